"""Several samples in one sequence of `seq_length` tokens, so that hardly any of it is padding.

Notable: each pack takes the longest sample and the set of others whose sum fills it best; sums that can be reached are bits
of one integer, so that adding a sample to all of them is one shift. Best-fit-decreasing leaves two per cent where no
sample is short. Packs come out of it longest first; order.py shuffles them.
"""

import math
from bisect import bisect_right
from itertools import accumulate, pairwise

PACKED_IDS = "\n"  # between the ids of a pack's samples; no file's name has it
CANDIDATES = 150  # samples that a pack is filled from at a time; more would be slower and fill no better


def fill_packs(lengths: list[int], capacity: int) -> list[list[int]]:
    """Distribute all items over few packs of `capacity`; returns the packs as lists of indices into `lengths`.

    2 to 25 µs a sample. Raises ValueError for an item longer than `capacity`.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    left = [lengths[index] for index in order]  # ascending, as `order`
    if left and left[-1] > capacity:
        raise ValueError(f"an item of {left[-1]} tokens does not fit into {capacity}")
    packs: list[list[int]] = []
    while left:
        room = capacity - left.pop()
        pack = [order.pop()]
        while left and left[0] <= room:
            for place in _fullest(left, room):
                room -= left.pop(place)
                pack.append(order.pop(place))
        packs.append(pack)
    return packs


def _fullest(ascending: list[int], room: int) -> list[int]:
    """The places, the latest first, of the items with the greatest sum up to `room`; long items rather than short ones.

    Looks at CANDIDATES of the items that fit, evenly over their lengths, and stops when nothing can be better.
    """
    fitting = bisect_right(ascending, room)
    step = max(1.0, fitting / CANDIDATES)
    places = [int(fitting - 1 - number * step) for number in range(min(fitting, CANDIDATES))]
    within = (2 << room) - 1
    reached = [1]  # bit n: some of the items so far have the sum n
    for place in places:
        sums = reached[-1]
        reached.append(sums | sums << ascending[place] & within)
        if reached[-1] >> room:
            break
    total = reached[-1].bit_length() - 1
    chosen = []
    for number in range(len(reached) - 1, 0, -1):
        if not reached[number - 1] >> total & 1:  # not without this item
            chosen.append(places[number - 1])
            total -= ascending[places[number - 1]]
    return chosen[::-1]


def cut_between(lengths: list[int], size: float) -> list[list[int]]:
    """The places of a pack's samples in chunks of about `size` tokens, in order; a longer sample stays whole."""
    total = sum(lengths)
    if total <= size:
        return [list(range(len(lengths)))]
    ends = list(accumulate(lengths))
    share = total / math.ceil(total / size)
    nearest = (
        min(range(len(ends)), key=lambda i: abs(ends[i] - n * share)) + 1 for n in range(1, round(total / share))
    )
    cuts = [0, *sorted(set(nearest) - {len(ends)}), len(ends)]
    return [list(range(first, last)) for first, last in pairwise(cuts)]


def fair_shares(costs: list[float], ranks: int) -> list[list[int]]:
    """The places of each rank's packs, as many for each, in order: the costliest first to the rank that has least to do so
    far (R. L. Graham, Bounds on multiprocessing timing anomalies, 1969). The same for everybody who asks."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads, each = [0.0] * ranks, len(costs) // ranks
    for place in sorted(range(each * ranks), key=lambda place: (-costs[place], place)):
        free = (rank for rank in range(ranks) if len(shares[rank]) < each)
        rank = min(free, key=lambda rank: (loads[rank], rank))
        shares[rank].append(place)
        loads[rank] += costs[place]
    return [sorted(share) for share in shares]
