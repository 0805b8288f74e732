"""How often a run saw each sample: counted over ranks and sources, and only when every step is there."""

import json
import sqlite3
from types import SimpleNamespace

import pytest

import report
from helpers.models import MAX_PIXELS, MIN_PIXELS
from helpers.webdatasets import Raw, record
from llava_sft.data.index import index_webdataset
from llava_sft.data.loader import VlmTaskEncoder
from llava_sft.data.nv_meta import METADATASET
from llava_sft.data.packing import PACKED_IDS
from llava_sft.data.stored import sample_ids
from llava_sft.data.stream import Ranks, train_loader
from llava_sft.errors import DamagedFileError, DataError, RunError
from llava_sft.files import write_json
from llava_sft.model.template import ChatTemplate
from llava_sft.run.coverage import count_samples, sample_counts, summary
from llava_sft.run.layout import SAMPLE_COUNTS
from llava_sft.settings.resolve import ResolvedSettings
from llava_sft.settings.resolved import ResolvedData
from llava_sft.training.watch import Watch


def note(run_dir, *ranks):
    (run_dir / "samples").mkdir(parents=True, exist_ok=True)
    for number, steps in enumerate(ranks):
        lines = [json.dumps({"iteration": step + 1, "samples": ids}) + "\n" for step, ids in enumerate(steps)]
        (run_dir / "samples" / f"rank{number:03d}.jsonl").write_text("".join(lines))


@pytest.fixture
def wds(tmp_path):
    raw = Raw(tmp_path, [record(i, None) for i in range(6)])
    raw.convert(range_bytes=300)
    index_webdataset(raw.wds, raw.parts)
    return raw.wds


def test_left_over_and_repeated_samples_are_named(wds, tmp_path):
    a, b, c, d, e, f = sorted(sample_ids(wds, "train")[""])
    note(tmp_path, [[a, b], [a, c]], [[a], [d]])  # two data-parallel ranks
    counts = sample_counts(tmp_path, wds, 2, left_out=[f])
    assert (counts["samples"], counts["epochs"]) == (6, 6 / 5)
    assert counts["seen"] == {"0": 1, "1": 3, "3": 1}
    assert (counts["left_over"], counts["repeated"], counts["left_out"]) == ([e], [a], [f])
    stale = sample_counts(tmp_path, wds, 2, left_out=["of other data"])
    assert (stale["left_out"], stale["epochs"]) == ([], 1) and stale["left_over"] == [e, f]
    assert "1 not seen, 3 seen once, 1 seen 3 times; 1 cannot be trained on" in summary(counts)


def test_counts_are_not_known_of_a_run_whose_steps_were_not_all_noted(wds, tmp_path):
    assert sample_counts(tmp_path, wds, 2) is None
    note(tmp_path, [["a"]])
    with pytest.raises(RunError, match="1 of 2 steps is in the log"):
        sample_counts(tmp_path, wds, 2)


def test_the_loader_names_samples_of_a_blend_by_their_source(tmp_path, small_checkpoint):
    for name in ("one", "two"):  # each with a tar of the same name
        raw = Raw(tmp_path / name, [record(i, None) for i in range(4)])
        raw.wds, raw.parts = tmp_path / "wds" / name, tmp_path / "parts" / name
        raw.convert(range_bytes=10_000)
    index_webdataset(tmp_path / "wds", tmp_path / "parts")
    encoder = VlmTaskEncoder(ChatTemplate(small_checkpoint), 200, MIN_PIXELS, MAX_PIXELS)
    batches = iter(train_loader(tmp_path / "wds" / METADATASET, encoder, Ranks(), 1))
    steps = [next(batches).__key__ for _ in range(40)]
    note(tmp_path / "run", steps)
    counts = sample_counts(tmp_path / "run", tmp_path / "wds" / METADATASET, 40)
    assert counts["samples"] == 8 and "0" not in counts["seen"]
    assert {name.split("/")[0] for ids in steps for name in ids} == {"one", "two"}


def test_of_the_ranks_that_share_samples_the_one_that_logs_keeps_its_lines(wds, tmp_path):
    values = ResolvedSettings(experiment="x", train_iters=2)
    logging, silent = (Watch(tmp_path, values, 0, 1, 0, writes, None, None) for writes in (True, False))
    ids = sorted(sample_ids(wds, "train")[""])
    for step in (1, 2):
        logging.batch(0.0, 8, 8, 0.0, [PACKED_IDS.join(ids)])
        silent.batch(0.0, 8, 8, 0.0, [PACKED_IDS.join(ids)])
        logging.step(step, 1.0, {"learning-rate": 0.1}, 1.0, 1.0)
    counts = sample_counts(tmp_path, wds, 2)
    assert (counts["epochs"], counts["seen"]) == (2, {"2": 6})


def test_a_report_makes_the_counts_again_that_were_damaged_and_deleted(wds, tmp_path):
    ids = sorted(sample_ids(wds, "train")[""])
    note(tmp_path, [ids, ids[:3]])
    resolved = {
        "run_name": "run",
        "settings": {"train_iters": 2},
        "why": {},
        "data": {"path": str(wds), "fingerprint": "d"},
    }
    write_json(tmp_path / "resolved.json", resolved)
    write_json(tmp_path / "done.json", {"iteration": 2})
    asked = SimpleNamespace(
        run_dir=tmp_path, resolved=tmp_path / "resolved.json", train_done=tmp_path / "done.json", export=None
    )
    count_samples(tmp_path, ResolvedData(path=str(wds), fingerprint="d"), 2)
    made = (tmp_path / SAMPLE_COUNTS).read_bytes()
    (tmp_path / SAMPLE_COUNTS).write_text("")
    with pytest.raises(DamagedFileError, match=SAMPLE_COUNTS):
        report.read_inputs(asked)
    (tmp_path / SAMPLE_COUNTS).unlink()
    assert report.read_inputs(asked)["counts"]["seen"] == {"1": 3, "2": 3}
    assert (tmp_path / SAMPLE_COUNTS).read_bytes() == made


def test_samples_that_the_index_can_not_tell_apart_are_an_error(wds, tmp_path):
    note(tmp_path, [["a"]])
    with sqlite3.connect(wds / ".nv-meta/index.sqlite") as index:
        index.execute("DELETE FROM samples WHERE sample_index = 0")
    with pytest.raises(DataError, match="repeat"):
        sample_counts(tmp_path, wds, 1)
