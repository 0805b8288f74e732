"""The embedded data set and its start checkpoint: `<exp_dir>/demo/`, which the experiment `vqa` trains on. No torch."""

import os
import re
from functools import cache
from pathlib import Path

from llava_sft.errors import DataError, shown

EMBEDDED = "vqa"  # the experiment whose data is the demo
# The demo's files exist only once a rule has made them, but the conversion is planned before: their sizes are fixed, and a
# test compares them with what is made.
DEMO_BYTES = {"train.jsonl": 4165660, "heldout.jsonl": 127362}
DEMO_CHECKPOINT = "LLaVA-OneVision-1.5-tiny"


@cache
def is_demo(path: Path, demo: Path | None) -> bool:
    """Whether the demo's rule makes this path below its folder `demo`, so that it need not exist yet."""
    if not demo or demo not in path.parents:
        return False
    first, *below = path.relative_to(demo).parts
    return first == "images" or (not below and first in (*DEMO_BYTES, DEMO_CHECKPOINT))


def check_demo(folder: Path) -> None:
    """Raise DataError when files stand where the demo's would be written that the demo did not make."""
    files = ((folder / name, size) for name, size in DEMO_BYTES.items())
    foreign = [path for path, size in files if path.exists() and not (path.is_file() and path.stat().st_size == size)]
    images, checkpoint = folder / "images", folder / DEMO_CHECKPOINT
    if images.exists():
        names = os.listdir(images) if images.is_dir() else [""]
        foreign += [images / name for name in names if not re.fullmatch(r"digit_\d{4}(_\d)?\.png", name)]
    if checkpoint.exists() and not (checkpoint / "config.json").is_file():
        foreign.append(checkpoint)
    if foreign:
        raise DataError(
            f"{shown(str(foreign[0]))}: the demo did not make this file, and writes its own into {shown(str(folder))}",
            "move your files to another folder and name it in the settings; or --config exp_dir=ANOTHER_FOLDER",
        )
