"""What may have been meant by a `load` that is no checkpoint: a folder below or above it, one of nearly its name. No torch."""

import re
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path

from llava_sft.checkpoint.hf_folder import ADAPTER, OTHER_FORMS
from llava_sft.errors import nearest
from llava_sft.run.layout import ITERATION, TRACKER

CHOICES = (
    "a Hugging Face folder, a hub id (org/name or org/name@revision), a PEFT folder, a …_mcore_tp1_pp1 folder, an "
    "iter_0000400 folder or its run directory, or `random`"
)
ADDRESS = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)/([\w.-]+/[\w.-]+)(?:/tree/([\w.-]+))?.*"
)
ARCHIVE = re.compile(r".*\.(zip|tar|tgz|7z|rar|(tar\.)?(gz|xz|bz2|zst))", re.IGNORECASE)
RANDOM = "random"
FROM_SCRATCH = ("none", "null", "no", "scratch", "from_scratch", "from-scratch", "init")  # random, as others call it
LOOKED_AT = 2000  # names: a folder of images has more, and no checkpoint


def right_name(name: str) -> str:
    """The fix for such a `load`: what to write, or all that it may be."""
    path = Path(name)
    if address := ADDRESS.fullmatch(name):
        return f"load: {address[1]}" + (f"@{address[2]}" if address[2] and address[2] != "main" else "")
    if path.is_file() and path.suffix.lower() in OTHER_FORMS:
        return f"{OTHER_FORMS[path.suffix.lower()]}: load: the Hugging Face folder that it was made from"
    if path.is_file() and ARCHIVE.fullmatch(path.name):
        return f"unpack it, and name the folder that has config.json: load: {path.parent}/…"
    if path.is_dir() and any(path.glob("*.safetensors")):
        return f"copy config.json to its weights, from where they came: {path}"
    try:
        if found := newest_below(path) if path.is_dir() else path.parent if is_checkpoint(path.parent) else None:
            return f"load: {found}"
        siblings = [folder.name for folder in islice(path.parent.glob("*"), LOOKED_AT) if folder.is_dir()]
    except OSError:
        siblings = []
    near = nearest(path.name, siblings) if not path.exists() else None
    meant = str(path.parent / near) if near else None
    if not path.exists() and random_meant(name, siblings):
        meant = f"{RANDOM} (untrained weights)"
    return (f"did you mean {meant}? " if meant else "") + f"load: {CHOICES}"


def random_meant(name: str, folders: Iterable[str] = ()) -> bool:
    """Whether the name of what is not there may have been meant as `random`, and not as one of the `folders`."""
    return name.casefold() in (RANDOM, *FROM_SCRATCH) or nearest(name, [*folders, RANDOM]) == RANDOM


def newest_below(folder: Path) -> Path | None:
    """A checkpoint in a folder, or in one of its folders: of several of one training the newest. Errors: OSError."""
    found = sorted(filter(is_checkpoint, islice(chain(folder.glob("*"), folder.glob("*/*")), LOOKED_AT)))
    beside = [each for each in found if each.parent == found[0].parent]
    return max(beside, key=_steps) if beside and _steps(beside[0]) else next(iter(beside), None)


def _steps(folder: Path) -> int:
    """After how many steps a checkpoint was saved, as the name says that Megatron or Transformers' Trainer gave it."""
    found = ITERATION.fullmatch(folder.name) or re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else 0


def right_tokenizer(folder: Path) -> str:
    """The fix for a `tokenizer` that is none."""
    if folder.name == "tokenizer.json":
        return f"tokenizer: {folder.parent}"
    if folder.is_dir() and (found := newest_below(folder)) and (found / "tokenizer.json").is_file():
        return f"tokenizer: {found}"
    on_hub = "hf download org/name --exclude '*.safetensors' --local-dir FOLDER"
    return f"tokenizer: the Hugging Face folder of the model; of one on the hub: {on_hub}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like one that `load` takes."""
    if ITERATION.fullmatch(folder.name):
        return (folder / ".metadata").is_file()
    weights = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return weights or (folder / TRACKER).is_file() or (folder / ADAPTER).is_file()
