"""The loader: every sample comes, the very next one after a resume, and none is left out in silence."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.energon import SkipSample

from conftest import MAX_PIXELS, MIN_PIXELS
from llava_sft.data.heldout import read_split
from llava_sft.data.index import index_webdataset
from llava_sft.data.loader import VlmTaskEncoder, train_loader, worker_config
from llava_sft.data.packing import PACKED_IDS
from llava_sft.data.records import Sample
from llava_sft.data.template import ChatTemplate
from llava_sft.errors import RunError
from llava_sft.training import validation
from webdataset_helpers import Raw, picture, record

RECORDS = 24
KEPT = []  # loaders with workers, till the end: torch waits five seconds for a worker whose loader is dropped


@pytest.fixture(scope="module")
def wds(tmp_path_factory):
    """24 samples with no, one and two images; two of them held out."""
    folder = tmp_path_factory.mktemp("wds")
    train = Raw(folder, [record(i, [None, "a.png", ["b.jpg", "a.png"]][i % 3]) for i in range(RECORDS)])
    heldout = Raw(folder, [record(100, ["b.jpg", "a.png"], kind="pair"), record(101, None)], "heldout.jsonl")
    train.convert()
    heldout.convert("heldout")
    index_webdataset(train.wds, train.parts)
    return train


def loader(folder, tokenizer, workers=0, seed=1, seq_length=512, micro_batch_size=2, packing=False):
    encoder = VlmTaskEncoder(ChatTemplate(tokenizer), seq_length, MIN_PIXELS, MAX_PIXELS, packing, seed=seed)
    return train_loader(folder, encoder, worker_config(0, 1, workers, seed), micro_batch_size, packing_buffer_size=10)


def take(batches, count):
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


def keys(batches):
    return [key for batch in batches for keys in batch.__key__ for key in keys.split(PACKED_IDS)]


def test_every_sample_comes_in_an_order_that_the_seed_decides(wds, small_checkpoint):
    order = keys(take(loader(wds.wds, small_checkpoint), 5 * RECORDS))
    assert len(set(order)) == RECORDS
    assert order[:RECORDS] != sorted(order[:RECORDS])
    assert order[:RECORDS] == keys(take(loader(wds.wds, small_checkpoint), RECORDS // 2))
    assert order[:RECORDS] != keys(take(loader(wds.wds, small_checkpoint, seed=2), RECORDS // 2))


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_restored_loader_goes_on_with_the_very_next_batch(wds, small_checkpoint, packing):
    first = loader(wds.wds, small_checkpoint, workers=1, packing=packing)
    iterator = iter(first)
    KEPT.append(iterator)
    for _ in range(5):
        next(iterator)
    state = first.save_state_rank()
    expected = [next(iterator) for _ in range(10)]  # into the second epoch
    again = loader(wds.wds, small_checkpoint, workers=1, packing=packing)
    again.restore_state_rank(state)
    KEPT.append(iter(again))
    for ours, theirs in zip(take(KEPT[-1], 10), expected, strict=True):
        assert ours.__key__ == theirs.__key__
        assert ours.segments == theirs.segments
        for name in ("input_ids", "answer_index", "answer_labels", "pixels", "grids", "image_index"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))


def test_packed_sequences_hold_whole_samples_and_no_more_than_fits(wds, small_checkpoint):
    for batch in take(loader(wds.wds, small_checkpoint, packing=True, seq_length=300, micro_batch_size=1), 8):
        assert batch.input_ids.shape == (1, batch.num_tokens) and batch.num_tokens <= 300
        starts = [0, *np.cumsum(batch.segments)[:-1].tolist()]
        begin = batch.input_ids[0, 0]  # <|im_start|> of the system prompt
        assert all(batch.input_ids[0, start] == begin for start in starts)
        assert len(starts) == len(batch.__key__[0].split(PACKED_IDS))


def test_a_batch_is_padded_to_its_own_longest_and_says_where_its_images_stand(wds, small_checkpoint):
    template = ChatTemplate(small_checkpoint)
    for batch in take(loader(wds.wds, small_checkpoint, micro_batch_size=4), 6):
        rows, length = batch.input_ids.shape
        text = batch.input_ids != template.pad_token_id
        assert batch.num_tokens == text.sum() and text.sum(1).max() == length
        assert all(not row[int(n) :].any() for row, n in zip(text, text.sum(1), strict=True))  # padding behind the text
        flat = batch.input_ids.T.flatten()  # the model's [tokens, batch]
        assert torch.equal(flat[batch.answer_index + rows], batch.answer_labels)  # each place predicts the next token
        for row in range(rows):
            answer = template.tokenizer.decode(
                batch.answer_labels[batch.answer_index % rows == row].tolist(), skip_special_tokens=False
            )
            assert re.fullmatch(r"Answer \d+\.<\|im_end\|>", answer)
        assert (flat[batch.image_index] == template.image_token_id).all()
        assert len(batch.image_index) == (flat == template.image_token_id).sum() == len(batch.pixels) // 4
        assert batch.grids.prod(1).sum() == len(batch.pixels)
        assert (batch.image_index % rows).diff().min() >= 0  # row by row, as the images come


def test_a_sample_that_does_not_fit_is_left_out_and_named(small_checkpoint, tmp_path, capfd):
    long = record(7, None)
    long["conversations"][1]["value"] = "word " * 400
    raw = Raw(tmp_path, [record(0, None), long, record(1)])
    raw.convert()
    index_webdataset(raw.wds, raw.parts)
    seen = take(loader(raw.wds, small_checkpoint, micro_batch_size=1, seq_length=120), 12)
    assert len(set(keys(seen))) == 2
    assert "left out: the first answer ends after 120 tokens" in capfd.readouterr().out


def test_images_of_the_turns_that_are_cut_off_are_not_in_the_batch(small_checkpoint, tmp_path):
    two_turns = record(0, ["a.png", "b.jpg"])
    two_turns["conversations"] = [
        {"from": "human", "value": "<image>Which?"},
        {"from": "gpt", "value": "This."},
        {"from": "human", "value": "<image>And which?" + " word" * 300},
        {"from": "gpt", "value": "That."},
    ]
    raw = Raw(tmp_path, [two_turns])
    raw.convert()
    index_webdataset(raw.wds, raw.parts)
    (batch,) = take(loader(raw.wds, small_checkpoint, micro_batch_size=1, seq_length=200), 1)
    assert len(batch.grids) == 1 and len(batch.pixels) == batch.grids.prod() == 4 * len(batch.image_index)


def test_an_image_that_can_not_be_read_ends_the_run(wds, small_checkpoint, monkeypatch):
    def damaged(data):
        raise OSError("image file is truncated")

    monkeypatch.setattr("llava_sft.data.loader.decode_rgb", damaged)
    with pytest.raises(Exception) as error:
        take(loader(wds.wds, small_checkpoint), RECORDS)
    causes = [error.value]
    while causes[-1].__cause__ or causes[-1].__context__:
        causes.append(causes[-1].__cause__ or causes[-1].__context__)
    assert any("image file is truncated" in str(cause) for cause in causes)


def test_held_out_samples_are_read_in_order_with_their_images_in_the_order_of_the_placeholders(wds):
    pair, text = read_split(wds.wds, "val")
    assert (pair.id, text.id) == ("r100", "r101")
    assert pair.images == [picture("JPEG", (40, 30)), picture()]
    assert pair.meta == {"kind": "pair"} and text.images == []
    assert [m["role"] for m in pair.messages] == ["user", "assistant"]
    assert list(read_split(wds.wds, "test")) == []
    assert np.unique([s.id for s in read_split(wds.wds, "train")]).size == RECORDS


@pytest.mark.parametrize("stored", [[], [Sample("a", [], [], {})]])
def test_a_validation_that_no_held_out_sample_fits_into_is_one_message(monkeypatch, stored):
    def too_long(self, sample):
        raise SkipSample

    monkeypatch.setattr(validation, "read_split", lambda path, split: iter(stored))
    monkeypatch.setattr(validation.HeldOut, "encode", too_long)
    held_out = validation.HeldOut("wds", SimpleNamespace(seq_length=64), 0, 1, micro_batch_size=2, batches=1)
    with pytest.raises(RunError, match="too few fit into seq_length 64"):
        next(held_out)
