"""Several samples in one sequence of `seq_length` tokens, so that hardly any of it is padding.

Notable: best-fit-decreasing over a buffer of samples; preflight counts steps with this very code. Packs come out of it
longest first and are shuffled, or short samples would stand together at the buffer's end.
"""

import random
from bisect import bisect_left, insort


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Distribute items over as few packs as this greedy rule finds: longest first, each into the fullest pack it fits.

    Returns the packs as lists of indices into `lengths`. O(n log n) but for list insertions.
    Raises ValueError for an item longer than `capacity`.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"an item of {length} tokens does not fit into {capacity}")
        place = bisect_left(room, (length, 0))
        if place < len(room):
            left, pack = room.pop(place)
            packs[pack].append(index)
        else:
            left, pack = capacity, len(packs)
            packs.append([index])
        if left > length:
            insort(room, (left - length, pack))
    return packs


def select_packs(lengths: list[int], capacity: int, seed: int) -> list[list[int]]:
    """The packs of one buffer in random order, the samples within each too; the same buffer gives the same order."""
    rng = random.Random(f"{seed} {len(lengths)} {sum(lengths)} {lengths[:16]}")
    packs = best_fit_decreasing(lengths, capacity)
    rng.shuffle(packs)
    for pack in packs:
        rng.shuffle(pack)
    return packs


def count_packs(lengths: list[int], capacity: int, buffer_size: int, streams: int, seed: int) -> int:
    """Packs of one epoch: the samples in random order, dealt to `streams` (ranks × loader workers), each packing its own
    buffers. Which order it is changes the number by little; benchmarks/packing.py says by how much."""
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    total = 0
    for stream in range(streams):
        own = [lengths[i] for i in order[stream::streams]]
        for start in range(0, len(own), buffer_size):
            total += len(best_fit_decreasing(own[start : start + buffer_size], capacity))
    return total
