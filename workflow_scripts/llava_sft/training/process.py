"""One training process: what the resolved settings ask for, set up, trained, and its failure said in words.

The launcher starts it once per rank (`__main__.py`); what it prints goes to the run's log.
"""

import functools
import multiprocessing
import os
import re
import signal
import traceback
from pathlib import Path

import torch

from llava_sft.megatron import cpu

ON_CPU = cpu.apply()

from megatron.core import parallel_state  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402

from llava_sft.data.loader import VlmTaskEncoder  # noqa: E402
from llava_sft.data.sizes import read_sizes  # noqa: E402
from llava_sft.data.stream import Ranks, TrainingLoader, train_loader, worker_ended  # noqa: E402
from llava_sft.errors import SHOWN, SftError, of_file  # noqa: E402
from llava_sft.machine import PEAK_FLOPS, known_gpu  # noqa: E402
from llava_sft.megatron import distributed, parallel  # noqa: E402
from llava_sft.megatron.checkpoint import Checkpoints  # noqa: E402
from llava_sft.model.config import ModelConfig  # noqa: E402
from llava_sft.model.template import ChatTemplate  # noqa: E402
from llava_sft.preflight.cost import checkpoint_size, state_bytes, training_flops  # noqa: E402
from llava_sft.run import remedies  # noqa: E402
from llava_sft.run.checkpoints import iterations_done  # noqa: E402
from llava_sft.run.layout import TENSORBOARD, checkpoint_dir  # noqa: E402
from llava_sft.settings.resolve import ResolvedSettings  # noqa: E402
from llava_sft.settings.resolved import Resolved, ResolvedData  # noqa: E402
from llava_sft.training.forward import Forward, build_model  # noqa: E402
from llava_sft.training.launcher import STORE  # noqa: E402
from llava_sft.training.loop import Loop, memory_gib, pad_multiple  # noqa: E402
from llava_sft.training.ranks import GOES_ON, note_failure, rank_name  # noqa: E402
from llava_sft.training.saving import Saves, note_damaged, restore_position  # noqa: E402
from llava_sft.training.validation import HeldOut  # noqa: E402
from llava_sft.training.watch import Watch  # noqa: E402

LAST_LINES = 12  # of a traceback: its last frames and the message
NO_MEMORY = ("not enough memory", "can't allocate memory", "Cannot allocate memory", "out of memory")


def set_up(resolved: Resolved, run_dir: Path) -> Loop:
    """The training of the settled settings, as it stands at the newest checkpoint of the run."""
    values, data, start = resolved.settings, resolved.data, resolved.start
    model_config, first = resolved.architecture, iterations_done(run_dir)
    if values.deterministic:
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
        torch.use_deterministic_algorithms(True, warn_only=True)
    if not ON_CPU:
        distributed.allow_gradient_fusion()
    device = parallel.start(values, meeting_place())
    model = distributed.wrap(build_model(model_config, values), values)
    optimizer = distributed.make_optimizer(model, values)
    scheduler = distributed.make_schedule(optimizer, values)
    lora = values.trained.lora is not None  # the frozen weights are never saved: they come from the start every time
    states = Checkpoints(model, optimizer, scheduler, in_background=values.async_save, trained_only=lora)
    if start.folder and (lora or not first):
        states.load_weights(start.folder)
    if first:
        states.load(checkpoint_dir(run_dir, first))
    elif start.pairs:
        states.load_weights(start.pairs, those_there=True)

    rank, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    world_size = torch.distributed.get_world_size()
    limits = ChatTemplate(start.sidecars), values.seq_length, values.min_pixels, values.max_pixels
    loader = make_loader(values, data, run_dir, limits, rank, replicas, model_config)
    if first:
        restore_position(loader, run_dir, first)
    writes = torch.distributed.get_rank() == world_size - 1
    tensorboard = SummaryWriter(run_dir / TENSORBOARD, max_queue=1000) if writes else None
    gpu = None if ON_CPU else known_gpu(torch.cuda.get_device_name(device))
    peak = PEAK_FLOPS[gpu] * world_size // replicas if gpu else None
    watch = Watch(run_dir, values, rank, replicas, first, writes, peak, tensorboard)
    saves = Saves(run_dir, values, checkpoint_size(model_config, values), states, loader, watch, start)
    held_out = None
    if values.eval_iters:
        batches = values.eval_iters * values.global_batch_size // (values.micro_batch_size * replicas)
        encoder = VlmTaskEncoder(*limits)
        held_out = HeldOut(data.path, encoder, rank, replicas, values.micro_batch_size, batches)
    forward = Forward(model, device)
    return Loop(values, model_config, model, forward, optimizer, scheduler, loader, watch, saves, held_out, first)


def make_loader(
    values: ResolvedSettings,
    data: ResolvedData,
    run_dir: Path,
    limits: tuple[ChatTemplate, int, int, int],
    rank: int,
    replicas: int,
    model: ModelConfig | None = None,
) -> TrainingLoader:
    """Micro-batches of this data-parallel rank; with the `model`, of ranks that have equally much to do."""

    trained = values.trained
    multiple = pad_multiple(not ON_CPU) if values.packing or values.fp8 != "none" else 1

    def cost(tokens: int, patches: list[int]) -> float:
        return training_flops(model, trained, [tokens], [(each, 1) for each in patches], 0) if model else 0

    return train_loader(
        data.path,
        VlmTaskEncoder(*limits, values.packing, multiple, values.seed),
        Ranks(rank, replicas, values.num_workers),
        values.micro_batch_size,
        values.packing_buffer_size,
        read_sizes(data.sizes, data.sizes_depend),
        max_damaged=values.max_damaged_samples,
        pin_memory=not ON_CPU,
        found_damaged=functools.partial(note_damaged, run_dir),
        micro_batches=values.global_batch_size // (values.micro_batch_size * replicas),
        cost=cost if model and values.packing else None,
    )


def meeting_place() -> torch.distributed.Store | None:
    """A file where all processes are of this machine: torch's default listens on every network, without a password."""
    path = os.environ.get(STORE)
    return torch.distributed.FileStore(path, int(os.environ["WORLD_SIZE"])) if path else None


def explain(error: BaseException, resolved: Resolved, run_dir: Path, loop: Loop | None) -> SftError | None:
    """The error as a person can use it; None when it is none of those that are known."""
    if isinstance(error, SftError):
        return error
    if ended := worker_ended(error):
        return ended
    full = isinstance(error, OSError) and error.errno in remedies.NO_SPACE
    if full or (isinstance(error, CheckpointException) and error.failures):  # one rank has them, the others end
        return remedies.not_written(run_dir, loop.saves.begun if loop else 0)
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(
        text in str(error) for text in NO_MEMORY
    ):
        return of_file(error) if isinstance(error, OSError) and error.filename is not None else None
    values = resolved.settings
    state = state_bytes(resolved.architecture, values)
    memory = {name: size / 2**30 for name, size in state.items()}
    largest = loop.forward.largest if loop else Forward.NOTHING
    return remedies.out_of_memory(values, memory | {"total": memory_gib(not ON_CPU)}, largest)


def note(error: BaseException, resolved: Resolved, run_dir: Path, loop: Loop | None) -> None:
    """Note for train.py why this rank ends: what a person can do, or where in the program it happened."""
    who = rank_name(os.environ)
    prefix = "" if os.environ["WORLD_SIZE"] == "1" else f"{who}: "
    if failure := explain(error, resolved, run_dir, loop):
        note_failure(run_dir, {"problem": prefix + failure.problem, "fix": failure.fix})
    elif prefix and lost_others(error):
        said = f"{who} lost the others: {str(error).strip().splitlines()[-1][:SHOWN]}"
        note_failure(run_dir, {"problem": said, "fix": GOES_ON, "follows": True})
    else:
        lines = "".join(traceback.format_exception(error)).rstrip().splitlines()[-LAST_LINES:]
        note_failure(run_dir, {"problem": f"{prefix}{type(error).__name__}", "lines": lines})


def lost_others(error: BaseException) -> bool:
    """Whether a collective failed: as a rule because another rank is gone, which is the cause then."""
    collective = "gloo|nccl|connection (closed|reset) by peer|broken pipe|ProcessGroup|TCPStore|timed out"
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and re.search(collective, str(error), re.IGNORECASE) is not None
    )


def main(resolved_path: str, run_dir: str) -> None:
    resolved, folder, loop = Resolved.read(Path(resolved_path)), Path(run_dir), None
    try:
        loop = set_up(resolved, folder)
        loop.run()
    except (Exception, CheckpointException) as error:  # torch derives the second from BaseException
        note(error, resolved, folder, loop)
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher asks until we have ended
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a loader worker that ends
        for child in multiprocessing.active_children():  # they hear no SIGTERM, with which Python would end them
            child.kill()
        if loop:
            loop.saves.states.stop_pinning()
    torch.distributed.destroy_process_group()
