"""Errors that are the user's to mend. Each says the value, the rule it breaks and the fix; no traceback, exit code 1.

Everything else (a bug, a full disk, a signal) keeps its traceback: hiding those would hide the cause.
"""

import functools
import inspect
import sys
from collections.abc import Callable


class SftError(Exception):
    """A mistake that the user can mend. `problem` quotes the value and the rule, `fix` says what to write instead."""

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
    """A training run can not start or go on as asked."""


def exits_cleanly[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a script's `main`, or what Snakemake calls: an `SftError` becomes one message on stderr and exit code 1."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except SftError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)

    wrapped.__signature__ = inspect.signature(function)  # Snakemake asks for it with every job
    return wrapped
