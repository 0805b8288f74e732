"""Pictures with captions in tars, and the question that they are asked."""

import re
import tarfile

import pytest
import yaml

from helpers import ROOT
from helpers.experiments import EXPERIMENT, mistake, sound_project, write_experiment
from helpers.webdatasets import Raw, picture, tar_of
from llava_sft.data.forms import Reading
from llava_sft.data.index import index_webdataset
from llava_sft.data.plan import plan_ranges
from llava_sft.data.shards import convert_range
from llava_sft.data.stored import read_split
from llava_sft.inputs import check_inputs
from llava_sft.paths import Paths
from llava_sft.settings.layers import load_settings


@pytest.fixture
def project(tmp_path, monkeypatch):
    project = sound_project(tmp_path, monkeypatch)
    jpg = picture("JPEG", (40, 30))
    for name in ("a", "b"):
        tar_of(project / f"tars/{name}.tar", {"0.jpg": jpg, "0.txt": f"A leaf of {name}.".encode()})
    tar_of(project / "own/a.tar", {"0.json": {"messages": [], "images": []}})
    write_experiment("mine", raw_data=None, image_root=None, webdatasets="tars")
    return project


def for_all(project, **settings):
    path = project / "config/config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | settings))


@pytest.mark.parametrize("given", ["experiment", "config.yaml", "--config"])
def test_another_question_is_refused_by_name_wherever_it_is_given_and_never_left_out(project, given):
    overrides = {"caption_prompt": "What?"} if given == "--config" else {}
    if given == "experiment":
        write_experiment("mine", raw_data=None, image_root=None, webdatasets="tars", caption_prompt="What?")
    if given == "config.yaml":
        for_all(project, caption_prompt="What?")
    place = {"experiment": EXPERIMENT, "config.yaml": "config/config.yaml", "--config": "--config"}[given]
    error = mistake(**overrides)
    assert error.problem.startswith(f"{place}: caption_prompt: applies to records")
    assert "'Describe the image.'" in error.fix and "docs/data.md" in error.fix


def test_where_there_are_no_captions_a_question_for_all_experiments_is_in_nobodys_way(project):
    for_all(project, caption_prompt="What?", image_first=True)
    write_experiment("mine", raw_data=None, image_root=None, webdatasets="own")
    check_inputs(Paths(load_settings("mine")), trains=False)


@pytest.mark.parametrize("page", ["data.md", "data_zh.md"])
def test_the_documents_way_to_another_question(project, page):
    for name in ("a", "b"):
        with tarfile.open(project / f"tars/{name}.tar") as tar:
            tar.extractall(project / "unpacked" / name, filter="data")
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    exec(code[1], {})
    raw = Raw(project / "made", [])
    for part in plan_ranges(project / "captions.jsonl", 10**6):
        convert_range(
            project / "captions.jsonl", project / "unpacked", raw.wds, raw.parts, "subtaskdata", part,
            reading=Reading(caption_prompt="What?"),
        )  # fmt: skip
    assert index_webdataset(raw.wds, raw.parts)["rejected"] == 0
    said = [[message["content"] for message in sample.messages] for sample in read_split(raw.wds, "train")]
    assert said == [["<image>\nWhat?", "A leaf of a."], ["<image>\nWhat?", "A leaf of b."]]
