"""The base of a checkpoint of LoRA: what is trained alone is saved, beside weights that are named and not copied. No torch."""

import shlex
from pathlib import Path
from typing import Any

from llava_sft.checkpoint.start import Start, is_legacy
from llava_sft.checkpoint.verify import content_of, require_whole
from llava_sft.errors import CheckpointError
from llava_sft.files import file_fingerprint, fingerprint, read_object, write_json
from llava_sft.model.lora import Lora
from llava_sft.run.layout import CHECKSUMS, LORA


def base_to_note(start: Start) -> dict[str, str]:
    """What pairs stand beside that are trained from now on: asked once, as the base may be deleted while they are."""
    assert start.folder, "LoRA begins from a trained model"
    noted = {"folder": str(start.folder), "load": start.base_load or start.load}
    return noted | {"fingerprint": content_of(start.folder)[0], "checksums": _checksums(start.folder)}


def note_base(folder: Path, lora: Lora, base: dict[str, str]) -> None:
    """Write what the pairs in a checkpoint folder are, and stand beside."""
    write_json(folder / LORA, {"lora": lora._asdict(), "base": base}, sealed=True)


def base_of(folder: Path) -> dict[str, str]:
    """What is noted of the base of a checkpoint of LoRA: its `folder` and `fingerprint`, and what it came from, `load`.

    Errors: CheckpointError.
    """
    return _noted(folder)["base"]


def _noted(folder: Path) -> dict[str, Any]:
    noted = read_object(folder / LORA)
    base = noted.get("base")
    if not isinstance(base, dict) or not {"folder", "fingerprint", "load"} <= base.keys() or "lora" not in noted:
        raise CheckpointError(
            f"{folder / LORA}: damaged: no base in it", "copy the file again, or use another iter_ folder"
        )
    return noted


def lora_of(folder: Path) -> tuple[Lora, Path] | None:
    """The pairs that a checkpoint folder holds, and the folder of their base; None for a checkpoint of all weights.

    Raises CheckpointError when the base is gone, or holds other weights.
    """
    if not (folder / LORA).is_file():
        return None
    noted = _noted(folder)
    base, load = _found(Path(noted["base"]["folder"]), folder), noted["base"]["load"]
    again = _making_again(base, load)
    if not base.is_dir():
        raise CheckpointError(f"{folder}: its base is gone: {base}", again)
    same = noted["base"].get("checksums") in (None, _checksums(base))  # noted since a later version
    if content_of(base)[0] != noted["base"]["fingerprint"] or not same:
        raise CheckpointError(
            f"{folder}: its LoRA was trained on other weights than {base} holds now",
            f"delete that folder; then, with {load} as it was: {again}" if base.name == "release" else again,
        )
    return Lora(**noted["lora"] | {"parts": tuple(noted["lora"]["parts"])}), base


def _checksums(base: Path) -> str:
    """Of a run's checkpoint those of its files: a run that is trained anew saves the same names and sizes."""
    path = base / CHECKSUMS
    return file_fingerprint(path) if path.is_file() and base.name != "release" else ""


def _making_again(base: Path, load: str) -> str:
    if base.name != "release":
        return f"restore {base}"
    if "+" in base.parent.name or is_legacy(Path(load)):  # converted with options that are not noted
        return "run the command again that converted it: `make preflight_X` of its experiment X"
    return shlex.join(["python", "workflow_scripts/convert_checkpoint.py", "hf2mcore", load, str(base.parent)])


def _found(base: Path, checkpoint: Path) -> Path:
    """A base may be noted from the project's folder, which commands need not be called from."""
    near = next((place for parent in checkpoint.absolute().parents if (place := parent / base).is_dir()), base)
    return base if base.is_dir() and near.samefile(base) else near


def beside_its_base(start: Start, wanted: Lora | None) -> Start:
    """What to start from where `load` names a checkpoint of LoRA: its base, and its pairs. Any other start as it is.

    Raises CheckpointError when `wanted`, the pairs that the settings ask for, are others.
    """
    pairs = start.pairs or start.folder
    base = check_pairs(pairs, start.load, wanted) if pairs else None
    if not pairs or not base:
        return start
    given: dict[str, Any] = {"base_load": base_of(pairs)["load"]}
    if not start.pairs:  # no PEFT folder, which was converted together with its base
        require_whole(base)
        content = fingerprint([content_of(base)[0], start.fingerprint])
        given |= {"folder": base, "pairs": pairs, "fingerprint": content}
    return start.model_copy(update=given)


def check_pairs(folder: Path, load: str, wanted: Lora | None) -> Path | None:
    """The base that LoRA's pairs in `folder`, which `load` named, stand beside; None where it holds none.

    Raises CheckpointError when `wanted`, the pairs that the settings ask for, are others.
    """
    if found := lora_of(folder):
        merging = "export it (convert_checkpoint.py mcore2hf), which merges them, and load that folder"
        require_wanted(load, found[0], wanted, merging)
        return found[1]
    return None


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
