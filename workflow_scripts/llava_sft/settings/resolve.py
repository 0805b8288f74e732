"""The rules that work out what is left at `auto`, and the settings that a training uses. No torch."""

import itertools
import math
import os
from typing import Any, NamedTuple

from pydantic import ConfigDict, field_validator

from llava_sft.errors import many
from llava_sft.machine import gpu_count, require_visible_gpus
from llava_sft.nodes import this_node
from llava_sft.settings.conflicts import check_fp8, check_global_batch_size, processes_per_node
from llava_sft.settings.schema import AllSettings, Settings

EVAL_ITERS = 10
PACKS_AT_ONCE, BUFFER_LIMITS = 200, (2_000, 10_000)


class ResolvedSettings(AllSettings):
    """The settings that a training uses: none is `auto`. Settings that are gone since a file was written are ignored.

    Defaults here are for files of versions that did not have the setting yet: what those versions did, and 0 for a setting
    without which no file of theirs is taken for this run.
    """

    model_config = ConfigDict(extra="ignore")

    packing_buffer_size: int = 0
    micro_batch_size: int = 0
    global_batch_size: int = 0
    train_iters: int = 0
    lr_vision: float = 0
    lr_adapter: float = 0
    min_lr: float = 0
    lr_decay_iters: int = 0
    bf16: bool = False
    save_interval: int = 0
    async_save: bool = False
    num_workers: int = 1
    nodes: int = 1
    gpus_per_node: int = 0
    nproc_per_node: int = 0
    first_stage_layers: int = 0  # as many as any stage
    eval_interval: int = 0
    eval_iters: int = 0

    @field_validator("recompute_language", mode="before")
    @classmethod
    def _selective_is_gone(cls, value: Any) -> Any:
        """A run that began with it goes on with `full`: the same gradients, in less memory."""
        return "full" if value == "selective" else value

    @property
    def on_gpu(self) -> bool:
        return self.gpus_per_node > 0

    @property
    def data_parallel_size(self) -> int:
        """Model replicas over all nodes."""
        return max(1, self.nproc_per_node * self.nodes // self.model_parallel_size)

    @property
    def reduces_in_bf16(self) -> bool:
        """Whether gradients are kept and reduced in bf16, and Adam's moments with them."""
        return self.on_gpu and self.optimizer_precision == "bf16"

    @property
    def chunk_tokens(self) -> float:
        """Tokens that go through the model at once: long packs are cut into chunks, but not with pipeline parallelism."""
        return self.pack_chunk_tokens if self.packing and self.pipeline_model_parallel_size == 1 else math.inf

    def dump(self) -> dict[str, Any]:
        """As resolved.json and run.json hold them."""
        return self.model_dump(mode="json")


class Epoch(NamedTuple):
    """One pass over the training samples.

    buffer_size: samples that are packed at a time.
    packs: of each source, as indices of its samples.
    sequences: how many packs a pass takes, those of a source of weight 2 twice.
    """

    buffer_size: int
    packs: list[list[int]]
    sequences: float


class _Auto:
    """Settings of which some are still `auto`, and for each that was, the sentence that says where its value came from."""

    def __init__(self, settings: Settings):
        self.values, self.why = settings.model_dump(mode="json"), dict[str, str]()

    def settle(self, name: str, value: Any, reason: str) -> Any:
        if self.values[name] == "auto":
            self.values[name], self.why[name] = value, reason
        return self.values[name]


def resolve(
    settings: Settings,
    train_samples: int,
    heldout_samples: int = 0,
    epoch: Epoch | None = None,
    cores: int | None = None,
) -> tuple[ResolvedSettings, dict[str, str]]:
    """All settings that training uses, and for each that was `auto` the sentence that says where it came from.

    `epoch`: steps are counted in its sequences; without, in samples. `cores`: CPU cores of a training node; default: this
    machine's. Raises SettingsError.
    """
    auto = _Auto(settings)
    _settle_machine(auto, settings, cores or len(os.sched_getaffinity(0)))
    gbs = _settle_batch(auto, settings)
    buffer_size = epoch.buffer_size if epoch else auto_packing_buffer([], settings.seq_length)
    of_packs = f"samples of {PACKS_AT_ONCE} packs, {BUFFER_LIMITS[0]:,} to {BUFFER_LIMITS[1]:,}"
    auto.settle("packing_buffer_size", buffer_size, of_packs)
    sequences = round(epoch.sequences) if epoch else train_samples
    packed = settings.packing and epoch
    what, of = ("packed sequence", f" (of {many(train_samples, 'sample')})") if packed else ("sample", "")
    epochs = f"{settings.epochs:g} epoch{'s' * (settings.epochs != 1)}"
    counted = f"{epochs} × {many(sequences, what)}{of} / {gbs}, raised to two digits"
    iters = auto.settle("train_iters", auto_train_iters(sequences, settings.epochs, gbs), counted)
    auto.settle("min_lr", settings.lr / 10, "lr / 10")
    auto.settle("lr_vision", settings.lr, "lr")
    auto.settle("lr_adapter", settings.lr, "lr")
    auto.settle("lr_decay_iters", iters, "train_iters; stays when the run is made longer")
    save = auto.settle("save_interval", auto_save_interval(iters), f"at most 16 checkpoints in {many(iters, 'step')}")
    auto.settle("eval_interval", save, "save_interval: every checkpoint is validated")
    eval_iters = min(EVAL_ITERS, max(1, heldout_samples // gbs)) if heldout_samples else 0
    if not heldout_samples:
        auto.values["eval_iters"] = "auto"  # there is nothing to validate on, whatever is asked for
    auto.settle(
        "eval_iters", eval_iters, f"{many(heldout_samples, 'held-out sample')}, at most {EVAL_ITERS} global batches"
    )
    return ResolvedSettings(**auto.values), auto.why


def _settle_machine(auto: _Auto, settings: Settings, cores: int) -> None:
    node = this_node() if settings.nodes == "auto" else None
    auto.settle("nodes", node.nodes if node else 1, "those that the platform started" if node else "this machine")
    if settings.gpus_per_node == "auto":
        require_visible_gpus()
    found = gpu_count()
    why = "GPUs of this machine" if found else "no GPU here: one process on the CPU"
    gpus = auto.settle("gpus_per_node", found, why)
    check_fp8(settings, gpus)
    processes = processes_per_node(settings, gpus)
    processes = auto.settle("nproc_per_node", processes, "one a GPU" if gpus else "TP × PP on a CPU")
    auto.settle("num_workers", auto_num_workers(cores, processes), f"four, on at most half of {many(cores, 'core')}")
    if settings.pipeline_model_parallel_size > 1:
        auto.settle("first_stage_layers", 0, "all stages equally slow, by prediction")
    else:
        auto.values["first_stage_layers"] = 0
    auto.settle("bf16", gpus > 0, "bf16 on GPUs, float32 on a CPU")
    why = "on GPUs, whose memory is copied in a second, and written in a minute"
    auto.settle("async_save", gpus > 0, why)


def _settle_batch(auto: _Auto, settings: Settings) -> int:
    """The global batch size, which fits the micro batch size and the model's replicas."""
    processes, given = auto.values["nodes"] * auto.values["nproc_per_node"], settings.global_batch_size
    replicas = processes // settings.model_parallel_size
    share = 1 if given == "auto" else math.ceil(given / replicas)
    mbs = auto.settle("micro_batch_size", share, f"a replica's share of the global batch, of {replicas}")
    if "micro_batch_size" in auto.why and given != "auto" and given % replicas:
        auto.values["global_batch_size"] = share * replicas
        auto.why["global_batch_size"] = f"{given}, raised to a multiple of data-parallel size {replicas}"
    why = f"4 × data-parallel size {replicas} × micro_batch_size {mbs}"
    gbs = auto.settle("global_batch_size", 4 * replicas * mbs, why)
    check_global_batch_size(gbs, mbs, replicas)
    return gbs


def part_rates(values: ResolvedSettings) -> dict[str, tuple[float, float]]:
    """Trained part → (lr, min_lr). Every part's rate ends at the same share of where it began."""
    rates = {"language_model": values.lr, "adapter": values.lr_adapter, "vision_model": values.lr_vision}
    share = values.min_lr / values.lr
    return {part: (rate, rate * share) for part, rate in rates.items() if part in values.trained.parts}


def auto_train_iters(samples: int, epochs: float, global_batch_size: int) -> int:
    """Steps for `epochs` over `samples`, raised to two significant digits (3,125 → 3,200; 1,250 → 1,300)."""
    steps = math.ceil(epochs * samples / global_batch_size)
    unit = 10 ** max(0, len(str(steps)) - 2)
    return math.ceil(steps / unit) * unit


def auto_save_interval(train_iters: int) -> int:
    """The smallest of {2, 5, 10}·10^k, from 20 on, that gives at most 16 checkpoints (3,200 → 200; 1,000 → 100; 20 → 20)."""
    intervals = (digit * 10**power for power in itertools.count(1) for digit in (2, 5, 10))
    return min(train_iters, next(each for each in intervals if math.ceil(train_iters / each) <= 16))


def auto_num_workers(cores: int, processes: int, wanted: float | None = None, prepared: float | None = None) -> int:
    """Loader processes of each of a node's training `processes`, which may take half of its cores.

    `wanted`: tokens a second that a process trains on; `prepared`: that one loader process delivers. Half as many again as
    these ask for, raised to a power of two, so that another measurement seldom says something else; four when they are not known.
    """
    most = max(1, cores // 2 // processes)
    if not (wanted and prepared):
        return min(most, 4)
    return min(most, 2 ** math.ceil(math.log2(max(1.0, 1.5 * wanted / prepared))))


def auto_packing_buffer(lengths: list[int], seq_length: int) -> int:
    """Samples that are packed at a time: of so many packs that the last one, which is not full, hardly counts."""
    mean = sum(lengths) / len(lengths) if lengths else seq_length
    low, high = BUFFER_LIMITS
    return max(low, min(high, math.ceil(PACKS_AT_ONCE * seq_length / mean / 100) * 100))


def packing_window(settings: Settings, lengths: list[int]) -> int:
    """`packing_buffer_size`, worked out where it is `auto`."""
    given = settings.packing_buffer_size
    return auto_packing_buffer(lengths, settings.seq_length) if given == "auto" else given


def warnings(settings: Settings, untrained: bool, hidden_size: int) -> list[str]:
    """Advice that does not stop a run. `untrained`: the start checkpoint holds random weights."""
    if settings.trained.lora and settings.lora_rank > hidden_size:
        return [
            f"lora_rank {settings.lora_rank:,} is above {hidden_size:,}, the most that the weights have: 8 to 64 is usual"
        ]
    if settings.trained.lora and not untrained and settings.lr > 1e-3:
        return [f"lr {settings.lr:g} is high for LoRA: 1e-4 or 2e-4 is usual"]
    if settings.trained.lora and settings.lr < 5e-5:
        return [f"lr {settings.lr:g} is low for LoRA, whose pairs start from zero: 1e-4 or 2e-4 is usual"]
    if settings.trained.lora and "vision_model" in settings.trained.whole and settings.lr_vision == "auto":
        return [
            f"the vision tower is trained whole, at LoRA's lr {settings.lr:g}: set lr_vision, 1e-5 or 2e-6, or freeze it"
        ]
    if not untrained and "language_model" in settings.trained.whole and not 1e-6 <= settings.lr <= 5e-5:
        return [
            f"lr {settings.lr:g} is outside 1e-6 … 5e-5, the range for trained LLM weights: "
            "5e-6 or 1e-6 if the loss is unstable, 2e-5 or 5e-5 if it falls too slowly"
        ]
    return []
