"""Errors that the user can fix. Each names the value, the rule it breaks and the fix; no traceback, exit code 1.

A full disk, and a file that cannot be read or written, are reported in the same way. A bug keeps its traceback: hiding that
would hide the cause. Ctrl-C has none: who pressed it knows.
"""

import difflib
import errno
import functools
import inspect
import os
import re
import select
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
IN_THE_WAY = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
NOT_ALLOWED = (errno.EACCES, errno.EPERM)
DISK_FULL = re.compile(r".*(disk is full|No space left on device|inline_container\.cc:\d+\] \. unexpected pos).*")
MORE_SPACE = (
    "free some space on that disk, then run the same command again; output may lie elsewhere: --config exp_dir=FOLDER"
)
MEND_LINK = "mount that disk, or mend the link; or name another place"
READABLE = "make it readable for you (`ls -ld` shows whose it is; `chmod -R u+rX` if it is yours), or name another"
MORE_QUOTA = "free some of your quota there (`quota -s` shows it), or --config exp_dir=FOLDER on another disk; then the same command"
BEING_WRITTEN = re.compile(
    r"(?<=/)\.(?=[^/]+\.\d+\.tmp$)|^\.(?=[^/]+\.\d+\.tmp$)|(?<=.)\.\d+\.tmp$"
)  # around a name, see files.py
FEW_FILES = 1000  # inodes that a job which failed for want of them may have given back as it ended
LEAST_SPACE = 16 << 20  # bytes free that programs need for their temporary files
INTERRUPTED = 130  # exit code after Ctrl-C
SHOWN = 200  # characters of a user's string that a message quotes, at most


class SftError(Exception):
    """A mistake that the user can fix. `problem` quotes the value and the rule, `fix` says what to write instead."""

    def __init__(self, problem: str, fix: str = ""):
        self.problem, self.fix = problem, fix
        super().__init__(f"{problem}\n  fix: {fix}" if fix else problem)


class SettingsError(SftError):
    """A setting is unknown, of the wrong type, or impossible together with another."""


class DataError(SftError):
    """Raw data or a WebDataset is missing, empty, damaged, or has more rejects than allowed."""


class CheckpointError(SftError):
    """A checkpoint is missing, half-written, or does not fit the model."""


class RunError(SftError):
    """A training run cannot start or resume as asked."""


class DamagedFileError(SftError, ValueError):
    """A small file that this project wrote, or takes over, does not hold what its format requires."""


def shown(value: Any, limit: int = SHOWN) -> str:
    """A value of the user's as a message quotes it: its repr, cut where it is long (an image in base64, say)."""
    if not isinstance(value, str | bytes):
        text = repr(value)
        return text if len(text) <= limit else f"{text[:limit]}…"
    # Cut before the repr as well: that of a string of 100 MB takes a second and the memory of another copy.
    text = repr(value[: limit + 1])
    if len(text) <= limit and len(value) <= limit:
        return text
    return f"{text[:limit]}… ({len(value):,} {'bytes' if isinstance(value, bytes) else 'characters'})"


def many(count: int, noun: str, verb: str = "") -> str:
    """`1 record`, `2,000 records`; with the `verb` of several, `1 record is`, `2 records are`."""
    if count != 1:
        noun += "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}" + (f" {verb_of(count, verb)}" if verb else "")


def verb_of(count: int, verb: str) -> str:
    """The verb of several, such as `are`, for so many: of one `is`."""
    return verb if count != 1 else {"are": "is", "were": "was", "have": "has"}.get(verb, f"{verb}s")


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that `word` may have been meant as: whatever its case, its dashes and the width of its letters."""

    def folded(text: str) -> str:
        return re.sub(r"[-\s.]+", "_", unicodedata.normalize("NFKC", text[:SHOWN]).strip().casefold())

    by_form = {folded(name): name for name in names}
    close = difflib.get_close_matches(folded(word), by_form, n=1)
    return by_form[close[0]] if close else None


def exits_cleanly[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a script's `main`, or a function that Snakemake calls: an `SftError`, and an `OSError` about a file or the
    disk, become one message on stderr and exit code 1."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            result = function(*args, **kwargs)
            if sys.stdout and not sys.stdout.closed:
                sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except BaseException as error:  # torch derives the error of a checkpoint's writer from BaseException
            if isinstance(error, BrokenPipeError) and _nobody_reads():
                sys.exit(1)
            message = as_message(error)
            if message is None:
                raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(1)

    wrapped.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]  # Snakemake asks for it with every job
    return wrapped


def _nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has ended, as `head` does. What Python would still write at exit is let go."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def as_message(error: BaseException) -> SftError | None:
    """The error that the user can fix; None for a bug, a signal and the like."""
    if isinstance(error, SftError):
        return error
    if isinstance(error, OSError) and (error.filename is not None or error.errno in NO_SPACE):
        return of_file(error)
    if reason := full_disk(error):
        return SftError(f"the disk may be full: {reason}", MORE_SPACE)
    return None


def full_disk(error: BaseException) -> str:
    """What an error says of a full disk, in its own words or the system's; empty for any other error."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return error.strerror or "no space left"
    found = None if isinstance(error, SftError | SystemExit | KeyboardInterrupt) else DISK_FULL.search(str(error))
    return found[0][:SHOWN] if found else ""


def of_file(error: OSError) -> SftError:
    """The message for a file that cannot be read or written, or a disk that is full."""
    name = error.filename2 or error.filename  # of a renaming: the new name
    if isinstance(name, str):  # what was to be written, not the name that it has until it is whole
        name = BEING_WRITTEN.sub("", name)
    what = f"{name}: {error.strerror}" if name is not None else f"{error.strerror}"
    if error.errno in NO_SPACE:
        fix = MORE_QUOTA if error.errno == errno.EDQUOT else MORE_SPACE
        return SftError(f"{what}{_room(str(name or ''))}", fix)
    if error.errno == errno.EROFS:
        return SftError(
            what, "work in a folder that is not read-only; output may lie elsewhere: --config exp_dir=FOLDER"
        )
    if error.errno in NOT_ALLOWED:
        return SftError(
            what, "make it readable and writable for you (`ls -ld` shows whose it is), or name another place"
        )
    if error.errno == errno.ENOENT and name is not None and (dead := dead_link(os.fsdecode(name))):
        return SftError(f"{what}: {dead}", MEND_LINK)
    if error.errno == errno.ENOENT:
        return SftError(what, "check the path, or restore it; what this workflow made, the same command makes again")
    if error.errno in IN_THE_WAY:
        return SftError(what, "name another place, or move what is there elsewhere")
    return SftError(what, "restore it, or remove it if this workflow made it: the same command makes it again")


def dead_link(path: Path | str) -> str:
    """What is said of a path that goes through a link to what is not there: a disk that is not mounted, say. Else empty."""
    links = (each for each in (Path(path), *Path(path).parents) if os.path.islink(each) and not os.path.exists(each))
    return next((f"{link} is a link to {os.readlink(link)}, which is not there" for link in links), "")


def require_folder(exp_dir: Path) -> None:
    """Raise RunError where there is no folder that runs could lie in."""
    if not exp_dir.is_dir():
        what = "a file" if exp_dir.exists() else dead_link(exp_dir) or "no such folder"
        raise RunError(f"{exp_dir}: {what}", "name the EXP_DIR of the runs: make runs exp_dir=FOLDER")


def existing_folder(path: Path) -> Path:
    """A folder that is there: `path`, or the first above it."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def size_in_words(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _room(path: str) -> str:
    """How much room there is where a path lies; empty where there is no such place."""
    if not path:
        return ""
    try:
        folder = existing_folder(Path(path).absolute().parent)
        usage, files = shutil.disk_usage(folder), os.statvfs(folder)
    except OSError:  # gone, or the disk with it; also the current folder
        return ""
    if files.f_files and files.f_favail < FEW_FILES:
        return f": the disk of {folder} takes {many(files.f_favail, 'more file')}, whatever their sizes (`df -i`)"
    return f"; free in {folder}: {size_in_words(usage.free)} of {size_in_words(usage.total)}"
