"""Packing wastes little, loses nothing, and is the same every time."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_sft.data.packing import cut_between, fill_packs


@given(st.lists(st.integers(1, 100), max_size=200))
def test_every_sample_is_in_one_pack_and_no_pack_is_too_long(lengths):
    packs = fill_packs(lengths, 100)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in pack) <= 100 for pack in packs)


def test_a_buffer_of_2000_mixed_samples_leaves_less_than_half_a_percent_unused_at_8192():
    rng = random.Random(1)
    lengths = [rng.choice((rng.randint(60, 300), rng.randint(700, 1500), rng.randint(2000, 6000))) for _ in range(2000)]
    packs = fill_packs(lengths, 8192)
    assert sum(lengths) / (len(packs) * 8192) > 0.995


def test_a_pack_may_hold_many_more_samples_than_are_looked_at_together():
    packs = fill_packs([26] * 5000, 32768)
    assert [len(pack) for pack in packs] == [1260, 1260, 1260, 1220]


def test_too_long_an_item_is_refused():
    with pytest.raises(ValueError, match="101"):
        fill_packs([5, 101], 100)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=60), st.integers(20, 400))
def test_a_pack_is_cut_between_its_samples_into_even_chunks(lengths, size):
    chunks = cut_between(lengths, size)
    assert [place for chunk in chunks for place in chunk] == list(range(len(lengths)))
    assert all(chunks)
    assert max(sum(lengths[i] for i in chunk) for chunk in chunks) < size + 2 * max(lengths)
