"""A converted checkpoint, a run's checkpoint or an export against the checksums that were noted when it was written.

Small files are read each time; weights only where `full`, or where they are not those that were last found whole.
"""

import shlex
import time
from pathlib import Path

from llava_sft.checkpoint.hf_folder import is_adapter, refuse_other_forms
from llava_sft.checksums import find_damage
from llava_sft.errors import CheckpointError, DamagedFileError
from llava_sft.files import file_fingerprint, fingerprint, read_object
from llava_sft.run.layout import CHECKSUMS, PAIRS, SIDECARS, TRACKER, VERIFIED, results_of, run_of

MARKER = "converted.json"  # of a converted checkpoint and of an export
SIDECARS_NOTE = ".checksums.json"  # in a run's copy of the tokenizer and config
WEIGHTS = (".safetensors", ".distcp")


def is_export(folder: Path) -> bool:
    """Whether it is what mcore2hf writes; a converted checkpoint has a marker too, and its config.json a folder deeper."""
    return (folder / MARKER).is_file() and (folder / "config.json").is_file()


def export_in(folder: Path) -> Path | None:
    """The export that `folder` is, or that it holds as the results of a run do; None where there is none."""
    return next((path for path in (folder, folder / SIDECARS) if is_export(path)), None)


def require_export(folder: Path) -> Path:
    """`export_in`, or CheckpointError."""
    if export := export_in(folder):
        return export
    if is_adapter(folder):
        refuse_other_forms(
            folder, str(folder), f"`hf upload --private org/name {folder}` uploads it as it is. For an export, "
        )
    raise CheckpointError(f"{folder}: no export in it{absent(folder)}", _way_to_an_export(folder))


def absent(folder: Path) -> str:
    """What is said of a path that is no folder; empty for one."""
    return "" if folder.is_dir() else ": a file" if folder.exists() else ": no such folder"


def _way_to_an_export(folder: Path) -> str:
    """What to name in the place of what holds no export, or how to make one of it."""
    script, quoted = "python workflow_scripts/convert_checkpoint.py", shlex.quote(str(folder))
    one = (folder / ".metadata").is_file()  # which the run's export may not be of
    near = [] if one else [folder.parent, *(results_of(run) for run in [run_of(folder)] if run)]
    if made := next(filter(export_in, near), None):
        return f"name {made}"
    if one or (folder / TRACKER).is_file():
        return f"export it: {script} mcore2hf {quoted} FOLDER, then name that FOLDER"
    if (folder / "config.json").is_file():
        name = f"output/{shlex.quote(folder.resolve().name)}"
        return (
            f"convert and export it: {script} hf2mcore {quoted} {name}_mcore_tp1_pp1, then "
            f"{script} mcore2hf {name}_mcore_tp1_pp1 {name}, and name {name}"
        )
    return "name an export, or a run's results; `make export_X` makes them for the experiment X"


def content_of(folder: Path) -> tuple[str, bool]:
    """What stands for the content of a checkpoint folder, and whether its weights are random. Errors: CheckpointError."""
    top = folder.parent
    if folder.name != "release" or not (marker := read_object(top / MARKER, {})):
        return _fingerprint_of_iteration(folder), False
    content = marker.get("fingerprint")
    if not isinstance(content, str):
        raise CheckpointError(
            f"{top / MARKER}: damaged: no fingerprint in it", f"delete {top} and run the same command"
        )
    return content, bool(marker.get("untrained"))


def _fingerprint_of_iteration(folder: Path) -> str:
    """Of its metadata and the sizes of its files; not of what is noted about them, nor what a killed process left."""
    files = [p for p in folder.iterdir() if p.name == ".metadata" or not p.name.startswith((".", CHECKSUMS))]
    try:
        return fingerprint([file_fingerprint(folder / ".metadata"), sorted(p.stat().st_size for p in files)])
    except OSError as error:
        raise CheckpointError(
            f"{folder}: .metadata cannot be read: {error.strerror}: not a whole torch_dist checkpoint",
            "use another iter_ folder",
        ) from None


def noted(folder: Path) -> tuple[Path, dict[str, list]]:
    """Size and checksum of each file of `folder` by its name below the path returned; none of one that noted nothing.

    Args:
        folder: `iter_0000400/`, `release/`, a converted folder, or an export.
    """
    if (folder / CHECKSUMS).is_file():  # names are those below the run directory; the folder may have been moved since
        sealed = read_object(folder / CHECKSUMS)
        names = {name.partition("/")[2]: entry for name, entry in sealed.items() if name.startswith("iter_")}
        return folder, {name: entry for name, entry in names.items() if not Path(name).name.startswith(f".{CHECKSUMS}")}
    top = folder.parent if folder.name in ("release", PAIRS) else folder
    files = read_object(top / MARKER, {}).get("files", {})
    if not isinstance(files, dict):
        raise CheckpointError(f"{top / MARKER}: damaged: `files` is no object", f"delete {top} and convert again")
    return top, files


def require_whole(folder: Path, full: bool = False) -> int:
    """Raise CheckpointError unless `folder` holds what was written into it; returns the bytes that were compared."""
    root, files = noted(folder)
    weights = {name: entry for name, entry in files.items() if name.endswith(WEIGHTS)}
    small = {name: entry for name, entry in files.items() if name not in weights}
    memo = (folder.parent if folder.name.startswith("iter_") else root) / VERIFIED
    if damage := find_damage(root, small, full=True) or find_damage(root, weights, memo, full):
        again = f"delete {root}, and run again the command that made it"
        if folder.name.startswith("iter_"):
            again = "use another iter_ folder"
        elif is_export(root):
            again = f"delete {root} and export again: `make export_X`, or convert_checkpoint.py mcore2hf"
        raise CheckpointError(
            f"{root}{'/' if damage.split()[0] in files else ': '}{damage}: damaged since it was written",
            f"restore it from a copy, or {again}",
        )
    return sum(entry[0] for entry in files.values())


def sidecars_damage(folder: Path) -> str | None:
    """What is wrong with the tokenizer and config of a run or a converted checkpoint; None where nothing is, or nothing was
    noted. Errors: CheckpointError for a damaged note."""
    try:
        if (folder / SIDECARS_NOTE).is_file():
            return find_damage(folder, read_object(folder / SIDECARS_NOTE), full=True)
        top, files = noted(folder.parent)
        small = {name: entry for name, entry in files.items() if name.startswith(f"{folder.name}/")}
        return find_damage(top, small, full=True)
    except DamagedFileError as error:
        return error.problem


def require_noted(folder: Path) -> None:
    """Raise CheckpointError where no checksums are noted, so that nothing could be compared."""
    if not noted(folder)[1]:
        raise CheckpointError(
            f"{folder}: no checksums are noted in it",
            "name a converted folder, an iter_ folder, or an export of this version",
        )


def verify(folder: Path) -> str:
    """Compare every byte, and say how fast that was. Raises CheckpointError."""
    require_noted(folder)
    began = time.perf_counter()
    size = require_whole(folder, full=True) / 1e9
    return f"{folder}: whole: {size:,.3f} GB compared at {size / (time.perf_counter() - began):,.2f} GB/s"
