"""The run directory, what Megatron is told, and what a person watches. Nothing here imports Megatron."""

import copy
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from helpers import MODELS, ROOT
from helpers.runs import VALUES, open_run, same_run
from llava_sft.errors import RunError
from llava_sft.files import atomic_dir, read_json, write_json
from llava_sft.model.config import load_model_config
from llava_sft.model.tensors import parameter_count
from llava_sft.run.checkpoints import iterations_done
from llava_sft.run.layout import METRICS, SIDECARS, TRACKER, VALIDATION, checkpoint_dir
from llava_sft.run.lock import lock
from llava_sft.run.records import forget_after, progress_line, read_jsonl, read_metrics
from llava_sft.settings.layers import load_settings
from llava_sft.settings.resolve import resolve
from llava_sft.settings.resolved import Resolved
from llava_sft.training.launcher import Place, commands, node_command
from llava_sft.training.slurm import Job
from llava_sft.training.watch import Watch


def saved(run_dir, iteration):
    """As Megatron leaves a whole checkpoint."""
    checkpoint_dir(run_dir, iteration).mkdir()
    (checkpoint_dir(run_dir, iteration) / ".metadata").write_text("x")
    (run_dir / TRACKER).write_text(str(iteration))


def changed(resolved, **settings):
    return copy.deepcopy(resolved) | {"settings": resolved["settings"] | settings}


# --- which run a directory holds -------------------------------------------------------------------------------------


def test_a_new_directory_takes_the_run_and_a_copy_of_all_but_the_weights(run_dir, resolved):
    assert open_run(run_dir, resolved) == 0
    assert Resolved.read(run_dir / "run.json") == Resolved.model_validate(resolved)
    assert {path.name for path in (run_dir / SIDECARS).iterdir()} == {
        "config.json",
        "tokenizer.json",
        ".checksums.json",
    }


def test_the_same_run_goes_on_from_its_newest_whole_checkpoint(run_dir, resolved):
    open_run(run_dir, resolved)
    saved(run_dir, 20)
    saved(run_dir, 40)
    checkpoint_dir(run_dir, 60).mkdir()  # killed while it was written: the tracker does not name it
    assert iterations_done(run_dir) == 40
    assert open_run(run_dir, resolved) == 40


def test_settings_that_change_nothing_that_is_learned_may_change_on_the_way(run_dir, resolved):
    open_run(run_dir, resolved)
    saved(run_dir, 40)
    free = {"save_interval": 7, "log_interval": 3, "exp_dir": "elsewhere", "evaluate_samples": 5, "epochs": 9.0}
    assert open_run(run_dir, changed(resolved, **free)) == 40
    assert read_json(run_dir / "run.json")["settings"]["log_interval"] == 3
    assert open_run(run_dir, resolved | {"versions": {"torch": "3"}}) == 40


def test_the_run_of_a_renamed_experiment_is_found_and_goes_on_where_it_is_moved(run_dir, resolved, tmp_path):
    open_run(run_dir, resolved)
    saved(run_dir, 40)
    for name, text in (("other", json.dumps(changed(resolved, lr=2e-5))), ("odd", "["), ("none", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    renamed = changed(resolved, experiment="ocr") | {"run_name": "stage2_sft_ocr"}
    new = run_dir.with_name("stage2_sft_ocr")
    assert same_run(new, renamed) == (run_dir, 40)
    assert same_run(run_dir, resolved) is None
    assert same_run(new, changed(renamed, seed=7)) is None
    run_dir.rename(new)
    assert same_run(new, renamed) is None
    assert open_run(new, renamed) == 40


@pytest.mark.parametrize(
    ("change", "difference", "tag"),
    [
        ({"settings": {"lr": 2e-5}}, "lr: 0.0001 → 2e-05", "lr2e-05"),
        ({"settings": {"seed": 7}}, "seed: 42 → 7", "seed7"),
        ({"settings": {"global_batch_size": 64}}, "global_batch_size: 32 → 64", "global_batch_size64"),
        ({"settings": {"max_pixels": 9999}}, "max_pixels: 1000000 → 9999", "max_pixels9999"),
        ({"data": {"fingerprint": "d2"}}, "data: d1 → d2", "datad2"),
        ({"start": {"fingerprint": "s2"}}, "start: s1 → s2", "starts2"),
        ({"settings": {"model": "4b"}, "model": {"name": "4b"}}, "model: tiny → 4b", "model4b-"),
        ({"model": {"language": {}}}, "tiny: language ffn_hidden_size: 288 → None", "modeltiny-"),
    ],
)
def test_another_run_is_refused_with_the_difference_and_a_tag_for_a_run_of_its_own(
    run_dir, resolved, change, difference, tag
):
    open_run(run_dir, resolved)
    saved(run_dir, 40)
    before = (run_dir / "run.json").read_bytes()
    other = copy.deepcopy(resolved)
    for part, values in change.items():
        other[part] |= values
    with pytest.raises(RunError) as error:
        open_run(run_dir, other)
    assert f"{run_dir} holds 40 steps of another run" in error.value.problem
    assert difference in error.value.problem and error.value.problem.count("→") == 1
    assert f"--config run_tag={tag}" in error.value.fix
    assert (run_dir / "run.json").read_bytes() == before


def test_the_proposed_tag_is_free_and_takes_the_place_of_the_tag_there_is(tmp_path, resolved):
    tagged = changed(resolved, run_tag="a") | {"run_name": "stage2_sft_vqa_a"}
    run_dir = tmp_path / "stage2_sft_vqa_a"
    open_run(run_dir, tagged)
    saved(run_dir, 40)
    for taken in ("lr2e-05", "lr2e-05-2"):
        (tmp_path / f"stage2_sft_vqa_{taken}").mkdir()
    with pytest.raises(RunError, match=r"run_tag=lr2e-05-3$"):
        open_run(run_dir, changed(tagged, lr=2e-5))


def test_without_a_checkpoint_another_run_takes_the_directory_with_its_own_tokenizer(run_dir, resolved, tmp_path):
    open_run(run_dir, resolved)
    other = changed(resolved, lr=2e-5)
    other["start"] = resolved["start"] | {"sidecars": str(tmp_path / "other"), "fingerprint": "s2"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tokenizer.json").write_text("another")
    assert open_run(run_dir, other) == 0
    assert read_json(run_dir / "run.json")["settings"]["lr"] == 2e-5
    assert (run_dir / SIDECARS / "tokenizer.json").read_text() == "another"
    assert not (run_dir / SIDECARS / "config.json").exists()


def test_a_larger_train_iters_extends_a_run_and_one_below_what_is_done_is_refused(run_dir, resolved):
    open_run(run_dir, resolved)
    saved(run_dir, 100)
    assert open_run(run_dir, changed(resolved, train_iters=150)) == 100
    assert read_json(run_dir / "run.json")["settings"]["train_iters"] == 150
    with pytest.raises(RunError, match="train_iters 99 is below the 100 steps") as error:
        open_run(run_dir, changed(resolved, train_iters=99))
    assert "train_iters: 100 or more" in error.value.fix
    assert open_run(run_dir, changed(resolved, train_iters=100)) == 100


def test_a_run_goes_on_with_another_number_of_loader_workers(run_dir, resolved):
    open_run(run_dir, resolved)
    saved(run_dir, 40)
    on_another_machine = changed(resolved, num_workers=8)
    assert open_run(run_dir, on_another_machine) == 40
    assert on_another_machine["settings"]["num_workers"] == 8


def test_a_run_of_an_earlier_version_goes_on_and_what_it_did_not_say_is_a_difference(run_dir, resolved):
    open_run(run_dir, resolved)
    saved(run_dir, 40)
    earlier = read_json(run_dir / "run.json")
    del earlier["settings"]["nodes"], earlier["settings"]["memory_check"], earlier["why"]
    earlier["settings"]["a_setting_that_is_gone"], earlier["more"] = 1, 2
    write_json(run_dir / "run.json", earlier)
    assert open_run(run_dir, resolved) == 40
    assert Resolved.read(run_dir / "run.json") == Resolved.model_validate(resolved)
    del earlier["settings"]["fp8"]
    write_json(run_dir / "run.json", earlier)
    with pytest.raises(RunError, match="fp8: None → none"):
        open_run(run_dir, resolved)


def test_checkpoints_of_somebody_else_are_not_trained_on(run_dir, resolved):
    saved(run_dir, 40)
    with pytest.raises(RunError, match=r"without run\.json"):
        open_run(run_dir, resolved)


# --- one training at a time ------------------------------------------------------------------------------------------

HOLD = "import sys, time, pathlib, llava_sft.run.lock as r; held = r.lock(pathlib.Path(sys.argv[1])); print(1, flush=True); time.sleep(60)"


def test_a_second_training_is_kept_out_until_the_first_is_dead(run_dir):
    here = os.environ | {"PYTHONPATH": str(ROOT / "workflow_scripts")}
    first = subprocess.Popen([sys.executable, "-c", HOLD, run_dir], stdout=subprocess.PIPE, env=here)
    try:
        assert first.stdout.readline() == b"1\n"
        with pytest.raises(RunError, match="another training is running"):
            lock(run_dir)
    finally:
        first.kill()
        first.communicate()
    lock(run_dir).close()


def test_the_lock_holds_as_long_as_a_training_process_lives_even_when_its_launcher_is_dead(run_dir):
    held = lock(run_dir)
    training = subprocess.Popen(["sleep", "60"], pass_fds=[held.fileno()])
    try:
        held.close()
        with pytest.raises(RunError):
            lock(run_dir)
    finally:
        training.kill()
        training.wait()
    lock(run_dir).close()


# --- where it starts from --------------------------------------------------------------------------------------------


# --- what is started ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "count"),
    [
        ({"gpus_per_node": 0}, 1),
        ({"gpus_per_node": 0, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 4),
        ({"gpus_per_node": 0, "nproc_per_node": 2}, 2),
        ({"gpus_per_node": 8, "tensor_model_parallel_size": 2, "global_batch_size": "auto"}, 8),
    ],
)
def test_as_many_processes_start_as_gpus_or_as_the_parallel_sizes_need(monkeypatch, asked, count):
    monkeypatch.chdir(ROOT)
    values = resolve(load_settings("vqa", {"global_batch_size": 64, **asked}), 5000)[0]
    assert values.nproc_per_node == count
    started = commands(count, ["a", "b"], "/tmp/store")
    assert all(argv == [sys.executable, "-m", "llava_sft.training", "a", "b"] for argv, _ in started)
    assert [(env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) for _, env in started] == [
        (str(i), str(i), str(count)) for i in range(count)
    ]


JOB = Job("4711", "10.0.0.1", nodes=8, cpus_per_node=96)


@pytest.mark.parametrize(("nodes", "gpus", "count"), [(1, 1, 1), (1, 8, 8), (8, 8, 8), (2, 0, 1)])
def test_slurm_starts_one_task_a_node_and_each_a_process_for_each_of_its_gpus(monkeypatch, nodes, gpus, count):
    monkeypatch.setenv("OMP_NUM_THREADS", "12")
    arguments = ["run.json", "run_dir"]
    argv = node_command(JOB, nodes, count, gpus, ["--mpi=none"], arguments)
    srun, (_, *task) = argv[: argv.index(sys.executable)], argv[argv.index(sys.executable) :]
    given = {f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--mpi=none", "--kill-on-bad-exit=1"}
    assert srun[0] == "srun" and given <= set(srun)
    assert [word for word in srun if "gres" in word] == ([f"--gres=gpu:{gpus}"] if gpus else [])
    address = task[2]
    assert task == ["-m", "llava_sft.training.launcher", address, str(count), *arguments]
    assert address.startswith(f"{JOB.first_address}:")
    host, port = address.split(":")
    started = commands(count, arguments, "/tmp/s", Place(host, int(port), nodes - 1, nodes) if nodes > 1 else None)
    assert [env["RANK"] for _, env in started] == [str((nodes - 1) * count + i) for i in range(count)]
    for argv, environment in started:
        assert argv == [sys.executable, "-m", "llava_sft.training", *arguments]
        assert environment["WORLD_SIZE"] == str(nodes * count)
        assert environment.get("OMP_NUM_THREADS", "12") == "12"
        # On one machine they meet in a file and talk over the loopback device; several nodes need the network.
        devices = {environment.get(f"{name}_SOCKET_IFNAME") for name in ("GLOO", "NCCL")}
        assert devices == ({"lo"} if nodes == 1 else {None})
        assert ("LLAVA_SFT_STORE" in environment) == (nodes == 1) != ("MASTER_ADDR" in environment)
        assert nodes == 1 or (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == (host, port)


# --- what a person watches -------------------------------------------------------------------------------------------


def record(iteration, **changes):
    return {
        "iteration": iteration, "train_iters": 3200, "lm loss": 1.2345, "learning-rate": 1e-5, "grad-norm": 0.5,
        "step_s": 0.5, "tokens_per_s": 5120.4, "padding_share": 0.1, "data_wait_share": 0.012, "memory_gib": 2.14,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("iteration", "step_s", "left"),
    [(200, 0.5, "25:00 left"), (3200, 0.5, "0:00 left"), (200, 1.31, "1:05:30 left"), (3195, 1.0, "0:05 left")],
)
def test_progress_is_one_line_with_the_time_that_is_left(iteration, step_s, left):
    line = progress_line(record(iteration, step_s=step_s))
    step = f"step {iteration:>4}/3200"
    assert (
        line
        == f"{step}  loss 1.2345  lr 1.00e-05  grad 0.50  5,120 tokens/s  padding 10%  data wait 1%  2.1 GiB  {left}"
    )


def test_a_resume_drops_the_records_of_the_steps_that_it_takes_again(run_dir):
    forget_after(run_dir, 0)  # nothing there yet
    path = run_dir / METRICS
    path.write_text("".join(json.dumps(record(i)) + "\n" for i in (10, 20, 30, 40)) + '{"iteration": 50, "lm')
    assert [r["iteration"] for r in read_metrics(run_dir)] == [10, 20, 30, 40]  # the torn line of a kill is no record
    forget_after(run_dir, 20)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [record(10), record(20)]
    forget_after(run_dir, 0)
    assert read_metrics(run_dir) == []


def test_a_record_sums_up_the_steps_since_the_last_one(run_dir):
    values = VALUES.model_copy(update={"train_iters": 25, "log_interval": 10, "max_bad_steps": 99})
    watch = Watch(run_dir, values, data_rank=0, replicas=2, first=0, writes=True, peak=None, tensorboard=None)
    for iteration in range(1, 26):
        time.sleep(0.001)
        watch.batch(waited=0.0001, tokens=30, padded=40, flops=1.0, ids=["a"])
        watch.batch(waited=0.0, tokens=50, padded=60, flops=1.0, ids=["b"])
        watch.step(iteration, loss=float(iteration), rates={"learning-rate": 1e-5}, grad_norm=None, memory_gib=1.0)
    records = read_metrics(run_dir)
    assert [r["iteration"] for r in records] == [10, 20, 25]  # the last step always
    assert [r["lm loss"] for r in records] == [5.5, 15.5, 23.0]
    for r in records:
        assert r["padding_share"] == pytest.approx(0.2)
        assert r["step_s"] >= 0.001
        assert r["tokens_per_s"] == pytest.approx(2 * 80 / r["step_s"])
        assert 0 < r["data_wait_share"] < 0.1


def test_a_record_that_a_kill_cut_behind_an_inner_brace_is_no_record(tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    whole = json.dumps({"iteration": 10, "answers": [{"id": "a"}]}) + "\n"
    (run_dir / VALIDATION).write_text(whole + whole[: whole.index("}") + 1])
    assert [each["iteration"] for each in read_jsonl(run_dir / VALIDATION)] == [10]
    forget_after(run_dir, 10)
    assert (run_dir / VALIDATION).read_text() == whole


def test_a_folder_that_a_killed_process_left_half_written_goes_with_the_next_try(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f".made.{dead.pid}.tmp").mkdir()
    (tmp_path / f".made.{os.getppid()}.tmp").mkdir()  # of another that is still at work
    with atomic_dir(tmp_path / "made") as folder:
        (folder / "x").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"made", f".made.{os.getppid()}.tmp"}


def test_space_is_asked_for_what_is_trained_and_no_more(run_dir, resolved, monkeypatch):
    from llava_sft.training import checks

    run_dir.mkdir(exist_ok=True)
    weights = 4 * parameter_count(load_model_config(MODELS / "tiny.yaml"))  # bytes; with moments, three times as many
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * weights))
    with pytest.raises(RunError, match="a checkpoint needs"):
        checks.check_space(run_dir, Resolved.model_validate(resolved))
    resolved["settings"]["trainable_modules"] = ["adapter"]
    checks.check_space(run_dir, Resolved.model_validate(resolved))
