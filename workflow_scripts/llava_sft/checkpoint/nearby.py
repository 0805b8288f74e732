"""What may have been meant by a `load` that is no checkpoint: a folder below or above it, one of nearly its name. No torch."""

import re
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
    try:
        below = chain(path.glob("*"), path.glob("*/*")) if path.is_dir() else iter([path.parent])
        if found := sorted(filter(is_checkpoint, islice(below, LOOKED_AT))):
            newest = ITERATION.fullmatch(found[-1].name) and found[-1].parent == found[0].parent
            return f"load: {found[-1] if newest else found[0]}"
        siblings = [folder.name for folder in islice(path.parent.glob("*"), LOOKED_AT) if folder.is_dir()]
    except OSError:
        siblings = []
    near = nearest(path.name, siblings) if not path.exists() else None
    return (f"did you mean {path.parent / near}? " if near else "") + f"load: {CHOICES}"


def right_tokenizer(folder: Path) -> str:
    """The fix for a `tokenizer` that is none."""
    if folder.name == "tokenizer.json":
        return f"tokenizer: {folder.parent}"
    on_hub = "hf download org/name --exclude '*.safetensors' --local-dir FOLDER"
    return f"tokenizer: the Hugging Face folder of the model; of one on the hub: {on_hub}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like one that `load` takes."""
    if ITERATION.fullmatch(folder.name):
        return (folder / ".metadata").is_file()
    weights = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return weights or (folder / TRACKER).is_file() or (folder / ADAPTER).is_file()
