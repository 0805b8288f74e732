"""A project folder with one sound experiment, which a test may spoil."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import yaml

from helpers import MODELS, ROOT
from llava_sft import machine
from llava_sft.errors import SftError
from llava_sft.inputs import check_inputs
from llava_sft.paths import Paths
from llava_sft.settings import layers
from llava_sft.settings.layers import load_settings

EXPERIMENT = "config/experiments/mine.yaml"
NO_TENSORS = struct.pack("<Q", 2) + b"{}"  # a file of weights that ends where its header says
SOUND = {"raw_data": "raw.jsonl", "image_root": "images", "load": "hf"}


def sound_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder from here on: the real config.yaml and model configs, and one sound experiment `mine`; no GPU."""
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
    (tmp_path / "hf/model.safetensors").write_bytes(NO_TENSORS)
    write_experiment("mine")
    return tmp_path


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None = None) -> None:
    """As if so many GPUs were in this machine, and nothing looked at them."""
    monkeypatch.setattr(machine, "_installed_gpus", lambda: [f"GPU-{number:04d}-aa" for number in range(count)])
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def write_experiment(name, **settings):
    values = {key: value for key, value in {**SOUND, **settings}.items() if value is not None}
    (layers.CONFIG_DIR / f"experiments/{name}.yaml").write_text(yaml.safe_dump(values))


def mistake(name="mine", **overrides) -> SftError:
    """What the user is told who asks for this experiment."""
    with pytest.raises(SftError) as error:
        check_inputs(Paths(load_settings(name, overrides)))
    assert error.value.fix
    return error.value
