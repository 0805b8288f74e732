"""Settings: what takes precedence, and one clear message for each mistake before anything runs."""

import subprocess
import sys

import pytest
import yaml

from helpers import ROOT
from helpers.experiments import EXPERIMENT, SOUND, mistake, pretend_gpus, sound_project, write_experiment
from llava_sft.errors import CheckpointError, DataError, SettingsError
from llava_sft.settings import layers
from llava_sft.settings.layers import load_settings
from llava_sft.settings.resolve import resolve
from llava_sft.settings.schema import DEFAULTS


@pytest.fixture
def project(tmp_path, monkeypatch):
    return sound_project(tmp_path, monkeypatch)


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
        (
            {"raw_data": None, "image_root": None, "webdatasets": "wds", "columns": {"answer": "a"}},
            ["columns", "read as it is"],
        ),
    ],
)
def test_a_wrong_setting_is_one_message_with_file_key_value_and_fix(project, settings, mentioned):
    write_experiment("mine", **settings)
    error = mistake()
    assert isinstance(error, SettingsError)
    for text in [EXPERIMENT, *mentioned]:
        assert text in str(error)


FOR_ALL = {"columns": {"answer": "a"}, "caption_prompt": "What?", "image_first": True, "heldout_data": "raw.jsonl"}


@pytest.mark.parametrize("key", FOR_ALL)
@pytest.mark.parametrize("data", [{"webdatasets": "wds"}, {"sources": [{"path": "raw.jsonl"}]}])
def test_what_is_given_for_all_experiments_is_refused_for_none_and_what_an_experiment_gives_for_itself_is(
    project, key, data
):
    (project / "config/config.yaml").write_text(yaml.safe_dump({"raw_data": "raw.jsonl", key: FOR_ALL[key]}))
    write_experiment("mine", raw_data=None, **data)
    applies = "sources" in data and key != "heldout_data"
    settings = load_settings("mine")
    stays = applies or key == "caption_prompt"  # tars may hold captions
    assert settings.raw_data is None and getattr(settings, key) == (FOR_ALL[key] if stays else DEFAULTS[key])
    for own, given in (({key: FOR_ALL[key]}, {}), ({}, {key: FOR_ALL[key]})):
        write_experiment("mine", **{"raw_data": None} | data | own)
        if applies:
            load_settings("mine", given)
            continue
        with pytest.raises(SettingsError, match=f"{EXPERIMENT if own else '--config'}: {key}: "):
            load_settings("mine", given)


@pytest.mark.parametrize("text", ["", "# comments alone\n", "null\n", "---\n# x\n...\n", "~"])
def test_a_file_that_says_nothing_is_a_file_without_settings(project, text):
    (project / EXPERIMENT).write_text(text)
    assert "exactly one of raw_data" in mistake().problem
    for name in ("config.yaml", "stages/align.yaml"):
        (project / "config" / name).write_text(text)
    write_experiment("mine")
    assert load_settings("mine", {"stage": "align"}).lr == DEFAULTS["lr"]
    (project / "config/models/4b.yaml").write_text(text)
    assert "4b.yaml: name: Field required" in mistake().problem


def test_names_of_columns_may_have_quotes_as_a_table_may(project):
    for value in ('"q"', "'q'", "“问题”"):
        assert load_settings("mine", {"columns": {"question": value}}).columns == {"question": value}
        sources = [{"path": "raw.jsonl", "columns": {"question": value}}]
        assert load_settings("mine", {"raw_data": None, "sources": sources}).sources[0].columns == {"question": value}
        assert "quotes" in mistake(sources=[{"path": value}]).problem


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
    pretend_gpus(monkeypatch, 3)
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
        (
            {"pipeline_model_parallel_size": 4, "first_stage_layers": 5},
            SettingsError,
            ["first_stage_layers: 5 of 36 layers", "one of 3, 6, 9"],
        ),
        ({"load": ""}, CheckpointError, ["load", "empty", "Hugging Face"]),
        ({"load": "none"}, CheckpointError, ["load", "none", "no such folder"]),
        ({"load": "images"}, CheckpointError, ["load", "images", "config.json"]),
        ({"load": "run/iter_0000400"}, CheckpointError, ["load", "run/iter_0000400", ".metadata"]),
        ({"load": "other"}, CheckpointError, ["other", "qwen2_vl", "llavaonevision1_5"]),
        ({"load": "broken"}, CheckpointError, ["broken", "config.json"]),
        ({"load": "bare"}, CheckpointError, ["bare", "no tokenizer", "tokenizer:"]),
        ({"load": "bare", "tokenizer": "images"}, CheckpointError, ["tokenizer: images", "tokenizer.json"]),
        ({"load": "random"}, CheckpointError, ["random", "tokenizer"]),
        ({"model": "5b"}, SettingsError, ["5b.yaml", "4b, 8b"]),
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
    run = subprocess.run([sys.executable, script, "mine", "--config", "lr=fast"], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("error: --config: lr: 'fast'") and "\n  fix: " in run.stderr
    assert "Traceback" not in run.stderr + run.stdout


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
        (b"%YAML 1.1\n# raw_data", "not valid YAML"),
        (b"%TAG ! raw_data\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_not_what_it_seems_is_refused_with_a_short_message(project, content, said):
    path = project / EXPERIMENT
    path.write_bytes(content if b"raw_data" in content else b"raw_data: raw.jsonl\n" + content)
    error = mistake()
    assert said in str(error) and len(str(error)) < 1000


def test_a_tag_that_is_a_date_or_a_plain_number_stays_as_it_is_written(project):
    for written in ("2026-11-27", "1000", "0o17"):
        (project / EXPERIMENT).write_text(yaml.safe_dump(SOUND) + f"run_tag: {written}\n")
        assert load_settings("mine").run_tag == written
