"""The terminal: lines that stay and, below them, one that is rewritten while jobs run; and the logs that jobs write."""

import contextlib
import os
import re
import shutil
import sys
import unicodedata
from typing import TextIO

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Screen:
    """Without a terminal there is no line that is rewritten. Where nobody reads any more, nothing happens."""

    def __init__(self) -> None:
        self.rewrites = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self.status = ""

    def say(self, text: str, stream: TextIO | None = None) -> None:
        """Print lines that stay. They may quote data: what would steer the terminal is shown as a replacement character."""
        text = CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)
        with contextlib.suppress(OSError):
            self._clear()
            print(text, file=stream or sys.stdout, flush=True)
            sys.stdout.write(self.status)
            sys.stdout.flush()

    def show(self, status: str) -> None:
        """Make this the last line, as much of it as fits."""
        if self.rewrites and (status or self.status):
            with contextlib.suppress(OSError):
                self._clear()
                self.status = fitting(status, shutil.get_terminal_size().columns - 1)
                sys.stdout.write(self.status)
                sys.stdout.flush()

    def _clear(self) -> None:
        if self.status:
            sys.stdout.write("\r\x1b[K")
            sys.stdout.flush()


def fitting(text: str, columns: int) -> str:
    """The beginning that fits into so many columns."""
    taken = 0
    for number, character in enumerate(text):
        taken += 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if taken > columns:
            return text[:number]
    return text


class Log:
    """What a job writes into its log from its start on; nothing of an earlier job's. `started`: when that was, in seconds."""

    def __init__(self, path: str, started: float):
        self.path, self.started = path, started
        self.before = self._state(path)
        self.begun, self.read, self.rest = False, 0, b""

    @staticmethod
    def _state(path: str | int) -> tuple[int, int, int] | None:
        with contextlib.suppress(OSError):
            status = os.stat(path)
            return status.st_ino, status.st_size, status.st_mtime_ns
        return None

    def lines(self, ended: bool = False) -> list[str]:
        """Those that are new and whole; all that is new once the job has ended."""
        try:
            with open(self.path, "rb") as file:  # opened anew, a network file system asks for what is new
                state = self._state(file.fileno())
                if not self.begun and state == self.before and state and state[2] < self.started * 1e9:
                    return []
                self.begun = True
                if state and state[1] < self.read:  # the job was tried again
                    self.read, self.rest = 0, b""
                file.seek(self.read)
                new = file.read()
        except OSError:
            return []
        self.read += len(new)
        *whole, self.rest = (self.rest + new).split(b"\n")
        if ended and self.rest:
            whole, self.rest = [*whole, self.rest], b""
        return [line.decode(errors="replace").rstrip().rpartition("\r")[2] for line in whole]
