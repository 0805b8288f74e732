"""This project's trainer through cases of settings in one process, timed from inside, for benchmarks/training.py.

`Measured` is the trainer with a clock in it: all that this benchmark knows of the trainer's inside stands here. Results
are written after each case.
"""

import collections
import functools
import itertools
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
from megatron.training import training
from megatron.training.async_utils import maybe_finalize_async_save

from cases import CASE, PEAK, run_settings
from kernels import kernel_times
from llava_sft.data.loader import VlmBatch, VlmTaskEncoder
from llava_sft.data.stream import Ranks, train_loader
from llava_sft.data.template import ChatTemplate
from llava_sft.model.config import ModelConfig, load_model_config
from llava_sft.model.flops import matmul_parameters, training_flops
from llava_sft.training import loop
from llava_sft.training.checkpoints import checkpoint_dir
from results import ROOT, machine
from training_rows import figures

GIB = 2**30


class Report:
    """The cases of this process, and what has been measured; rank 0 writes it."""

    def __init__(self, args):
        self.cases = [CASE | case for case in args.cases]
        self.path, self.vision = args.result, args.vision
        precision = args.values.get("optimizer_precision", "bf16")
        self.content = {"model": args.model, "optimizer_precision": precision, "machine": machine()}
        self.content |= {"gpus": int(os.environ["WORLD_SIZE"]), "cases": {}, "vision": {}}

    @property
    def next_case(self) -> dict | None:
        done = len(self.content["cases"])
        return self.cases[done] if done < len(self.cases) else None

    def write(self, message: str) -> None:
        if os.environ["RANK"] == "0":
            print(message, flush=True)
            self.path.write_text(json.dumps(self.content))


class Phases:
    """Events in the GPU's queue where one phase of a step ends and the next begins. Backward hooks mark as well."""

    def __init__(self):
        self.on = False
        self.marks: list[tuple[str, torch.cuda.Event]] = []

    def mark(self, name: str) -> None:
        if self.on:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))

    def watch(self, model: torch.nn.Module) -> None:
        def encoded(module, inputs, features):
            self.mark("forward: language model")
            if features.requires_grad:
                features.register_hook(lambda grad: self.mark("backward: vision tower and adapter"))

        def answered(module, inputs, losses):
            if losses.requires_grad:
                losses.register_hook(lambda grad: self.mark("backward: language model"))

        model.vision_model.register_forward_pre_hook(lambda *_: self.mark("forward: vision tower and adapter"))
        model.adapter.register_forward_hook(encoded)
        model.register_forward_hook(answered)

    def milliseconds(self) -> dict[str, float]:
        self.mark("end")
        torch.cuda.synchronize()
        spent: collections.Counter = collections.Counter()
        for (name, start), (_, stop) in itertools.pairwise(self.marks):
            spent[name] += start.elapsed_time(stop)
        return spent


class Measured(loop.Trainer):
    """Trains the cases one after another on the loader's batches."""

    def __init__(self, report: Report, resolved: dict, run_dir: Path):
        super().__init__(resolved, run_dir)
        self.report, self.phases = report, Phases()
        self.case: dict | None = None
        self.steps: list[dict] = []
        self.profiler: torch.profiler.profile | None = None

    def build_model(self, *given, **named):
        # Not earlier: Megatron forks helpers, which must not find the GPU in use.
        self.report.content["gpu"] = torch.cuda.get_device_name()
        if gib := self.report.cases[0].get("gpu_gib"):
            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1, gib * GIB / whole))
        model = super().build_model(*given, **named)
        self.phases.watch(model)
        return model

    def datasets(self, *given):
        """All loaders at once: each counts the samples' tokens first, which takes seconds."""
        self.loaders = {}
        values = self.values
        ranks = Ranks(mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size(), values["num_workers"])
        for length, rows in {(case["seq_length"], case["micro_batch_size"]) for case in self.report.cases}:
            limits = length, values["min_pixels"], values["max_pixels"]
            encoder = VlmTaskEncoder(ChatTemplate(self.sidecars), *limits, True, 128, 0)
            loader = train_loader(
                self.data["path"], encoder, ranks, rows, values["packing_buffer_size"], pin_memory=True
            )
            self.loaders[length, rows] = iter(loader)
        return super().datasets(*given)

    def begin_case(self) -> None:
        self.case, self.steps = self.report.next_case, []
        language, vision = self.model.language_model, self.model.vision_model
        for part, config in (("language", language.config), ("vision", vision.decoder.config)):
            full = self.case[f"recompute_{part}"] == "full"
            config.recompute_granularity = "full" if full else None
            config.recompute_method, config.recompute_num_layers = ("uniform", 1) if full else (None, None)
        language.config.fp8 = None if self.case["fp8"] == "none" else "hybrid"
        language.config.fp8_recipe = self.case["fp8"]
        self.values["pack_chunk_tokens"] = self.case["pack_chunk_tokens"]
        self.phases.on = self.case.get("profile", False)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def begin_step(self) -> None:
        torch.cuda.synchronize()
        self.batches, self.waited, self.phases.marks = [], 0.0, []
        if self.phases.on and len(self.steps) == self.case["steps"] - 1:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.__enter__()
        self.began = time.perf_counter()

    def batch_iterator(self) -> Iterator[VlmBatch]:
        loader = self.loaders[self.case["seq_length"], self.case["micro_batch_size"]]
        while True:
            asked = time.perf_counter()
            batch = next(loader)
            self.waited += time.perf_counter() - asked
            if not self.case["images"]:
                batch.pixels, batch.grids, batch.image_index = batch.pixels[:0], batch.grids[:0], batch.image_index[:0]
            self.batches.append(batch)
            yield batch

    def forward_step(self, data_iterator, model):
        if self.case is None:
            self.begin_case()
            self.begin_step()
        return super().forward_step(self.batch_iterator(), model)

    def _note_norm(self, *given):
        self.phases.mark("gradient norm and optimizer")
        return super()._note_norm(*given)

    def training_log(self, *given, **named):
        flag = super().training_log(*given, **named)
        torch.cuda.synchronize()
        step = {"seconds": time.perf_counter() - self.began, "waited": self.waited}
        if self.phases.on:
            step["phases"] = self.phases.milliseconds()
        if self.profiler is not None:
            step["kernels"] = self.end_profile()
        step["batches"] = [self.batch_figures(batch) for batch in self.batches]
        self.steps.append(step)
        if len(self.steps) == self.case["steps"]:
            self.end_case()
        self.begin_step()
        return flag

    def end_profile(self) -> dict:
        self.profiler.__exit__(None, None, None)
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            self.profiler.export_chrome_trace(str(trace))
            self.profiler = None
            return kernel_times(json.loads(trace.read_text()))

    def batch_figures(self, batch: VlmBatch) -> dict:
        grids = [tuple(grid) for grid in batch.grids.tolist()]
        answers = len(batch.answer_labels)
        chunks = batch.chunks(self.case["pack_chunk_tokens"], 128)
        return {
            "chunks": [(c.input_ids.numel(), len(c.pixels), len(c.grids), len(c.answer_labels)) for c in chunks],
            "segments": batch.lengths,
            "padded": batch.input_ids.numel(),
            "patches": [height * width for height, width in grids],
            "answers": answers,
            "flops": training_flops(self.model_config, self.parts, batch.lengths, grids, answers),
        }

    def end_case(self) -> None:
        result = self.case | {
            "steps": self.steps,
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            "between_steps_gib": torch.cuda.memory_allocated() / GIB,
        }
        self.report.content["cases"][self.case["name"]] = result
        shown = figures(result)
        memory = f"{result['peak_allocated_gib']:.1f} / {result['peak_reserved_gib']:.1f} GiB"
        self.report.write(f"CASE {self.case['name']}: {shown['step_ms']:.0f} ms, {shown['mfu']:.3f} MFU, {memory}")
        if self.report.next_case:
            self.begin_case()
        elif self.report.vision:
            self.report.content["vision"] = vision_alone(self.model.vision_model, self.model_config)
            self.report.write(f"VISION {self.report.content['vision']}")

    def save_checkpoint(self, original, iteration, model, optimizer, scheduler, *given, **named):
        """Only for a case that asks for it: saved, destroyed in memory and loaded, each timed."""
        if not self.report.cases[-1].get("checkpoint"):
            return
        saves = []
        for step in (iteration, iteration + 1):  # the first makes the copy in host memory, where there is one
            began = time.perf_counter()
            super().save_checkpoint(original, step, model, optimizer, scheduler, *given, **named)
            stalled = time.perf_counter() - began
            maybe_finalize_async_save(blocking=True)
            saves.append({"stall_s": stalled, "written_s": time.perf_counter() - began})
            self.sealing.join()
            size = sum(path.stat().st_size for path in checkpoint_dir(self.run_dir, step).iterdir())
            if step == iteration:
                shutil.rmtree(checkpoint_dir(self.run_dir, step))
        peak = torch.cuda.max_memory_allocated() / GIB
        saved = {"saves": saves, "async": self.values["async_save"], "bytes": size, "save_peak_gib": peak}
        load = functools.partial(training.load_checkpoint, model, optimizer, scheduler)
        saved |= load_again(load, self.model, optimizer)
        self.report.content["checkpoint"] = saved
        self.report.write(f"CASE checkpoint: {saved}")


def load_again(load: Callable, model: torch.nn.Module, optimizer) -> dict:
    """Time, peak memory and result of a load into weights and moments that were set to zero."""

    def state() -> Iterator[torch.Tensor]:
        for part in optimizer.chained_optimizers:
            for tensors in part.optimizer.state.values():
                yield from (t for t in tensors.values() if torch.is_tensor(t) and t.numel() > 1)
        yield from (parameter.data for parameter in model.parameters())

    def sums() -> list[float]:
        return sorted(tensor.double().sum().item() for tensor in state())

    before = sums()
    for tensor in state():
        tensor.zero_()
    del tensor  # the memory is the optimizer's alone, as when a run starts
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    load()
    seconds = time.perf_counter() - began
    same = before == sums()
    return {"load_s": seconds, "same": same, "load_peak_gib": torch.cuda.max_memory_allocated() / GIB}


def vision_alone(tower: torch.nn.Module, model: ModelConfig) -> dict[str, dict]:
    """Forward and backward of the vision tower alone, by number of images and patches of each."""
    result = {}
    for images, side in ((24, 32), (6, 64), (96, 16)):
        pixels = torch.randint(256, (images * side**2, 588), dtype=torch.uint8, device="cuda")
        times = []
        for _ in range(12):
            torch.cuda.synchronize()
            began = time.perf_counter()
            features = tower(pixels, [(side, side)] * images)
            host = time.perf_counter() - began
            features.backward(features.detach())
            torch.cuda.synchronize()
            times.append((time.perf_counter() - began, host))
        seconds, host = (statistics.median(column) for column in zip(*times[4:], strict=True))
        square = 4 * model.vision.num_layers * model.vision.hidden_size * images * side**4
        flops = 3 * (2 * matmul_parameters(model)[2] * images * side**2 + square)
        result[f"{images}x{side**2}"] = {"ms": seconds * 1e3, "host_ms": host * 1e3, "mfu": flops / seconds / PEAK}
    return result


def train(args) -> None:
    report = Report(args)
    resolved = {
        "settings": run_settings(
            args.model, {"train_iters": sum(case["steps"] for case in report.cases)} | args.values
        ),
        "model": load_model_config(ROOT / "config/models" / f"{args.model}.yaml").model_dump(),
        "data": {"path": str(args.webdatasets), "fingerprint": "benchmark"},
        "start": {"sidecars": str(args.tokenizer), "folder": None, "untrained": True, "old_names": False},
    }
    run_dir = Path(tempfile.mkdtemp(prefix="llava_sft_training_"))
    (run_dir / "resolved.json").write_text(json.dumps(resolved))

    def micro_batches_of_case(**named):
        return forward_backward_no_pipelining(**named | {"num_microbatches": report.next_case["micro_batches"]})

    training.get_forward_backward_func = lambda *given, **named: micro_batches_of_case
    loop.Trainer = functools.partial(Measured, report)
    loop.main(str(run_dir / "resolved.json"), str(run_dir), "")
