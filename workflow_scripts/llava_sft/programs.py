"""How another program is asked. Standard library only: set-up asks before anything is installed."""

import subprocess
from typing import NamedTuple


class Answer(NamedTuple):
    """`output` is what it printed, also where it failed; `trouble` why it has not answered, in its own words."""

    output: str
    trouble: str | None


def ask(*command: str, seconds: float = 30) -> Answer:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired:
        return Answer("", f"{command[0]} gave no answer within {seconds:g} s")
    except OSError as error:
        return Answer("", f"{command[0]}: {error.strerror}")
    words = done.stderr.strip() or f"{command[0]} failed with exit code {done.returncode}"
    return Answer(done.stdout.strip(), words.splitlines()[-1] if done.returncode else None)


def said(*command: str, seconds: float = 30) -> str | None:
    """What a program prints; None where it is not there, fails or hangs."""
    answer = ask(*command, seconds=seconds)
    return None if answer.trouble else answer.output
