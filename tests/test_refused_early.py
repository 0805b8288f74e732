"""What would only fail later, asked before any job: GPUs that are not here, weights that cannot be read."""

import json
import struct
from pathlib import Path

import pytest

from helpers.experiments import mistake, pretend_gpus, sound_project, write_experiment
from llava_sft.errors import SettingsError
from llava_sft.inputs import check_inputs
from llava_sft.paths import Paths
from llava_sft.settings.layers import load_settings
from llava_sft.workflow import Workflow


@pytest.fixture
def project(tmp_path, monkeypatch):
    return sound_project(tmp_path, monkeypatch)


# --- what this machine cannot do -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "here", "problem", "fix"),
    [
        ({"gpus_per_node": 8}, 1, "gpus_per_node is 8, this machine has 1", "gpus_per_node: 1"),
        ({"gpus_per_node": 2}, 0, "gpus_per_node is 2, this machine has 0", "gpus_per_node: 0 trains on the CPU"),
        ({"fp8": "blockwise"}, 0, "fp8: blockwise, and no GPU", "fp8: none"),
        ({"fp8": "tensorwise", "gpus_per_node": 0}, 2, "fp8: tensorwise, and no GPU", "fp8: none"),
        ({"bf16": False}, 1, "bf16 is false, gpus_per_node 1", "bf16: true"),
        ({"parity": "gpu"}, 0, "parity: gpu, and there is no GPU here", "parity: cpu"),
        ({"trackers": ["swanlab"]}, 0, "the package swanlab is not installed", "trackers: []"),
    ],
)
def test_what_this_machine_cannot_do_is_said_before_any_job_and_only_while_it_is_to_be_done(
    project, monkeypatch, settings, here, problem, fix
):
    pretend_gpus(monkeypatch, here)
    monkeypatch.setattr("llava_sft.machine.engine_trouble", lambda: None)
    write_experiment("mine", **settings)
    paths = Paths(load_settings("mine"))
    with pytest.raises(SettingsError) as error:
        check_inputs(paths, elsewhere=False)
    assert problem in error.value.problem and fix in error.value.fix
    for done in (paths.train_done, paths.export_done):
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()
    check_inputs(paths, elsewhere=False)


def test_on_a_cluster_other_machines_have_the_gpus(project, monkeypatch, capsys):
    pretend_gpus(monkeypatch, 0)
    write_experiment("mine", gpus_per_node=8)
    Workflow({}, [], {"nodes": 1, "gpus_per_node": 8}).target("train", "mine")(None)
    with pytest.raises(SystemExit):
        Workflow({}, []).target("train", "mine")(None)
    assert "gpus_per_node is 8, this machine has 0" in capsys.readouterr().err
    Workflow({}, []).target("data", "mine")(None)


# --- the start checkpoint ------------------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"


def cut(folder: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 20)


def indexed(folder: Path) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / names["a"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize(
    ("spoil", "problem", "fix"),
    [
        (lambda hf: (hf / "model.safetensors").write_text(POINTER), "hf/model.safetensors: a pointer of Git LFS", "git -C hf lfs pull"),
        (lambda hf: (hf / "tokenizer.json").write_text(POINTER), "hf/tokenizer.json: a pointer of Git LFS", "lfs pull"),
        (lambda hf: (hf / "config.json").write_text(POINTER), "hf/config.json: a pointer of Git LFS", "lfs pull"),
        (cut, "hf/model.safetensors: damaged or cut off", "copy the file again"),
        (lambda hf: (hf / "model.safetensors").write_bytes(b""), "hf/model.safetensors: damaged or cut off", "copy the file again"),
        (lambda hf: (hf / "model.safetensors").write_text("<!DOCTYPE html>"), "damaged or cut off", "copy the file again"),
        (indexed, "model-00002-of-00002.safetensors is missing", "copy the folder again"),
        (lambda hf: (hf / "model.safetensors").unlink(), "hf: no *.safetensors file in it", "complete Hugging Face folder"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_read_are_named_before_any_job(project, spoil, problem, fix):
    spoil(project / "hf")
    error = mistake()
    assert problem in error.problem and fix in error.fix


def test_a_file_in_the_demos_checkpoint_is_refused_as_any_file_is(project, capsys):
    demo = project / "output/demo/LLaVA-OneVision-1.5-tiny"
    demo.mkdir(parents=True)
    (demo / "model.safetensors").touch()
    for name in ("vqa", "mine"):
        write_experiment(name, load=f"{{exp_dir}}/demo/{demo.name}/model.safetensors")
    error = mistake("vqa")
    assert "a file; checkpoints are folders" in error.problem and error.fix == f"load: output/demo/{demo.name}"
