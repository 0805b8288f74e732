"""This project's trainer through cases of settings in one process, timed from inside, for benchmarks/training.py.

A case changes the settings of a training that is set up already, and each of its steps is one of the training loop's,
in the same order (`Cases.step`). Figures are written after each case.
"""

import collections
import gc
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from cases import CASE, PEAK, run_settings
from kernel_times import kernel_times, trace
from llava_sft.checkpoint.start import Start
from llava_sft.data.loader import VlmBatch
from llava_sft.model import flash4
from llava_sft.model.config import load_model_config
from llava_sft.model.processing import PATCH_VALUES
from llava_sft.model.template import ChatTemplate
from llava_sft.preflight.cost import matmul_parameters, training_flops
from llava_sft.run.layout import checkpoint_dir
from llava_sft.settings.resolved import Resolved, ResolvedData
from llava_sft.training import process
from llava_sft.training.loop import Loop, pad_multiple
from results import ROOT, machine, seconds_left
from training_rows import figures

from llava_sft.megatron.distributed import unwrapped  # isort: skip (the CPU layer, of `process`, comes first)
from llava_sft.model import fused_layers  # isort: skip

GIB = 2**30


class Phases:
    """Events in the GPU's queue where one phase of a step ends and the next begins; hooks mark the backward pass."""

    def __init__(self, model: torch.nn.Module):
        self.on = False
        self.marks: list[tuple[str, torch.cuda.Event]] = []
        model.vision_model.register_forward_pre_hook(lambda *_: self.mark("forward: vision tower and adapter"))
        model.adapter.register_forward_hook(self._encoded)
        model.register_forward_hook(self._answered)

    def mark(self, name: str) -> None:
        if self.on:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))

    def _encoded(self, module, inputs, features: torch.Tensor) -> None:
        self.mark("forward: language model")
        if features.requires_grad:
            features.register_hook(lambda gradient: self.mark("backward: vision tower and adapter"))

    def _answered(self, module, inputs, losses: torch.Tensor) -> None:
        if losses.requires_grad:
            losses.register_hook(lambda gradient: self.mark("backward: language model"))

    def milliseconds(self) -> dict[str, float]:
        self.mark("end")
        torch.cuda.synchronize()
        spent: collections.Counter = collections.Counter()
        for (name, start), (_, stop) in itertools.pairwise(self.marks):
            spent[name] += start.elapsed_time(stop)
        return spent


def amounts(loop: Loop, batch: VlmBatch, case: dict) -> dict:
    """How much there was to do for a micro-batch. Of a chunk: tokens, patches, images, answer tokens."""
    grids = [tuple(grid) for grid in batch.grids.tolist()]
    chunks = batch.chunks(case["pack_chunk_tokens"], pad_multiple(loop.on_gpu))
    trained, answers = loop.values.trained, len(batch.answer_labels)
    return {
        "chunks": [(c.input_ids.numel(), len(c.pixels), len(c.grids), len(c.answer_labels)) for c in chunks],
        "segments": batch.lengths,
        "padded": batch.input_ids.numel(),
        "patches": [height * width for height, width in grids],
        "answers": answers,
        "flops": training_flops(loop.model_config, trained, batch.lengths, grids, answers),
    }


class Cases:
    """Trains the cases one after another on the loaders' batches."""

    def __init__(self, loop: Loop, cases: list[dict], resolved: Resolved, run_dir: Path):
        self.loop, self.model = loop, unwrapped(loop.model)
        self.phases = Phases(self.model)
        self.iteration, self.waited = 0, 0.0
        self.has_memory_for_inputs = fused_layers.has_memory_for_inputs
        self.batches: list[VlmBatch] = []
        self.kept: dict[tuple[int, int], list[VlmBatch]] = {}
        # All loaders at once: each counts the samples' tokens first, which takes seconds.
        self.loaders = {}
        for length, rows in {(case["seq_length"], case["micro_batch_size"]) for case in cases}:
            template = ChatTemplate(resolved.start.sidecars)
            limits = template, length, loop.values.min_pixels, loop.values.max_pixels
            values = loop.values.model_copy(update={"micro_batch_size": rows})
            ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
            self.loaders[length, rows] = process.make_loader(values, resolved.data, run_dir, limits, *ranks)

    def run(self, case: dict) -> dict:
        """The case and its figures: `steps`, and the memory at their peak and between them."""
        self.apply(case)
        gc.collect()  # the loop has switched off what Python does by itself
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        last = case["steps"] - 1
        limit_memory(case.get("gpu_gib", math.inf))
        try:
            steps = [self.timed_step(case, case.get("profile") and step == last) for step in range(case["steps"])]
        except torch.OutOfMemoryError as error:
            return case | {"out_of_memory": str(error).splitlines()[0]}
        in_use = "flash4" if flash4.wanted(False) and flash4.wanted(True) else "cudnn"  # the library may have failed
        if "attention" in case or in_use == "flash4":
            case |= {"attention": in_use}
        return case | {
            "steps": steps,
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
            "between_steps_gib": torch.cuda.memory_allocated() / GIB,
            "inputs_kept": self.inputs_kept,
        }

    def apply(self, case: dict) -> None:
        language, vision = self.model.language_model, self.model.vision_model
        for part, config in (("language", language.config), ("vision", vision.decoder.config)):
            full = case[f"recompute_{part}"] == "full"
            config.recompute_granularity = "full" if full else None
            config.recompute_method, config.recompute_num_layers = ("uniform", 1) if full else (None, None)
        flash4.choose(case.get("attention", "auto"))
        language.config.fp8 = None if case["fp8"] == "none" else "hybrid"
        language.config.fp8_recipe = case["fp8"]
        chunk = {"pack_chunk_tokens": case["pack_chunk_tokens"]}
        self.loop.values = self.loop.values.model_copy(update=chunk)
        self.loop.micro_batches = case["micro_batches"]
        key = case["seq_length"], case["micro_batch_size"]
        loader = self.again(key) if case.get("same_batches") else self.loaders[key]
        self.loop.loader = self.clocked(loader, case["images"])
        self.phases.on = case.get("profile", False)
        self.inputs_kept = False

        def has_memory_for_inputs(layer, tokens: int) -> bool:
            found = case.get("keep_inputs", True) and self.has_memory_for_inputs(layer, tokens)
            self.inputs_kept |= found
            return found

        fused_layers.has_memory_for_inputs = has_memory_for_inputs

    def again(self, key: tuple[int, int]) -> Iterator[VlmBatch]:
        """The batches that an earlier case had, and then new ones."""
        kept = self.kept.setdefault(key, [])
        for number in itertools.count():
            if number == len(kept):
                kept.append(next(self.loaders[key]))
            yield kept[number]

    def clocked(self, loader: Iterator[VlmBatch], images: bool) -> Iterator[VlmBatch]:
        while True:
            asked = time.perf_counter()
            batch = next(loader)
            self.waited += time.perf_counter() - asked
            if not images:
                batch.pixels, batch.grids, batch.image_index = batch.pixels[:0], batch.grids[:0], batch.image_index[:0]
            self.batches.append(batch)
            yield batch

    def step(self) -> None:
        self.loop.saves.finish()
        self.loop.forward.begin(self.iteration)
        sums = self.loop.forward_backward()
        self.phases.mark("gradient norm and optimizer")
        norm = self.loop.update()
        self.iteration += 1
        self.loop.log(self.iteration, sums, norm)
        self.loop.must_stop()

    def timed_step(self, case: dict, profiled: bool) -> dict:
        torch.cuda.synchronize()
        self.batches, self.waited, self.phases.marks = [], 0.0, []
        profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) if profiled else None
        with profiler or nullcontext():
            began = time.perf_counter()
            self.step()
            torch.cuda.synchronize()
            result: dict[str, Any] = {"seconds": time.perf_counter() - began, "waited": self.waited}
        if self.phases.on:
            result["phases"] = self.phases.milliseconds()
        if profiler:
            result["kernels"] = kernel_times(trace(profiler))
        return result | {"batches": [amounts(self.loop, batch, case) for batch in self.batches]}

    def save_and_load(self) -> dict:
        """Two saves, of which the first takes the host memory for its copy, and a load into zeros, each timed."""
        saves, folder = [], checkpoint_dir(self.loop.saves.run_dir, self.iteration)
        for _ in range(2):
            shutil.rmtree(folder, ignore_errors=True)
            began = time.perf_counter()
            self.loop.saves.save(self.iteration)
            stalled = time.perf_counter() - began
            self.loop.saves.states.finish(wait=True)
            saves.append({"stall_s": stalled, "written_s": time.perf_counter() - began})
            self.loop.saves.finish(wait=True)
        size = sum(path.stat().st_size for path in folder.iterdir())
        peak = torch.cuda.max_memory_allocated() / GIB
        before = self.sums()
        for tensor in self.state():
            tensor.zero_()
        del tensor  # the memory is the optimizer's alone, as when a run starts
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        self.loop.saves.states.load(folder)
        loaded = {"load_s": time.perf_counter() - began, "same": before == self.sums()}
        loaded["load_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        in_background = self.loop.values.async_save
        return {"saves": saves, "async": in_background, "bytes": size, "save_peak_gib": peak, **loaded}

    def state(self) -> Iterator[torch.Tensor]:
        """The weights, and the optimizer's tensors."""
        yield from (parameter.data for parameter in self.model.parameters())
        for part in self.loop.optimizer.chained_optimizers:
            for tensors in part.optimizer.state.values():
                yield from (t for t in tensors.values() if torch.is_tensor(t) and t.numel() > 1)

    def sums(self) -> list[float]:
        return sorted(tensor.double().sum().item() for tensor in self.state())


def tower_once(loop: Loop, pixels: torch.Tensor, grids: list[tuple[int, int]]) -> tuple[float, float]:
    """Seconds of the vision tower's forward and backward, and of the host in the forward."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    features = unwrapped(loop.model).vision_model(pixels, grids)
    host = time.perf_counter() - began
    features.backward(features.detach())
    torch.cuda.synchronize()
    return time.perf_counter() - began, host


def vision_alone(loop: Loop) -> dict[str, dict]:
    """Forward and backward of the vision tower alone, by number of images and patches of each."""
    vision, parameters = loop.model_config.vision, matmul_parameters(loop.model_config)[2]
    result = {}
    for images, side in ((24, 32), (6, 64), (96, 16)):
        pixels = torch.randint(256, (images * side**2, PATCH_VALUES), dtype=torch.uint8, device=loop.forward.device)
        times = [tower_once(loop, pixels, [(side, side)] * images) for _ in range(12)]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            tower_once(loop, pixels, [(side, side)] * images)
        seconds, host = (statistics.median(column) for column in zip(*times[4:], strict=True))
        attention = 4 * vision.num_layers * vision.hidden_size * images * side**4
        flops = 3 * (2 * parameters * images * side**2 + attention)
        result[f"{images}x{side**2}"] = {"ms": seconds * 1e3, "host_ms": host * 1e3, "mfu": flops / seconds / PEAK}
        result[f"{images}x{side**2}"]["kernels"] = kernel_times(trace(profiler))
    return result


def limit_memory(gib: float) -> None:
    """Of this process on its GPU, as if that had no more."""
    device = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(device)
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / whole), device)


def train(args) -> None:
    cases = [CASE | case for case in args.cases]
    resolved = Resolved(
        settings=run_settings(args.model, {"train_iters": sum(case["steps"] for case in cases)} | args.values),
        model=load_model_config(ROOT / "config/models" / f"{args.model}.yaml").model_dump(),
        data=ResolvedData(path=str(args.webdatasets), fingerprint="benchmark"),
        start=Start(sidecars=args.tokenizer, fingerprint="benchmark", untrained=True),
    )
    report: dict[str, Any] = {"model": args.model, "machine": machine(), "cases": {}}
    report |= {"optimizer_precision": args.values.get("optimizer_precision", "bf16")}
    run_dir = Path(tempfile.mkdtemp(prefix="llava_sft_training_"))

    def write(message: str) -> None:
        if os.environ["RANK"] == "0":
            print(message, flush=True)
            args.result.write_text(json.dumps(report))

    if gib := cases[0].get("gpu_gib"):
        limit_memory(gib)
    loop = process.set_up(resolved, run_dir)
    report |= {"gpu": torch.cuda.get_device_name(), "gpus": torch.distributed.get_world_size()}
    loop.model.train()
    trainer = Cases(loop, cases, resolved, run_dir)
    for case in cases:
        if seconds_left() <= 0 and report["gpus"] == 1:
            write(f"CASE {case['name']}: not begun, the time is over")
            break
        report["cases"][case["name"]] = result = trainer.run(case)
        if "out_of_memory" in result:
            write(f"CASE {case['name']}: {result['out_of_memory']}")
            continue
        if case.get("vision_alone"):
            result["vision"] = vision_alone(loop)
            write(
                f"VISION {case['name']}: { {name: round(tower['ms'], 1) for name, tower in result['vision'].items()} }"
            )
        shown = figures(result)
        memory = f"{result['peak_allocated_gib']:.1f} / {result['peak_reserved_gib']:.1f} GiB"
        rate = shown["useful_tokens_per_s"]
        write(f"CASE {case['name']}: {shown['step_ms']:.0f} ms, {rate:,.0f} tokens/s, {shown['mfu']:.3f} MFU, {memory}")
    if args.vision and seconds_left() > 0:
        report["vision"] = vision_alone(loop)
        write(f"VISION { {name: tower['ms'] for name, tower in report['vision'].items()} }")
    if cases[-1].get("checkpoint") and cases[-1]["name"] in report["cases"]:
        report["checkpoint"] = trainer.save_and_load()
        write(f"CASE checkpoint: {report['checkpoint']}")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # as the trainer ends: torch takes a worker's end for an error
    for child in multiprocessing.active_children():
        child.kill()
    torch.distributed.destroy_process_group()
