"""The base of a checkpoint of LoRA: what is trained alone is saved, beside weights that are named and not copied. No torch."""

from pathlib import Path
from typing import Any

from llava_sft.checkpoint.start import Start, content_of
from llava_sft.checkpoint.verify import require_whole
from llava_sft.errors import CheckpointError
from llava_sft.files import fingerprint, read_object, write_json
from llava_sft.model.lora import Lora
from llava_sft.run.layout import LORA


def note_base(folder: Path, lora: Lora, start: Start) -> None:
    """Write what a checkpoint folder is without meaning, beside its weights."""
    if start.pairs:
        base = read_object(start.pairs / LORA)["base"]
    else:
        content = content_of(start.folder)[0] if start.folder else start.fingerprint
        base = {"folder": str(start.folder), "fingerprint": content, "load": start.load}
    write_json(folder / LORA, {"lora": lora._asdict(), "base": base}, sealed=True)


def base_of(folder: Path) -> dict[str, str]:
    """What is noted of the base of a checkpoint of LoRA: its `folder` and `fingerprint`, and what it came from, `load`."""
    return dict(read_object(folder / LORA)["base"])


def lora_of(folder: Path) -> tuple[Lora, Path] | None:
    """The pairs that a checkpoint folder holds, and the folder of their base; None for a checkpoint of all weights."""
    noted: dict[str, Any] = read_object(folder / LORA, {})
    if not noted:
        return None
    base = Path(noted["base"]["folder"])
    if not base.is_dir():
        raise CheckpointError(
            f"{folder}: the base of its LoRA is gone: {base}", f"make it again from {noted['base']['load']}"
        )
    if content_of(base)[0] != noted["base"]["fingerprint"]:
        raise CheckpointError(
            f"{folder}: its LoRA stands beside other weights than {base} holds now",
            f"make {base.parent} again from {noted['base']['load']} as it was",
        )
    return Lora(**noted["lora"] | {"parts": tuple(noted["lora"]["parts"])}), base


def beside_its_base(start: Start, wanted: Lora | None) -> Start:
    """What to start from where `load` names a checkpoint of LoRA: its base, and its pairs. Any other start as it is.

    Raises CheckpointError when `wanted`, the pairs that the settings ask for, are others.
    """
    pairs = start.pairs or start.folder
    found = lora_of(pairs) if pairs else None
    if not found:
        return start
    lora, base = found
    merging = "export it (convert_checkpoint.py mcore2hf), which merges them, and load that folder"
    require_wanted(start.load, lora, wanted, merging)
    if start.pairs:  # a PEFT folder, which was converted together with its base
        return start
    require_whole(base)
    content = fingerprint([content_of(base)[0], start.fingerprint])
    return start.model_copy(update={"folder": base, "pairs": pairs, "fingerprint": content})


def require_wanted(load: str, lora: Lora, wanted: Lora | None, merging: str) -> None:
    """Raise CheckpointError unless the settings ask for pairs as those of `load` are; `merging`: the way on without them."""
    if wanted and wanted._replace(dropout=lora.dropout, parts=lora.parts) == lora and {*wanted.parts} == {*lora.parts}:
        return
    parts = f"[{', '.join(lora.parts)}]"
    raise CheckpointError(
        f"load: {load}: LoRA's pairs of rank {lora.rank}, alpha {lora.alpha:.10g}, in {parts}; the settings ask for "
        + (f"rank {wanted.rank}, alpha {wanted.alpha:.10g}, in [{', '.join(wanted.parts)}]" if wanted else "none"),
        f"lora_rank: {lora.rank}, lora_alpha: {lora.alpha:.10g}, lora_modules: {parts}; or {merging}",
    )
