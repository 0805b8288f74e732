"""What a user names to talk to → a Hugging Face folder that transformers can load.

Notable:
- a Megatron checkpoint is exported first; the export stays beside its run, and is made only once.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from llava_sft.checkpoint.hf_folder import refuse_other_forms
from llava_sft.checkpoint.hub import fetch
from llava_sft.checkpoint.nearby import newest_below
from llava_sft.checkpoint.start import Checkpoint, existing_checkpoint
from llava_sft.checkpoint.verify import MARKER, export_in, is_export
from llava_sft.errors import CheckpointError, DamagedFileError
from llava_sft.files import read_json
from llava_sft.run.layout import RESULTS, SIDECARS, results_of

CHOICES = (
    "an export, a run's folder or its results, an iter_0000400 folder, a Hugging Face folder, or org/name on the hub"
)
EXPORTS = "_exports"  # what follows the name of a run's folder in that of exports made for this


def find_model(name: str) -> Path:
    """The Hugging Face folder that `name` stands for; a Megatron checkpoint is exported for it, which is said.

    Errors: CheckpointError where there is no such model.
    """
    folder = Path(name)
    if Checkpoint.of(name).kind == "hub":
        found, notes = fetch(name)
        print("".join(f"{note}\n" for note in notes), end="", file=sys.stderr)
        return found
    if not folder.is_dir():
        raise CheckpointError(f"{name}: no such folder", CHOICES)
    if export := export_in(folder):
        return export
    if folder.name.endswith(RESULTS):  # of a run that is not exported yet
        folder = folder.with_name(folder.name.removesuffix(RESULTS))
    checkpoint = Checkpoint.of(folder)
    if checkpoint.kind == "legacy":
        raise CheckpointError(
            f"{folder}: a checkpoint of the original project, which keeps no tokenizer beside it",
            f"convert_checkpoint.py hf2mcore {folder} FOLDER --sidecars HUGGING_FACE_FOLDER, then name that FOLDER",
        )
    if checkpoint.kind in ("huggingface", "peft"):
        refuse_other_forms(folder, name)
        if not (folder / "config.json").is_file():
            below = newest_below(folder)
            raise CheckpointError(f"{folder}: neither a model nor a run", f"name {below}" if below else CHOICES)
        return folder
    return exported(existing_checkpoint(folder))


def exported(checkpoint: Path) -> Path:
    """The export of one checkpoint folder of a run: the run's own, if it is of that checkpoint, else one made for this."""
    if not checkpoint.parent.name or ".." in checkpoint.parts:
        checkpoint = Path(os.path.abspath(checkpoint))  # `.` has no name
    run = checkpoint.parent
    of_run = results_of(run) / SIDECARS
    with contextlib.suppress(DamagedFileError, KeyError, TypeError):
        same = is_export(of_run) and Path(read_json(of_run / MARKER)["source"]).parts[-2:] == checkpoint.parts[-2:]
        if same and (of_run / MARKER).stat().st_mtime >= (checkpoint / ".metadata").stat().st_mtime:
            return of_run
    target = run.with_name(f"{run.name}{EXPORTS}") / checkpoint.name
    state = "looking at" if is_export(target) else "exporting it to"
    print(f"{checkpoint}: a Megatron checkpoint: {state} {target}", file=sys.stderr, flush=True)
    script = Path(__file__).parents[2] / "convert_checkpoint.py"
    # A process of its own: the memory that Megatron takes goes with it.
    done = subprocess.run([sys.executable, script, "mcore2hf", checkpoint, target], stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(1)  # it has said why
    return target
