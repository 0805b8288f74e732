"""The same command makes again exactly what is damaged, gone or made from other raw data, through the real Snakemake."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from llava_sft.data.heldout import read_split
from project_runs import planned, snakemake
from webdataset_helpers import picture, record

DATASET = "output/data/redo/dataset.json"


def write_raw(path: Path, word: str = "Answer") -> None:
    records = [record(i, f"{i}.png") for i in range(24)]
    records[13]["conversations"][1]["value"] = f"{word} 13."
    if path.suffix == ".parquet":
        rows = [each | {"image": {"bytes": picture(size=(28 + i, 30)), "path": None}} for i, each in enumerate(records)]
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4, compression="none", use_dictionary=False)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in records))


def answers(folder: Path) -> set[str]:
    return {sample.messages[-1]["content"] for sample in read_split(folder, "train")}


def edit_with_the_same_size_and_date(raw: Path) -> None:
    status = os.stat(raw)
    write_raw(raw, "Anwser")
    assert raw.stat().st_size == status.st_size
    os.utime(raw, ns=(status.st_atime_ns, status.st_mtime_ns))


def damage_four_shards_and_the_index(data: Path) -> None:
    os.truncate(data / "webdatasets/subtaskdata-00000.tar", 3000)
    (data / "webdatasets/subtaskdata-00001.tar.idx").unlink()
    (data / "webdatasets.parts/subtaskdata-00002.samples.jsonl").unlink()
    os.truncate(data / "webdatasets.parts/subtaskdata-00003.stats.json", 50)
    (data / "webdatasets/.nv-meta/split.yaml").unlink()


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_the_same_command_mends_what_is_damaged_and_follows_what_was_edited(project, suffix):
    folder, data = project / suffix, project / "output/data/redo"
    shutil.rmtree(data, ignore_errors=True)
    folder.mkdir()
    for i in range(24):
        (folder / f"{i}.png").write_bytes(picture(size=(28 + i, 30)))
    raw = folder / f"raw.{suffix}"
    write_raw(raw)
    settings = {"raw_data": f"{suffix}/raw.{suffix}", "shard_bytes": 700, "load": "x"}
    (project / "config/experiments/redo.yaml").write_text(yaml.safe_dump(settings))
    made = snakemake(project, DATASET)
    assert made.returncode == 0, made.stdout
    before = json.loads((project / DATASET).read_bytes())
    jobs = planned(made.stdout)["stage2_sftdata2webdataset"]
    assert jobs > 4
    if suffix == "jsonl":
        damage_four_shards_and_the_index(data)
        dry = planned(snakemake(project, "-n", DATASET).stdout)
        assert dry == {"stage2_sftdata2webdataset": 4, "index_webdataset": 1}
        again = snakemake(project, DATASET)
        assert (again.returncode, planned(again.stdout)) == (0, dry), again.stdout
        assert json.loads((project / DATASET).read_bytes()) == before
    edit_with_the_same_size_and_date(raw)
    edited = snakemake(project, DATASET)
    assert edited.returncode == 0, edited.stdout
    assert 1 <= planned(edited.stdout)["stage2_sftdata2webdataset"] < jobs
    assert "Anwser 13." in answers(data / "webdatasets")
    assert "Nothing to be done" in snakemake(project, DATASET).stdout
