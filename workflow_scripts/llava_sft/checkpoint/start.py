"""What training starts from: a Hugging Face folder or hub id, a Megatron folder, or one `iter_` folder of an earlier run.

What is not in our own format (`torch_dist`) is converted first, by the `hf2mcore` rule.
Imported while Snakemake builds its DAG: no torch.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from llava_sft.checkpoint.verify import MARKER, require_whole
from llava_sft.errors import CheckpointError, shown
from llava_sft.files import file_fingerprint, fingerprint, read_object
from llava_sft.model.config import ModelConfig
from llava_sft.model.tensors import OLD_PART_NAMES, PARTS
from llava_sft.run.layout import CHECKSUMS, ITERATION, RUN_FILE, SIDECARS, TRACKER, iteration_name

RANDOM = "random"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
CHOICES = (
    "a Hugging Face folder, a hub id with its revision (org/name@revision), a …_mcore_tp1_pp1 folder, an iter_0000400 "
    "folder or its run directory, or `random`"
)


@dataclass(frozen=True)
class Start:
    """`folder` is one checkpoint folder (`release/`, `iter_0000400/`), None for random weights; `sidecars` holds the
    config, tokenizer and the like; `fingerprint` stands for the content; `untrained`: the weights are random; `old_names`: the Hugging Face folder at the
    very beginning spelled its tensors as transformers 4.53 does, and so will the export."""

    folder: Path | None
    sidecars: Path
    fingerprint: str
    untrained: bool
    old_names: bool = False


def is_iteration(load: str | Path) -> bool:
    """Whether `load` names one checkpoint folder and not the folder above."""
    name = Path(load).name
    return name == "release" or ITERATION.fullmatch(name) is not None


def is_megatron(load: str | Path) -> bool:
    return (Path(load) / TRACKER).is_file()


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint folder that the tracker of a Megatron folder names; the folder itself when it is one."""
    if not is_megatron(folder):
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
    others = sorted(path.name for path in folder.glob("iter_*") if path.is_dir())
    if others and not is_megatron(folder):
        raise CheckpointError(f"{folder / TRACKER}: missing", f"name {folder / others[-1]} itself")
    found = newest_checkpoint(folder)
    if not found.is_dir():
        named = is_megatron(folder)
        what = f"{folder / TRACKER} names {found.name}, which is not there" if named else f"{found}: no such folder"
        raise CheckpointError(what, f"name {folder / others[-1]} itself" if others else "copy the folder again")
    return found


def is_legacy(load: str | Path) -> bool:
    """Whether `load` is in the original project's `torch` format: a folder per model-parallel rank."""
    folder = newest_checkpoint(Path(load))
    try:
        return any(path.name.startswith("mp_rank_") for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}", "a folder that you may read") from None


def is_hub(load: str) -> bool:
    """`org/name@revision`. The revision is asked for, so that the same settings mean the same weights."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+@[\w./-]+", load) is not None and not Path(load).exists()


def needs_conversion(load: str) -> bool:
    """Whether `load` is not in our format yet: the `hf2mcore` rule converts it first."""
    return load != RANDOM and (is_legacy(load) or not (is_iteration(load) or is_megatron(load)))


def converted_name(load: str, parts: dict[str, str]) -> str:
    """`LLaVA-OneVision-1.5-4B-stage0_mcore_tp1_pp1`, whatever kind of folder `load` is; parts from elsewhere add their names."""
    path, _, revision = load.partition("@") if is_hub(load) else (load, "", "")
    folder = Path(path)
    if is_iteration(folder):
        folder = folder.parent if folder.name == "release" else folder.with_name(f"{folder.parent.name}_{folder.name}")
    name = re.sub(r"_mcore_tp\d+_pp\d+$", "", folder.name) + (f"@{revision[:12]}" if revision else "")
    names = [name, *(f"{part}={Path(source).name}" for part, source in sorted(parts.items()))]
    return "+".join(names).replace("/", "_") + "_mcore_tp1_pp1"


def read_hf_config(folder: Path) -> dict:
    """config.json of a Hugging Face folder, or CheckpointError."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file: not a Hugging Face checkpoint", "name a folder that holds config.json"
        )
    return read_object(path)


def check_load(load: str, parts: dict[str, str], tokenizer: Path | None, made_here: bool) -> None:
    """Raise CheckpointError when there is nothing to start from. `made_here`: a rule will make it."""
    if not load:
        raise CheckpointError("load is empty: nothing to start from", f"load: {CHOICES}")
    if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
        raise CheckpointError(
            f"tokenizer: {tokenizer}: no tokenizer.json in it", "tokenizer: the Hugging Face folder of the model"
        )
    if load == RANDOM and tokenizer is None:
        raise CheckpointError(
            "load: random, and no tokenizer", "tokenizer: a Hugging Face folder to take config and tokenizer from"
        )
    if parts and not needs_conversion(load):
        raise CheckpointError(
            f"load_parts, and load: {load} is a whole Megatron checkpoint",
            "load: a Hugging Face folder, or no load_parts",
        )
    for part, source in parts.items():
        if OLD_PART_NAMES.get(part, part) not in PARTS or (source == RANDOM and part != "adapter"):
            raise CheckpointError(
                f"load_parts: {part}: {source}",
                f"{' | '.join(PARTS)}: a folder or hub id; adapter: random is allowed too",
            )
        if source != RANDOM and not is_hub(source) and not Path(source).is_dir():
            raise CheckpointError(f"load_parts: {part}: {source}: no such folder", "a folder, or org/name@revision")
    if load == RANDOM or made_here or is_hub(load):
        return
    folder = Path(load)
    if not folder.is_dir():
        raise CheckpointError(f"load: {load}: no such folder", f"load: {CHOICES}")
    if re.fullmatch(r"mp_rank_\d+(_\d+)?", folder.name):
        raise CheckpointError(f"load: {load}: one rank of a checkpoint", f"load: {folder.parent}")
    existing_checkpoint(folder)
    if is_legacy(load):
        if tokenizer is None:
            raise CheckpointError(
                f"load: {load}: a checkpoint of the original project, which keeps no tokenizer beside it",
                "tokenizer: the Hugging Face folder of the same model",
            )
    elif is_iteration(load):
        if not (folder / ".metadata").is_file():
            raise CheckpointError(
                f"load: {load}: not a whole torch_dist checkpoint (no .metadata)", "use another iter_ folder"
            )
    elif not is_megatron(load):
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"load: {load}: neither config.json (Hugging Face) nor {TRACKER} (Megatron) in it", f"load: {CHOICES}"
            )
        try:
            if not parts:
                ModelConfig.from_hf_config(read_hf_config(folder))
        except CheckpointError as error:
            raise CheckpointError(f"load: {load}: {error.problem}", error.fix) from None
        if tokenizer is None:
            _sidecars(folder, load)


def sidecars_of(load: str, converted: Path | None, tokenizer: Path | None) -> Path:
    """The folder with the start checkpoint's tokenizer, once it is converted."""
    top = converted or (Path(load).parent if is_iteration(load) else Path(load))
    return tokenizer or top / SIDECARS


def open_start(load: str, converted: Path | None, tokenizer: Path | None) -> Start:
    """The checkpoint to start from. `converted` is the folder that the `hf2mcore` rule made of `load`, if it did."""
    if load == RANDOM:
        return Start(None, tokenizer, "random", True)
    folder = converted / "release" if converted else existing_checkpoint(Path(load))
    require_whole(folder)
    top = folder.parent
    sidecars = tokenizer or _sidecars(sidecars_of(load, converted, None), load)
    if folder.name == "release" and (marker := read_object(top / MARKER, {})):
        content, untrained = marker.get("fingerprint"), bool(marker.get("untrained"))
        if not isinstance(content, str):
            raise CheckpointError(
                f"{top / MARKER}: damaged: no fingerprint in it", f"delete {top} and run the same command"
            )
    else:
        # Not what is noted about the checkpoint, nor what a killed process left.
        kept = [p for p in folder.iterdir() if p.name == ".metadata" or not p.name.startswith((".", CHECKSUMS))]
        try:
            content = fingerprint([file_fingerprint(folder / ".metadata"), sorted(p.stat().st_size for p in kept)])
        except OSError as error:
            raise CheckpointError(
                f"{folder}: .metadata cannot be read: {error.strerror}: not a whole torch_dist checkpoint",
                "use another iter_ folder",
            ) from None
        untrained = False
    return Start(folder, sidecars, content, untrained, old_names(top))


def old_names(top: Path) -> bool:
    """The spelling that the export of a converted folder, or of a run, shall have: see `Start`."""
    origin = read_object(top / MARKER, {}) or read_object(top / RUN_FILE, {}).get("start")
    return isinstance(origin, dict) and bool(origin.get("old_names"))


def _sidecars(folder: Path, load: str) -> Path:
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"load: {load}: no tokenizer beside it ({folder})", "tokenizer: the Hugging Face folder of the same model"
        )
    return folder


def copy_sidecars(source: Path, target: Path) -> None:
    """All files of a Hugging Face folder but its weights."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(WEIGHT_SUFFIXES):
            try:
                shutil.copyfile(path, target / path.name)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}", "a file that you may read") from None
