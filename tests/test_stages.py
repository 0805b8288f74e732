"""Stages as layers under an experiment, the schema and shipped config of the settings, and the template of an experiment."""

import json
import subprocess

import pytest

from helpers import ROOT
from llava_sft.errors import SettingsError
from llava_sft.files import read_json
from llava_sft.settings.layers import CONFIG_DIR, load_settings
from llava_sft.settings.resolve import part_rates, resolve, warnings
from llava_sft.settings.schema import STAGES, Settings
from write_schema import config_yaml, json_schema


@pytest.fixture
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize(
    ("stage", "name", "expected"),
    [
        ("align", "stage1_align_chemistry", {"trainable_modules": ["adapter"], "weight_decay": 0}),
        ("mid", "stage1.5_mid_chemistry", {"weight_decay": 0.01, "adam_beta2": 0.95}),
        ("sft", "stage2_sft_chemistry", {"weight_decay": 0, "adam_beta2": 0.99, "lr_warmup_fraction": 0.002}),
    ],
)
def test_a_stage_is_a_layer_under_the_experiment(at_root, stage, name, expected):
    settings = load_settings("chemistry", {"stage": stage})
    assert settings.run_name == name and stage in STAGES
    assert {key: getattr(settings, key) for key in expected} == expected
    assert settings.lr == 5e-6 and settings.origin["lr"].endswith("chemistry.yaml")  # the experiment's word is the last
    assert settings.origin["weight_decay"] == f"config/stages/{stage}.yaml"
    assert load_settings("agriculture", {"stage": "align", "lr": 3e-4}).origin["lr"] == "--config"


def test_the_published_rates_of_the_stages(at_root):
    rates = {stage: Settings.model_validate(stage_values(stage)).lr for stage in STAGES}
    assert rates == {"align": 1e-4, "mid": 1e-5, "sft": 1e-5}


def stage_values(stage):
    import yaml

    layers = (CONFIG_DIR / "config.yaml", CONFIG_DIR / f"stages/{stage}.yaml")
    values = {key: value for path in layers for key, value in yaml.safe_load(path.read_text()).items()}
    return values | {"experiment": "x", "stage": stage, "raw_data": "x"}


def test_every_part_has_its_rate_and_ends_at_the_same_share_of_it(at_root):
    settings = load_settings("agriculture", {"lr_vision": 2e-6, "trainable_modules": ["adapter", "vision_model"]})
    resolved, _ = resolve(settings, 1000)
    rates = part_rates(resolved)
    assert rates.keys() == {"adapter", "vision_model"}
    assert rates["adapter"] == pytest.approx((1e-5, 1e-6)) and rates["vision_model"] == pytest.approx((2e-6, 2e-7))
    with pytest.raises(SettingsError, match="vision_model is not trained"):
        load_settings("agriculture", {"lr_vision": 2e-6, "stage": "align"})


def test_the_schema_of_the_settings_is_current_and_knows_every_setting(at_root):
    assert read_json(CONFIG_DIR / "schema.json") == json.loads(json.dumps(json_schema())), "run `make schema`"
    assert "# yaml-language-server: $schema=../schema.json" in (CONFIG_DIR / "experiments/TEMPLATE.yaml").read_text()
    undescribed = [name for name, entry in json_schema()["properties"].items() if "description" not in entry]
    assert undescribed == []
    assert (CONFIG_DIR / "config.yaml").read_text(encoding="utf-8") == config_yaml(), "run `make schema`"


def test_make_experiment_gives_a_file_that_only_lacks_the_data(tmp_path):
    import shutil

    shutil.copytree(ROOT / "config", tmp_path / "config")
    shutil.copy(ROOT / "Makefile", tmp_path)

    def make(name):
        command = ["make", "-s", "experiment", f"NAME={name}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert make("leaves").returncode == 0
    text = (tmp_path / "config/experiments/leaves.yaml").read_text()
    assert "data/leaves/train.jsonl" in text and "NAME" not in text
    again = make("leaves")
    assert again.returncode != 0 and "is there already" in again.stderr
    assert make("").returncode != 0


def test_lora_trains_parts_that_are_trained_beside_weights_that_are_kept(at_root):
    settings = load_settings("agriculture_lora")
    assert settings.trained.whole == () and settings.trained.by_pairs == ("language_model",)
    with_tower = load_settings("agriculture", {"lora_rank": 8, "lr": 1e-4})
    assert with_tower.trained.whole == ("vision_model", "adapter") and with_tower.trained.by_pairs == (
        "language_model",
    )
    assert "set lr_vision" in warnings(with_tower, False)[0]
    assert warnings(load_settings("agriculture", {"lora_rank": 8, "lr": 1e-4, "lr_vision": 1e-5}), False) == []
    low = warnings(load_settings("agriculture", {"lora_rank": 8}), False)
    assert len(low) == 1 and "lr 1e-05 is low for LoRA" in low[0]
    with pytest.raises(SettingsError, match="lora_modules: language_model is not trained") as refused:
        load_settings("agriculture", {"lora_rank": 8, "stage": "align"})
    assert refused.value.fix == "add language_model to trainable_modules, or lora_modules: [adapter]"
    with pytest.raises(SettingsError, match="lora_rank: load is random"):
        load_settings("agriculture", {"lora_rank": 8, "load": "random"})
