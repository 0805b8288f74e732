"""Real trainings on the CPU, interrupted and provoked: what goes on is the same run, what fails says why. (Minutes.)

`benchmarks/resume.py` runs the full table of interruptions and the thirty random kills; here is one of each kind.
"""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest

from faults.server import Servers
from helpers import ROOT, trainings
from helpers.projects import snakemake
from helpers.trainings import kill, same
from llava_sft.checkpoint.torch_dist import TorchDistReader
from llava_sft.files import read_json
from llava_sft.run.checkpoints import damage, iterations_done
from llava_sft.run.layout import checkpoint_dir, checkpoints
from llava_sft.run.records import read_jsonl

STEPS = 9
HOW = {"train_iters": STEPS, "save_interval": 3, "async_save": True}
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def base(prepared_project):
    """Resolved settings of the embedded experiment, its data and start checkpoint made."""
    return trainings.demo(prepared_project)


@pytest.fixture(scope="module", autouse=True)
def _forked(servers):
    Run.servers = servers


class Run(trainings.Run):
    """A run whose starts that nothing happens to are forked from a process that has imported Megatron already."""

    servers: Servers

    def finish(self, first: str = "") -> int:
        """Exit code. `first`: Python that the training processes run before anything else."""
        with open(self.folder.with_suffix(".log"), "ab") as log:
            return self.servers.ask(self.script(), ROOT, log.fileno(), first).wait()

    def limited(self, option: str) -> int:
        """Exit code of a start under `prlimit`."""
        return super().finish("prlimit", option)


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    run = Run(base, tmp_path_factory.mktemp("runs") / "undisturbed", **HOW)
    assert run.finish() == 0, run.said()
    return run


LOOPBACK = {"127.0.0.1", "::1"}


def listening(run, process, step):
    """The addresses at which a run accepts connections once it has logged a step."""
    while process.poll() is None and not run.logged(step):
        time.sleep(0.02)
    found = set()
    for member in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {c.laddr.ip for c in member.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


def alive(run):
    """Processes that have to do with a run."""
    found = psutil.process_iter(["cmdline", "status"])
    return [p for p in found if str(run.folder) in " ".join(p.info["cmdline"] or []) and p.info["status"] != "zombie"]


def test_a_stopped_run_whose_newest_checkpoint_is_damaged_ends_bit_for_bit_like_an_undisturbed_one(
    base, undisturbed, tmp_path
):
    run = Run(base, tmp_path / "stopped", **HOW)
    process = run.start()
    assert listening(run, process, 4) <= LOOPBACK
    os.killpg(process.pid, signal.SIGTERM)  # as systemd and batch systems do: loader workers get it too
    assert process.wait() == 75, run.said()
    assert "the same command resumes" in run.said()
    before, newest = checkpoints(run.folder)[-2:]
    assert 4 <= newest < STEPS
    os.truncate(checkpoint_dir(run.folder, newest) / "__0_0.distcp", 1000)
    assert run.finish() == 0, run.said()
    assert f"iter_{newest:07d} IS DAMAGED" in run.said() and f"resuming from step {before}" in run.said()
    assert same(run, undisturbed, STEPS) == dict.fromkeys(("losses", "samples", "validation", "weights"), True)


HELD_WRITES = """
import os, time
flush = os.fsync
def fsync(file):
    name = os.readlink(f"/proc/self/fd/{file}")
    while os.environ["HELD"] in name and name.endswith(".distcp") and not os.path.exists(os.environ["LET_GO"]):
        time.sleep(0.02)
    flush(file)
os.fsync = fsync
"""


def in_a_save(run, tmp_path, step):
    """A run whose checkpoint of a step is not written before `let_go` is made, and that is at the next step already."""
    (tmp_path / "sitecustomize.py").write_text(HELD_WRITES)
    let_go = tmp_path / "let_go"
    process = run.start(PYTHONPATH=str(tmp_path), HELD=f"iter_{step:07d}", LET_GO=str(let_go))
    while process.poll() is None and not run.logged(step + 1):
        time.sleep(0.02)
    assert iterations_done(run.folder) == step - 3 and checkpoint_dir(run.folder, step).is_dir(), run.said()
    return process, let_go


def interrupt_a_save(run, tmp_path, step, number):
    process, let_go = in_a_save(run, tmp_path, step)
    kill(process, number)
    if number == signal.SIGKILL:
        process.wait()
    let_go.touch()
    return process.wait()


def test_a_training_goes_on_while_a_checkpoint_is_written_and_one_that_is_killed_meanwhile_has_the_one_before(
    base, undisturbed, tmp_path
):
    run = Run(base, tmp_path / "saving", **HOW)
    interrupt_a_save(run, tmp_path, 6, signal.SIGKILL)
    assert run.finish() == 0, run.said()
    assert "iter_0000006: not finished when the training was killed; deleted" in run.said()
    assert "resuming from step 3" in run.said()
    assert same(run, undisturbed, STEPS) == dict.fromkeys(("losses", "samples", "validation", "weights"), True)
    assert run.weights(6) == undisturbed.weights(6)


def test_a_training_stopped_while_a_checkpoint_is_written_ends_with_whole_ones(base, undisturbed, tmp_path):
    run = Run(base, tmp_path / "stopping", **HOW)
    assert interrupt_a_save(run, tmp_path, 3, signal.SIGTERM) == 75, run.said()
    found = checkpoints(run.folder)
    assert found[0] == 3 < found[-1] == iterations_done(run.folder) < STEPS
    assert [damage(run.folder, iteration) for iteration in found] == [None] * len(found)
    assert run.weights(3) == undisturbed.weights(3)
    assert run.finish() == 0, run.said()
    assert same(run, undisturbed, STEPS) == dict.fromkeys(("losses", "samples", "validation", "weights"), True)


def test_a_checkpoint_that_can_not_be_written_ends_the_training_with_one_message(base, tmp_path):
    run = Run(base, tmp_path / "unwritten", **HOW)
    assert run.limited(f"--fsize={1 << 20}") == 1  # a file system that takes no more
    assert "the checkpoint of step 3 could not be written" in run.said(), run.said()
    assert "the same command resumes from step 0" in run.said() and "Traceback" not in run.said()


def test_a_disk_that_fills_up_is_named_and_with_room_the_run_goes_on(base, undisturbed, tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        run = Run(base, folder, **HOW)
        process, let_go = in_a_save(run, tmp_path, 6)
        with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))  # the last one as far as there is room
        let_go.touch()
        assert process.wait() == 1, run.said()
        named = ("is on a full disk", "the checkpoint of step ")  # whichever comes first: a log line or a save
        assert any(problem in run.said() for problem in named) and "Traceback" not in run.said(), run.said()
        (folder / "filler").unlink()
        assert run.finish() == 0, run.said()
        assert same(run, undisturbed, STEPS) == dict.fromkeys(("losses", "samples", "validation", "weights"), True)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_two_ranks_in_bf16_killed_or_out_of_time_go_on_exactly_between_the_log_lines(base, tmp_path):
    how = HOW | {"bf16": True, "nproc_per_node": 2, "log_interval": 4, "eval_interval": 5}
    whole, run = trainings.Run(base, tmp_path / "whole", **how), trainings.Run(base, tmp_path / "killed", **how)
    assert whole.finish() == 0, whole.said()
    process = run.start()
    assert listening(run, process, 4) <= LOOPBACK  # half of the steps are still to come
    kill(process, signal.SIGKILL)
    process.wait()
    for _ in range(600):
        if not (left := alive(run)):
            break
        time.sleep(0.1)
    assert not left  # neither training processes nor their helpers outlive the launcher
    run.change(max_minutes=0.001)
    assert run.finish() == 75, run.said()
    run.change(max_minutes=None)
    assert run.finish() == 0, run.said()
    assert same(run, whole, STEPS) == dict.fromkeys(("losses", "samples", "validation", "weights"), True)
    ranks = run.samples()
    assert len(ranks) == 2
    seen = [name for rank in ranks.values() for step in rank for name in step["samples"]]
    assert len(seen) == len(set(seen)) == STEPS * 16  # no sample lost or doubled over the ranks


def test_settings_of_another_run_are_refused_by_snakemake_before_a_finished_one_is_touched(
    prepared_project,
    undisturbed,
):
    results = prepared_project / "output/stage2_sft_vqa_results"
    shutil.copytree(undisturbed.folder, prepared_project / "output/stage2_sft_vqa", symlinks=True)
    (results / "train.done.json").write_text("{}")
    before = {path: path.read_bytes() for path in results.glob("*.json")}
    refused = snakemake(prepared_project, "train_vqa", "--config", "global_batch_size=64")
    shutil.rmtree(prepared_project / "output/stage2_sft_vqa")
    assert refused.returncode != 0 and "holds 9 steps of another run" in refused.stdout, refused.stdout
    assert {path: path.read_bytes() for path in results.glob("*.json")} == before
    assert snakemake(prepared_project, "-n", "preflight_vqa").returncode == 0  # the old settings go on as they were
    (results / "train.done.json").unlink()


def test_another_number_of_workers_is_the_same_run(base, undisturbed):
    asked = read_json(undisturbed.resolved)
    undisturbed.change(num_workers=2)
    assert undisturbed.finish() == 0
    assert "nothing to train" in undisturbed.said()
    undisturbed.change(**asked["settings"])


def test_a_longer_run_keeps_its_schedule_and_only_adds_steps(base, undisturbed, tmp_path):
    run = Run(base, tmp_path / "longer", **HOW)
    shutil.copytree(undisturbed.folder, run.folder, symlinks=True)
    base_why = read_json(run.resolved)["why"] | {"lr_decay_iters": "train_iters"}
    resolved = read_json(run.resolved) | {"why": base_why}
    resolved["settings"] |= {"train_iters": STEPS + 3, "lr_decay_iters": STEPS + 3, "keep_last": 2}
    run.write(resolved)
    assert run.finish() == 0, run.said()
    assert f"keeps its schedule of {STEPS} steps" in run.said()
    assert run.losses()[:STEPS] == undisturbed.losses() and len(run.losses()) == STEPS + 3
    rates = [record["learning-rate"] for record in read_jsonl(run.folder / "metrics.jsonl")]
    assert rates[STEPS:] == [pytest.approx(resolved["settings"]["min_lr"])] * 3
    best = read_json(run.folder / "best.json")["iteration"]
    assert set(checkpoints(run.folder)) == {STEPS, STEPS + 3} | {best}


def test_a_frozen_part_does_not_move_and_the_trained_ones_have_their_rates(base, undisturbed, tmp_path):
    parts = {"trainable_modules": ["adapter", "vision_model"], "lr_vision": 1e-4}
    run = Run(base, tmp_path / "frozen", **HOW, **parts)
    assert run.finish() == 0, run.said()
    early, late = run.weights(3), run.weights(STEPS)
    moved = {name for name in early if early[name] != late[name] and not name.startswith(("optimizer", "rng"))}
    assert moved and all(name.startswith(("adapter.", "vision_model.")) for name in moved)
    records = read_jsonl(run.folder / "metrics.jsonl")
    assert all(r["learning-rate-vision_model"] == pytest.approx(r["learning-rate-adapter"] / 20) for r in records)


def test_a_learning_rate_that_explodes_stops_with_the_remedy(base, tmp_path):
    run = Run(base, tmp_path / "exploded", train_iters=40, save_interval=5, max_bad_steps=3, lr=2e-4)
    resolved = read_json(run.resolved)
    resolved["settings"] |= {"lr": 1e4, "lr_vision": 1e4, "lr_adapter": 1e4, "lr_warmup_fraction": 0.9, "clip_grad": 0}
    run.write(resolved)
    assert run.finish() == 1
    assert "3 bad steps in a row" in run.said() and "lr=2500" in run.said(), run.said()
    assert "Traceback" not in run.said()
    bad = read_jsonl(run.folder / "bad_steps.jsonl")
    assert len(bad) >= 3 and all(len(step["samples"]) == 16 for step in bad)
    assert not math.isfinite(bad[-1]["loss"]) or bad[-1]["loss"] > 1


def test_too_little_memory_names_the_setting(base, tmp_path):
    run = Run(
        base,
        tmp_path / "memory",
        train_iters=4,
        save_interval=4,
        micro_batch_size=1024,
        global_batch_size=1024,
        eval_iters=0,
    )
    assert run.limited(f"--as={5 << 30}") == 1
    assert "out of memory at a micro-batch of 1024" in run.said(), run.said()
    assert "micro_batch_size: 512 (global_batch_size stays 1024)" in run.said()


def test_slow_loading_is_said_once_with_the_rates_and_the_workers_that_keep_up(base, tmp_path):
    slow = "import time, PIL.Image as I; o = I.open; I.open = lambda *a, **k: (time.sleep(0.05), o(*a, **k))[1]"  # far longer than a step
    run = Run(base, tmp_path / "slow", train_iters=6, save_interval=6, eval_iters=0)
    run.change(log_interval=2)
    assert run.finish(slow) == 0, run.said()
    said = [line for line in run.said().splitlines() if "slow loading" in line]
    assert len(said) == 1 and "num_workers 1 load" in said[0] and "workers" in said[0].split("model would take")[1]


PINNED = """
import json, os
if "RANK" in os.environ:
    from llava_sft.training import loop
    from llava_sft.megatron import checkpoint
    checkpoint.HOST = "a GPU's, for once"
    checkpoint.pin = lambda sizes, ending: json.dump(sizes, open(os.environ["PINNED"], "w"))
"""


def test_memory_is_pinned_before_the_first_save_for_all_that_it_copies(base, tmp_path):
    run = Run(base, tmp_path / "pinned", **HOW | {"train_iters": 2, "save_interval": 2, "eval_iters": 0})
    assert run.finish(f"import os; os.environ['PINNED'] = {str(tmp_path / 'sizes.json')!r}\n{PINNED}") == 0, run.said()
    sizes = sorted(read_json(tmp_path / "sizes.json"))
    reader = TorchDistReader(checkpoint_dir(run.folder, 2))
    stored = [reader.read(name) for name in reader.tensors()]
    assert sum(sizes) == sum(tensor.nbytes for tensor in stored) and len(sizes) >= len(stored)


STILL_PINNING = """
import json, os, time
if "RANK" in os.environ:
    from llava_sft.megatron import checkpoint
    from llava_sft.training import loop
    checkpoint.HOST, pin, begun = "a GPU's, for once", checkpoint.pin, []
    def slowly(sizes, ending):
        begun.append(sizes)
        told, taken = ending.wait(60), []
        time.sleep(1)
        checkpoint.torch.empty = lambda *given, **named: taken.append(given)
        pin(sizes, ending)
        json.dump([told, taken], open(os.environ["PINNED"], "w"))
    checkpoint.pin = slowly
    step = loop.Loop.forward_backward
    def fails(self):
        if begun:
            raise ValueError("of no known kind")
        return step(self)
    loop.Loop.forward_backward = fails
"""


def test_a_failure_while_memory_is_pinned_ends_that_first(base, tmp_path):
    """A thread that calls CUDA when the interpreter ends aborts it, and the failure is lost."""
    run, told = Run(base, tmp_path / "pinning", **HOW | {"train_iters": 4, "eval_iters": 0}), tmp_path / "told.json"
    assert run.finish(f"import os; os.environ['PINNED'] = {str(told)!r}\n{STILL_PINNING}") == 1, run.said()
    assert "of no known kind" in run.said()
    assert read_json(told) == [True, []]  # of its sizes none was taken any more
