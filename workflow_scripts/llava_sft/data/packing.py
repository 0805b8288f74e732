"""Several samples in one sequence of `seq_length` tokens, so that hardly any of it is padding.

Notable: each pack takes the longest samples first and ends with the pair that fills it best; best-fit-decreasing alone
leaves two per cent where no sample is short. Preflight counts steps with this very code. Packs come out of it longest first
and are shuffled, or short samples would stand together at the buffer's end.
"""

import random
from bisect import bisect_right
from collections.abc import Iterator


def fill_packs(lengths: list[int], capacity: int) -> list[list[int]]:
    """Distribute all items over few packs of `capacity`; returns the packs as lists of indices into `lengths`.

    About O(packs × items) for the pairs, 10 to 30 µs a sample of a buffer of 2,000.
    Raises ValueError for an item longer than `capacity`.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    left = [lengths[index] for index in order]  # ascending, as `order`
    if left and left[-1] > capacity:
        raise ValueError(f"an item of {left[-1]} tokens does not fit into {capacity}")
    any_of = random.Random(0).randrange
    packs: list[list[int]] = []
    while left:
        pack, room = [], capacity
        while left and left[0] <= room:
            fitting = bisect_right(left, room)
            if fitting == len(left) and (fitting < 2 or left[-1] + left[-2] <= room):
                # Room for any two: the longest first, then any, so that what is left for later packs stays mixed.
                places = [any_of(fitting) if pack else fitting - 1]
            else:
                places = _best_pair(left, room) or [fitting - 1]
            for place in places:  # descending
                room -= left.pop(place)
                pack.append(order.pop(place))
        packs.append(pack)
    return packs


def _best_pair(ascending: list[int], room: int) -> list[int]:
    """The places, the later first, of the two items with the greatest sum that fits; empty when no two do."""
    low, high = 0, bisect_right(ascending, room - ascending[0]) - 1
    best, found = 0, []
    while low < high:
        total = ascending[low] + ascending[high]
        if total > room:
            high -= 1
            continue
        if total > best:
            best, found = total, [high, low]
            if total == room:
                break
        low += 1
    return found


def select_packs(lengths: list[int], capacity: int, seed: int) -> list[list[int]]:
    """The packs of one buffer in random order, the samples within each too; the same buffer gives the same order."""
    rng = random.Random(f"{seed} {len(lengths)} {sum(lengths)} {lengths[:16]}")
    packs = fill_packs(lengths, capacity)
    rng.shuffle(packs)
    for pack in packs:
        rng.shuffle(pack)
    return packs


def epoch_packs(lengths: list[int], capacity: int, buffer_size: int, streams: int, seed: int) -> Iterator[list[int]]:
    """The packs of one epoch as indices into `lengths`: the samples in random order, dealt to `streams` (ranks × loader
    workers), each packing its own buffers. Which order it is changes their number by little; benchmarks/packing.py says
    by how much."""
    order = random.Random(seed).sample(range(len(lengths)), len(lengths))
    for stream in range(streams):
        own = order[stream::streams]
        for start in range(0, len(own), buffer_size):
            buffer = own[start : start + buffer_size]
            for pack in fill_packs([lengths[i] for i in buffer], capacity):
                yield [buffer[i] for i in pack]
