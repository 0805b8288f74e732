"""Token counts: what the loader will make of the samples, from image headers alone, and counted again only where they must."""

import json
import os
import shutil
import subprocess
import sys
import time

import psutil

from helpers.models import MAX_PIXELS, MIN_PIXELS
from helpers.webdatasets import Raw, picture, record
from llava_sft.data.index import index_webdataset
from llava_sft.data.loader import VlmTaskEncoder
from llava_sft.data.sizes import Limits, prepared_tokens_per_s, sample_sizes
from llava_sft.data.stored import sample_ids
from llava_sft.data.stream import Ranks, train_loader
from llava_sft.files import read_json, write_json
from llava_sft.model.template import ChatTemplate

LIMITS = Limits(120, MIN_PIXELS, MAX_PIXELS)


def test_sizes_equal_those_of_the_loader(tmp_path, small_checkpoint):
    long = record(7, None)
    long["conversations"][1]["value"] = "word " * 400
    raw = Raw(tmp_path, [record(i, [None, "a.png", ["b.jpg", "a.png"]][i % 3]) for i in range(6)] + [long])
    raw.convert()
    index_webdataset(raw.wds, raw.parts)
    sizes = sample_sizes(raw.wds, small_checkpoint, LIMITS, processes=2)
    assert len(sizes.tokens) == 6

    encoder = VlmTaskEncoder(ChatTemplate(small_checkpoint), *LIMITS)
    batches = iter(train_loader(raw.wds, encoder, Ranks(), micro_batch_size=1))
    seen = {}
    while len(seen) < 6:
        batch = next(batches)
        seen[batch.__key__[0]] = batch.num_tokens, [height * width for height, width in batch.grids.tolist()]
    assert sorted(seen.values()) == sorted(zip(sizes.tokens, sizes.patches, strict=True))
    assert len(sizes.left_out) == 1 and not set(sizes.left_out) & seen.keys()
    assert {*sizes.left_out} | seen.keys() == sample_ids(raw.wds, "train")[""]
    assert prepared_tokens_per_s(raw.wds, small_checkpoint, LIMITS) > 0


def test_only_what_changed_is_counted_again(tmp_path, small_checkpoint):
    raw = Raw(tmp_path, [record(i, "a.png") for i in range(12)])
    raw.convert()
    index_webdataset(raw.wds, raw.parts)
    kept = tmp_path / "sizes"
    sample_sizes(raw.wds, small_checkpoint, LIMITS, kept)
    files = sorted(kept.rglob("*.json"))
    assert len(files) == len(list(raw.wds.glob("*.tar"))) > 2
    for path in files:  # whatever is read from now on shows
        write_json(path, read_json(path) | {"tokens": [1]})
    assert sample_sizes(raw.wds, small_checkpoint, LIMITS, kept).tokens == [1] * len(files)

    (raw.images / "a.png").write_bytes((raw.images / "b.jpg").read_bytes())
    os.unlink(next(iter(sorted(raw.wds.glob("*.tar")))))
    raw.convert(only={0})
    index_webdataset(raw.wds, raw.parts)
    again = sample_sizes(raw.wds, small_checkpoint, LIMITS, kept).tokens
    assert again.count(1) == len(files) - 1 and len(again) > len(files)
    assert sample_sizes(raw.wds, small_checkpoint, LIMITS._replace(seq_length=130), kept).tokens != again
    assert sample_sizes(raw.wds, small_checkpoint, LIMITS, kept).tokens == again  # both are kept


def test_a_shard_that_was_made_again_in_the_same_size_is_counted_again(tmp_path, small_checkpoint):
    raw = Raw(tmp_path, [record(0, None)])
    kept, found = tmp_path / "sizes", []
    for answer in ("no", "one two three four five six"):  # tars are padded: both are of one size
        given = record(0, None)
        given["conversations"][1]["value"] = answer
        raw.path.write_text(json.dumps(given) + "\n")
        for folder in (raw.wds, raw.parts):
            shutil.rmtree(folder, ignore_errors=True)
        raw.convert()
        index_webdataset(raw.wds, raw.parts)
        found.append(sample_sizes(raw.wds, small_checkpoint, LIMITS, kept).tokens)
    assert found[0] < found[1]


def test_an_image_with_a_profile_longer_than_what_is_read_of_it_first(tmp_path, small_checkpoint):
    raw = Raw(tmp_path, [record(0, "a.png"), record(1, "c.jpg")])
    (raw.images / "c.jpg").write_bytes(picture("JPEG", (32, 28), icc_profile=b"\0" * 300_000))
    raw.convert()
    index_webdataset(raw.wds, raw.parts)
    sizes = sample_sizes(raw.wds, small_checkpoint, LIMITS)
    assert sizes.patches[0] == sizes.patches[1]


def test_processes_that_count_end_with_the_one_that_started_them():
    script = (
        "import os, time; from pathlib import Path; from llava_sft.data import sizes\n"
        "def slow(*_): os.write(1, b'%d\\n' % os.getpid()); time.sleep(60)\n"
        "sizes.stored_shards, sizes._counted_with, sizes._shard_sizes = (lambda *_: [1, 2]), (lambda *_: []), slow\n"
        "sizes.sample_sizes(Path(), Path(), None, None, 2)\n"
    )
    # Two workers write to one pipe: with PYTHONUNBUFFERED a print would be two writes, and their numbers could run together.
    counting = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    worker = int(counting.stdout.readline())
    counting.terminate()
    counting.wait()
    until = time.monotonic() + 60
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)
