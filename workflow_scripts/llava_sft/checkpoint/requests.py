"""What convert_checkpoint.py is asked and cannot be meant, said before anything is read: no torch."""

import argparse
import shlex
from pathlib import Path

from llava_sft.checkpoint.hf_folder import ADAPTER, is_adapter
from llava_sft.checkpoint.start import Checkpoint, existing_checkpoint
from llava_sft.checkpoint.verify import MARKER, is_export
from llava_sft.data.nv_meta import read_meta, source_folders
from llava_sft.errors import CheckpointError, SettingsError
from llava_sft.files import read_object, refuse_others_file
from llava_sft.machine import gpu_count
from llava_sft.run.layout import ITERATION, run_of

# By option, the directions that it means something to; the others would pass it over in silence.
OPTIONS_OF = {
    "model": ("hf2mcore", "mcore2hf", "mcore2peft", "merge"), "sidecars": ("hf2mcore", "mcore2hf", "mcore2peft"), "part": ("hf2mcore",),
    "base": ("mcore2peft",), "min_pixels": ("mcore2hf", "merge"), "max_pixels": ("mcore2hf", "merge"), "samples": ("mcore2hf",),
    "parity": ("mcore2hf",), "export_names": ("mcore2hf", "merge"), "done": ("hf2mcore", "mcore2hf"),
}  # fmt: skip


def refuse_unmeant(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raise SettingsError for an option of another direction, a second folder to verify, or a target that is not replaced."""
    for name, directions in OPTIONS_OF.items():
        if args.direction not in directions and getattr(args, name) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            raise SettingsError(
                f"{option}: {args.direction} has no use for it", f"leave it out: it is of {' and '.join(directions)}"
            )
    if args.direction == "verify":
        if args.target:
            raise SettingsError(
                f"verify {args.source} {args.target}: one folder at a time", f"verify {args.target}, after it"
            )
        return
    refuse_others_folder(args.direction, args.target, Path(args.source))
    if args.done:
        refuse_others_file(args.done, "depends", f"--done {args.done}")
    if args.samples and args.parity != "skip":  # the comparison is the last step: nobody is to wait for it in vain
        for folder in source_folders(args.samples):
            read_meta(folder)
        if args.parity == "gpu" and not gpu_count():
            raise CheckpointError(
                "parity: gpu, and there is no GPU here", "--parity cpu, or export on a machine with a GPU"
            )


def refuse_others_folder(direction: str, target: Path, source: Path) -> None:
    """Raise SettingsError for a target that holds anything but what this direction wrote: it is replaced as a whole. Also for
    one within a checkpoint, whose files are counted."""
    if direction == "mcore2peft":  # PEFT itself has written `auto_mapping` always
        ours = is_adapter(target) and "auto_mapping" not in read_object(target / ADAPTER)
    else:
        ours = (target / MARKER).is_file() and (direction == "hf2mcore") != is_export(target)
    empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    above = target.resolve().parents
    holds_source = source.exists() and target.resolve() in (source.resolve(), *source.resolve().parents)
    if holds_source or not (ours or empty):
        raise SettingsError(
            f"{target}: exists already, and is not what {direction} wrote",
            "the folder to write comes last: name a new one",
        )
    if inside := [each for each in above if ITERATION.fullmatch(each.name) or (each / MARKER).is_file()]:
        raise SettingsError(
            f"{target}: in the checkpoint {inside[-1]}", f"a folder outside, as {inside[-1].parent / target.name}"
        )


def trained_checkpoint(name: str) -> Path:
    """The checkpoint folder of a run, or the converted one. Raises CheckpointError."""
    folder = Path(name)
    run = run_of(folder)
    if run and not folder.is_dir() and folder.exists():
        raise CheckpointError(f"{name}: a file; checkpoints are folders", f"name {run}, or one of its iter_ folders")
    source = existing_checkpoint(folder)
    if not (source / ".metadata").is_file():
        others = "name a run directory, one of its iter_ folders, or a converted folder; others are converted by hf2mcore first"
        raise CheckpointError(
            f"{name}: no torch_dist checkpoint in it (no .metadata)", f"name {run}" if run and run != folder else others
        )
    return source


def untrained_checkpoint(checkpoint: Checkpoint) -> Path:
    """The folder to convert to Megatron's form. Raises CheckpointError for one that has it already."""
    name = checkpoint.name
    if checkpoint.folder.is_file():
        raise CheckpointError(f"{name}: a file; checkpoints are folders", f"name {checkpoint.folder.parent}")
    source = existing_checkpoint(checkpoint.folder)
    if checkpoint.kind in ("megatron", "iteration") and (source / ".metadata").is_file():
        raise CheckpointError(
            f"{name}: a Megatron checkpoint already",
            f"`load` takes it as it is; a Hugging Face folder of it: convert_checkpoint.py mcore2hf {shlex.quote(name)} FOLDER",
        )
    return source


def base_to_merge(checkpoint: Checkpoint) -> Path:
    """The folder whose weights adapters are added to. Raises CheckpointError for one of another kind."""
    name = shlex.quote(checkpoint.name)
    if checkpoint.kind in ("megatron", "iteration"):
        raise CheckpointError(
            f"{checkpoint.name}: a Megatron checkpoint, and adapters are merged into a Hugging Face folder",
            f"make one of it: convert_checkpoint.py mcore2hf {name} FOLDER, then merge FOLDER",
        )
    if checkpoint.kind == "peft":
        raise CheckpointError(f"{checkpoint.name}: an adapter, and the base comes first", "merge BASE ADAPTER … TARGET")
    return checkpoint.folder
