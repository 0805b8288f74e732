"""Several sources of several formats through the real Snakemake, and a foreign WebDataset: what runs, and what runs again."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from helpers.projects import planned, snakemake
from helpers.webdatasets import mix, picture, read_with_energon, record


def write_sources(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    for i in range(40):
        (folder / f"images/{i}.png").write_bytes(picture(size=(28 + i, 30)))
    (folder / "array.json").write_text(json.dumps([record(i, f"{i}.png") for i in range(40)]))
    for number in range(2):
        rows = [
            record(100 * number + i) | {"image": {"bytes": picture(size=(28 + i, 40 + number)), "path": None}}
            for i in range(9)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"part-{number}.parquet", row_group_size=3)


def test_sources_of_several_formats_are_converted_blended_and_only_what_grew_again(project):
    write_sources(project / "data")
    mix(project / "theirs/pretrain-0.tar", range(6))
    array = {"path": "data/array.json", "image_root": "data/images", "weight": 2.0}
    sources = [array, {"path": "data/part-*.parquet", "name": "hub"}]
    experiments = project / "config/experiments"
    (experiments / "blend.yaml").write_text(
        yaml.safe_dump({"sources": sources, "shard_bytes": 3000, "val_fraction": 0.2, "load": "x"})
    )
    (experiments / "foreign.yaml").write_text(
        yaml.safe_dump({"webdatasets": "theirs", "load": "x", "exp_dir": "out put"})
    )
    made = snakemake(project, "output/data/blend/inspect.json", "out put/data/foreign/inspect.json")
    assert made.returncode == 0, made.stdout
    jobs = planned(made.stdout)["stage2_sftdata2webdataset"]
    data = {"blend": project / "output/data/blend", "foreign": project / "out put/data/foreign"}
    dataset, foreign = (json.loads((folder / "dataset.json").read_bytes()) for folder in data.values())
    assert dataset["train"]["samples"] + dataset["heldout"]["samples"] == 58
    assert dataset["heldout"]["samples"] > 0
    assert dataset["weights"] == {"array": 2.0, "hub": 1.0}
    assert foreign["train"] == {"samples": 6, "shards": 1}
    assert sorted(path.name for path in (data["blend"] / "webdatasets/hub").glob("sub*.tar"))[-1] > "subtaskdata-100000"
    for name, path in (("blend", "webdatasets/metadataset.yaml"), ("foreign", "webdatasets")):
        assert len(set(read_with_energon(data[name] / path)[0]["train"])) > 5, name
    assert not (project / "theirs/pretrain-0.tar.idx").exists()

    (project / "data/array.json").write_text(json.dumps([record(i, f"{i % 40}.png") for i in range(41)]))
    again = planned(snakemake(project, "-n", "output/data/blend/inspect.json").stdout)
    assert 1 <= again["stage2_sftdata2webdataset"] <= 2 < jobs
    assert "inspect_webdataset" in again
