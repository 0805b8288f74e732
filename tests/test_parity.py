"""The gate of the export: a right export passes and is named, a wrong one is not, and the figures say why."""

import json
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file, save_file

from faults import server
from faults.project import environment
from helpers import ROOT
from helpers.models import MAX_PIXELS, MIN_PIXELS
from helpers.webdatasets import picture
from llava_sft.checkpoint.convert import hf2mcore, mcore2hf
from llava_sft.data.records import Sample
from llava_sft.errors import CheckpointError
from llava_sft.evaluation import parity
from llava_sft.evaluation.parity import check_parity
from llava_sft.run.layout import SIDECARS


@pytest.fixture(scope="module")
def mcore(small_checkpoint, small_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parity") / "small_mcore_tp1_pp1"
    hf2mcore(small_checkpoint, folder, small_model)
    return folder


@pytest.fixture(scope="module")
def megatron(tmp_path_factory):
    """A process that has Megatron imported, of which the Megatron half of a comparison is forked."""
    with server.Servers(ROOT, tmp_path_factory.mktemp("servers"), environment(), ("modules",)) as servers:
        servers.wait()
        yield servers


@pytest.fixture
def data(monkeypatch, megatron):
    """Held-out samples: one image each, as in the demo; those with 0 and 3 images have to be made."""
    messages = [
        {"role": "user", "content": "<image>\nWhich digit is this?"},
        {"role": "assistant", "content": "It is 7."},
    ]
    samples = [Sample(f"s{i}", messages, [picture(size=(60 + 30 * i, 90))], {}) for i in range(3)]
    monkeypatch.setattr(parity, "read_split", lambda folder, split: samples if split == "val" else [])
    monkeypatch.setenv(server.MODULES, str(megatron.place / "modules"))
    monkeypatch.setattr(subprocess, "Popen", server.Popen)


def export(mcore, model, target, where="cpu", spoil=lambda folder: None):
    def gate(folder):
        spoil(folder)
        check_parity(mcore / "release", model, target, where, folder)

    return mcore2hf(mcore / "release", target, mcore / SIDECARS, model, MIN_PIXELS, MAX_PIXELS, gate=gate)


def test_a_right_export_is_named_and_its_figures_are_kept(mcore, small_model, data, tmp_path):
    export(mcore, small_model, tmp_path / "hf")
    result = json.loads((tmp_path / "hf/parity.json").read_text())
    assert result["passed"] and result["dtype"] == "float32"
    assert [row["images"] for row in result["samples"]] == [0, 1, 3]
    assert len({tuple(grid) for grid in result["samples"][2]["grids"]}) == 3
    assert max(row["logits"] for row in result["samples"]) <= 1e-5
    assert [row["greedy"] for row in result["samples"]] == [0, 0, 0]


def other_weights(folder):
    weights = load_file(folder / "model.safetensors")
    first, second = (f"model.visual.blocks.{i}.mlp.fc1.bias" for i in range(2))
    weights[first], weights[second] = weights[second], weights[first]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_eps(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 1e-4
    (folder / "config.json").write_text(json.dumps(config))


def test_a_wrong_export_gets_no_name(mcore, small_model, data, tmp_path):
    """The faults that differ least: biases of two layers in each other's place, another LayerNorm eps."""
    for spoil in (other_weights, other_eps):
        with pytest.raises(CheckpointError, match="does not answer as the Megatron model") as error:
            export(mcore, small_model, tmp_path / "hf", spoil=spoil)
        print(error.value.problem)
        assert list(tmp_path.iterdir()) == []


def test_bf16_passes_within_its_bounds(mcore, small_model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(parity, "computing_dtype", lambda *args: "bfloat16")
    export(mcore, small_model, tmp_path / "hf")
    result = json.loads((tmp_path / "hf/parity.json").read_text())
    print(result)
    assert result["passed"] and result["dtype"] == "bfloat16"


def test_skipping_is_loud_and_written_down(mcore, small_model, tmp_path, capsys):
    export(mcore, small_model, tmp_path / "hf", where="skip")
    assert "parity is not checked" in capsys.readouterr().out
    assert json.loads((tmp_path / "hf/parity.json").read_text())["passed"] is None


def test_float32_is_used_where_it_fits(small_model, monkeypatch):
    assert parity.computing_dtype(small_model, "bfloat16", "cpu") == "float32"
    monkeypatch.setattr(parity, "parameter_count", lambda model: 10**14)
    assert parity.computing_dtype(small_model, "bfloat16", "cpu") == "bfloat16"


def test_data_without_any_image_still_gives_three_cases(small_checkpoint, tmp_path, monkeypatch):
    messages = [{"role": "user", "content": "Which digit is this?"}, {"role": "assistant", "content": "It is 7."}]
    monkeypatch.setattr(parity, "read_split", lambda folder, split: [Sample("s", messages, [], {})])
    cases = list(parity.make_cases(small_checkpoint, tmp_path))
    assert [len(case["grids"]) for case in cases] == [0, 1, 3]
    assert all(isinstance(case["ids"], torch.Tensor) for case in cases)
    monkeypatch.setattr(parity, "read_split", lambda folder, split: [])
    with pytest.raises(CheckpointError, match="no sample"):
        list(parity.make_cases(small_checkpoint, tmp_path))


def test_the_answer_is_the_greedy_one_whatever_the_start_folder_says_of_generating(
    small_checkpoint, tmp_path, monkeypatch
):
    messages = [{"role": "user", "content": "Which digit is this?"}, {"role": "assistant", "content": "It is 7."}]
    monkeypatch.setattr(parity, "read_split", lambda folder, split: [Sample("s", messages, [], {})])
    cases = list(parity.make_cases(small_checkpoint, tmp_path))[:1]
    plain = parity.run_export(small_checkpoint, cases, "cpu", "float32")[0]["reply"]
    shutil.copytree(small_checkpoint, tmp_path / "other")
    settings = {"repetition_penalty": 9.0, "do_sample": True, "temperature": 5.0}
    (tmp_path / "other/generation_config.json").write_text(json.dumps(settings))
    assert torch.equal(parity.run_export(tmp_path / "other", cases, "cpu", "float32")[0]["reply"], plain)
