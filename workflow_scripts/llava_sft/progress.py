"""How far a job is: now and then a line as `  1,200 of 4,800 samples, 26.7/s, 0:15 left`.

In a rule's log the logger plugin finds these lines and keeps the last one at the foot of the terminal; by hand they
stand in the output.
"""

import time
from collections.abc import Iterable, Iterator

FIRST_S, SHARE, LONGEST_S = 2.0, 0.02, 60.0  # a line after so many seconds; then after this share of the time gone by


class Progress:
    """`total` of `unit`, of which `done` were there before."""

    def __init__(self, total: float, unit: str, done: float = 0):
        self.total, self.unit, self.done, self.before = total, unit, done, done
        self.began = self.said = time.monotonic()

    def add(self, count: float = 1) -> None:
        self.done += count
        now = time.monotonic()
        if self.done < self.total and now - self.said >= max(FIRST_S, min(LONGEST_S, SHARE * (now - self.began))):
            self.said = now
            print(self, flush=True)

    def __str__(self) -> str:
        rate = (self.done - self.before) / max(1e-9, time.monotonic() - self.began)
        left = clock((self.total - self.done) / rate) if rate else "?"
        speed = f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
        return f"  {self.done:,.0f} of {self.total:,.0f} {self.unit}, {speed}/s, {left} left"


def tracked[T](items: Iterable[T], total: int, unit: str) -> Iterator[T]:
    """The items; lines say how many the caller is through with."""
    progress = Progress(total, unit)
    for item in items:
        yield item
        progress.add()


def clock(seconds: float) -> str:
    """`4:32`, `1:04:32`."""
    hours, minutes, seconds = int(seconds) // 3600, int(seconds) // 60 % 60, int(seconds) % 60
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
