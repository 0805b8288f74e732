"""Training speed and memory on one GPU, side by side: this project, and the same model in transformers' Trainer.

    python benchmarks/training.py WEBDATASETS TOKENIZER [--parts ours transformers unpacked calibration]

One command, one process after another on the same GPU, on the same batches of real images: `make_photos.py` and the
two data scripts make WEBDATASETS, TOKENIZER is any folder with the model's tokenizer. Weights are random, at the true shape.
- ours: the trainer and the loader that `train_X` runs, in bf16 and FP8, at 8,192 and 32,768 tokens, the language model
  alone (the ceiling: same packs, no images) and the vision tower alone; step time and memory over settings, which
  preflight predicts from (results/memory_time.json); where the time of a step goes (results/profile.json);
- transformers: the project's Hugging Face file in the Trainer: bf16, SDPA or flex attention, fused AdamW, recomputation
  only where memory needs it, packed; the batches are loaded and normalised before the clock runs;
- unpacked: the same one sample at a time, everything recomputed: what users of the model run today;
- calibration: more for preflight: float32 moments, and 8B;
- checkpoint: 4B trained in no more memory than an 80 GB GPU has, saved with its optimizer and loaded, timed;
- two_gpus: the same on two GPUs, data parallel, as many packs for each.
MFU: `llava_sft.model.cost.training_flops` (vision tower counted, attention causal and by segment, the output layer for
answers only, no recomputation) over step time and the GPU's dense bf16 peak, in FP8 too. Useful tokens: without padding.
"""

import argparse
import collections
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from cases import CALIBRATION, CALIBRATION_8B, CASE, CHECKPOINT, OURS, PEAK, PROFILE, TWO_GPUS
from kernels import kernel_times, profiles
from llava_sft.model.config import load_model_config
from llava_sft.model.tensors import parameter_count
from peers import PEER, PEERS, transformers_trainer
from results import ROOT, machine, row, write_results


def settings_of(model: str, values: dict) -> dict:
    """Resolved settings of a run of `model` on one GPU; no validation, no checkpoint."""
    from llava_sft.settings import layers, resolve

    layers.CONFIG_DIR = ROOT / "config"
    own = {"model": model, "load": "random", "packing": True, "gpus_per_node": 1, "num_workers": 6, "log_interval": 1}
    far = {"save_interval": 10**6, "eval_interval": 10**6, "eval_iters": 0, "log_answers": 0, "max_bad_steps": 10**6}
    long = {
        "micro_batch_size": 1,
        "weight_decay": 0,
        "seq_length": 8192,
        "global_batch_size": 4,
        "packing_buffer_size": 1000,
        "train_iters": 1000,
        "lr": 1e-5,
    }
    settings = layers.load_settings("vqa", own | far | long | {"lr_warmup_fraction": 0.002, "adam_eps": 1e-5} | values)
    return resolve.resolve(settings, 1000)[0].dump()


def train(args) -> None:
    """One process of this project's trainer through `cases`, one after another; results are written after each."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    alone |= {"MASTER_PORT": str(29000 + os.getpid() % 9000), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    for name, value in alone.items():  # torchrun sets its own
        os.environ.setdefault(name, value)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch
    from megatron.core import mpu
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
    from megatron.training import training
    from megatron.training.async_utils import maybe_finalize_async_save

    from llava_sft.data.loader import VlmTaskEncoder
    from llava_sft.data.stream import Ranks, train_loader
    from llava_sft.model.cost import matmul_parameters, training_flops
    from llava_sft.model.template import ChatTemplate
    from llava_sft.run.layout import checkpoint_dir
    from llava_sft.training import loop

    cases = [CASE | case for case in args.cases]
    about = {"model": args.model, "optimizer_precision": args.values.get("optimizer_precision", "bf16")}
    found = {**about, "machine": machine(), "gpus": int(os.environ["WORLD_SIZE"]), "cases": {}, "vision": {}}

    def moments(adam):
        states = adam.state.values()
        return [t for state in states for t in state.values() if torch.is_tensor(t) and t.numel() > 1]

    class Measured(loop.Trainer):
        def start_loaders(self):
            """All at once: to count the samples' tokens takes each some seconds."""
            self.loaders = {}
            for length, rows in {(case["seq_length"], case["micro_batch_size"]) for case in cases}:
                limits = length, self.values["min_pixels"], self.values["max_pixels"]
                encoder = VlmTaskEncoder(ChatTemplate(self.sidecars), *limits, True, 128, 0)
                workers = self.values["num_workers"]
                ranks = Ranks(mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size(), workers)
                buffer = self.values["packing_buffer_size"]
                self.loaders[length, rows] = iter(
                    train_loader(self.data["path"], encoder, ranks, rows, buffer, pin_memory=True)
                )

        def datasets(self, *given):
            self.start_loaders()
            return super().datasets(*given)

        def begin(self):
            self.case = cases[len(found["cases"])]
            self.steps = []
            language, vision = self.model.language_model, self.model.vision_model
            for part, config in (("language", language.config), ("vision", vision.decoder.config)):
                full = self.case[f"recompute_{part}"] == "full"
                config.recompute_granularity = "full" if full else None
                config.recompute_method, config.recompute_num_layers = ("uniform", 1) if full else (None, None)
            language.config.fp8 = None if self.case["fp8"] == "none" else "hybrid"
            language.config.fp8_recipe = self.case["fp8"]
            self.values["pack_chunk_tokens"] = self.case["pack_chunk_tokens"]
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.began_step()

        def began_step(self):
            torch.cuda.synchronize()
            self.batches, self.waited, self.marks, self.clock = [], 0.0, [], time.perf_counter()
            if self.case.get("profile") and len(self.steps) == self.case["steps"] - 1:
                self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.profiler.__enter__()
                self.clock = time.perf_counter()

        def batch_iterator(self):
            key = self.case["seq_length"], self.case["micro_batch_size"]
            while True:
                asked = time.perf_counter()
                batch = next(self.loaders[key])
                self.waited += time.perf_counter() - asked
                if not self.case["images"]:
                    batch.pixels, batch.grids, batch.image_index = (
                        x[:0] for x in (batch.pixels, batch.grids, batch.image_index)
                    )
                self.batches.append(batch)
                yield batch

        def forward_step(self, data_iterator, model):
            if not hasattr(self, "case"):
                self.begin()
            return super().forward_step(self.batch_iterator(), model)

        def training_log(self, *given, **named):
            flag = super().training_log(*given, **named)
            torch.cuda.synchronize()
            step = {"seconds": time.perf_counter() - self.clock, "waited": self.waited, "batches": []}
            if self.case.get("profile"):
                self.mark("end")
                torch.cuda.synchronize()
                step["phases"] = collections.Counter()
                for (name, start), (_, stop) in itertools.pairwise(self.marks):
                    step["phases"][name] += start.elapsed_time(stop)
                if len(self.steps) == self.case["steps"] - 1:
                    self.profiler.__exit__(None, None, None)
                    with tempfile.TemporaryDirectory() as folder:
                        self.profiler.export_chrome_trace(f"{folder}/trace.json")
                        step["kernels"] = kernel_times(json.loads(Path(f"{folder}/trace.json").read_text()))
            for batch in self.batches:
                grids = [tuple(grid) for grid in batch.grids.tolist()]
                answers = len(batch.answer_labels)
                chunks = batch.chunks(self.case["pack_chunk_tokens"], 128)
                step["batches"].append(
                    {
                        "chunks": [
                            (c.input_ids.numel(), len(c.pixels), len(c.grids), len(c.answer_labels)) for c in chunks
                        ],
                        "segments": batch.lengths,
                        "padded": batch.input_ids.numel(),
                        "patches": [h * w for h, w in grids],
                        "answers": answers,
                        "flops": training_flops(self.model_config, self.parts, batch.lengths, grids, answers),
                    }
                )
            self.steps.append(step)
            if len(self.steps) == self.case["steps"]:
                self.end()
            self.began_step()
            return flag

        def end(self):
            gib = 2**30
            result = self.case | {
                "steps": self.steps,
                "peak_allocated_gib": torch.cuda.max_memory_allocated() / gib,
                "peak_reserved_gib": torch.cuda.max_memory_reserved() / gib,
                "between_steps_gib": torch.cuda.memory_allocated() / gib,
            }
            found["cases"][self.case["name"]] = result
            seconds = statistics.median(step["seconds"] for step in self.steps[self.case["warm"] :])
            if os.environ["RANK"] == "0":
                print(f"CASE {self.case['name']}: {seconds * 1e3:.0f} ms, {figures(result)['mfu']:.3f} MFU, ", end="")
                print(f"{result['peak_allocated_gib']:.1f} / {result['peak_reserved_gib']:.1f} GiB", flush=True)
                args.result.write_text(json.dumps(found))
            if len(found["cases"]) < len(cases):
                self.begin()
            elif args.vision:
                self.vision_alone()

        def mark(self, name):
            if self.case.get("profile"):
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                self.marks.append((name, event))

        def build_model(self, *given, **named):
            # Not earlier: Megatron forks helpers, which must not find the GPU in use.
            found["gpu"] = torch.cuda.get_device_name()
            if gib := cases[0].get("gpu_gib"):
                whole = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1, gib * 2**30 / whole))
            model = super().build_model(*given, **named)

            def encoded(module, inputs, features):
                self.mark("forward: language model")
                if features.requires_grad:
                    features.register_hook(lambda grad: self.mark("backward: vision tower and adapter"))

            model.vision_model.register_forward_pre_hook(lambda *_: self.mark("forward: vision tower and adapter"))
            model.adapter.register_forward_hook(encoded)

            def answered(module, inputs, losses):
                if losses.requires_grad:
                    losses.register_hook(lambda grad: self.mark("backward: language model"))

            model.register_forward_hook(answered)
            return model

        def _note_norm(self, *given):
            self.mark("gradient norm and optimizer")
            return super()._note_norm(*given)

        def vision_alone(self):
            tower, vision = self.model.vision_model, self.model_config.vision
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
                square = 4 * vision.num_layers * vision.hidden_size * images * side**4
                flops = 3 * (2 * matmul_parameters(self.model_config)[2] * images * side**2 + square)
                figure = {"ms": seconds * 1e3, "host_ms": host * 1e3, "mfu": flops / seconds / PEAK}
                found["vision"][f"{images}x{side**2}"] = figure
                print(f"VISION {images} x {side**2}: {figure}", flush=True)
            args.result.write_text(json.dumps(found))

        def save_checkpoint(self, original, iteration, model, optimizer, scheduler, *given, **named):
            """Only for a case that asks for it: saved, destroyed in memory and loaded, each timed."""
            if not cases[-1].get("checkpoint"):
                return
            saves = []
            for step in (iteration, iteration + 1):  # the first makes the copy in host memory, where there is one
                began = time.perf_counter()
                super().save_checkpoint(original, step, model, optimizer, scheduler, *given, **named)
                stalled = time.perf_counter() - began
                maybe_finalize_async_save(blocking=True)
                saves.append({"stall_s": stalled, "written_s": time.perf_counter() - began})
                self.sealing.join()
                size = sum(path.stat().st_size for path in checkpoint_dir(run_dir, step).iterdir())
                if step == iteration:
                    shutil.rmtree(checkpoint_dir(run_dir, step))
            peak = torch.cuda.max_memory_allocated() / 2**30
            state = [tensor for part in optimizer.chained_optimizers for tensor in moments(part.optimizer)]
            weights = [parameter.data for parameter in self.model.parameters()]
            before = sorted(tensor.double().sum().item() for tensor in state + weights)
            for tensor in state + weights:
                tensor.zero_()
            found["checkpoint"] = {
                "saves": saves,
                "async": self.values["async_save"],
                "bytes": size,
                "save_peak_gib": peak,
            }
            args.result.write_text(json.dumps(found))
            tensor = state = weights = None  # the memory is the optimizer's alone, as when a run starts
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            training.load_checkpoint(model, optimizer, scheduler)
            loaded = time.perf_counter() - began
            state = [tensor for part in optimizer.chained_optimizers for tensor in moments(part.optimizer)]
            weights = [parameter.data for parameter in self.model.parameters()]
            same = before == sorted(tensor.double().sum().item() for tensor in state + weights)
            load_peak = torch.cuda.max_memory_allocated() / 2**30
            found["checkpoint"] |= {"load_s": loaded, "same": same, "load_peak_gib": load_peak}
            print(f"CASE checkpoint: {found['checkpoint']}", flush=True)
            args.result.write_text(json.dumps(found))

    values = settings_of(args.model, {"train_iters": sum(case["steps"] for case in cases)} | args.values)
    model = load_model_config(ROOT / "config/models" / f"{args.model}.yaml")
    run_dir = Path(tempfile.mkdtemp(prefix="llava_sft_training_"))
    resolved = {
        "settings": values,
        "model": model.model_dump(),
        "data": {"path": str(args.webdatasets), "fingerprint": "benchmark"},
        "start": {"sidecars": str(args.tokenizer), "folder": None, "untrained": True, "old_names": False},
    }
    (run_dir / "resolved.json").write_text(json.dumps(resolved))
    loop.Trainer = Measured

    def micro_batches_of_case(**named):
        count = cases[len(found["cases"])]["micro_batches"]
        return forward_backward_no_pipelining(**named | {"num_microbatches": count})

    training.get_forward_backward_func = lambda *given, **named: micro_batches_of_case
    loop.main(str(run_dir / "resolved.json"), str(run_dir), "")


def figures(case: dict) -> dict:
    """Median figures of the timed steps of one case."""
    timed = case["steps"][case["warm"] :]

    def rate(of):
        return statistics.median(sum(of(batch) for batch in step["batches"]) / step["seconds"] for step in timed)

    return {
        "mfu": rate(lambda batch: batch["flops"]) / PEAK,
        "useful_tokens_per_s": rate(lambda batch: sum(batch["segments"])),
        "tokens_per_s": rate(lambda batch: batch["padded"]),
        "data_wait": sum(step["waited"] for step in timed) / sum(step["seconds"] for step in timed),
        "peak_gib": case["peak_allocated_gib"],
        "step_ms": statistics.median(step["seconds"] for step in timed) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("webdatasets", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parts = ["ours", "transformers", "unpacked", "calibration", "checkpoint", "two_gpus"]
    parser.add_argument("--parts", nargs="+", default=parts[:3], choices=parts)
    parser.add_argument("--model", default="4b")
    parser.add_argument("--output", type=Path, help="folder for the raw figures; results/ is then left as it is")
    parser.add_argument("--read", type=Path, help="folder of raw figures, of another machine: write results/ from them")
    parser.add_argument("--minutes", type=float, default=8, help="longest time of one process")
    parser.add_argument("--worker", choices=["train", "transformers_trainer"], help=argparse.SUPPRESS)
    parser.add_argument("--cases", type=json.loads, help="JSON list of cases, in place of a part's own")
    parser.add_argument("--values", type=json.loads, default={}, help="JSON of further settings")
    parser.add_argument("--vision", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        if args.worker == "train":
            train(args)
        else:
            transformers_trainer(args, settings_of(args.model, {}), PEAK)
        return

    if args.read:
        write([json.loads(path.read_text()) for path in sorted(args.read.glob("*.json"))])
        return
    found = []
    folder = args.output or Path(tempfile.mkdtemp())
    for part in args.parts:
        for number, (worker, cases, extra) in enumerate(processes(part, args)):
            result = folder / f"{part}_{number}.json"
            launcher = (
                ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if part == "two_gpus" else []
            )
            command = [
                sys.executable,
                *launcher,
                __file__,
                str(args.webdatasets),
                str(args.tokenizer),
                "--worker",
                worker,
            ]
            command += ["--cases", json.dumps(cases), "--result", str(result), "--model", args.model, *extra]
            began = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            timer = threading.Timer(60 * args.minutes, process.kill)
            timer.start()
            with open(result.with_suffix(".log"), "w") as log:
                for line in process.stdout:
                    print(line, end="", file=log, flush=True)
                    if re.match("CASE|VISION", line):
                        print(line, end="", flush=True)
            timer.cancel()
            process.wait()
            print(f"{part} {number}: {time.perf_counter() - began:.0f} s, exit code {process.returncode}", flush=True)
            if result.is_file():
                found.append(json.loads(result.read_text()))
    if not args.output:
        write(found)


def picture(bars: list[tuple[str, float]], unit: str) -> str:
    """Horizontal bars as an SVG image."""
    longest = max(value for _, value in bars)
    lines = []
    for number, (name, value) in enumerate(bars):
        y, length = 12 + 30 * number, 340 * value / longest
        lines.append(f'<text x="250" y="{y + 15}" text-anchor="end">{name}</text>')
        lines.append(f'<rect x="260" y="{y}" width="{length:.0f}" height="20" fill="#4878a8"/>')
        lines.append(f'<text x="{265 + length:.0f}" y="{y + 15}">{value:,.0f}</text>')
    height = 30 * len(bars) + 36
    caption = f'<text x="260" y="{height - 8}">{unit}</text>'
    style = '<g font-family="sans-serif" font-size="13" fill="#444">'
    frame = f'<svg xmlns="http://www.w3.org/2000/svg" width="680" height="{height}">'
    return "\n".join(
        [frame, '<rect width="100%" height="100%" fill="white"/>', style, *lines, caption, "</g></svg>", ""]
    )


def write(found: list[dict]) -> None:
    """The result files, of the processes of one run on one machine."""
    on = {"command": "python benchmarks/training.py WEBDATASETS TOKENIZER", **found[0]["machine"]}
    if measured := memory_and_time([process for process in found if "cases" in process]):
        write_results("memory_time", measured, **on)
    if profiled := profiles([process for process in found if "cases" in process]):
        write_results("profile", profiled, **on)
    if speeds := speed(found):
        write_results("training", speeds, **on)
        named = {"fp8_8192": "this project, FP8", "bf16_8192": "this project, bf16"}
        peers = [process["peer"] for process in found if "peer" in process]
        named |= {peer["name"]: peer["name"] for peer in peers if peer["seq_length"] == 8192}
        rates = {r["note"].split(":")[0]: r["value"] for r in speeds if "useful_tokens_per_s" in r["metric"]}
        bars = [(title, rates[name]) for name, title in named.items() if name in rates]
        unit = f"useful tokens/s, 4B, 8,192 tokens, one {found[0]['gpu']}"
        (ROOT / "docs/performance.svg").write_text(picture(bars, unit))


def processes(part: str, args) -> list:
    """(worker, cases, further arguments) of each process of a part."""
    given = ["--values", json.dumps(args.values)]
    if part in PEERS:
        return [("transformers_trainer", [PEER | case], []) for case in args.cases or PEERS[part]]
    if part == "ours":
        cases = sorted(CALIBRATION + OURS + PROFILE, key=lambda case: "fp8" in case)  # FP8 copies of the weights stay
        return [("train", args.cases or cases, ["--vision", *given])]
    if part == "checkpoint":
        return [("train", args.cases or CHECKPOINT, given)]
    if part == "two_gpus":
        two = json.dumps({"gpus_per_node": 2, "global_batch_size": 8} | args.values)
        return [("train", args.cases or TWO_GPUS, ["--values", two])]
    fp32 = ["--values", json.dumps({"optimizer_precision": "fp32"})]
    return [("train", [CALIBRATION[2] | {"name": "fp32"}], fp32), ("train", CALIBRATION_8B, ["--model", "8b"])]


def memory_and_time(found: list[dict]) -> list[dict]:
    """What preflight predicts from: for each setting a step's time and the peak memory, with all that decides them."""
    parameters = {
        name: parameter_count(load_model_config(ROOT / f"config/models/{name}.yaml")) for name in ("4b", "8b")
    }
    result = []
    for process in found:
        for case in process["cases"].values():
            if not case["images"] or case.get("profile"):
                continue
            timed = sorted(case["steps"][case["warm"] :], key=lambda step: step["seconds"])
            middle = timed[(len(timed) - 1) // 2]
            every = [chunk for step in case["steps"] for batch in step["batches"] for chunk in batch["chunks"]]
            chunks = [chunk for batch in middle["batches"] for chunk in batch["chunks"]]
            settings = {
                "model": process["model"],
                "parameters": parameters[process["model"]],
                "optimizer_precision": process["optimizer_precision"],
                "gpus": process.get("gpus", 1),
                **{key: case[key] for key in CASE.keys() - {"steps", "warm", "images"}},
                "largest_chunk": max(every, key=lambda chunk: (chunk[0] + chunk[1], chunk)),
                "step_chunks": len(chunks),
                "step_tokens": sum(sum(batch["segments"]) for batch in middle["batches"]),
                "step_padded_tokens": sum(chunk[0] for chunk in chunks),
                "step_patches": sum(chunk[1] for chunk in chunks),
                "step_answers": sum(chunk[3] for chunk in chunks),
                "step_flops": sum(batch["flops"] for batch in middle["batches"]),
                "gpu": process["gpu"],
            }
            note = (
                "largest_chunk: tokens, patches, images, answers of the largest of the run; step_…: of the timed step"
            )
            for metric, value, unit in (
                ("peak_gib", case["peak_allocated_gib"], "GiB"),
                ("peak_reserved_gib", case["peak_reserved_gib"], "GiB"),
                ("between_steps_gib", case["between_steps_gib"], "GiB"),
                ("step_ms", middle["seconds"] * 1e3, "ms"),
            ):
                result.append(row(metric, value, unit, None, "lower", note, **settings))
    return result


def speed(found: list[dict]) -> list[dict]:
    """The figures that have goals, of all processes of one run."""
    cases, peers, result = {}, {}, []
    for process in found:
        known = {"model": process["model"], "gpu": process["gpu"], "gpus": process.get("gpus", 1)}
        known |= {"optimizer_precision": process.get("optimizer_precision")}
        for name, case in process.get("cases", {}).items():
            if case.get("profile") or name in {case["name"] for case in CALIBRATION}:
                continue
            cases[name] = figures(case) | case | {"of": known}
        if "peer" in process:
            peers[process["peer"]["name"]] = process["peer"] | {"of": known}

    def add(metric, value, unit, goal, better, note, case, **more):
        kept = ["seq_length", "micro_batches", "fp8", "accumulate", "recompute"]
        kept += ["pack_chunk_tokens"] if case.get("pack_chunk_tokens") != CASE["pack_chunk_tokens"] else []
        kept += [] if case.get("images", True) else ["images"]
        where = {key: case[key] for key in kept if key in case}
        known = {
            key: value
            for key, value in case["of"].items()
            if value not in (None, "bf16") and (key, value) != ("gpus", 1)
        }
        recomputed = {key: "full" for key in ("recompute_language", "recompute_vision") if case.get(key) == "full"}
        result.append(row(metric, value, unit, goal, better, note, **known, **where, **recomputed, **more))

    goals = {"bf16_8192": 0.52, "bf16_32768": 0.50}
    for name, case in cases.items():
        chip = "h100" if "H100" in case["of"]["gpu"] else "h200"
        fp8 = {"none": "", "tensorwise": "fp8_", "blockwise": "fp8_blockwise_"}[case["fp8"]]
        kind = fp8 or ("bf16_" if case["images"] else "language_")
        note = "median of the timed steps; vision tower counted, output layer for answers only, no recomputation"
        add(f"mfu_{kind}{case['seq_length']}_{chip}", case["mfu"], "", goals.get(name), "higher", note, case)
        add("useful_tokens_per_s", case["useful_tokens_per_s"], "tokens/s", None, "higher", name, case)
        add("peak_memory_gib", case["peak_gib"], "GiB", None, "lower", name, case)
        add("loader_wait_share", case["data_wait"], "", 0.02, "lower", name, case)
    rate = {name: case["useful_tokens_per_s"] for name, case in (cases | peers).items()}
    best = {}  # sequence length → the fastest packed peer
    for name, peer in sorted(peers.items(), key=lambda item: item[1]["useful_tokens_per_s"]):
        if peer["packed"]:
            best[peer["seq_length"]] = name
    small, fast = "bf16_8192 80 GB", "bf16_8192"
    for metric, first, second, unit, goal in (
        ("fp8_speedup", "fp8_8192", fast, "×", 1.2),
        ("speedup_vs_transformers", fast, best.get(8192), "×", 1.4),
        ("speedup_vs_transformers", "bf16_32768", best.get(32768), "×", 1.4),
        ("speedup_fp8_vs_transformers", "fp8_8192", best.get(8192), "×", 1.7),
        ("speedup_vs_unpacked", fast, "transformers unpacked", "×", 4.0),
        ("dp2_efficiency", "two gpus gbs 4", f"{small} gbs 4", "", 0.97),
        ("dp2_efficiency", "two gpus", small, "", 0.97),
    ):
        if first in rate and second in rate:
            note = f"useful tokens/s of {first} over {second}: {rate[first]:,.0f} over {rate[second]:,.0f}"
            note += ", of one GPU" if "two" in first else ""
            add(metric, rate[first] / rate[second], unit, goal, "higher", note, cases[first])
    for name, peer in peers.items():
        add("peer_mfu", peer["mfu"], "", None, "higher", name, peer)
        add("peer_useful_tokens_per_s", peer["useful_tokens_per_s"], "tokens/s", None, "higher", name, peer)
        add("peer_peak_memory_gib", peer["peak_gib"], "GiB", None, "lower", name, peer)
    for process in found:
        where = {"of": {"model": process["model"], "gpu": process["gpu"]}}
        for name, figure in process.get("vision", {}).items():
            goal = {"24x1024": 0.50, "6x4096": 0.45}.get(name)
            note = f"{figure['ms']:.0f} ms forward and backward, the host busy for {figure['host_ms']:.0f} ms of the forward"
            add("mfu_vision_tower", figure["mfu"], "", goal, "higher", note, where, images_and_patches=name)
        if saved := process.get("checkpoint"):
            for number, save in enumerate(saved["saves"], 1):
                note = f"{saved['bytes'] / 1e9:.1f} GB with the optimizer, written after {save['written_s']:.0f} s"
                add(
                    "save_stall_s",
                    save["stall_s"],
                    "s",
                    2,
                    "lower",
                    note,
                    where,
                    async_save=saved["async"],
                    save=number,
                )
            note = f"into the optimizer that there is, peak {saved['load_peak_gib']:.1f} GiB; all values the same"
            add(
                "checkpoint_load_s",
                saved["load_s"],
                "s",
                None,
                "lower",
                note if saved["same"] else "NOT the same",
                where,
            )
    return result


if __name__ == "__main__":
    main()
