"""The run directory between trainings: whole and damaged checkpoints, pruning, locks, records, messages. No training."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import MODELS, ROOT
from helpers.runs import VALUES, save
from llava_sft.errors import RunError
from llava_sft.files import write_json
from llava_sft.model.config import load_model_config
from llava_sft.model.lora import Lora
from llava_sft.model.tensors import parameter_count, parameters_by_part
from llava_sft.model.trained import Trained
from llava_sft.preflight.cost import checkpoint_size, expected_bytes, matmul_parameters, training_flops
from llava_sft.run import checkpoints as checkpoints_module
from llava_sft.run.checkpoints import check_disk, iterations_done, newest_whole, prune
from llava_sft.run.layout import checkpoints
from llava_sft.run.lock import give_back, is_running, lock
from llava_sft.run.records import Tail, append, read_jsonl
from llava_sft.run.remedies import exploded, less_memory, lower_lr, out_of_memory, slow_loading
from llava_sft.training.watch import Watch

# --- checkpoints -----------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[500] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda run: flip(run / "iter_0000020/__0_0.distcp"), "does not hold what was written"),
        (lambda run: os.truncate(run / "iter_0000020/__0_0.distcp", 999), "has 999 bytes, 1,000 were written"),
        (lambda run: (run / "iter_0000020/.metadata").unlink(), ".metadata is missing"),
        (
            lambda run: (run / "dataloader/iter_0000020/train_dataloader_dprank000.pt").unlink(),
            "dprank000.pt is missing",
        ),
    ],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before_loudly(tmp_path, harm, said, capsys):
    save(tmp_path, 10)
    save(tmp_path, 20)
    harm(tmp_path)
    assert newest_whole(tmp_path) == 10
    assert iterations_done(tmp_path) == 10  # what Megatron will load
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "DAMAGED" in lines[0] and said in lines[0]
    assert checkpoints(tmp_path) == [10] and (tmp_path / "damaged_iter_0000020").is_dir()


def test_a_save_that_was_killed_is_removed_and_an_empty_tracker_does_no_harm(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20, sealed=False)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("")
    assert newest_whole(tmp_path) == 10
    assert checkpoints(tmp_path) == [10]


def test_a_checkpoint_that_was_finished_but_not_sealed_counts(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20, sealed=False)
    assert newest_whole(tmp_path) == 20
    assert (tmp_path / "iter_0000020/checksums.json").is_file()


def test_without_any_whole_checkpoint_nothing_is_trained_from_the_start_in_silence(tmp_path):
    flip(save(tmp_path, 10) / "__0_0.distcp")
    with pytest.raises(RunError, match="no whole checkpoint is left"):
        newest_whole(tmp_path)
    with pytest.raises(RunError, match="no whole checkpoint is left"):  # and not at the second try either
        newest_whole(tmp_path)
    assert newest_whole(tmp_path / "new") == 0


def test_pruning_keeps_the_newest_every_nth_and_the_best(tmp_path):
    for iteration in range(10, 90, 10):
        save(tmp_path, iteration, sealed=iteration != 80)
    write_json(tmp_path / "best.json", {"iteration": 30})
    assert prune(tmp_path, None, None) == []
    assert prune(tmp_path, 2, 40) == [10, 20, 50]
    assert checkpoints(tmp_path) == [30, 40, 60, 70, 80]  # 80 is being written: it neither counts nor goes
    assert not (tmp_path / "dataloader/iter_0000010").exists()
    prune(tmp_path, 1, None)
    assert 70 in checkpoints(tmp_path)


def test_a_full_disk_says_how_much_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 << 20))
    check_disk(tmp_path, 90 << 20, "a checkpoint")
    with pytest.raises(RunError) as error:
        check_disk(tmp_path, 300 << 20, "the checkpoint of step 40")
    assert "step 40 needs 300 MiB" in error.value.problem and "100 MiB free" in error.value.problem
    assert "free 204 MiB" in error.value.fix and "keep_last" not in error.value.fix  # there is nothing to delete
    save(tmp_path, 10), save(tmp_path, 20)
    with pytest.raises(RunError, match="keep_last to less than the 2 checkpoints"):
        check_disk(tmp_path, 300 << 20, "the checkpoint of step 40")


def test_the_expected_size_counts_optimizer_state_of_trained_parts_alone():
    cpu, gpu = (VALUES.model_copy(update={"bf16": bf16, "gpus_per_node": int(bf16)}) for bf16 in (False, True))
    assert expected_bytes(1000, 1000, cpu) == 12_000
    assert expected_bytes(1000, 1000, gpu) == 14_000
    assert expected_bytes(1000, 10, gpu) == 2_120
    assert expected_bytes(1000, 1000, gpu.model_copy(update={"optimizer_precision": "bf16"})) == 8_000


def test_on_gpus_a_checkpoint_has_the_state_of_each_ranks_tower_and_adapter():
    model = load_model_config(MODELS / "4b.yaml")
    of_images = sum(parameters_by_part(model)[part] for part in ("vision_model", "adapter"))
    for ranks in (2, 4):
        for trained in (
            {},
            {"trainable_modules": ["language_model"]},
            {"trainable_modules": ["vision_model", "adapter"]},
        ):
            for gpus in (0, 8):
                values = VALUES.model_copy(update={"bf16": True, "gpus_per_node": gpus} | trained)
                shared = values.model_copy(update={"tensor_model_parallel_size": ranks})
                more = checkpoint_size(model, shared) - checkpoint_size(model, values)
                again = (ranks - 1) * of_images * ("vision_model" in values.trained.whole) * (gpus > 0)
                assert more == expected_bytes(0, again, values)


# --- lock ------------------------------------------------------------------------------------------------------------


def hold(run_dir, ready, end):
    lock(run_dir)
    ready.set()
    end.wait(300)
    os._exit(1)  # dies without giving the lock back


def test_two_trainings_in_one_run_directory_are_impossible_and_a_dead_ones_lock_is_recognised(tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready, end))
    other.start()
    assert ready.wait(300)
    assert is_running(tmp_path)
    with pytest.raises(RunError, match=f"pid {other.pid} on {socket.gethostname()}"):
        lock(tmp_path)
    end.set()
    other.join()
    assert not is_running(tmp_path)
    held = lock(tmp_path)
    assert f"stale lock of pid {other.pid}" in capsys.readouterr().out
    give_back(held)
    lock(tmp_path).close()
    assert "stale" not in capsys.readouterr().out


def test_the_last_processes_of_a_training_that_gave_its_lock_back_are_waited_for(tmp_path):
    held = lock(tmp_path)
    loader = subprocess.Popen(["sleep", "1.5"], pass_fds=[held.fileno()])
    give_back(held)
    lock(tmp_path).close()
    assert loader.poll() == 0


def test_a_lock_of_another_host_counts_as_long_as_its_heart_beats(tmp_path, capsys):
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"host": "node7", "pid": 4}))
    with pytest.raises(RunError, match="pid 4 on node7"):
        lock(tmp_path)
    began = time.monotonic()
    with pytest.raises(RunError, match="pid 4 on node7"):
        lock(tmp_path, patience_s=2)  # a job that is started again waits for the last processes of the one before
    assert time.monotonic() - began >= 2
    os.utime(path, (1, 1))
    lock(tmp_path).close()
    assert "stale lock of pid 4 on node7" in capsys.readouterr().out


# --- watching --------------------------------------------------------------------------------------------------------


def test_bad_steps_are_recorded_with_their_samples_and_stop_the_run_with_the_numbers_to_change(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20)
    watch = Watch(tmp_path, VALUES, 0, 1, 0, True, None, None)
    tail = Tail(tmp_path)

    def step(iteration, loss, grad_norm=1.0):
        watch.batch(0.0, 10, 12, 1.0, [f"sample{iteration}"])
        watch.step(iteration, loss, {"learning-rate": 1e-5}, grad_norm, 1.0)

    for iteration in range(1, 13):
        step(iteration, 0.5 + 0.01 * iteration)
    step(13, 3.0)  # a single spike
    step(14, 0.6)
    step(15, float("nan"))
    step(16, 9.0)
    with pytest.raises(RunError) as error:
        step(17, 9.5, float("inf"))
    bad = read_jsonl(tmp_path / "bad_steps.jsonl")
    assert [(one["iteration"], one["samples"]) for one in bad] == [(i, [f"sample{i}"]) for i in (13, 15, 16, 17)]
    assert [line.split(":")[0] for line in tail.new()] == ["step 13", "step 15"]
    assert "3 bad steps in a row, 15 … 17" in error.value.problem and "0.5" in error.value.problem
    assert "lr=5e-06" in error.value.fix and f"load={tmp_path}/iter_0000010" in error.value.fix


def test_the_remedy_for_an_exploding_loss_names_no_checkpoint_that_is_still_being_written(tmp_path):
    save(tmp_path, 10)
    save(tmp_path, 20, sealed=False)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    step = {"iteration": 21, "loss": 9.0, "grad_norm": 1.0, "samples": []}
    assert f"load={tmp_path}/iter_0000010" in exploded(VALUES, tmp_path, [step], 0.5, 21).fix


@pytest.mark.parametrize(("lr", "lower"), [(2e-5, 5e-6), (1e-5, 5e-6), (5e-6, 1e-6), (2e-3, 5e-4), (1e-6, 2.5e-7)])
def test_the_remedy_for_an_exploding_loss_is_the_guides_next_lower_lr(lr, lower):
    assert lower_lr(lr) == lower


def test_slow_loading_names_the_workers_that_keep_up(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    assert "num_workers: 3 would keep up" in slow_loading(VALUES, 1000, 0.6)
    assert "the model would take 2,500" in slow_loading(VALUES, 1000, 0.6)
    assert "there are 8 cores" in slow_loading(VALUES.model_copy(update={"num_workers": 6}), 1000, 0.6)


def test_out_of_memory_names_the_parts_and_the_setting():
    memory = {"weights": 9.0, "gradients": 18.0, "optimizer": 54.0, "total": 90.0}
    error = out_of_memory(VALUES, memory, {"rows": 4, "tokens": 1000, "patches": 200, "image": 16})
    assert "4 × 1000 tokens" in error.problem and "activations and the rest 9.00" in error.problem
    assert "micro_batch_size: 2" in error.fix
    alone = VALUES.model_copy(update={"micro_batch_size": 1})
    assert (
        "tensor_model_parallel_size: 2"
        in out_of_memory(
            alone.model_copy(update={"gpus_per_node": 8}), memory, {"rows": 1, "tokens": 9, "patches": 9, "image": 9}
        ).fix
    )
    assert (
        "max_pixels: 500000"
        in out_of_memory(alone, memory, {"rows": 1, "tokens": 9, "patches": 6000, "image": 5000}).fix
    )
    packed = alone.model_copy(update={"packing": True})
    largest = {"rows": 1, "tokens": 8192, "patches": 9, "image": 9}
    assert out_of_memory(packed, memory, largest).fix.startswith("pack_chunk_tokens: 4096")


def test_out_of_memory_proposes_what_preflight_tries_and_only_what_can_be_set():
    memory = {"weights": 1.0, "gradients": 1.0, "optimizer": 1.0, "total": 70.0}
    largest = {"rows": 1, "tokens": 6000, "patches": 9, "image": 9}
    packed = VALUES.model_copy(update={"packing": True, "micro_batch_size": 1, "gpus_per_node": 8})
    smaller = less_memory(packed, largest["tokens"])
    assert smaller["pack_chunk_tokens"] == [3000, 1500] and smaller["tensor_model_parallel_size"] == [2, 4]
    fix = out_of_memory(packed, memory, largest).fix
    assert (
        "pack_chunk_tokens: 3000" in fix and "recompute_language: full (slower" in fix and "recompute_vision" not in fix
    )
    assert "tensor_model_parallel_size" not in fix, "the weights are not what takes the memory"
    done = packed.model_copy(
        update={"recompute_language": "full", "pipeline_model_parallel_size": 2, "gpus_per_node": 0}
    )
    smaller = less_memory(done, largest["tokens"])
    assert {name for name, values in smaller.items() if values} == {"recompute_vision", "seq_length"}
    halved = packed.model_copy(update={"tensor_model_parallel_size": 4})
    assert less_memory(halved, 6000)["tensor_model_parallel_size"] == [8]


def test_a_half_written_record_is_shown_when_it_is_whole(tmp_path):
    tail, path = Tail(tmp_path), tmp_path / "events.jsonl"
    append(path, {"iteration": 1, "message": "first"})
    with open(path, "a") as file:
        file.write('{"iteration": 2, "mess')
    assert tail.new() == ["step 1: first"]
    with open(path, "a") as file:
        file.write('age": "second"}\n')
    assert tail.new() == ["step 2: second"]


def test_flops_are_six_per_weight_and_token_and_less_for_frozen_parts():
    model = load_model_config(ROOT / "config/models/4b.yaml")
    language, output, vision, adapter = matmul_parameters(model)
    parts = Trained(("language_model", "adapter", "vision_model"))
    assert output == 151936 * 2560
    assert 0 <= 1 - (language + output + vision + adapter + 151936 * 2560) / parameter_count(model) < 1e-3
    short = training_flops(model, parts, [1], [], 1)
    assert short == pytest.approx(6 * (language + output), rel=1e-3)
    long = training_flops(model, parts, [8192], [], 100)
    assert long == pytest.approx(6 * language * 8192 + 6 * output * 100 + 6 * 36 * 32 * 128 * 8192**2)
    grids = [(64, 64)] * 4
    alone = training_flops(model, parts._replace(whole=("adapter",)), [8192], grids, 100)
    attention, image = 36 * 32 * 128 * 8192**2, (64 * 64) ** 2 * 4
    # The language model's products twice, its attention three times; the adapter's three times, the tower once.
    expected = 4 * (language * 8192 + output * 100) + 6 * attention + 6 * adapter * 4096
    assert alone == pytest.approx(expected + 2 * vision * 4 * 4096 + 4 * 24 * 1024 * image)
    pairs = Lora(rank=16, alpha=16, parts=("language_model",))
    by_pairs = training_flops(model, Trained((), pairs), [8192], [], 100)
    language_alone = training_flops(model, Trained(("language_model",)), [8192], [], 100)
    of_pairs = 6 * pairs.parameters(model) * 8192
    assert language_alone - by_pairs + of_pairs == pytest.approx(2 * (language * 8192 + output * 100))


def test_runs_are_listed_with_the_command_that_goes_on(tmp_path):
    run = tmp_path / "stage2_sft_x_big"
    save(run, 20)
    write_json(run / "run.json", {"settings": {"experiment": "x", "train_iters": 40}})
    append(run / "metrics.jsonl", {"iteration": 20, "lm loss": 0.25})
    write_json(tmp_path / "stage2_sft_x_big_results/preflight.json", {"overrides": ['run_tag="big"', "lr=1e-06"]})
    script = [sys.executable, str(ROOT / "workflow_scripts/list_runs.py"), str(tmp_path)]
    listing = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert listing.splitlines()[1].split()[:4] == ["stage2_sft_x_big", "stopped", "20/40", "0.2500"]
    assert "snakemake train_x --config run_tag=big lr=1e-06" in listing
