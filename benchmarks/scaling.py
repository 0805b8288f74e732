"""Two GPUs beside one: useful tokens/s, peak memory and losses of data, tensor and pipeline parallelism.

    python benchmarks/scaling.py WEBDATASETS TOKENIZER --only one --output raw       # then dp2, tp2, pp2: minutes each
    python benchmarks/scaling.py WEBDATASETS TOKENIZER --read raw                    # the rows of results/scaling.json

Random weights at the model's true shape, the trainer and the loader that `train_X` runs, in one process a GPU. First the
losses of `--loss-steps` steps of two packs, the same packs in every layout; then timed steps of 16 packs for each GPU, and
of 4, beside what preflight predicts. Efficiency: useful tokens/s (without padding) of two GPUs over twice that of one. Losses
are compared while they fall: the first ten steps, and means of ten in the first thirty. Later the data is known by heart,
and rounding decides. On a machine without GPUs, `--model tiny --seq-length 256` tries all of it on CPUs.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cases import run_settings
from llava_sft.data.sizes import Limits, global_order, sample_sizes
from llava_sft.machine import gpu_count, this_machine
from llava_sft.model.config import ModelConfig, load_model_config
from llava_sft.preflight.predict import Case, mean_and_largest
from llava_sft.preflight.proposals import forecast_of
from llava_sft.training.launcher import commands
from results import ROOT, machine, seconds_left
from scaling_rows import FORETELLING, compare, write

LAYOUTS = {
    "one": {},
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}
LOSS_PACKS = 2
SPEED = {16: (1, 3), 4: (1, 3)}  # packs for each GPU → steps not timed, timed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("webdatasets", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument("--model", default="4b")
    parser.add_argument(
        "--layers", type=int, help="of the language model: so many of its own (losses of 8B beside one GPU)"
    )
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=4096, help="pack_chunk_tokens: what fits into 80 GB")
    parser.add_argument("--packs", type=int, nargs="+", default=[*SPEED], help="for each GPU, in the timed steps")
    parser.add_argument("--unbalanced", action="store_true", help="deal the packs in turn, whatever they cost")
    parser.add_argument("--loss-steps", type=int, default=50)
    parser.add_argument("--values", type=json.loads, default={}, help="JSON of further settings")
    parser.add_argument("--minutes", type=float, default=3, help="longest time of one layout")
    parser.add_argument(
        "--profile", action="store_true", help="then one step more: kernels of each rank, in the raw figures"
    )
    parser.add_argument("--output", type=Path, help="folder for the raw figures; results/ is then left as it is")
    parser.add_argument("--read", type=Path, help="folder of raw figures: write results/ from them")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        train(args, json.loads(args.worker))
        return
    folder = args.read or args.output or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    for layout in () if args.read else args.only:
        if seconds_left() > 0:
            measure(layout, args, folder)
    raw = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json") if path.stem in LAYOUTS}
    compare(raw)
    if not args.output:
        write(raw)


def measure(layout: str, args: argparse.Namespace, folder: Path) -> None:
    """Run a layout in processes of its own; its raw figures are then in the folder, and its log beside them."""
    count, began = (1 if layout == "one" else 2), time.monotonic()
    result, store = folder / f"{layout}.json", tempfile.mkdtemp(prefix="llava_sft_")
    result.unlink(missing_ok=True)
    values, predicted = foreseen(layout, args, Path(store))
    worker = json.dumps(
        {"layout": layout, "processes": count, "result": str(result), "run_dir": f"{store}/run"}
        | {"values": values, "predicted": predicted}
    )
    with open(result.with_suffix(".log"), "w") as log:
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--worker", worker],
                env=os.environ | environment, stdout=log, stderr=log,
            )
            for _, environment in commands(count, [], store)
        ]  # fmt: skip
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            if time.monotonic() > began + 60 * args.minutes:
                break
            time.sleep(0.2)
        for rank in ranks:
            rank.kill()
    codes = [rank.wait() for rank in ranks]
    shutil.rmtree(store, ignore_errors=True)
    print(f"{layout}: {time.monotonic() - began:.0f} s, exit codes {codes}", flush=True)
    if any(codes):
        print("\n".join(result.with_suffix(".log").read_text(errors="replace").splitlines()[-25:]), flush=True)


def architecture(args: argparse.Namespace) -> ModelConfig:
    model = load_model_config(ROOT / "config/models" / f"{args.model}.yaml")
    fewer = {"num_layers": args.layers or model.language.num_layers}
    return model.model_copy(update={"language": model.language.model_copy(update=fewer)})


def foreseen(layout: str, args: argparse.Namespace, store: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a layout, cut into pipeline stages as preflight does it; and preflight's prediction of timed steps."""
    processes = 1 if layout == "one" else 2
    values = {"seq_length": args.seq_length, "pack_chunk_tokens": args.chunk, "global_batch_size": LOSS_PACKS}
    values |= {"gpus_per_node": processes} if gpu_count() else {"gpus_per_node": 0, "bf16": False}
    values |= {"nproc_per_node": processes} | LAYOUTS[layout] | args.values
    settings = run_settings(args.model, values)
    limits = Limits(settings.seq_length, settings.min_pixels, settings.max_pixels)
    sizes = sample_sizes(args.webdatasets, args.tokenizer, limits, store / "sizes")
    order = global_order(
        args.webdatasets, sizes, settings.seq_length, settings.packing_buffer_size, settings.seed
    ).first_pass()
    model = architecture(args)
    machine, predicted = this_machine(settings.gpus_per_node, processes), {}
    for packs in args.packs if machine else ():
        case = settings.model_copy(update={"global_batch_size": packs * processes})
        batches = mean_and_largest(sizes, case, order[0])
        forecast = forecast_of(Case(model, case, machine, *batches), cut="first_stage_layers" not in args.values)
        values["first_stage_layers"] = forecast.case.values.first_stage_layers or "auto"
        predicted[str(packs)] = {
            "step_s": forecast.prediction.step_s,
            "memory_gib": forecast.prediction.memory_gib,
            "run": {
                "values": forecast.case.values.model_dump(mode="json", include=set(FORETELLING)),
                "machine": machine,
                "mean": batches[0],
                "largest": batches[1],
            },
        }
    return values, predicted


def train(args: argparse.Namespace, job: dict[str, Any]) -> None:
    """What one process does: the losses, then the timed steps; rank 0 writes what is known after each part."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch

    from llava_sft.training import process  # first: it makes Megatron run without a GPU

    from llava_sft.checkpoint.start import Start  # isort: skip
    from llava_sft.megatron import distributed
    from llava_sft.settings.resolved import Resolved, ResolvedData

    resolved = Resolved(
        settings=run_settings(args.model, job["values"]),
        model=architecture(args).model_dump(),
        data=ResolvedData(path=str(args.webdatasets), fingerprint="benchmark"),
        start=Start(sidecars=args.tokenizer, fingerprint="benchmark", untrained=True),
    )
    began = time.monotonic()
    run_dir = Path(job["run_dir"])
    loop = process.set_up(resolved, run_dir)
    fill(loop)
    if args.unbalanced:
        loop.loader.cost = None
    steps = Steps(loop)
    report = {"layout": job["layout"], "machine": machine(), "setup_s": time.monotonic() - began, "speed": {}}
    cut = {"layers": args.layers} if args.layers else {}
    report |= {"model": args.model, "settings": job["values"] | cut, "predicted": {} if cut else job["predicted"]}
    report["gpu"] = torch.cuda.get_device_name() if gpu_count() else "CPU"

    def write() -> None:
        report["losses"] = steps.recorded(run_dir, "lm loss")[: args.loss_steps]
        report["gradient_norms"] = steps.recorded(run_dir, "grad-norm")[: args.loss_steps]
        report["first_gradients"] = steps.first_gradients
        if os.environ["RANK"] == "0":
            Path(job["result"]).write_text(json.dumps(report))

    for _ in range(args.loss_steps):
        steps.take()
    report["unlike_copies"] = distributed.unlike_copies(distributed.unwrapped(steps.loop.model))
    write()
    if args.profile:
        report["profile"] = steps.profiled(args.packs[-1] * job["processes"])
        write()
    for packs in args.packs:
        warm, timed = SPEED.get(packs, (1, 3))
        report["speed"][str(packs)] = steps.timed(packs * job["processes"], warm, timed)
        write()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # as the trainer ends: torch takes a worker's end for an error
    for child in multiprocessing.active_children():
        child.kill()
    torch.distributed.destroy_process_group()


def fill(loop) -> None:
    """Random weights that are the same in every layout: drawn for each whole tensor from a seed of its name's."""
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    from llava_sft.megatron.distributed import unwrapped

    state = unwrapped(loop.model).sharded_state_dict()
    apply_factories(state)
    for part in nested_values(state):
        if not isinstance(part, ShardedTensor) or "norm" in part.key or part.key.endswith("bias"):
            continue
        seed = int(hashlib.sha256(part.key.encode()).hexdigest()[:12], 16)
        generator = torch.Generator(part.data.device).manual_seed(seed)
        whole = torch.empty(part.global_shape, device=part.data.device).normal_(0, 0.02, generator=generator)
        mine = tuple(slice(at, at + size) for at, size in zip(part.global_offset, part.local_shape, strict=True))
        with torch.no_grad():
            part.data.copy_(whole[mine])
    loop.optimizer.reload_model_params()


class Steps:
    """Steps of a training that is set up, each of them the loop's, in its order."""

    def __init__(self, loop):
        self.loop, self.iteration, self.tokens = loop, 0, 0
        self.first_gradients: dict[str, float] = {}
        loop.model.train()
        next_batch = loop.next_batch

        def counted():
            batch = next_batch()
            self.tokens += batch.num_tokens
            return batch

        loop.next_batch = counted

    def take(self) -> None:
        loop = self.loop
        loop.saves.finish()
        sums = loop.forward_backward()
        if self.iteration == 0 and loop.replicas == 1:  # else each rank has the sum of a part alone
            self.first_gradients = gradients_by_kind(loop.model)
        norm = loop.update()
        self.iteration += 1
        loop.log(self.iteration, sums, norm)
        loop.must_stop()

    def timed(self, packs: int, warm: int, count: int) -> dict[str, Any]:
        """Median useful tokens/s over `count` steps of `packs` packs, and each rank's peak memory in GiB."""
        import torch
        from megatron.core import parallel_state

        loop, group = self.loop, parallel_state.get_data_parallel_group()
        loop.micro_batches = loop.loader.micro_batches = packs // loop.replicas
        rates, seconds = [], []
        if loop.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        for number in range(warm + count):
            self._wait()
            self.tokens, began = 0, time.perf_counter()
            self.take()
            self._wait()
            spent = time.perf_counter() - began
            tokens = torch.tensor(float(self.tokens), device=loop.forward.device)
            torch.distributed.all_reduce(tokens, group=group)
            if number >= warm:
                seconds.append(spent)
                rates.append(float(tokens) / spent)
        memory = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(memory, self._peak())
        return {"tokens_per_s": statistics.median(rates), "step_s": statistics.median(seconds), "peak_gib": memory}

    def profiled(self, packs: int) -> list[dict]:
        """Of each rank: milliseconds by kind of kernel, idle time, and the kernels that take longest, of one step."""
        import torch

        from ours import kernel_times

        self.loop.micro_batches = self.loop.loader.micro_batches = packs // self.loop.replicas
        self._wait()
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds[: 1 + self.loop.on_gpu]) as profile:
            self.take()
            self._wait()
        with tempfile.NamedTemporaryFile(suffix=".json") as trace:
            profile.export_chrome_trace(trace.name)
            found = kernel_times(json.loads(Path(trace.name).read_text())) if self.loop.on_gpu else {}
        averages = sorted(profile.key_averages(), key=lambda each: -each.self_device_time_total)[:25]
        found["longest"] = {each.key[:120]: [each.self_device_time_total / 1e3, each.count] for each in averages}
        of_all: list[dict] = [{}] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_all, found)
        return of_all

    def _wait(self) -> None:
        import torch

        if self.loop.on_gpu:
            torch.cuda.synchronize()
        torch.distributed.barrier()

    def _peak(self) -> float:
        import torch

        from llava_sft.training.loop import memory_gib

        return torch.cuda.max_memory_allocated() / 2**30 if self.loop.on_gpu else memory_gib(False)

    @staticmethod
    def recorded(run_dir: Path, tag: str) -> list[float]:
        from llava_sft.run.records import read_metrics

        return [record[tag] for record in read_metrics(run_dir)]


def gradients_by_kind(model) -> dict[str, float]:
    """The norm of the gradient of each kind of parameter, over all layers, tensor-parallel ranks and stages."""
    import torch
    from megatron.core import parallel_state

    from llava_sft.megatron.distributed import unwrapped

    first, squares = parallel_state.get_tensor_model_parallel_rank() == 0, dict[str, float]()
    for name, parameter in unwrapped(model).named_parameters():
        if hasattr(parameter, "main_grad") and (first or getattr(parameter, "tensor_model_parallel", False)):
            kind = re.sub(r"\.\d+\.", ".", name)
            squares[kind] = squares.get(kind, 0.0) + float(parameter.main_grad.float().square().sum())
    of_all: list[dict] = [{}] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_all, squares)
    kinds = {kind for each in of_all for kind in each}
    return {kind: sum(each.get(kind, 0.0) for each in of_all) ** 0.5 for kind in sorted(kinds)}


if __name__ == "__main__":
    main()
