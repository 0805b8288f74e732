"""What training starts from: a Hugging Face folder, a Megatron folder, or one `iter_` folder of an earlier run.

Imported while Snakemake builds its DAG: no torch.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from llava_sft.errors import CheckpointError
from llava_sft.files import file_fingerprint, fingerprint, read_json
from llava_sft.model.config import ModelConfig

TRACKER = "latest_checkpointed_iteration.txt"
SIDECARS = "huggingface"
MARKER = "converted.json"
RANDOM = "random"


@dataclass(frozen=True)
class Start:
    """`folder` is one checkpoint folder (`release/`, `iter_0000400/`), None for random weights; `sidecars` holds the
    config, tokenizer and the like; `fingerprint` stands for the content; `untrained`: the weights are random."""

    folder: Path | None
    sidecars: Path
    fingerprint: str
    untrained: bool


def is_iteration(load: str | Path) -> bool:
    return re.fullmatch(r"iter_\d+", Path(load).name) is not None


def is_megatron(load: str | Path) -> bool:
    return (Path(load) / TRACKER).is_file()


def newest_checkpoint(folder: Path) -> Path:
    """The checkpoint folder that the tracker of a Megatron folder names; the folder itself when it is one."""
    if not is_megatron(folder):
        return folder
    name = (folder / TRACKER).read_text().strip()
    return folder / (name if name == "release" else f"iter_{int(name):07d}")


def needs_conversion(load: str) -> bool:
    """Whether `load` is a Hugging Face folder, which the `hf2mcore` rule converts first."""
    return load != RANDOM and not is_iteration(load) and not is_megatron(load)


def read_hf_config(folder: Path) -> dict:
    """config.json of a Hugging Face folder, or CheckpointError."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file: not a Hugging Face checkpoint", "name a folder that holds config.json"
        )
    try:
        return read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON, or cut off: {error}", "copy the file again") from None


def check_load(load: str, tokenizer: Path | None, made_here: bool) -> None:
    """Raise CheckpointError when there is nothing to start from. `made_here`: a rule will make it."""
    choices = (
        "a Hugging Face folder, a …_mcore_tp1_pp1 folder, an iter_0000400 folder or its run directory, or `random`"
    )
    if not load:
        raise CheckpointError("load is empty: nothing to start from", f"load: {choices}")
    if tokenizer is not None and not (tokenizer / "tokenizer.json").is_file():
        raise CheckpointError(
            f"tokenizer: {tokenizer}: no tokenizer.json in it", "tokenizer: the Hugging Face folder of the model"
        )
    if load == RANDOM and tokenizer is None:
        raise CheckpointError(
            "load: random, and no tokenizer", "tokenizer: a Hugging Face folder to take config and tokenizer from"
        )
    if load == RANDOM or made_here:
        return
    folder = Path(load)
    if not folder.is_dir():
        raise CheckpointError(f"load: {load}: no such folder", f"load: {choices}")
    if is_iteration(load):
        if not (folder / ".metadata").is_file():
            raise CheckpointError(
                f"load: {load}: not a whole torch_dist checkpoint (no .metadata)", "use another iter_ folder"
            )
    elif not is_megatron(load):
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"load: {load}: neither config.json (Hugging Face) nor {TRACKER} (Megatron) in it", f"load: {choices}"
            )
        try:
            ModelConfig.from_hf_config(read_hf_config(folder))
        except CheckpointError as error:
            raise CheckpointError(f"load: {load}: {error.problem}", error.fix) from None
        if tokenizer is None:
            _sidecars(folder, load)


def open_start(load: str, converted: Path | None, tokenizer: Path | None) -> Start:
    """The checkpoint to start from. `converted` is the folder that the `hf2mcore` rule made of `load`, if it did."""
    if load == RANDOM:
        return Start(None, tokenizer, "random", True)
    top = Path(load).parent if is_iteration(load) else converted or Path(load)
    folder = Path(load) if is_iteration(load) else newest_checkpoint(top)
    if folder.name == "release" and (top / MARKER).is_file():
        marker = read_json(top / MARKER)
        return Start(folder, tokenizer or _sidecars(top / SIDECARS, load), marker["fingerprint"], marker["untrained"])
    digest = fingerprint([file_fingerprint(folder / ".metadata"), sorted(p.stat().st_size for p in folder.iterdir())])
    return Start(folder, tokenizer or _sidecars(top / SIDECARS, load), digest, False)


def _sidecars(folder: Path, load: str) -> Path:
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"load: {load}: no tokenizer beside it ({folder})", "tokenizer: the Hugging Face folder of the same model"
        )
    return folder
