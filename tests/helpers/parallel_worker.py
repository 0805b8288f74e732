"""The ranks of test_parallel.py: each loads a checkpoint, takes a forward and backward pass, saves weights and gradients, for
one parallel layout after the other; then some steps of packs in chunks, with and without reduction of the gradients during
the backward pass.

    python tests/helpers/parallel_worker.py JOB_DIR RANKS [JOB_DIR RANKS]...

The ranks are forked from a process that has Megatron imported: that takes longer than all of it.
"""

import dataclasses
import gc
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llava_sft.files import read_json
from llava_sft.megatron import cpu
from llava_sft.model.config import ModelConfig

cpu.apply()

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.transformer.transformer_block import TransformerBlock  # noqa: E402

from helpers.conversations import VALUES, conversation, loader_batch  # noqa: E402
from helpers.megatron_model import use_fused_layers  # noqa: E402
from llava_sft.megatron import config, distributed, parallel  # noqa: E402
from llava_sft.model.llava import LlavaOneVision  # noqa: E402
from llava_sft.model.lora import A, B  # noqa: E402
from llava_sft.training.forward import Forward, build_model  # noqa: E402
from llava_sft.training.loop import Loop  # noqa: E402

decoder_forward = TransformerBlock.forward


def as_a_view(self, *given, **named):
    """What the fused layers of GPUs return, and a pipeline stage may not hand on: a view of another tensor."""
    return decoder_forward(self, *given, **named)[:]


TransformerBlock.forward = as_a_view


def build(job: dict, tp: int, pp: int, values: dict, reduction: dict) -> Loop:
    """A training without optimizer, with the weights of the job's checkpoint. `reduction`: of Megatron's DDP."""
    parallel_state.initialize_model_parallel(tp, pp)
    parallel.seed(1)
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    settings = VALUES.model_copy(update=values | sizes)
    made = dataclasses.replace(config.ddp_config(settings, 1), grad_reduce_in_fp32=True, **reduction)
    distributed.ddp_config = lambda *given: made
    model_config = ModelConfig(**job["model"])
    built = build_model(model_config, settings)
    wanted = {name: value for name, value in built.sharded_state_dict().items() if not name.endswith((A, B))}
    built.load_state_dict(
        dist_checkpointing.load({"model": wanted}, job["release"])["model"], strict=not settings.lora_rank
    )
    if settings.lora_rank:
        load_pairs(built, Path(job["folder"]) / "pairs")
    model = distributed.wrap(built, settings)
    model.train()
    watch = SimpleNamespace(batch=lambda *counted: None)
    optimizer = SimpleNamespace(zero_grad=lambda: None)
    forward = Forward(model, torch.device("cpu"))
    return Loop(settings, model_config, model, forward, optimizer, None, iter(()), watch, None, None, 0)


def load_pairs(model: LlavaOneVision, folder: Path) -> None:
    """Those that one process has drawn, for all layouts the same; none is zero."""
    pairs = {name: value for name, value in model.sharded_state_dict().items() if name.endswith((A, B))}
    if not folder.is_dir():
        torch.manual_seed(1)
        for pair in pairs.values():
            torch.nn.init.normal_(pair.data, std=0.05)
        torch.distributed.barrier()
        folder.mkdir(exist_ok=True)
        dist_checkpointing.save(pairs, str(folder))
    model.load_state_dict(dist_checkpointing.load({"model": pairs}, str(folder))["model"], strict=False)


def forward_backward(loop: Loop, batches: list) -> float:
    """One step's gradients; returns the mean loss per answer token on the ranks of the last stage, else NaN."""
    loop.loader, loop.micro_batches = iter(batches), len(batches)
    total = loop.forward_backward()
    total = torch.full((2,), float("nan")) if total is None else total
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return float(total[0] / total[1])


def run(job: dict, tp: int, pp: int, micro_batch_size: int, values: dict, save: Path | None) -> float:
    """Load, forward, backward; returns the mean loss.

    The four samples are shared out to the data-parallel ranks; with a micro-batch size of 4 each rank takes them all."""
    loop = build(job, tp, pp, {"global_batch_size": 16} | values, {})
    samples = [conversation(1, 1), conversation(0, 1), conversation(3, 2), conversation(2, 4)]
    rank, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = samples if micro_batch_size == 4 else samples[rank::replicas]
    batches = [
        loader_batch(job["source"], mine[i : i + micro_batch_size]) for i in range(0, len(mine), micro_batch_size)
    ]
    loss = forward_backward(loop, batches)
    if save:
        (save / "weights").mkdir(parents=True, exist_ok=True)
        dist_checkpointing.save(distributed.unwrapped(loop.model).sharded_state_dict(), str(save / "weights"))
        save_gradients(loop, save)
    parallel_state.destroy_model_parallel()
    return loss


def save_gradients(loop: Loop, folder: Path) -> None:
    (folder / "gradients").mkdir(parents=True, exist_ok=True)
    sharded = distributed.unwrapped(loop.model).sharded_state_dict()
    for key, value in list(sharded.items()):
        value.data = getattr(value.data, "main_grad", None)
        if value.data is None:
            del sharded[key]
        elif hasattr(value, "dtype"):
            value.dtype = value.data.dtype
    dist_checkpointing.save(sharded, str(folder / "gradients"))


# Numbers of images of the samples of each pack, for (step, rank): two micro-batches. Steps 1 to 3 end without an image
# on the one rank, on the other, and on both.
PACKS = [
    [[[1, 2, 0], [0, 1, 1]], [[2, 1], [0, 2]]],
    [[[1, 0], [2, 1, 0]], [[1, 1, 0], [0, 3]]],
    [[[0, 1], [1, 1]], [[2, 0], [0, 0, 0]]],
    [[[1, 0], [0, 0]], [[1, 0], [2, 0]]],
]


def steps(job: dict, tp: int, pp: int, parts: list[str], reduction: dict) -> dict:
    """Number of buckets that gradients are reduced in, and of each step the loss and a checksum of the gradients."""
    values = {"trainable_modules": parts, "pack_chunk_tokens": 32, "packing": True, "global_batch_size": 4}
    loop = build(job, tp, pp, values, reduction)
    found = []
    for ranks in PACKS:
        packs = ranks[parallel_state.get_data_parallel_rank() % 2]
        batches = [
            loader_batch(job["source"], [conversation(n, i) for i, n in enumerate(images)], packing=True)
            for images in packs
        ]
        assert bool(len(batches[-1].chunks(values["pack_chunk_tokens"])[-1].grids)) == bool(packs[-1][-1])
        loss = forward_backward(loop, batches)
        gradients = b"".join(buffer.grad_data.numpy().tobytes() for buffer in loop.model.buffers)
        found.append([str(loss), hashlib.sha256(gradients).hexdigest()])
    buckets = len(loop.model.bucket_groups)
    parallel_state.destroy_model_parallel()
    return {"buckets": buckets, "steps": found}


def of_a_pack(job: dict, tp: int, fused: bool, save: Path) -> float:
    """Mean loss of a pack, each replica the same; the gradients are saved. `fused`: through the layers of GPUs, whose time is
    that of the programs that Triton's interpreter runs: some for each token, patch and layer."""
    loop = build(job, tp, 1, {"packing": True, "global_batch_size": 4}, {})
    samples = [conversation(1), conversation(0, 1), conversation(1, 2)]
    patch = pytest.MonkeyPatch()
    seen = use_fused_layers(distributed.unwrapped(loop.model), patch) if fused else {True, False}
    loss = forward_backward(loop, [loader_batch(job["source"], samples, packing=True, pad_multiple=64)])
    patch.undo()
    assert seen == {True, False}
    save_gradients(loop, save)
    parallel_state.destroy_model_parallel()
    return loss


def rank(number: int, folder: Path, ranks: int, port: int) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks)}
    store, layouts = torch.distributed.TCPStore("127.0.0.1", port), itertools.count()
    job, losses = read_json(folder / "job.json"), {}

    def in_groups_of_its_own(do: Callable, *given: Any) -> Any:
        """Each group has threads, which wake up a hundred times a second: those of all layouts took half of the time."""
        prefixed = torch.distributed.PrefixStore(str(next(layouts)), store)
        torch.distributed.init_process_group("gloo", store=prefixed, rank=number, world_size=ranks)
        found = do(job, *given)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        gc.collect()
        return found

    for name, *settings, save in job["runs"]:
        losses[name] = in_groups_of_its_own(run, *settings, folder / name if save else None)
    for name, *settings in job["packs"]:
        losses[name] = in_groups_of_its_own(of_a_pack, *settings, folder / name)
    found = {name: in_groups_of_its_own(steps, *settings) for name, *settings in job["steps"]}
    (folder / f"steps_{number}.json").write_text(json.dumps(found))
    if number == ranks - 1:
        (folder / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    for place, count in itertools.batched(sys.argv[1:], 2):
        meeting = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        given = Path(place).resolve(), int(count), meeting.port
        torch.multiprocessing.start_processes(rank, given, nprocs=int(count), start_method="fork")
