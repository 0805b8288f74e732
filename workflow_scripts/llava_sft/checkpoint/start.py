"""What training starts from: a Hugging Face folder or hub id, a Megatron folder, or one `iter_` folder of an earlier run.

`Checkpoint.of(load)` says once which of them it is. What is not in our own format (`torch_dist`) is converted first, by
the `hf2mcore` rule. Imported while Snakemake builds its DAG: no torch.
"""

import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from llava_sft.checkpoint.hf_folder import (
    ADAPTER,
    WEIGHT_SUFFIXES,
    is_adapter,
    refuse_other_forms,
    refuse_pointer,
    require_weights,
)
from llava_sft.checkpoint.nearby import CHOICES, RANDOM, random_meant, right_name, right_tokenizer
from llava_sft.checkpoint.peft import Adapter
from llava_sft.checkpoint.verify import MARKER, absent, content_of, require_whole
from llava_sft.errors import READABLE, CheckpointError, shown
from llava_sft.files import fingerprint, read_object
from llava_sft.model.hf_config import model_of_config
from llava_sft.model.tensors import PARTS
from llava_sft.run.layout import ITERATION, PAIRS, SIDECARS, TRACKER, iteration_name

CONVERTED = "_mcore_tp1_pp1"  # ends the name of a converted folder
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
Kind = Literal["random", "hub", "huggingface", "peft", "megatron", "iteration", "legacy"]


@dataclass(frozen=True)
class Checkpoint:
    """What `load` names, or an entry of `load_parts`.

    kind:
        random: random weights
        hub: org/name@revision, or org/name: then the conversion takes the newest commit and notes which that was
        megatron: a folder with a tracker file: a run directory, or a converted checkpoint
        iteration: one checkpoint folder of those, iter_0000400 or release
        peft: LoRA's pairs in PEFT's form, which stand beside the weights of `base`
        legacy: either of both in the original project's `torch` format: a folder per model-parallel rank
        huggingface: any other folder, whether it is there or not
    """

    name: str  # as the user writes it
    kind: Kind

    @classmethod
    def of(cls, name: str | Path) -> "Checkpoint":
        """Raises CheckpointError for a folder that cannot be read."""
        return cls(str(name), _kind(str(name)))

    @property
    def folder(self) -> Path:
        return Path(self.name)

    @property
    def needs_conversion(self) -> bool:
        """Whether it is not in our own format (`torch_dist`) yet: the `hf2mcore` rule converts it first."""
        return self.kind in ("hub", "huggingface", "peft", "legacy")

    @property
    def base(self) -> "Checkpoint":
        """What the pairs of a PEFT folder stand beside; of another kind the checkpoint itself. Raises CheckpointError."""
        if self.kind != "peft":
            return self
        base = Checkpoint.of(Adapter.of(self.folder).base)
        is_folder = base.kind == "huggingface" and (base.folder / "config.json").is_file()
        if not base.name or not (base.kind == "hub" or is_folder):
            raise CheckpointError(
                f"load: {self.name}: its base is {shown(base.name)}: neither a Hugging Face folder nor on the hub",
                f"write the base's folder or hub id into {self.folder / ADAPTER}, as base_model_name_or_path",
            )
        return base

    def converted_name(self, parts: dict[str, str]) -> str:
        """`LLaVA-OneVision-1.5-4B-stage0_mcore_tp1_pp1`, of whatever kind it is; parts from elsewhere add their names."""
        path, revision = split_id(self.name)
        folder = Path(path)
        if _is_iteration(folder):
            top = folder.parent
            folder = top if folder.name == "release" else folder.with_name(f"{top.name}_{folder.name}")
        name = re.sub(r"_mcore_tp\d+_pp\d+$", "", folder.name) + (f"@{revision[:12]}" if revision else "")
        names = [name, *(f"{part}={Path(source).name}" for part, source in with_old_names(parts).items())]
        return "+".join(names).replace("/", "_") + CONVERTED

    def hf_files(self, converted: Path | None, tokenizer: Path | None) -> Path:
        """The folder with its tokenizer and config, there once it is converted."""
        if tokenizer:
            return tokenizer
        return (converted or (self.folder.parent if self.kind == "iteration" else self.folder)) / SIDECARS


def split_id(name: str) -> tuple[str, str]:
    """(`org/name`, `revision`) of a hub id; of anything else, which may have an @ in its path, (itself, "")."""
    repo, _, revision = name.partition("@") if Checkpoint.of(name).kind == "hub" else (name, "", "")
    return repo, revision


def _kind(name: str) -> Kind:
    if name == RANDOM:
        return "random"
    if _is_hub_id(name):
        return "hub"
    if is_legacy(Path(name)):
        return "legacy"
    if _is_iteration(Path(name)):
        return "iteration"
    return "megatron" if _has_tracker(Path(name)) else "peft" if is_adapter(Path(name)) else "huggingface"


def _is_hub_id(name: str) -> bool:
    """A folder goes first. A path without a revision whose parent is there, or that ends as our folders do, means one that
    is missing."""
    path = Path(name)
    if not HUB_ID.fullmatch(name) or path.exists():
        return False
    ours = _is_iteration(path) or name.endswith(CONVERTED) or path.parent.is_dir()
    return "@" in name or not ours


def with_old_names(parts: dict[str, str]) -> dict[str, str]:
    """Parts under the names that stand in the names of converted folders: `language`, `vision`, `adapter`."""
    return dict(sorted((part.removesuffix("_model"), source) for part, source in parts.items()))


def named_parts(given: Iterable[tuple[str, str]], spelled: str = "load_parts: {}: {}") -> dict[str, Checkpoint]:
    """Part of the model → where its weights come from. `language` and `vision`, as parts were called, are understood.

    Raises CheckpointError, with the entry `spelled` as it was given, for a part that there is not, that stands twice, or
    that cannot be random.
    """
    parts: dict[str, Checkpoint] = {}
    for name, source in given:
        part = name if name in PARTS else f"{name}_model"
        if part not in PARTS or part in parts or not source or (source == RANDOM and part != "adapter"):
            twice = f": {part} stands twice" if part in parts else ""
            raise CheckpointError(
                f"{spelled.format(name, source)}{twice}",
                f"one entry for each of {', '.join(PARTS)} that comes from elsewhere: a folder or hub id; adapter: random is "
                "allowed too",
            )
        parts[part] = Checkpoint.of(source)
    return parts


class Start(BaseModel):
    """What training starts from.

    folder: one checkpoint folder (`release/`, `iter_0000400/`); None for random weights.
    sidecars: folder with config, tokenizer and the like.
    fingerprint: stands for the content.
    untrained: the weights are random.
    pairs: a checkpoint of LoRA that stands beside `folder`, and whose pairs are gone on with.
    base_load: what `load` was for `folder`, where there are pairs.
    notes: what its conversion found that the user may not expect, such as the commit that an id on the hub stood for.
    """

    model_config = ConfigDict(frozen=True)

    load: str = ""
    folder: Path | None = None
    sidecars: Path
    fingerprint: str
    untrained: bool = False
    pairs: Path | None = None
    base_load: str | None = None
    notes: tuple[str, ...] = ()


def _is_iteration(folder: Path) -> bool:
    return folder.name == "release" or ITERATION.fullmatch(folder.name) is not None


def _has_tracker(folder: Path) -> bool:
    return (folder / TRACKER).is_file()


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint folder that the tracker of a Megatron folder names; the folder itself when it is one."""
    if not _has_tracker(folder):
        return folder
    try:
        name = (folder / TRACKER).read_bytes().decode(errors="replace").strip()
    except OSError as error:
        raise CheckpointError(
            f"{folder / TRACKER}: cannot be read: {error.strerror}", "name the iter_ folder itself"
        ) from None
    if name != "release" and not re.fullmatch(r"[0-9]{1,12}", name):
        raise CheckpointError(
            f"{folder / TRACKER}: {shown(name, 40)} is neither a number nor `release`", "name the iter_ folder itself"
        )
    return folder / (name if name == "release" else iteration_name(int(name)))


def existing_checkpoint(folder: Path) -> Path:
    """`newest_checkpoint`, or CheckpointError where there is no such folder."""
    if not folder.is_dir():
        near = sorted(path for path in folder.parent.glob("iter_*") if path.is_dir())
        what = "a run directory, one of its iter_ folders, or a converted folder"
        raise CheckpointError(f"{folder}{absent(folder)}", f"name {near[-1] if near else what}")
    others = sorted(path.name for path in folder.glob("iter_*") if path.is_dir())
    if others and not _has_tracker(folder):
        raise CheckpointError(f"{folder / TRACKER}: missing", f"name {folder / others[-1]} itself")
    found = newest_checkpoint(folder)
    if not found.is_dir():
        what = f"{folder / TRACKER} names {found.name}, which is not there"
        raise CheckpointError(what, f"name {folder / others[-1]} itself" if others else "copy the folder again")
    return found


def is_legacy(folder: Path) -> bool:
    """Whether a folder, or the checkpoint that its tracker names, is in the original project's format."""
    try:
        return any(path.name.startswith("mp_rank_") for path in newest_checkpoint(folder).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}", READABLE) from None


def read_hf_config(folder: Path) -> dict:
    """config.json of a Hugging Face folder, or CheckpointError."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file: not a Hugging Face checkpoint", "name a folder that holds config.json"
        )
    refuse_pointer(path)
    return read_object(path)


def check_load(checkpoint: Checkpoint, parts: dict[str, str], tokenizer: Path | None, made_here: bool) -> None:
    """Raise CheckpointError when there is nothing to start from. `made_here`: a rule will make it."""
    load, kind = checkpoint.name, checkpoint.kind
    if not load:
        raise CheckpointError("load is empty: nothing to start from", f"load: {CHOICES}")
    if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
        raise CheckpointError(f"tokenizer: {tokenizer}: no tokenizer.json in it", right_tokenizer(tokenizer))
    if kind == "random" and tokenizer is None:
        raise CheckpointError(
            "load: random, and no tokenizer", "tokenizer: a Hugging Face folder to take config and tokenizer from"
        )
    if parts and (kind == "peft" or not checkpoint.needs_conversion):
        raise CheckpointError(
            f"load_parts, and load: {load} is {'a PEFT folder' if kind == 'peft' else 'a whole Megatron checkpoint'}",
            "load: a Hugging Face folder, or no load_parts",
        )
    for part, source in named_parts(parts.items()).items():
        if source.kind not in ("random", "hub") and not source.folder.is_dir():
            meant = f"did you mean {RANDOM}? " if part == "adapter" and random_meant(source.name) else ""
            raise CheckpointError(
                f"load_parts: {part}: {source.name}: no such folder", f"{meant}a folder, or org/name on the hub"
            )
        if source.kind in ("huggingface", "peft"):
            refuse_other_forms(source.folder, f"load_parts: {part}: {source.name}")
            require_weights(source.folder)
    for each in dict.fromkeys((checkpoint, checkpoint.base)):
        if each.kind not in ("random", "hub") and not made_here:
            _check_folder(each, bool(parts), tokenizer)


def _check_folder(checkpoint: Checkpoint, has_parts: bool, tokenizer: Path | None) -> None:
    load, folder = checkpoint.name, checkpoint.folder
    if folder.is_file():
        raise CheckpointError(f"load: {load}: a file; checkpoints are folders", right_name(load))
    if not folder.is_dir():
        raise CheckpointError(f"load: {load}: no such folder", right_name(load))
    if re.fullmatch(r"mp_rank_\d+(_\d+)?", folder.name):
        raise CheckpointError(f"load: {load}: one rank of a checkpoint", f"load: {folder.parent}")
    if checkpoint.kind == "legacy" and tokenizer is None:
        raise CheckpointError(
            f"load: {load}: a checkpoint of the original project, which keeps no tokenizer beside it",
            "tokenizer: the Hugging Face folder of the same model",
        )
    if checkpoint.kind in ("iteration", "megatron"):
        if not (existing_checkpoint(folder) / ".metadata").is_file():
            raise CheckpointError(
                f"load: {load}: not a whole torch_dist checkpoint (no .metadata)", "use another iter_ folder"
            )
        _with_tokenizer(checkpoint.hf_files(None, tokenizer), load)
    if checkpoint.kind == "huggingface":
        refuse_other_forms(folder, f"load: {load}")
        if not (folder / "config.json").is_file():
            missing = f"neither config.json (Hugging Face) nor {TRACKER} (Megatron)"
            raise CheckpointError(f"load: {load}: contains {missing}", right_name(load))
        if not has_parts:
            try:
                model_of_config(read_hf_config(folder))
            except CheckpointError as error:
                raise CheckpointError(f"load: {load}: {error.problem}", error.fix) from None
        if tokenizer is None:
            _with_tokenizer(folder, load)
        require_weights(folder)


def open_start(checkpoint: Checkpoint, converted: Path | None, tokenizer: Path | None) -> Start:
    """The checkpoint to start from. `converted` is the folder that the `hf2mcore` rule made of it, if it did."""
    if checkpoint.kind == "random":
        assert tokenizer is not None, "check_load asks for it"
        return Start(load=RANDOM, sidecars=tokenizer, fingerprint="random", untrained=True)
    if converted and not converted.is_dir():
        raise CheckpointError(
            f"{converted}: gone, which {checkpoint.name} was converted to",
            f"delete {converted}.done.json and run the same command",
        )
    folder = converted / "release" if converted else existing_checkpoint(checkpoint.folder)
    require_whole(folder)
    top = folder.parent
    sidecars = tokenizer or _with_tokenizer(checkpoint.hf_files(converted, None), checkpoint.name)
    content, untrained = content_of(folder)
    pairs = top / PAIRS if folder.name == "release" and (top / PAIRS).is_dir() else None
    notes = read_object(top / MARKER, {}).get("notes") if folder.name == "release" else None
    return Start(
        load=checkpoint.name,
        folder=folder,
        sidecars=sidecars,
        fingerprint=fingerprint([content, read_object(top / MARKER)[PAIRS]]) if pairs else content,
        untrained=untrained,
        pairs=pairs,
        notes=tuple(map(str, notes)) if isinstance(notes, list) else (),
    )


def _with_tokenizer(folder: Path, load: str) -> Path:
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"load: {load}: no tokenizer beside it ({folder})", "tokenizer: the Hugging Face folder of the same model"
        )
    refuse_pointer(folder / "tokenizer.json")
    return folder


def copy_sidecars(source: Path, target: Path) -> None:
    """All files of a Hugging Face folder but its weights."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHT_SUFFIXES):
            try:
                shutil.copyfile(path, target / path.name)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}", READABLE) from None
