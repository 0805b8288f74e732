"""The GPU path: fused layers and cuDNN attention on Transformer Engine, FP8, checkpoints that move between machines, and
exact resume. Skipped without a GPU. Bounds are of bf16: its numbers have 8 bits.

Four minutes on an H100 with each test in a process of its own, all at the same time. The tests that resume write 30 GB, of
12 layers of 4B; `LLAVA_SFT_GPU_LAYERS` sets another number.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import MODELS, ROOT
from helpers.gpu import VALUES
from helpers.trainings import Run, same
from llava_sft.model.config import load_model_config
from on_gpus import data_commands

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """A tokenizer, and a WebDataset of digits tiled to small photographs."""
    folder = tmp_path_factory.mktemp("data")
    for command in data_commands(folder, 64):
        run = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
    return {"tokenizer": folder / "tokenizer", "shards": folder / "wds"}


def resolved_of(data, model, start: Path | None = None, **values) -> dict:
    start_from = {"sidecars": str(data["tokenizer"]), "fingerprint": "test", "folder": start and str(start)}
    return {
        "settings": VALUES.model_copy(update=values).dump(),
        "model": model.model_dump(),
        "data": {"path": str(data["shards"]), "fingerprint": "test"},
        "start": start_from | {"untrained": True},
        "batch": dict.fromkeys(("mean", "largest"), (2048, 1_000_000, 4096, 1_000_000)),
    }


class Training:
    """One training process in a run directory, on the GPU or on the CPU of the same machine."""

    # Below the ports that the system gives away: one of those may be taken before the process binds it.
    port = 10_000 + 8 * os.getpid() % 20_000

    def __init__(self, data, run_dir: Path, gpu: bool, model=None, start: Path | None = None, **values):
        run_dir.mkdir(exist_ok=True)
        self.run_dir = run_dir
        model = model or load_model_config(MODELS / "tiny.yaml")
        resolved = resolved_of(data, model, start, **{"gpus_per_node": int(gpu), "bf16": gpu} | values)
        (run_dir / "resolved.json").write_text(json.dumps(resolved))
        Training.port += 1
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(self.port),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llava_sft.training", run_dir / "resolved.json", run_dir],
            env=os.environ | alone | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""}),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def losses(self) -> list[float]:
        """Of every step so far, once it has ended."""
        output, _ = self.process.communicate()
        assert self.process.returncode == 0, output[-6000:]
        return [json.loads(line)["lm loss"] for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("how", [[], ["lora"], ["dropout"]])
def test_fused_layers_packs_and_chunks_agree_with_megatrons_layers(data, how):
    worker = ROOT / "tests/helpers/gpu_worker.py"
    here = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])}
    run = subprocess.run([sys.executable, worker, data["tokenizer"], *how], env=here, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-6000:]
    found = json.loads(run.stdout.split("RESULT ")[1].splitlines()[0])
    print(found)
    theirs, ours = found.pop("FP8 of Megatron's layers, from bf16"), found.pop("FP8, from bf16")
    assert np.all(np.array(ours) < 1.5 * np.array(theirs))
    for losses, gradients in found.values():
        assert losses < 0.01 and gradients < 0.05


def found_by(worker: str, *given) -> dict:
    """What a worker of tests/helpers prints."""
    here = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])}
    command = [sys.executable, ROOT / "tests/helpers" / worker, *given]
    run = subprocess.run(command, env=here, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-6000:]
    found = json.loads(run.stdout.split("RESULT ")[1].splitlines()[0])
    print(found)
    return found


def test_faster_ways_agree_with_what_they_replace(data):
    """At 4B's widths. FP8 with largest values of the kernels that write is the same but for the order of attention's sums."""
    found = found_by("levers_worker.py", data["tokenizer"], "levers")
    assert found["bytes of casts that differ"] == {} and found["largest values that are wrong"] == []
    assert found["amax"][0] == 0 and found["amax"][1] < 2 * found["FP8 again"][1] + 1e-6
    for lever in (
        "flash4_vision",
        "flash4_language",
    ):  # bf16 has 8 bits; without the library cuDNN's comes in its place
        losses, gradients = found[lever]
        assert losses < 0.01 and gradients < 0.02
    assert found["all, from bf16"][1] < 2 * found["FP8, from bf16"][1]


def test_sums_of_gradients_validation_and_fp8_copies_of_weights(data):
    """At 4B's widths."""
    found = found_by("levers_worker.py", data["tokenizer"], "seams")
    for micro_batches in (1, 16, 224):
        cosine, length = found[f"gradients of {micro_batches} micro-batches"]
        assert cosine > 0.999 and length == pytest.approx(1, abs=0.01)
    for kind, error in (("bf16", 0.003), ("FP8", 0.02)):
        packed, unpacked = found[f"validation in {kind}: packed, unpacked"]
        assert packed == pytest.approx(unpacked, rel=error)
    assert found["weights changed: packed, unpacked"] == found["a new process: packed, unpacked"]


def test_a_checkpoint_moves_from_cpu_to_gpu_and_back(data, tmp_path):
    """In float32 and plain PyTorch on one, bf16 and Transformer Engine on the other: the same first loss."""
    Training(data, tmp_path / "cpu", gpu=False).losses()
    start = tmp_path / "cpu/iter_0000004"
    cpu, gpu = (Training(data, tmp_path / f"from_cpu_{on}", on, start=start) for on in (False, True))
    cpu, gpu = cpu.losses(), gpu.losses()
    assert gpu[0] == pytest.approx(cpu[0], rel=0.01)
    assert gpu == pytest.approx(cpu, rel=0.05)
    back = tmp_path / "from_cpu_True/iter_0000004"
    cpu, gpu = (Training(data, tmp_path / f"from_gpu_{on}", on, start=back, train_iters=1) for on in (False, True))
    assert gpu.losses() == pytest.approx(cpu.losses(), rel=0.01)


def test_fp8_learns_as_bf16_does(data, tmp_path):
    """200 steps; what is left at the end is compared with what was learned. Widths are multiples of the blocks' 128."""
    model = load_model_config(MODELS / "tiny.yaml")
    language = model.language.model_copy(update={"hidden_size": 128, "ffn_hidden_size": 384})
    model = model.model_copy(update={"language": language})
    runs = {
        fp8: Training(data, tmp_path / fp8, True, model, fp8=fp8, train_iters=200)
        for fp8 in ("none", "tensorwise", "blockwise")
    }
    losses = {fp8: np.array(run.losses()) for fp8, run in runs.items()}
    ends = {fp8: curve[-50:].mean() for fp8, curve in losses.items()}
    print(ends)
    learned = losses["none"][0] - ends["none"]
    assert learned > 1
    for fp8 in ("tensorwise", "blockwise"):
        assert abs(ends[fp8] - ends["none"]) < 0.05 * learned
        assert np.abs(losses[fp8] - losses["none"]).mean() < 0.1 * learned


def test_fp8_learns_as_bf16_does_at_the_widths_of_4b(data, tmp_path):
    """500 steps of two layers a tower."""
    model = cut_of_4b()
    language = model.language.model_copy(update={"num_layers": 2})
    model = model.model_copy(update={"language": language, "vision": model.vision.model_copy(update={"num_layers": 2})})
    given = {"train_iters": 500, "lr": 2e-4, "min_lr": 2e-5, "lr_vision": 1e-4, "lr_adapter": 2e-4}
    runs = {fp8: Training(data, tmp_path / fp8, True, model, fp8=fp8, **given) for fp8 in ("none", "tensorwise")}
    losses = {fp8: np.array(run.losses()) for fp8, run in runs.items()}
    ends = {fp8: curve[-100:].mean() for fp8, curve in losses.items()}
    learned = losses["none"][0] - ends["none"]
    print(ends, learned)
    assert learned > 1
    assert abs(ends["tensorwise"] - ends["none"]) < 0.05 * learned


def cut_of_4b():
    """4B's widths, fewer layers, and the vocabulary of the test's tokenizer (the embeddings would be most of it)."""
    model = load_model_config(MODELS / "4b.yaml")
    language = model.language.model_copy(
        update={"num_layers": int(os.environ.get("LLAVA_SFT_GPU_LAYERS", "12")), "vocab_size": 8192}
    )
    return model.model_copy(update={"language": language, "vision": model.vision.model_copy(update={"num_layers": 4})})


PAIRS = {"trainable_modules": ["language_model"], "lora_rank": 8, "lora_dropout": 0.1}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("deterministic", [True, False])
def test_resume_on_a_gpu(data, tmp_path, deterministic, lora):
    """Bit for bit with `deterministic`; without it the sums of attention's gradients differ in order."""
    given = {"model": cut_of_4b(), "deterministic": deterministic, "lr": 1e-5, "min_lr": 1e-6}
    if lora:
        base = tmp_path / "base"
        Training(data, base, True, **given, train_iters=1).losses()
        given |= PAIRS | {"start": base / "iter_0000001", "lr": 1e-4, "min_lr": 1e-5}
    whole = Training(data, tmp_path / "whole", True, **given, train_iters=4)
    parts = tmp_path / "parts"
    half = Training(data, parts, True, **given, train_iters=2).losses()
    resumed = Training(data, parts, True, **given, train_iters=4).losses()
    whole = whole.losses()
    print(deterministic, whole, resumed)
    assert len(half) == 2 and len(resumed) == 4
    if deterministic:
        assert resumed == whole
    else:
        assert resumed == pytest.approx(whole, rel=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU on this machine")
@pytest.mark.parametrize("layout", [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}])
def test_a_run_on_two_gpus_that_is_killed_and_stopped_ends_as_an_undisturbed_one(data, tmp_path, layout):
    """`train.py` and the same command again, bit for bit."""
    here = {"nproc_per_node": 2, "gpus_per_node": 2, "bf16": True, "deterministic": True}
    here |= {"memory_check": "warn"}  # of GPUs that another test uses, too
    base = resolved_of(data, load_model_config(MODELS / "tiny.yaml"), **here | layout)
    how = {"train_iters": 12, "save_interval": 4, "micro_batch_size": 1, "global_batch_size": 4}
    undisturbed, run = Run(base, tmp_path / "undisturbed", **how), Run(base, tmp_path / "disturbed", **how)
    for each in (undisturbed, run):
        each.change(eval_iters=0)  # the data has no held-out samples
    beside = undisturbed.start()
    run.interrupt(6, signal.SIGKILL)
    run.interrupt(10, signal.SIGTERM)
    assert run.finish() == 0, run.said()[-6000:]
    assert beside.wait() == 0, undisturbed.said()[-6000:]
    assert all(same(run, undisturbed, 12).values()), same(run, undisturbed, 12)
