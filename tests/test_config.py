"""Settings: what is worked out, what takes precedence, and one clear message for each mistake before anything runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from helpers import MODELS, ROOT
from llava_sft.data.order import GlobalOrder, SourceLengths
from llava_sft.embedded import check_demo
from llava_sft.errors import CheckpointError, DataError, SettingsError, SftError
from llava_sft.inputs import check_inputs
from llava_sft.machine import gpu_count, require_able_gpus
from llava_sft.paths import Paths
from llava_sft.settings import layers
from llava_sft.settings.layers import load_settings
from llava_sft.settings.resolve import (
    auto_num_workers,
    auto_save_interval,
    auto_train_iters,
    first_epoch,
    resolve,
    warnings,
)
from llava_sft.workflow import Workflow, overview


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project folder with the real config.yaml and model configs, and one sound experiment `mine`; no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "config/experiments").mkdir(parents=True)
    shutil.copy(ROOT / "config/config.yaml", tmp_path / "config/config.yaml")
    shutil.copytree(ROOT / "config/stages", tmp_path / "config/stages")
    shutil.copytree(MODELS, tmp_path / "config/models")
    (tmp_path / "raw.jsonl").write_text('{"conversations": []}\n')
    (tmp_path / "images").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps({"model_type": "llavaonevision1_5"}))
    (tmp_path / "hf/tokenizer.json").touch()
    write_experiment("mine")
    return tmp_path


SOUND = {"raw_data": "raw.jsonl", "image_root": "images", "load": "hf"}


def write_experiment(name, **settings):
    values = {key: value for key, value in {**SOUND, **settings}.items() if value is not None}
    (layers.CONFIG_DIR / f"experiments/{name}.yaml").write_text(yaml.safe_dump(values))


def mistake(name="mine", **overrides) -> SftError:
    """What the user is told who asks for this experiment."""
    with pytest.raises(SftError) as error:
        check_inputs(Paths(load_settings(name, overrides)))
    assert error.value.fix
    return error.value


# --- auto ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "epochs", "batch", "steps"),
    [
        (100_000, 1, 32, 3_200),  # 3,125
        (10_000, 1, 8, 1_300),  # 1,250
        (50_000, 1, 16, 3_200),  # 3,125
        (100_000, 2, 32, 6_300),  # 6,250
        (320_000, 1, 100, 3_200),  # exact
        (1_000, 0.5, 32, 16),  # 15.6: two digits are left as they are
        (5, 1, 32, 1),
    ],
)
def test_train_iters_are_the_epochs_raised_to_two_digits(samples, epochs, batch, steps):
    assert auto_train_iters(samples, epochs, batch) == steps


@pytest.mark.parametrize(("steps", "interval"), [(3_200, 200), (1_000, 100), (1, 1), (16, 1), (17, 2), (1_300, 100)])
def test_save_interval_gives_at_most_16_checkpoints(steps, interval):
    assert auto_save_interval(steps) == interval
    assert -(-steps // interval) <= 16


@pytest.mark.parametrize(
    ("cores", "processes", "wanted", "workers"),
    [
        (2, 1, None, 1),
        (1, 1, None, 1),
        (64, 1, None, 4),
        (64, 8, None, 4),  # of each process: half of the cores together
        (16, 8, None, 1),
        (64, 1, 900, 2),  # a worker prepares 1,000 tokens/s
        (64, 1, 1500, 4),
        (64, 1, 100, 1),
        (64, 8, 9000, 4),  # more than the cores allow
    ],
)
def test_num_workers_keep_up_on_at_most_half_of_the_cores(cores, processes, wanted, workers):
    assert auto_num_workers(cores, processes, wanted, 1000) == workers


def test_auto_values_are_worked_out_and_explained(project):
    settings = load_settings("mine", {"gpus_per_node": 8, "micro_batch_size": 2, "tensor_model_parallel_size": 2})
    resolved, why = resolve(settings, train_samples=100_000)
    assert resolved.global_batch_size == 4 * 4 * 2  # GPUs / TP, times MBS
    assert resolved.train_iters == 3_200
    assert resolved.save_interval == 200
    assert resolved.bf16 is True
    assert resolved.min_lr == pytest.approx(1e-6)  # lr / 10
    assert {"global_batch_size", "train_iters", "save_interval", "num_workers", "bf16"} <= set(why)
    assert "auto" not in resolved.dump().values()
    assert json.loads(json.dumps(resolved.dump())) == resolved.dump()


def test_nodes_multiply_the_replicas_and_the_cluster_says_what_auto_is(project):
    cluster = {"nodes": 2, "gpus_per_node": 8, "cpus_per_task": 96}
    settings = load_settings("mine", {"tensor_model_parallel_size": 2}, cluster)
    resolved, why = resolve(settings, train_samples=100_000, cores=96)
    assert (resolved.nodes, resolved.nproc_per_node, resolved.global_batch_size) == (2, 8, 4 * 2 * 8 // 2)
    assert resolved.num_workers == 4 and "nodes" not in why and settings.origin["nodes"] == "the profile"
    assert load_settings("mine", {"nodes": 8, "gpus_per_node": 1}, cluster).nodes == 8  # a person comes first
    assert resolve(load_settings("mine"), train_samples=100)[0].nodes == 1
    with pytest.raises(SettingsError, match="data-parallel size 16 = 16"):
        check_inputs(Paths(load_settings("mine", {"global_batch_size": 24}, cluster)))


def test_packed_sequences_are_counted_not_samples(project):
    given = {"seq_length": 1000, "global_batch_size": 10, "packing_buffer_size": 100}
    settings = load_settings("mine", given)
    resolved, why = resolve(
        settings, 20_000, epoch=first_epoch(GlobalOrder([SourceLengths([250] * 20_000)], 1000, 100, 1), 100)
    )
    assert resolved.train_iters == 500  # four samples a sequence
    assert "5,000 packed sequences (of 20,000 samples)" in why["train_iters"]


def test_without_a_gpu_one_process_trains_in_float32(project):
    resolved, _ = resolve(load_settings("mine"), train_samples=1_000)
    assert (resolved.gpus_per_node, resolved.global_batch_size, resolved.bf16) == (0, 4, False)


def test_given_values_are_not_worked_out_anew(project):
    given = {
        "train_iters": 7,
        "save_interval": 3,
        "global_batch_size": 6,
        "num_workers": 5,
        "bf16": True,
        "min_lr": 0.0,
    }
    resolved, why = resolve(load_settings("mine", given), train_samples=1_000)
    assert given.items() <= resolved.dump().items()
    assert why.keys().isdisjoint(given)


@pytest.mark.parametrize(("visible", "count"), [("0,3", 2), ("", 0), ("-1", 0), ("GPU-a", 1)])
def test_gpus_are_those_that_are_visible(monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_count() == count


@pytest.mark.parametrize(
    ("card", "fp8", "problem", "fix"),
    [
        ("Tesla T4, 15360, 3, 7.5", "none", "capability 7.5; training needs 8.0", "gpus_per_node: 0"),
        ("NVIDIA A100-SXM4-80GB, 81920, 3, 8.0", "none", None, None),
        ("NVIDIA A100-SXM4-80GB, 81920, 3, 8.0", "tensorwise", "fp8: tensorwise needs 8.9", "fp8: none"),
        ("NVIDIA GeForce RTX 4090, 24564, 3, 8.9", "tensorwise", None, None),
        ("NVIDIA GeForce RTX 4090, 24564, 3, 8.9", "blockwise", "fp8: blockwise needs 9.0", "fp8: none"),
        ("NVIDIA H100 80GB HBM3, 81559, 3, [N/A]", "blockwise", None, None),
    ],
)
def test_a_gpu_that_is_too_old_is_named_with_what_it_lacks(tmp_path, monkeypatch, card, fp8, problem, fix):
    """In the place of nvidia-smi stands a script: such GPUs are not at hand."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{card}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if problem is None:
        require_able_gpus(1, fp8)
        return
    with pytest.raises(SettingsError) as error:
        require_able_gpus(1, fp8)
    assert problem in error.value.problem and fix in error.value.fix


@pytest.mark.parametrize(
    ("lr", "untrained", "warned"), [(2e-3, False, True), (2e-3, True, False), (1e-5, False, False), (1e-7, False, True)]
)
def test_a_learning_rate_for_another_purpose_is_a_warning_with_advice(project, lr, untrained, warned):
    notes = warnings(load_settings("mine", {"lr": lr, "min_lr": 0}), untrained)
    assert bool(notes) == warned
    assert all("5e-6" in note and "2e-5" in note for note in notes)


# --- precedence ------------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_experiment_and_that_over_the_defaults(project):
    default = load_settings("mine")
    assert (default.lr, default.seed, default.min_lr) == (1e-5, 42, "auto")
    write_experiment("mine", lr=3e-6, seed=7)
    assert (load_settings("mine").lr, load_settings("mine").seed) == (3e-6, 7)
    override = load_settings("mine", {"lr": 5e-6})
    assert (override.lr, override.seed) == (5e-6, 7)


def test_an_exponent_without_a_point_is_a_number_wherever_it_stands(project):
    path = layers.CONFIG_DIR / "experiments/mine.yaml"
    path.write_text(path.read_text() + "lr: 2e-5\nmin_lr: 1e-6\nadam_eps: 1e-8\nclip_grad: 1e0\nepochs: 2e0\n")
    assert yaml.safe_load(path.read_text())["lr"] == "2e-5"  # this is how YAML reads it
    settings = load_settings("mine", {"weight_decay": "1e-2"})
    assert (settings.lr, settings.min_lr, settings.adam_eps, settings.weight_decay) == (2e-5, 1e-6, 1e-8, 1e-2)
    assert (settings.clip_grad, settings.epochs) == (1.0, 2.0)


def test_a_run_tag_may_be_a_number_as_dates_are(project):
    assert load_settings("mine", {"run_tag": 20261125}).run_name == "stage2_sft_mine_20261125"


def test_shipped_experiments_hold_only_possible_settings(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in layers.experiments():
        assert load_settings(name).experiment == name


# --- mistakes --------------------------------------------------------------------------------------------------------

EXPERIMENT = "config/experiments/mine.yaml"


@pytest.mark.parametrize(
    ("settings", "mentioned"),
    [
        ({"learning_rate": 1e-5}, ["'learning_rate'", "unknown"]),
        ({"micro_batchsize": 1}, ["'micro_batchsize'", "did you mean micro_batch_size?"]),
        ({"lr": "fast"}, ["lr", "'fast'", "number"]),
        ({"micro_batch_size": 1.5}, ["micro_batch_size", "1.5", "integer"]),
        ({"micro_batch_size": 0}, ["micro_batch_size", "0", "greater than 0"]),
        ({"train_iters": "soon"}, ["train_iters", "'soon'", "auto", "integer"]),
        ({"stage": "pretrain"}, ["stage", "'pretrain'", "sft"]),
        ({"stage": []}, ["stage", "[]", "sft"]),
        ({"stage": {"sft": 1}}, ["stage", "sft"]),
        ({"lr_warmup_fraction": 1.5}, ["lr_warmup_fraction", "1.5", "less than 1"]),
        ({"run_tag": "my run"}, ["run_tag", "'my run'"]),
        ({"run_tag": "../other"}, ["run_tag", "'../other'"]),
        ({"run_tag": "my_results"}, ["run_tag", "'my_results'"]),
        ({"experiment": "other"}, ["experiment"]),
        ({"NSTEP": 100}, ["'NSTEP'", "did you mean train_iters?"]),
        ({"min_lr": 1e-4}, ["lr: 1e-05", "min_lr 0.0001"]),
        ({"min_pixels": 2_000_000}, ["min_pixels", "2000000", "max_pixels 1000000"]),
        ({"webdatasets": "wds"}, ["raw_data", "webdatasets", "exactly one"]),
        ({"raw_data": None}, ["raw_data", "webdatasets", "exactly one"]),
        ({"raw_data": None, "webdatasets": "wds", "heldout_data": "raw.jsonl"}, ["heldout_data", "remove"]),
    ],
)
def test_a_wrong_setting_is_one_message_with_file_key_value_and_fix(project, settings, mentioned):
    write_experiment("mine", **settings)
    error = mistake()
    assert isinstance(error, SettingsError)
    for text in [EXPERIMENT, *mentioned]:
        assert text in str(error)


def test_a_wrong_setting_of_the_command_line_is_said_to_come_from_there(project):
    assert "--config: lr: 'fast'" in str(mistake(lr="fast"))
    assert "--config: unknown setting 'lrr'" in str(mistake(lrr=1))


@pytest.mark.parametrize(
    ("settings", "rule", "nearest"),
    [
        ({"global_batch_size": 33, "micro_batch_size": 8}, "33 is not a multiple", "32 or 40"),
        ({"global_batch_size": 3, "micro_batch_size": 8}, "3 is not a multiple", "8"),
        ({"global_batch_size": 20, "micro_batch_size": 2, "gpus_per_node": 8}, "20 is not a multiple", "16 or 32"),
        ({"global_batch_size": 20, "gpus_per_node": 8, "tensor_model_parallel_size": 4}, None, None),
    ],
)
def test_a_global_batch_that_can_not_be_split_names_the_two_nearest_before_anything_runs(
    project, settings, rule, nearest
):
    write_experiment("mine", **settings)
    if rule is None:
        load_settings("mine")
        return
    error = mistake()
    assert EXPERIMENT in error.problem
    assert f"global_batch_size: {rule}" in error.problem
    assert error.fix == f"global_batch_size: {nearest}"


def test_a_global_batch_that_does_not_fit_this_machines_gpus_is_refused_when_they_are_known(project, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert mistake(global_batch_size=4).fix == "global_batch_size: 3 or 6"
    with pytest.raises(SettingsError, match="3 or 6"):
        resolve(load_settings("mine", {"global_batch_size": 4}), train_samples=100)


def test_gpus_that_parallel_sizes_do_not_divide_are_refused(project):
    error = mistake(gpus_per_node=6, tensor_model_parallel_size=4)
    assert error.problem.startswith("--config: gpus_per_node: 6 is not a multiple") and "= 4" in error.problem


@pytest.mark.parametrize(
    ("settings", "kind", "mentioned"),
    [
        ({"raw_data": "none.jsonl"}, DataError, ["raw_data", "none.jsonl", "no such file", EXPERIMENT]),
        ({"heldout_data": "none.jsonl"}, DataError, ["heldout_data", "none.jsonl", "no such file"]),
        ({"image_root": "pictures"}, DataError, ["image_root", "pictures", "no such folder"]),
        ({"raw_data": "empty.jsonl"}, DataError, ["empty.jsonl", "empty"]),
        ({"raw_data": None, "image_root": None, "webdatasets": "wds"}, DataError, ["webdatasets", "wds", ".nv-meta"]),
        (
            {"tensor_model_parallel_size": 16},
            SettingsError,
            ["tensor_model_parallel_size: 16", "8 key/value groups", "4b"],
        ),
        ({"pipeline_model_parallel_size": 5}, SettingsError, ["pipeline_model_parallel_size: 5", "36 layers"]),
        ({"load": ""}, CheckpointError, ["load", "empty", "Hugging Face"]),
        ({"load": "none"}, CheckpointError, ["load", "none", "no such folder"]),
        ({"load": "images"}, CheckpointError, ["load", "images", "config.json"]),
        ({"load": "run/iter_0000400"}, CheckpointError, ["load", "run/iter_0000400", ".metadata"]),
        ({"load": "other"}, CheckpointError, ["other", "qwen2_vl", "llavaonevision1_5"]),
        ({"load": "broken"}, CheckpointError, ["broken", "config.json"]),
        ({"load": "bare"}, CheckpointError, ["bare", "no tokenizer", "tokenizer:"]),
        ({"load": "bare", "tokenizer": "images"}, CheckpointError, ["tokenizer: images", "tokenizer.json"]),
        ({"load": "random"}, CheckpointError, ["random", "tokenizer"]),
        ({"model": "5b"}, SettingsError, ["5b.yaml", "4b.yaml"]),
    ],
)
def test_what_the_user_has_to_bring_is_named_when_it_is_not_there(project, settings, kind, mentioned):
    (project / "empty.jsonl").touch()
    (project / "run/iter_0000400").mkdir(parents=True)
    sound = '{"model_type": "llavaonevision1_5"}'
    for name, content in (("other", '{"model_type": "qwen2_vl"}'), ("broken", '{"model_ty'), ("bare", sound)):
        (project / name).mkdir()
        (project / name / "config.json").write_text(content)
    write_experiment("mine", **settings)
    error = mistake()
    assert isinstance(error, kind)
    for text in mentioned:
        assert text in str(error)


def test_a_broken_experiment_file_is_named(project):
    (layers.CONFIG_DIR / "experiments/mine.yaml").write_text("lr: [1")
    assert f"{EXPERIMENT}: not valid YAML" in str(mistake())
    (layers.CONFIG_DIR / "experiments/mine.yaml").write_text("- lr")
    assert f"{EXPERIMENT}: holds a list" in str(mistake())
    assert "config/experiments/nobody.yaml: no such file" in str(mistake("nobody"))


def test_a_mistake_ends_the_script_with_the_message_alone(project):
    script = ROOT / "workflow_scripts/preflight.py"
    run = subprocess.run(
        [sys.executable, script, "mine", "--config", "lr=fast"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: --config: lr: 'fast'") and "\n  fix: " in run.stderr
    assert "Traceback" not in run.stderr + run.stdout


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
    write_experiment("other", exp_dir="out put/[1]+$x")
    flow = Workflow({}, [])
    for value in ("output", "out put/[1]+$x"):
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


# --- files of settings ------------------------------------------------------------------------------------------------


def bomb(levels):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join([*lines, f"raw_data: *a{levels - 1}"]).encode()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (bomb(9), "aliases"),
        (b"x: &x [*x]", "aliases"),
        (b"load: " + b"[" * 5000, "nested too deeply"),
        (b"#" * 2_000_000, "over 1,048,576 bytes"),
        (b"lr: 1e-5\nseed: 1\nlr: 2e-5", "'lr' stands twice, in lines 2 and 4"),
        (b"load:\n\thf", "tab"),
        ("load: café".encode("latin-1"), "not UTF-8"),
        (b"5: x", "5 is no setting's name"),
        (b"load: " + b"x" * 100_000, "longer than a path"),
        (b'load: "a\\0b"', "control character"),
        (b"seed: 017", "another number (to base 8 or 60)"),
        (b"seed: 1:30", "another number"),
        (b"micro_batch_size: yes", "this is yes or no"),
        (b"lr: .inf", "finite"),
        (b"lr: .nan", "finite"),
        (b"seed: " + b"9" * 400, "64 bits"),
        (b"max_minutes: 2026-13-45", "month"),
        (b"exp_dir: a{b}c", "without braces"),
        (b"exp_dir: -n", "begins neither"),
        (b"run_tag: " + b"a" * 150, "at most 100"),
        (b"x: !!python/object/apply:os.system [ls]", "not valid YAML"),
    ],
)
def test_a_file_that_is_not_what_it_seems_is_refused_with_a_short_message(project, content, said):
    path = project / EXPERIMENT
    path.write_bytes(content if b"raw_data" in content else b"raw_data: raw.jsonl\n" + content)
    error = mistake()
    assert said in str(error) and len(str(error)) < 1000


def test_a_tag_that_is_a_date_or_a_plain_number_stays_as_it_is_written(project):
    for written in ("2026-11-27", "1_000", "0o17"):
        (project / EXPERIMENT).write_text(yaml.safe_dump(SOUND) + f"run_tag: {written}\n")
        assert load_settings("mine").run_tag == written.replace("_", "")


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
