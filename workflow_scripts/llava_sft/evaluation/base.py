"""The model that a trained one is compared with: the start checkpoint of its run, exported for the time of the evaluation."""

import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from llava_sft.checkpoint.verify import MARKER, require_export, require_whole
from llava_sft.errors import CheckpointError, RunError
from llava_sft.evaluation.answers import Model
from llava_sft.evaluation.view import readable
from llava_sft.files import fingerprint, read_object
from llava_sft.model.export_files import export_form
from llava_sft.run.layout import RUN_FILE, run_of
from llava_sft.settings.resolved import Resolved


def exported(folder: Path) -> Model:
    """An export, or the one in a run's results. Errors: CheckpointError where there is none, or it is damaged."""
    folder = require_export(folder)
    require_whole(folder)
    depends = read_object(folder / MARKER).get("depends")
    if not isinstance(depends, str):
        raise CheckpointError(
            f"{folder / MARKER}: not written by this workflow, or edited: `depends` is missing",
            f"delete {folder} and export again: `make export_X`, or convert_checkpoint.py mcore2hf",
        )
    return Model(str(folder), depends, partial(readable, folder))


def start_of(run_dir: Path, scratch: Path) -> Model:
    """What the run started from; `scratch`: a folder that its weights find room in.

    Errors: RunError, CheckpointError where there is none any more; its problem says so.
    """
    if not (run_dir / RUN_FILE).is_file():
        meant = run_of(run_dir)
        raise RunError(f"{run_dir / RUN_FILE}: no such file", f"name {meant or 'a run directory'}")
    resolved = Resolved.read(run_dir / RUN_FILE)
    start, settings = resolved.start, resolved.settings
    if start.folder is None:
        raise RunError("training started from random weights")
    weights = start.pairs or start.folder  # the pairs of an earlier run are merged
    if not weights.is_dir():
        raise RunError(f"the start checkpoint is no longer there: {weights}")
    limits = settings.min_pixels, settings.max_pixels
    depends = fingerprint([start.fingerprint, resolved.model, limits, export_form()])
    return Model(
        f"start checkpoint ({start.load})",
        depends,
        partial(_exported_start, resolved, scratch / f"start.{platform.node()}.{os.getpid()}"),
    )


@contextmanager
def _exported_start(resolved: Resolved, folder: Path) -> Iterator[Path]:
    from llava_sft.checkpoint.convert import mcore2hf

    start, settings = resolved.start, resolved.settings
    assert start.folder, "start_of has looked"
    # Of an evaluation that was killed on this machine: as large as the checkpoint. Others may share the folder.
    for leftover in folder.parent.glob(f"{folder.stem}.*"):
        if leftover.stem == folder.stem and not os.path.exists(f"/proc/{leftover.suffix[1:]}"):
            shutil.rmtree(leftover, ignore_errors=True)
    try:
        mcore2hf(
            start.pairs or start.folder,
            folder,
            start.sidecars,
            resolved.architecture,
            settings.min_pixels,
            settings.max_pixels,
        )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
