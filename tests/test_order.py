"""An epoch is an epoch: no sample is seen again before all others have been seen as often, and a run goes on exactly."""

import json
from collections import Counter
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_sft.data.order import GlobalOrder, Passes, SourceLengths, shuffled

SIZES = [37, 500, 3000, 20_000]


def lengths_of(count: int) -> list[int]:
    return [60 + 37 * n % 900 + (2000 if n % 11 == 0 else 0) for n in range(count)]


def order(count: int, capacity: int | None, seed: int = 1) -> GlobalOrder:
    return GlobalOrder([SourceLengths(lengths_of(count))], capacity, window=2000, seed=seed)


@pytest.mark.parametrize("capacity", [None, 8192], ids=["alone", "packed"])
@pytest.mark.parametrize("count", SIZES)
def test_counts_differ_by_one_at_most_after_every_pack(count, capacity):
    seen, total = [0] * count, 0
    of_each = Counter({0: count})  # how many samples have been seen so often
    for pack in order(count, capacity):
        for sample in pack:
            of_each[seen[sample]] -= 1
            seen[sample] += 1
            of_each[seen[sample]] += 1
        total += len(pack)
        times = [number for number, samples in of_each.items() if samples]
        assert max(times) - min(times) <= 1
        if total >= 2.5 * count:
            break


@given(st.lists(st.integers(1, 100), min_size=1, max_size=80), st.integers(1, 30), st.integers(0, 5))
@settings(deadline=None)
def test_whatever_the_lengths_a_pass_holds_each_sample_once_and_no_pack_is_too_long(lengths, window, seed):
    passes, found = Passes(lengths, 100, window, str(seed)), []
    while len(found) < 3 * len(lengths):
        pack = next(passes)
        assert sum(lengths[sample] for sample in pack) <= 100
        found += pack
    for start in range(0, 3 * len(lengths), len(lengths)):
        assert sorted(found[start : start + len(lengths)]) == list(range(len(lengths)))


def test_each_pass_and_each_seed_has_an_order_of_its_own():
    packs = list(islice(order(500, None), 1000))
    first, second = packs[:500], packs[500:]
    assert first != second and sorted(first) == sorted(second) != first
    assert list(islice(order(500, None), 500)) == first != list(islice(order(500, None, seed=2), 500))


def test_the_order_does_not_change_from_version_to_version():
    assert shuffled(8, "1 0 0").tolist() == [5, 2, 6, 4, 3, 7, 0, 1]


@pytest.mark.parametrize("taken", [0, 1, 5, 63, 200, 431])
def test_an_order_goes_on_from_its_position_as_json(taken):
    sources = [SourceLengths(lengths_of(300)), SourceLengths(lengths_of(90), 2.0), SourceLengths([10], 5.0)]
    first = GlobalOrder(sources, 4096, window=50, seed=3)
    list(islice(first, taken))
    position = json.loads(json.dumps(first.position))
    again = GlobalOrder(sources, 4096, window=50, seed=3)
    again.restore(position)
    assert list(islice(again, 300)) == list(islice(first, 300))


def test_a_position_of_another_seed_or_of_other_sources_is_refused():
    position = order(37, None, seed=1).position
    for other in (order(37, None, seed=2), GlobalOrder([SourceLengths([1]), SourceLengths([2])], None, 10, seed=1)):
        with pytest.raises(ValueError, match="another seed, or of other sources"):
            other.restore(position)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.01, 50)), min_size=1, max_size=6), st.sampled_from([None, 50])
)
@settings(deadline=None, max_examples=50)
def test_after_any_number_of_packs_each_source_has_its_share_but_for_one(sources, capacity):
    lengths = [([5] * count, weight) for count, weight in sources]
    blend = GlobalOrder([SourceLengths(*one) for one in lengths], capacity, window=20, seed=0)
    work = [weight * count for count, weight in sources]  # all samples are equally long
    bounds = [sum(count for count, _ in sources[: n + 1]) for n in range(len(sources))]
    counts = [0] * len(sources)
    for total in range(1, 400):
        pack = next(blend)
        counts[next(n for n, bound in enumerate(bounds) if pack[0] < bound)] += 1
        assert all(abs(got - total * part / sum(work)) <= 1 + 1e-6 for got, part in zip(counts, work, strict=True))


def test_a_source_without_samples_takes_no_part():
    blend = GlobalOrder([SourceLengths([]), SourceLengths([5, 5]), SourceLengths([])], 10, window=20, seed=0)
    assert [sorted(pack) for pack in islice(blend, 3)] == [[0, 1]] * 3
    with pytest.raises(ValueError, match="no sample"):
        GlobalOrder([SourceLengths([])], 10, window=20, seed=0)


@pytest.mark.parametrize(("capacity", "least"), [(8192, 0.995), (32768, 0.99)])
def test_packs_of_20000_samples_are_full(capacity, least):
    lengths = lengths_of(20_000)
    packs, sequences = order(20_000, capacity).first_pass()
    assert sequences == len(packs) and sum(lengths) / (len(packs) * capacity) >= least


def test_a_pass_over_a_blend_counts_a_source_by_its_weight():
    blend = GlobalOrder([SourceLengths([10] * 30), SourceLengths([10] * 10, 2.0)], 50, window=100, seed=0)
    packs, sequences = blend.first_pass()
    assert (len(packs), sequences) == (8, 10)
