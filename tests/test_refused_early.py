"""What would only fail later, asked before any job: GPUs that are not here, weights that cannot be read."""

import contextlib
import errno
import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.experiments import mistake, pretend_gpus, sound_project, write_experiment
from llava_sft.checkpoint.base import note_base
from llava_sft.checkpoint.verify import content_of
from llava_sft.errors import SettingsError, of_file
from llava_sft.inputs import check_inputs
from llava_sft.model.lora import Lora
from llava_sft.paths import Paths
from llava_sft.settings.layers import load_settings
from llava_sft.workflow import Workflow, where_jobs_run


@pytest.fixture
def project(tmp_path, monkeypatch):
    return sound_project(tmp_path, monkeypatch)


# --- what this machine cannot do -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "here", "problem", "fix"),
    [
        ({"gpus_per_node": 8}, 1, " has 1", "gpus_per_node: 1"),
        ({"gpus_per_node": 2}, 0, " has 0", "gpus_per_node: 0 trains on the CPU"),
        ({"fp8": "blockwise"}, 0, "fp8: blockwise needs a GPU", "fp8: none"),
        ({"fp8": "tensorwise", "gpus_per_node": 0}, 2, "fp8: tensorwise needs a GPU", "fp8: none"),
        ({"bf16": False}, 1, "bf16 is false and gpus_per_node is 1", "bf16: true"),
        ({"parity": "gpu"}, 0, "parity: gpu needs a GPU, and there is none here", "parity: cpu"),
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
    assert " has 0\n" in capsys.readouterr().err
    Workflow({}, []).target("data", "mine")(None)


def test_a_profile_that_does_not_say_how_many_gpus_its_nodes_have_is_not_taken_to_mean_this_machine(
    project, monkeypatch, capsys
):
    pretend_gpus(monkeypatch, 2)
    with pytest.raises(SystemExit):
        Workflow({}, [], {"nodes": 1}).target("train", "mine")(None)
    assert "fix: auto_gpus_per_node beside auto_nodes in the profile" in capsys.readouterr().err
    Workflow({}, [], {"nodes": 1}).target("inspect", "mine")(None)
    Workflow({"gpus_per_node": 4}, [], {"nodes": 1}).target("train", "mine")(None)


@pytest.mark.parametrize(
    ("executor", "where", "job"),
    [
        ({"local_exec": True}, "here", ""),
        ({"local_exec": True, "dryrun_exec": True}, "nowhere", ""),
        ({"local_exec": True, "touch_exec": True}, "nowhere", ""),
        (None, "nowhere", ""),  # snakemake --rulegraph
        ({"local_exec": False}, "elsewhere", "nodes=1"),  # a profile of a user's, without auto_nodes
    ],
)
def test_this_machine_is_to_be_able_only_where_snakemakes_jobs_run_here(project, monkeypatch, executor, where, job):
    pretend_gpus(monkeypatch, 0)
    write_experiment("mine", gpus_per_node=8)
    settings = {"local_exec": True, "dryrun_exec": False, "touch_exec": False} | (executor or {})
    plugin = executor and SimpleNamespace(common_settings=SimpleNamespace(**settings))
    flow = Workflow({}, [])
    flow.jobs_run = lambda: where_jobs_run(plugin)
    assert flow.jobs_run() == where
    with pytest.raises(SystemExit) if where == "here" else contextlib.nullcontext():
        flow.target("train", "mine")(None)
    monkeypatch.setattr(flow, "of", lambda wildcards: flow.paths("mine"))
    assert flow.preflight_job(None).partition("--cluster")[2].strip() == job


def disk_of(free: int):
    return lambda path: SimpleNamespace(free=free)


def test_no_room_in_shared_memory_or_for_temporary_files_is_said_before_any_job(project, monkeypatch):
    monkeypatch.setattr("llava_sft.machine.shutil.disk_usage", disk_of(20 << 20))
    with pytest.raises(SettingsError, match="/dev/shm has 20 MiB free") as error:
        check_inputs(Paths(load_settings("mine")), elsewhere=False)
    assert "--shm-size=8g" in error.value.fix
    monkeypatch.setattr("llava_sft.machine.shutil.disk_usage", disk_of(5 << 10))
    assert "for temporary files, has 5 KiB left" in (error := mistake()).problem and "export TMPDIR=" in error.fix

    def nowhere():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    assert "no folder for temporary files" in mistake().problem


@pytest.mark.parametrize("key", ["exp_dir", "raw_data", "heldout_data", "image_root", "load", "tokenizer"])
@pytest.mark.parametrize("below", ["", "/me/output"])
def test_a_path_through_a_link_to_nowhere_is_named_by_the_link(project, key, below):
    Path("scratch").symlink_to("/gone/away")
    error = mistake(**{key: f"scratch{below}"})
    assert error.problem == f"{key}: 'scratch{below}': scratch is a link to /gone/away, which is not there"
    assert "mount that disk, or mend the link" in error.fix
    if key in ("load", "tokenizer"):  # the data alone needs neither
        check_inputs(Paths(load_settings("mine", {key: f"scratch{below}"})), trains=False)


def test_a_file_that_is_a_link_to_nowhere_is_named_by_the_link(project):
    Path("parts").mkdir()
    for name in ("parts/0.jsonl", "config/experiments/linked.yaml"):
        Path(name).symlink_to("/gone/file")
    assert "parts/0.jsonl is a link to /gone/file, which is not there" in mistake(raw_data="parts/*.jsonl").problem
    with pytest.raises(SettingsError, match=r"linked\.yaml is a link to /gone/file, which is not there"):
        load_settings("linked")
    said = of_file(FileNotFoundError(errno.ENOENT, "No such file or directory", "parts/0.jsonl"))
    assert "is a link to /gone/file" in said.problem and "mend the link" in said.fix


def test_a_tokenizer_is_a_folder(project):
    Path("qwen").mkdir()
    Path("qwen/tokenizer.json").touch()
    for step in (9, 10):
        shutil.copytree("hf", f"trained/checkpoint-{step}")
    newest = ("trained", "tokenizer: trained/checkpoint-10")
    for name, fix in (
        newest,
        ("qwen/tokenizer.json", "tokenizer: qwen"),
        ("Qwen/Qwen3-4B", "hf download org/name --exclude"),
    ):
        error = mistake(tokenizer=name)
        assert "no tokenizer.json in it" in error.problem and error.fix.startswith("tokenizer: ") and fix in error.fix


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
    for name in ("model.safetensors", "config.json"):
        (demo / name).touch()
    for name in ("vqa", "mine"):
        write_experiment(name, load=f"{{exp_dir}}/demo/{demo.name}/model.safetensors")
    error = mistake("vqa")
    assert "a file; checkpoints are folders" in error.problem and error.fix == f"load: output/demo/{demo.name}"


@pytest.mark.parametrize(
    ("load", "problem", "fix"),
    [
        ("results", "contains neither", "load: results/huggingface"),
        ("cache/models--org--name", "contains neither", "load: cache/models--org--name/snapshots/1a2b"),
        ("runs", "contains neither", "load: runs/stage2_sft_a"),
        ("untracked", "contains neither", "load: untracked/iter_0000800"),
        ("trained", "contains neither", "load: trained/checkpoint-1500"),
        ("sweep", "contains neither", "load: sweep/a/checkpoint-1000"),
        ("bare", "contains neither", "copy config.json"),
        ("HF-", "no such folder", "did you mean hf? load: a Hugging Face folder"),
        ("results/hugingface", "no such folder", "did you mean results/huggingface?"),
        ("hf/model.safetensors", "a file", "load: hf"),
        ("Model.Q4.GGUF", "a file", "GGUF is a form for inference"),
        ("model.tar.gz", "a file", "unpack it"),
        ("https://huggingface.co/org/name", "no such folder", "load: org/name"),
        ("https://hf-mirror.com/org/name/tree/v1.5", "no such folder", "load: org/name@v1.5"),
        ("huggingface.co/org/name/tree/main", "no such folder", "load: org/name"),
        ("/nowhere/at/all", "no such folder", "load: a Hugging Face folder"),
        ("Random", "no such folder", "did you mean random (untrained weights)? load: a Hugging Face folder"),
        ("RANDOM ", "a blank", "load: RANDOM"),
        ("ranodm", "no such folder", "did you mean random (untrained weights)? "),
        ("None", "no such folder", "did you mean random (untrained weights)? "),
        ("from-scratch", "no such folder", "did you mean random (untrained weights)? "),
        ("hf_", "no such folder", "did you mean hf? "),
        ("auto", "no such folder", "load: a Hugging Face folder"),
    ],
)
def test_a_load_that_is_no_checkpoint_is_answered_with_the_one_that_is_near(project, load, problem, fix):
    for place in ("results/huggingface", "cache/models--org--name/snapshots/1a2b"):
        shutil.copytree(project / "hf", project / place)
    (project / "runs/stage2_sft_a").mkdir(parents=True)
    (project / "runs/stage2_sft_a/latest_checkpointed_iteration.txt").write_text("400")
    for number in (400, 800):
        (project / f"untracked/iter_{number:07d}").mkdir(parents=True)
        (project / f"untracked/iter_{number:07d}/.metadata").touch()
    for name in (
        "trained/checkpoint-500",
        "trained/checkpoint-1000",
        "trained/checkpoint-1500",
        "sweep/a/checkpoint-1000",
        "sweep/b/checkpoint-2000",
    ):
        shutil.copytree(project / "hf", project / name)
    (project / "bare").mkdir()
    for name in ("bare/model.safetensors", "Model.Q4.GGUF", "model.tar.gz"):
        (project / name).touch()
    write_experiment("mine", load=load)
    error = mistake()
    assert problem in error.problem and error.fix.startswith(fix)


def test_random_in_another_spelling_is_named_for_a_part_too_where_a_part_may_be_random(project):
    write_experiment("mine", load_parts={"adapter": "Random"})
    assert mistake().fix == "did you mean random? a folder, or org/name on the hub"
    write_experiment("mine", load_parts={"vision_model": "Random"})
    assert mistake().fix == "a folder, or org/name on the hub"


def test_other_pairs_than_those_of_the_run_to_start_from_are_refused_before_any_job(project):
    for name in ("base/iter_0000001", "run/iter_0000004", "run/huggingface"):
        Path(name).mkdir(parents=True)
        (Path(name) / ("tokenizer.json" if "hugging" in name else ".metadata")).touch()
    base = {"folder": "base/iter_0000001", "load": "base", "fingerprint": content_of(Path("base/iter_0000001"))[0]}
    note_base(Path("run/iter_0000004"), Lora(4, 32, ("language_model",)), base)
    asked = {"load": "run/iter_0000004", "trainable_modules": ["language_model"]}
    check_inputs(Paths(load_settings("mine", asked | {"lora_rank": 4})))
    for rank in (0, 8):
        assert "lora_rank: 4, lora_alpha: 32" in mistake(**asked, lora_rank=rank).fix
