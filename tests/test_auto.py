"""What is `auto` is worked out from the data and the machine, and explained."""

import json
import os
from fnmatch import fnmatch
from pathlib import Path

import pytest

from helpers.experiments import pretend_gpus, sound_project
from llava_sft import machine
from llava_sft.data.order import GlobalOrder, SourceLengths
from llava_sft.errors import SettingsError
from llava_sft.gpu_stack import driver, gpu_name
from llava_sft.inputs import check_inputs
from llava_sft.machine import gpu_count, require_able_gpus
from llava_sft.paths import Paths
from llava_sft.settings.layers import load_settings
from llava_sft.settings.resolve import (
    Epoch,
    ResolvedSettings,
    auto_num_workers,
    auto_save_interval,
    auto_train_iters,
    resolve,
    warnings,
)


@pytest.fixture
def project(tmp_path, monkeypatch):
    return sound_project(tmp_path, monkeypatch)


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


@pytest.mark.parametrize(
    ("steps", "interval"), [(3_200, 200), (1_000, 100), (1, 1), (16, 16), (30, 20), (321, 50), (1_300, 100)]
)
def test_save_interval_gives_at_most_16_checkpoints_and_few_in_a_short_run(steps, interval):
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
    assert (
        "auto"
        not in {
            key: value for key, value in resolved.dump().items() if key not in ("report_language", "attention")
        }.values()
    )
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
    order = GlobalOrder([SourceLengths([250] * 20_000)], 1000, 100, 1)
    resolved, why = resolve(settings, 20_000, epoch=Epoch(100, *order.first_pass()))
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


def test_selective_recomputation_is_refused_by_name_and_runs_that_used_it_go_on_with_full(project):
    with pytest.raises(SettingsError, match="recompute_language: 'selective': input should be 'none' or 'full'"):
        load_settings("mine", {"recompute_language": "selective"})
    resolved, _ = resolve(load_settings("mine"), train_samples=1_000)
    kept = resolved.dump() | {"recompute_language": "selective"}
    assert ResolvedSettings.model_validate(kept).recompute_language == "full"


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 4), ("0,3", 2), ("", 0), ("-1", 0), ("1,-1,2", 1), ("NoDevFiles", 0), ("GPU-0001", 1), (" 2 , 0", 2)],
)
def test_gpus_are_those_that_are_visible(monkeypatch, visible, count):
    pretend_gpus(monkeypatch, 4, visible)
    assert gpu_count() == count


@pytest.mark.parametrize(
    ("here", "visible", "rule", "fix"),
    [
        (1, "7", "this machine has 1, numbered from 0", "export CUDA_VISIBLE_DEVICES=0, or unset it"),
        (2, "0,1,2", "2: this machine has 2", "export CUDA_VISIBLE_DEVICES=0,1, or unset it"),
        (2, "0,0", "0: named twice", "CUDA_VISIBLE_DEVICES=0,1"),
        (2, "0;1", "neither the number", "CUDA_VISIBLE_DEVICES=0,1"),
        (2, "all", "neither the number", "CUDA_VISIBLE_DEVICES=0,1"),
        (2, "-2", "neither the number", "CUDA_VISIBLE_DEVICES=0,1"),
        (2, "cuda:1", "neither", "CUDA_VISIBLE_DEVICES=0,1"),
        (2, "0,GPU-0007", "GPU-0007: no such GPU here: nvidia-smi -L", "CUDA_VISIBLE_DEVICES=0,1"),
        (2, "MIG-1234", "no such GPU here", "CUDA_VISIBLE_DEVICES=0,1"),
        (0, "0", "there is no GPU here", "unset CUDA_VISIBLE_DEVICES to train on the CPU"),
        (0, "GPU-0000", "there is no GPU here", "unset CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_cuda_would_pass_over_in_silence_is_refused(project, monkeypatch, here, visible, rule, fix):
    pretend_gpus(monkeypatch, here, visible)
    check_inputs(Paths(load_settings("mine")))  # another machine trains: a login node, say
    check_inputs(Paths(load_settings("mine", {"gpus_per_node": 0})), elsewhere=False)
    resolve(load_settings("mine", {"gpus_per_node": 0}), train_samples=100)
    with pytest.raises(SettingsError, match="CUDA_VISIBLE_DEVICES is"):  # `auto` is their number
        resolve(load_settings("mine"), train_samples=100)
    with pytest.raises(SettingsError) as raised:
        check_inputs(Paths(load_settings("mine")), elsewhere=False)
    error = raised.value
    assert error.problem == f"CUDA_VISIBLE_DEVICES is {visible!r}: {error.problem.partition("': ")[2]}"
    assert rule in error.problem and fix in error.fix and "make gpu" not in error.fix


def test_gpus_are_listed_by_nvidia_smi_with_their_parts(tmp_path, monkeypatch):
    listing = "GPU 0: NVIDIA H100 (UUID: GPU-11-aa)\n  MIG 1g.10gb Device 0: (UUID: MIG-22-bb)\nGPU 1: NVIDIA H100 (UUID: GPU-33-cc)"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{listing}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(machine, "_installed_gpus", machine._installed_gpus.__wrapped__)
    for visible, count in ((None, 2), ("MIG-22-bb", 1), ("MIG-GPU-11-aa/1/0", 1), ("GPU-3,0", 2)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible) if visible else monkeypatch.delenv(
            "CUDA_VISIBLE_DEVICES", False
        )
        assert gpu_count() == count


@pytest.mark.parametrize(
    ("script", "count"),
    [
        ("echo 'GPU 0: A (UUID: GPU-1)'; echo 'WARNING: infoROM is corrupted at gpu 0000:3B:00.0'; exit 14", 1),
        ("echo 'Unable to determine the device handle: Unknown Error'; echo 'GPU 1: A (UUID: GPU-2)'; exit 15", 1),
        ("echo 'No devices were found'; exit 6", 0),
        (
            'echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver. Make sure …"; exit 9',
            0,
        ),
    ],
)
def test_a_gpu_with_a_fault_hides_none_that_nvidia_smi_lists(tmp_path, monkeypatch, script, count):
    (tmp_path / "nvidia-smi").write_text(
        f'#!/bin/sh\n[ "$1" = -L ] || {{ echo "A, 590.1"; echo "WARNING: infoROM"; exit 14; }}\n{script}\n'
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "_installed_gpus", machine._installed_gpus.__wrapped__)
    assert gpu_count() == count and (gpu_name(), driver()) == ("A", "590.1")


def test_a_gpu_of_wsl_counts_as_one(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    there: list[str] = []
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [Path(name) for name in there if fnmatch(name, pattern)])
    assert gpu_name() is None
    there.append("dxg")
    assert gpu_name()


def test_gpus_that_no_program_lists_are_taken_by_their_numbers(monkeypatch):
    monkeypatch.setattr(machine, "_installed_gpus", lambda: None)  # a container with /dev/nvidia0, and no nvidia-smi
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert gpu_count() == 1


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
    notes = warnings(load_settings("mine", {"lr": lr, "min_lr": 0}), untrained, 64)
    assert bool(notes) == warned
    assert all("5e-6" in note and "2e-5" in note for note in notes)
