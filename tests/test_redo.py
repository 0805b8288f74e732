"""The same command makes again exactly what is damaged, gone or made from other raw data, through the real Snakemake."""

import json
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from helpers.projects import planned, snakemake
from helpers.webdatasets import picture, record
from llava_sft.data.stored import read_split

FORMATS = ("jsonl", "json", "parquet")
DATASET = "output/data/redo/dataset.json"


def write_raw(path: Path) -> None:
    records = [record(i, f"{i}.png") for i in range(24)]
    if path.suffix == ".parquet":
        rows = [each | {"image": {"bytes": picture(size=(28 + i, 30)), "path": None}} for i, each in enumerate(records)]
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=8, compression="none", use_dictionary=False)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        path.write_text("".join(json.dumps(each) + "\n" for each in records))


def answers(folder: Path) -> set[str]:
    return {sample.messages[-1]["content"] for sample in read_split(folder, "train")}


def edit_with_the_same_size_and_date(raw: Path) -> None:
    status = os.stat(raw)
    raw.write_bytes(raw.read_bytes().replace(b"Answer 13.", b"Anwser 13."))
    os.utime(raw, ns=(status.st_atime_ns, status.st_mtime_ns))


def damage_four_shards_and_the_index(data: Path) -> None:
    os.truncate(data / "webdatasets/jsonl/subtaskdata-00000.tar", 3000)
    (data / "webdatasets/jsonl/subtaskdata-00001.tar.idx").unlink()
    (data / "webdatasets.parts/json/subtaskdata-00000.samples.jsonl").unlink()
    os.truncate(data / "webdatasets.parts/parquet/subtaskdata-00000.stats.json", 50)
    (data / "webdatasets/json/.nv-meta/split.yaml").unlink()


def tars(data: Path) -> dict[Path, bytes]:
    return {path.relative_to(data / "webdatasets"): path.read_bytes() for path in data.rglob("*.tar")}


def test_the_same_command_mends_what_is_damaged_and_follows_what_was_edited(project):
    data, files = project / "output/data/redo", [project / f"raw/raw.{suffix}" for suffix in FORMATS]
    files[0].parent.mkdir()
    for i in range(24):
        (files[0].parent / f"{i}.png").write_bytes(picture(size=(28 + i, 30)))
    for raw in files:
        write_raw(raw)
    sources = [{"path": f"raw/raw.{suffix}", "name": suffix} for suffix in FORMATS]
    settings = {"sources": sources, "shard_bytes": 1000, "load": "x"}
    (project / "config/experiments/redo.yaml").write_text(yaml.safe_dump(settings))
    made = snakemake(project, DATASET)
    assert made.returncode == 0, made.stdout
    before, whole = json.loads((project / DATASET).read_bytes()), tars(data)
    assert min(Counter(name.parent for name in whole).values()) > 2

    damage_four_shards_and_the_index(data)
    dry = planned(snakemake(project, "-n", DATASET).stdout)
    assert dry == {"stage2_sftdata2webdataset": 4, "index_webdataset": 1}
    again = snakemake(project, DATASET)
    assert (again.returncode, planned(again.stdout)) == (0, dry), again.stdout
    assert json.loads((project / DATASET).read_bytes()) == before
    assert tars(data) == whole

    for raw in files:
        edit_with_the_same_size_and_date(raw)
    edited = snakemake(project, DATASET)
    assert edited.returncode == 0, edited.stdout
    assert planned(edited.stdout)["stage2_sftdata2webdataset"] == len(FORMATS)
    changed = [name for name, content in tars(data).items() if content != whole[name]]
    assert sorted(str(name.parent) for name in changed) == sorted(FORMATS)
    for suffix in FORMATS:
        assert "Anwser 13." in answers(data / "webdatasets" / suffix)
    assert "Nothing to be done" in snakemake(project, DATASET).stdout
