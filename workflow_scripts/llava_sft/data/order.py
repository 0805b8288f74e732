"""In which order a run sees its samples: one order for the whole run, whatever the number of ranks and loader workers.

Notable:
- a pass over a source is a permutation of its samples, drawn anew for each pass from (seed, source, pass). It ends before
  the next begins: at every pack's end the counts of two samples of a source differ by one at most. Its last pack is
  closed short;
- packs are made of the permutation a window of samples at a time; what would leave its pack half empty waits for the next
  window. Of 22 million samples only their lengths and one permutation are in memory (12 bytes a sample);
- several sources are blended by the rule that keeps each within one pack of its share at any moment;
- the position is a few numbers, the same on all ranks: it does not name ranks or workers.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llava_sft.data.packing import fill_packs

WELL_FILLED = 0.98  # of a pack's capacity: others wait for the next window's samples
WAITING = 8  # at most one in so many of a window's samples waits


class SourceLengths(NamedTuple):
    """The samples of a source that can be trained on: their lengths in tokens, and how often each is to be seen, relative
    to the samples of other sources."""

    lengths: Sequence[int]
    weight: float = 1.0


def shuffled(count: int, seed: str) -> np.ndarray:
    """A permutation of range(count), [count] uint32: the numbers in the order of their hashes (splitmix64).

    NumPy's own may change with its version, and a resumed run with it.
    """
    key = np.uint64(random.Random(seed).getrandbits(64))
    with np.errstate(over="ignore"):
        x = (np.arange(count, dtype=np.uint64) + key) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return np.argsort(x, kind="stable").astype(np.uint32)


class Passes:
    """Endless packs of one source, as lists of its samples' numbers.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a pack; None: each sample alone.
        window: samples that are packed at a time.
        seed: of the order; different ones for different sources.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, capacity: int | None, window: int, seed: str):
        self.lengths = np.asarray(lengths, dtype=np.int32)
        self.capacity, self.window, self.seed = capacity, window, seed
        self.position: dict[str, Any] = {"pass": 0, "start": 0, "waiting": [], "taken": 0}
        self._order: tuple[int, np.ndarray] | None = None
        self._packs: list[list[int]] | None = None
        self._after: dict[str, Any] = {}

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        while True:
            if self._packs is None:
                self._packs = self._pack()
            if self.position["taken"] < len(self._packs):
                break
            self.position, self._packs = self._after, None
        pack = self._packs[self.position["taken"]]
        self.position = {**self.position, "taken": self.position["taken"] + 1}  # a new one: others hold the old
        return pack

    def restore(self, position: dict[str, Any]) -> None:
        self.position, self._packs = position, None

    def first_pass(self) -> Iterator[list[int]]:
        """The packs of pass 0."""
        fresh = Passes(self.lengths, self.capacity, self.window, self.seed)
        while True:
            pack = next(fresh)
            if fresh.position["pass"]:
                return
            yield pack

    def _pack(self) -> list[list[int]]:
        """The packs of the present window, in random order."""
        number, start = self.position["pass"], self.position["start"]
        if self._order is None or self._order[0] != number:
            self._order = number, shuffled(len(self.lengths), f"{self.seed} {number}")
        samples = self.position["waiting"] + self._order[1][start : start + self.window].tolist()
        last = start + self.window >= len(self.lengths)
        if last:
            self._after = {"pass": number + 1, "start": 0, "waiting": [], "taken": 0}
        else:
            self._after = {"pass": number, "start": start + self.window, "waiting": [], "taken": 0}
        if self.capacity is None:
            return [[sample] for sample in samples]
        lengths = self.lengths[samples].tolist()
        packs = fill_packs(lengths, self.capacity)
        if not last:
            waiting = self._set_aside(packs, lengths, self.capacity)
            self._after["waiting"] = [samples[index] for index in waiting]
        draw = random.Random(f"{self.seed} {number} {start}")
        draw.shuffle(packs)
        for pack in packs:
            draw.shuffle(pack)
        return [[samples[index] for index in pack] for pack in packs]

    def _set_aside(self, packs: list[list[int]], lengths: list[int], capacity: int) -> list[int]:
        """Take the emptiest packs out of `packs`; returns their samples."""
        filled = [sum(lengths[index] for index in pack) for pack in packs]
        waiting: list[int] = []
        for number in sorted(range(len(packs)), key=filled.__getitem__):
            many = len(waiting) + len(packs[number]) > len(lengths) // WAITING
            if many or filled[number] >= WELL_FILLED * capacity:
                break
            waiting += packs[number]
            packs[number] = []
        packs[:] = [pack for pack in packs if pack]
        return waiting


class GlobalOrder:
    """Endless packs of all sources, as lists of samples' numbers (those of the first source come first).

    A source's share of the packs is weight × tokens (weight × samples where each sample is alone): a sample of weight 2 is
    seen twice as often as one of weight 1. After any number of packs each source has its share of them, less or more than
    one pack (R. Tijdeman, The chairman assignment problem, 1980).
    """

    def __init__(self, sources: Sequence[SourceLengths], capacity: int | None, window: int, seed: int):
        self.firsts = np.cumsum([0, *(len(source.lengths) for source in sources)]).tolist()
        self.weights = [source.weight for source in sources]
        self.passes = [
            Passes(source.lengths, capacity, window, f"{seed} {number}") for number, source in enumerate(sources)
        ]
        size = [len(one.lengths) if capacity is None else int(one.lengths.sum()) for one in self.passes]
        work = [weight * amount for weight, amount in zip(self.weights, size, strict=True)]
        if not sum(work):
            raise ValueError("no sample to train on")
        self.shares = {number: part / sum(work) for number, part in enumerate(work) if part}
        self.counts = [0] * len(sources)
        self.seed = seed

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        source = self._turn()
        self.counts[source] += 1
        first = self.firsts[source]
        return [first + sample for sample in next(self.passes[source])]

    def _turn(self) -> int:
        """The source of the next pack: of those that may have one already, the one that has to have it first."""
        if len(self.shares) == 1:
            return next(iter(self.shares))
        slack = 1 / (2 * len(self.shares) - 2)
        due = sum(self.counts) + 1
        may = [number for number, share in self.shares.items() if share * due - self.counts[number] >= slack - 1e-9]
        return min(may, key=lambda number: (1 - slack + self.counts[number]) / self.shares[number])

    @property
    def position(self) -> dict[str, Any]:
        """JSON: what `restore` takes."""
        return {"seed": self.seed, "counts": list(self.counts), "sources": [passes.position for passes in self.passes]}

    def restore(self, position: dict[str, Any]) -> None:
        """Go on from `position`. Errors: ValueError when it is not one of such an order."""
        counts, sources = position["counts"], position["sources"]
        if position["seed"] != self.seed or not len(counts) == len(sources) == len(self.passes):
            raise ValueError("of another seed, or of other sources")
        self.counts = list(counts)
        for passes, at in zip(self.passes, sources, strict=True):
            passes.restore(dict(at))

    def first_pass(self) -> tuple[list[list[int]], float]:
        """The packs of each source's first pass, and how many packs a pass over the blend takes: each source's, times its
        weight."""
        packs: list[list[int]] = []
        units = 0.0
        for number in self.shares:
            first, before = self.firsts[number], len(packs)
            packs += ([first + sample for sample in pack] for pack in self.passes[number].first_pass())
            units += self.weights[number] * (len(packs) - before)
        return packs, units
