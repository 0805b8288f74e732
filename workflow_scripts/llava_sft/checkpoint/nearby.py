"""What may have been meant by a `load` that is no checkpoint: a folder below or above it, one of nearly its name. No torch."""

import re
from itertools import chain, islice
from pathlib import Path

from llava_sft.checkpoint.hf_folder import ADAPTER, OTHER_FORMS
from llava_sft.errors import nearest
from llava_sft.run.layout import TRACKER

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
    if found := ADDRESS.fullmatch(name):
        return f"load: {found[1]}" + (f"@{found[2]}" if found[2] and found[2] != "main" else "")
    if path.is_file() and path.suffix.lower() in OTHER_FORMS:
        return f"{OTHER_FORMS[path.suffix.lower()]}: load: the Hugging Face folder that it was made from"
    if path.is_file() and ARCHIVE.fullmatch(path.name):
        return f"unpack it, and name the folder that has config.json: load: {path.parent}/…"
    try:
        below = chain(path.glob("*"), path.glob("*/*")) if path.is_dir() else iter([path.parent])
        if found_there := next((folder for folder in islice(below, LOOKED_AT) if is_checkpoint(folder)), None):
            return f"load: {found_there}"
        siblings = [folder.name for folder in islice(path.parent.glob("*"), LOOKED_AT) if folder.is_dir()]
    except OSError:
        siblings = []
    near = nearest(path.name, siblings) if not path.exists() else None
    return (f"did you mean {path.parent / near}? " if near else "") + f"load: {CHOICES}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like one that `load` takes."""
    weights = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    return weights or (folder / TRACKER).is_file() or (folder / ADAPTER).is_file()
