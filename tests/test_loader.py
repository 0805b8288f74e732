"""The loader: every sample comes, the very next one after a resume, and none is left out in silence."""

import io
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.energon import SkipSample, WorkerConfig, get_loader, get_train_dataset
from PIL import Image

from helpers.models import MAX_PIXELS, MIN_PIXELS
from helpers.webdatasets import Raw, picture, record
from llava_sft.data.index import index_webdataset
from llava_sft.data.loader import VlmTaskEncoder
from llava_sft.data.packing import PACKED_IDS, fair_shares
from llava_sft.data.records import Sample
from llava_sft.data.sizes import Limits, sample_sizes
from llava_sft.data.stored import read_split
from llava_sft.data.stream import Ranks, train_loader, worker_ended
from llava_sft.errors import DataError, RunError
from llava_sft.model.template import ChatTemplate
from llava_sft.training import validation

RECORDS = 24
LOADERS = []


@pytest.fixture(autouse=True)
def _workers_end():
    yield
    while LOADERS:
        LOADERS.pop().close()


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


def loader(
    folder,
    tokenizer,
    workers=0,
    seed=1,
    seq_length=512,
    micro_batch_size=2,
    packing=False,
    rank=0,
    replicas=1,
    **options,
):
    encoder = VlmTaskEncoder(ChatTemplate(tokenizer), seq_length, MIN_PIXELS, MAX_PIXELS, packing, seed=seed)
    found = train_loader(folder, encoder, Ranks(rank, replicas, workers), micro_batch_size, 10, **options)
    LOADERS.append(found)
    return found


def take(batches, count):
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


def keys(batches):
    return [key for batch in batches for keys in batch.__key__ for key in keys.split(PACKED_IDS)]


def test_every_sample_comes_once_a_pass_in_an_order_that_the_seed_decides(wds, small_checkpoint):
    order = keys(take(loader(wds.wds, small_checkpoint), RECORDS))
    first, second = order[:RECORDS], order[RECORDS:]
    assert len(set(first)) == RECORDS and sorted(first) == sorted(second) != first != second
    assert first == keys(take(loader(wds.wds, small_checkpoint), RECORDS // 2))
    assert first != keys(take(loader(wds.wds, small_checkpoint, seed=2), RECORDS // 2))


def equal(ours, theirs) -> None:
    assert ours.__key__ == theirs.__key__ and ours.segments == theirs.segments
    for name in ("input_ids", "answer_index", "answer_labels", "pixels", "grids", "image_index"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("workers", [0, 3])
def test_what_comes_depends_on_neither_ranks_nor_workers_and_goes_on_after_a_resume(
    wds, small_checkpoint, packing, workers
):
    """Five batches by one process, then by two ranks with other workers, from the position that the first left."""
    alone = loader(wds.wds, small_checkpoint, packing=packing)
    expected = take(alone, 20)  # into the second pass
    first = loader(wds.wds, small_checkpoint, workers=1, packing=packing)
    for ours, theirs in zip(take(first, 4), expected, strict=False):
        equal(ours, theirs)
    state = first.save_state()
    assert torch.load(saved(state), weights_only=True) == state
    for rank in range(2):
        again = loader(wds.wds, small_checkpoint, workers=workers, packing=packing, rank=rank, replicas=2)
        again.restore(state)
        for ours, theirs in zip(take(again, 8), expected[4 + rank :: 2], strict=True):
            equal(ours, theirs)
        assert again.save_state() == alone.save_state()


def test_the_packs_of_a_step_are_shared_out_by_what_they_cost_and_a_resume_changes_nothing(wds, small_checkpoint):
    """Three steps of three micro-batches, on one rank, on two, and on two that go on after the first step."""

    def patches(tokens: int, images: list[int]) -> float:
        return 1 + sum(images)

    def dealt(replicas: int, state=None) -> list[list[str]]:
        """The samples of each step, rank by rank."""
        found = []
        for rank in range(replicas):
            how = {"packing": True, "micro_batch_size": 1, "seq_length": 128, "rank": rank, "replicas": replicas}
            batches = loader(wds.wds, small_checkpoint, **how, micro_batches=6 // replicas, cost=patches)
            if state:
                batches.restore(state)
            each = 6 // replicas
            found.append([keys(take(batches, each)) for _ in range(2 if state else 3)])
        return found

    (alone,), (first, second) = dealt(1), dealt(2)
    for whole, one, other in zip(alone, first, second, strict=True):
        assert sorted(whole) == sorted(one + other)
    batches = loader(wds.wds, small_checkpoint, packing=True, micro_batch_size=1, seq_length=128)
    take(batches, 6)
    assert dealt(2, batches.save_state()) == [first[1:], second[1:]]


def test_shares_are_as_many_packs_and_about_as_much_work():
    costs = np.random.default_rng(1).lognormal(0, 1, 64).tolist()
    shares = fair_shares(costs, 4)
    assert sorted(place for share in shares for place in share) == list(range(64))
    assert {len(share) for share in shares} == {16} and shares == [sorted(share) for share in shares]
    sums = [sum(costs[place] for place in share) for share in shares]
    in_turn = [sum(costs[16 * rank : 16 * (rank + 1)]) for rank in range(4)]
    assert max(sums) < 1.03 * min(sums) and max(in_turn) > 1.2 * min(in_turn)
    assert fair_shares([3.0, 1.0], 2) == [[0], [1]] and fair_shares([], 2) == [[], []]


def saved(state) -> io.BytesIO:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize(
    "state", [None, {}, {"order": 3}, {"order": {"seed": 1}}, {"order": {"seed": 9, "counts": [0], "sources": []}}]
)
def test_a_state_that_is_none_of_ours_is_refused(wds, small_checkpoint, state):
    with pytest.raises(ValueError):
        loader(wds.wds, small_checkpoint).restore(state)


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


def test_stock_energon_makes_batches_with_our_encoder(wds, small_checkpoint):
    encoder = VlmTaskEncoder(ChatTemplate(small_checkpoint), 512, 3136, 1_000_000)
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    options = {"shuffle_buffer_size": 8, "max_samples_per_sequence": 5, "batch_size": 2}
    batches = get_loader(get_train_dataset(wds.wds, worker_config=config, task_encoder=encoder, **options))
    batch = next(iter(batches))
    assert len(batch.__key__) == len(batch.input_ids) == 2
    assert batch.num_tokens > 0 and batch.answer_labels.numel() > 0


def test_a_sample_that_does_not_fit_is_never_dealt_out(small_checkpoint, tmp_path):
    long = record(7, None)
    long["conversations"][1]["value"] = "word " * 400
    raw = Raw(tmp_path, [record(0, None), long, record(1)])
    raw.convert()
    index_webdataset(raw.wds, raw.parts)
    seen = keys(take(loader(raw.wds, small_checkpoint, micro_batch_size=1, seq_length=120), 4))
    assert len(set(seen)) == 2 and set(seen[:2]) == set(seen[2:])


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


@pytest.fixture
def damaged(tmp_path, small_checkpoint):
    """Eight samples, of which the pictures of two were damaged before the conversion, behind their headers."""
    raw = Raw(tmp_path, [record(i, f"{i}.jpg") for i in range(8)])
    for number in range(8):
        data = picture("JPEG", (64, 48))
        if number in (2, 5):  # in the tables that its picture is coded with
            table = data.index(b"\xff\xc4") + 4
            data = data[:table] + b"\xff" + data[table + 1 :]
        (raw.images / f"{number}.jpg").write_bytes(data)
    raw.convert()
    index_webdataset(raw.wds, raw.parts)
    return raw.wds


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_ends_the_run_with_its_tar_key_and_id(damaged, small_checkpoint, workers):
    with pytest.raises(DataError) as error:
        take(loader(damaged, small_checkpoint, workers=workers, micro_batch_size=1), 8)
    assert re.search(r"subtaskdata-\d+\.tar: \S+ \(id 'r[25]'\): .*an image cannot be read", error.value.problem)
    assert "decode_images: true" in error.value.fix and "max_damaged_samples" in error.value.fix


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_damaged_samples_are_left_out_and_counted_as_far_as_they_may_be(damaged, small_checkpoint, packing):
    found = []
    options = {"packing": packing, "micro_batch_size": 1, "found_damaged": lambda *fault: found.append(fault)}
    batches = take(loader(damaged, small_checkpoint, **options, max_damaged=2), 16)
    seen = keys(batches)
    assert len(set(seen)) == 6 and len({number for number, _ in found}) == len(found) == 2
    assert all("an image cannot be read" in fault for _, fault in found)
    with pytest.raises(DataError, match="2 samples cannot be read, max_damaged_samples allows 1"):
        take(loader(damaged, small_checkpoint, **options, max_damaged=1), 16)


def test_a_tar_that_changed_after_it_was_indexed_is_named(wds, small_checkpoint, tmp_path):
    folder = Path(shutil.copytree(wds.folder, tmp_path / "copy")) / "wds"
    tar = next(folder.glob("subtaskdata-*.tar"))
    data = bytearray(tar.read_bytes())
    data[512:530] = bytes(18)
    tar.write_bytes(data)
    sizes = sample_sizes(wds.wds, small_checkpoint, Limits(512, MIN_PIXELS, MAX_PIXELS))
    with pytest.raises(DataError, match=rf"{tar.name}: .*(cannot be read|does not hold)"):
        take(loader(folder, small_checkpoint, sizes=sizes), RECORDS)


def test_counts_of_other_data_are_refused(wds, small_checkpoint):
    sizes = sample_sizes(wds.wds, small_checkpoint, Limits(512, MIN_PIXELS, MAX_PIXELS))
    other = sizes._replace(shards=[("elsewhere.tar", len(sizes.rows))])
    with pytest.raises(DataError, match="of other data"):
        loader(wds.wds, small_checkpoint, sizes=other)
    longer = sizes._replace(tokens=[tokens + 1 for tokens in sizes.tokens])
    with pytest.raises(DataError, match="were counted"):
        take(loader(wds.wds, small_checkpoint, sizes=longer), 1)


def test_a_picture_whose_header_gives_another_size_than_it_decodes_to_is_an_error(wds, small_checkpoint, monkeypatch):
    monkeypatch.setattr("llava_sft.data.loader.decode_rgb", lambda data: Image.new("RGB", (300, 30)))
    with pytest.raises(DataError, match="its header says"):
        take(loader(wds.wds, small_checkpoint), RECORDS)


def test_a_loader_process_that_is_killed_is_one_message(wds, small_checkpoint):
    found = loader(wds.wds, small_checkpoint, workers=1)
    next(found)
    os.kill(found.iterator._workers[0].pid, signal.SIGTERM)  # is for the trainer
    next(found)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises from there too, wherever we are just then
    try:
        os.kill(found.iterator._workers[0].pid, signal.SIGKILL)
        with pytest.raises(RunError, match=r"a loader process ended(.|\n)*num_workers"):
            take(found, 50)
    finally:
        found.close()
        signal.signal(signal.SIGCHLD, before)
    assert worker_ended(RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."))
    assert worker_ended(RuntimeError("CUDA error")) is None


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


@pytest.mark.parametrize("content", [b"", b"cut", pytest.param(None, id="of an earlier version")])
def test_a_position_that_cannot_be_gone_on_from_names_the_way_on(wds, small_checkpoint, tmp_path, content, monkeypatch):
    from llava_sft.training import saving

    path = tmp_path / "run" / "dataloader" / "iter_0000400" / "train_dataloader_dprank000.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(content or b"")
    if content is None:
        torch.save({"dataloader_state_dict": Ranks()}, path)  # a class, as energon's state is
    monkeypatch.setattr(saving, "position_file", lambda run_dir, iteration: path)  # asks Megatron for the rank
    with pytest.raises(RunError, match=r"(?s)earlier version .*load=\S+/run/iter_0000400") as error:
        saving.restore_position(loader(wds.wds, small_checkpoint), tmp_path / "run", 400)
    assert "run_tag=next" in error.value.fix
