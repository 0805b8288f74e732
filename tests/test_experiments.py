"""Experiments side by side: names, folders and files of the user's that none of them may touch."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from helpers import MODELS, ROOT
from helpers.experiments import EXPERIMENT, mistake, sound_project, write_experiment
from llava_sft.embedded import check_demo
from llava_sft.errors import DataError, SettingsError
from llava_sft.inputs import check_inputs
from llava_sft.paths import Paths
from llava_sft.settings import layers
from llava_sft.settings.layers import load_settings
from llava_sft.settings.resolve import (
    resolve,
)
from llava_sft.workflow import Workflow, overview


@pytest.fixture
def project(tmp_path, monkeypatch):
    return sound_project(tmp_path, monkeypatch)


# --- the experiments that are not asked for --------------------------------------------------------------------------


def test_a_mistake_in_an_experiment_that_is_not_asked_for_disturbs_nobody(project, capsys):
    write_experiment("a_first", lr="fast")
    write_experiment("mine_too", lr="fast")
    flow = Workflow(
        {"run_tag": "too"}, []
    )  # its run is `stage2_sft_mine_too`: no mix-up with the experiment of that name
    assert Paths(load_settings("mine", {"run_tag": "too"})).report in flow.target("train", "mine")(None)
    assert flow.path("run_dir")(SimpleNamespace(run_name="stage2_sft_mine_too")).name == "stage2_sft_mine_too"
    assert flow.checkpoint_folders(SimpleNamespace(checkpoint="hf")) == ["hf"]
    with pytest.raises(SystemExit) as end:
        flow.target("train", "a_first")(None)
    assert end.value.code == 1
    assert "config/experiments/a_first.yaml: lr: 'fast'" in capsys.readouterr().err


def conversions() -> dict[str, str]:
    """The job of each converted checkpoint, as a job on another machine finds it: by its wildcards, no target asked."""
    names = {Workflow({}, []).paths(name).converted.name for name in layers.experiments()}
    stems = [name.removesuffix("_mcore_tp1_pp1") for name in names]
    return {stem: Workflow({}, []).checkpoint_job(SimpleNamespace(checkpoint=stem, exp_dir="output")) for stem in stems}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"model": "8b"}, {"model": "4b"}),
        ({"load": "a/hf"}, {"load": "b/hf"}),
        ({"load_parts": {"vision": "a/hf"}}, {"load_parts": {"vision": "b/hf"}}),
        ({"tokenizer": "a/hf"}, {}),
    ],
)
def test_experiments_that_convert_one_name_from_different_things_get_a_folder_each(project, first, second):
    for folder in ("a", "b"):
        shutil.copytree(project / "hf", project / folder / "hf")
    write_experiment("a_first", **first)
    write_experiment("mine", **second)
    made = conversions()
    assert len(made) == 2 and len(set(made.values())) == 2
    write_experiment("mine", **first)  # the same for both: one folder, under its plain name
    assert len(made := conversions()) == 1 and not any("-" in stem for stem in made)


def test_a_converted_folder_keeps_its_name_when_another_experiment_takes_that_name_too(project):
    shutil.copytree(project / "hf", project / "a/hf")
    made = project / "output/checkpoints/hf_mcore_tp1_pp1"
    made.mkdir(parents=True)
    (made / "converted.json").write_text(json.dumps({"source": "hf"}))
    write_experiment("a_first", load="a/hf")
    assert conversions()["hf"] == "hf --model 4b"


def test_an_experiment_with_the_wrong_model_does_not_rename_the_checkpoint_of_one_with_the_right_one(project):
    def model(name, size):
        sizes = yaml.safe_load((MODELS / "tiny.yaml").read_text())
        sizes["language"]["num_layers"] = size
        (project / f"config/models/{name}.yaml").write_text(yaml.safe_dump(sizes))

    model("right", 2), model("wrong", 3)
    from llava_sft.model.config import load_model_config

    hf = load_model_config(project / "config/models/right.yaml").to_hf_config()
    (project / "hf/config.json").write_text(json.dumps(hf))
    write_experiment("a_first", model="wrong")
    write_experiment("mine", model="right")
    assert conversions()["hf"] == "hf --model right"


def test_two_experiments_with_one_run_directory_are_refused_by_name(project):
    write_experiment("mine", run_tag="too")
    write_experiment("mine_too")
    with pytest.raises(SettingsError, match=r"(?s)mine_too and mine: both runs would be .*fix: rename"):
        Workflow({}, []).paths("mine_too")


# --- files of the user's ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"raw_data": "output/data/other/webdatasets/subtaskdata-00000.jsonl"},
        {"raw_data": "output/stage2_sft_other_results/report.html"},
        {"heldout_data": "output/data/mine/dataset.json"},
        {"image_root": "output/data/other/webdatasets"},
        {"raw_data": None, "image_root": None, "webdatasets": "output/data/mine/webdatasets"},
        {"raw_data": None, "image_root": None, "webdatasets": "output/data/other/webdatasets"},
        {"raw_data": "link/data/other/raw.jsonl"},
        {"raw_data": None, "image_root": None, "sources": [{"path": "elsewhere/data/other/*.jsonl"}]},
    ],
)
def test_what_a_user_brings_may_not_lie_where_the_workflow_writes(project, settings):
    (project / "link").symlink_to("output")
    write_experiment("other", exp_dir="elsewhere")
    write_experiment("mine", **settings)
    with pytest.raises(SettingsError, match="which the workflow makes and deletes"):
        Workflow({}, []).paths("mine")


@pytest.mark.parametrize(
    "settings", [{"load": "output/stage2_sft_other_results/huggingface"}, {"raw_data": "output/r"}]
)
def test_an_export_may_be_loaded_and_other_folders_of_the_output_hold_what_the_user_likes(project, settings):
    write_experiment("other")
    write_experiment("mine", **settings)
    assert Workflow({}, []).paths("mine")


@pytest.mark.parametrize("name", ["train.jsonl", "images/PRECIOUS.txt", "LLaVA-OneVision-1.5-tiny/notes.txt"])
def test_the_demo_is_not_written_over_files_that_it_did_not_make(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(DataError, match="did not make this file"):
        check_demo(tmp_path)


# --- names ------------------------------------------------------------------------------------------------------------

ODD = ["a(b", "a b", "{x}", "it's", 'q"q', "$HOME", "-n", ".hidden", "x" * 200, "a\nb", "a*"]


def test_a_file_with_an_odd_name_disturbs_no_other_and_is_named_with_the_rule(project, capsys):
    shutil.copy(project / EXPERIMENT, project / "config/experiments/数据-2.v1.yaml")
    for name in ODD:
        shutil.copy(project / EXPERIMENT, project / f"config/experiments/{name}.yaml")
    flow = Workflow({}, ["data_mine"])
    assert flow.experiments == ["mine", "数据-2.v1"]
    assert re.fullmatch(flow.pattern("experiment"), "数据-2.v1")
    assert "Left out: '$HOME'" in overview(flow)
    for name in ODD:
        with pytest.raises(SystemExit):
            Workflow({}, [f"data_{name}"])
        said = capsys.readouterr().err
        assert "not a name for an experiment" in said and "fix: rename the file" in said and len(said) < 1000


def test_wildcards_match_the_folders_of_the_settings_and_nothing_beside_them(project):
    write_experiment("other", exp_dir="out put/[1]+x$")
    flow = Workflow({}, [])
    for value in ("output", "out put/[1]+x$"):
        assert re.fullmatch(flow.pattern("exp_dir"), value)
    for value in ("mine", "output/x", "outputs", "out put/1$x", ""):
        assert not re.fullmatch(flow.pattern("exp_dir"), value)
    assert not re.fullmatch(flow.pattern("run_name"), "stage2_sft_mine_results")
    assert flow.pattern("demo") == "(?!)"  # no embedded experiment here


def test_the_demo_moves_with_exp_dir(monkeypatch):
    monkeypatch.chdir(ROOT)
    flow = Workflow({"exp_dir": "else where"}, [])
    paths = flow.paths("vqa")
    check_inputs(paths)
    assert paths.sources[0].files["subtaskdata"] == [Path("else where/demo/train.jsonl")]
    assert str(paths.demo_done) == "else where/demo.done.json" and flow.pattern("demo") == re.escape("else where")


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 5, 8, 64])
def test_the_demo_trains_on_any_number_of_gpus(monkeypatch, gpus):
    monkeypatch.chdir(ROOT)
    settings = load_settings("vqa", {"gpus_per_node": gpus})
    check_inputs(Paths(settings))
    resolved, _ = resolve(settings, train_samples=19_200)
    replicas = max(1, gpus)
    assert resolved.global_batch_size == resolved.micro_batch_size * replicas >= 32
    if gpus in (0, 1):
        assert (resolved.micro_batch_size, resolved.global_batch_size) == (32, 32)


def test_data_alone_needs_neither_batches_that_fit_nor_a_checkpoint(project):
    write_experiment("mine", global_batch_size=33, micro_batch_size=8, load="none")
    flow = Workflow({}, [])
    assert flow.target("data", "mine")(None) and flow.target("inspect", "mine")(None)
    with pytest.raises(SystemExit):
        flow.target("preflight", "mine")(None)


def test_sources_are_named_by_their_files_and_the_name_that_stands_twice_is_told(project):
    names = ("first.jsonl", "my data (2).jsonl", "more/my data (2).jsonl")
    for name in names:
        (project / name).parent.mkdir(exist_ok=True)
        shutil.copy(project / "raw.jsonl", project / name)
    write_experiment("mine", raw_data=None, image_root=None, sources=[{"path": name} for name in names[:2]])
    assert [source.name for source in Paths(load_settings("mine", {})).sources] == ["first", "my_data_2_"]
    write_experiment("mine", raw_data=None, image_root=None, sources=[{"path": name} for name in names])
    assert "2 would be named 'my_data_2_'" in mistake().problem


def test_shards_that_exist_keep_their_cut_where_new_ones_are_cut_by_images(project):
    row = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}],
    }
    (project / "raw.jsonl").write_text((json.dumps(row) + "\n") * 30_000)
    size = (project / "raw.jsonl").stat().st_size
    cut = Paths(load_settings("mine", {})).shards
    assert len(cut) > 2
    assert len(Paths(load_settings("mine", {"shard_bytes": 8 << 20})).shards) == 1
    stats = project / "output/data/mine/webdatasets.parts/subtaskdata-00000.stats.json"
    stats.parent.mkdir(parents=True)
    stats.write_text(json.dumps({"raw": {"path": "raw.jsonl", "start": 0, "end": size}}))
    assert len(Paths(load_settings("mine", {})).shards) == 1
