"""What benchmarks/training.py trains with: a case is CASE, or PEER in transformers, with what it names."""

from llava_sft.settings import layers
from llava_sft.settings.resolve import ResolvedSettings, resolve
from results import ROOT

PEAK = 989e12  # FLOP/s, dense bf16 of an H100 or H200
CASE = {"seq_length": 8192, "micro_batch_size": 1, "micro_batches": 4, "pack_chunk_tokens": 8192, "images": True}
CASE |= {"fp8": "none", "recompute_language": "none", "recompute_vision": "none"}
CASE |= {"steps": 6, "warm": 2}  # the warm ones are not timed: compilation, the allocator
# GBS 16: the optimizer's share of a step is that of a usual run, or more.
BIG = {"micro_batches": 16, "steps": 4, "warm": 1}
LONG = {"seq_length": 32768, "micro_batches": 4, "steps": 4, "warm": 1}
OURS = [
    {"name": "bf16_8192 gbs 4"},
    {"name": "language_8192", "images": False, "steps": 5},
    {"name": "bf16_32768", **LONG},
    {"name": "bf16_8192", **BIG},
    {"name": "fp8_8192", "fp8": "tensorwise", **BIG},
    {"name": "fp8_blockwise_8192", "fp8": "blockwise", "steps": 4},
]
FLASH4 = [
    case | {"name": f"{case['name']} {attention}", "attention": attention}
    for case, attention in ((OURS[3], "flash4"), (OURS[4], "flash4"), (OURS[2], "flash4"), (OURS[3], "cudnn"))
]
PROFILE = [
    {"name": "bf16 profile", "profile": True},
    {"name": "fp8 profile", "fp8": "tensorwise", "profile": True, "steps": 5},
    {"name": "bf16 chunks profile", "pack_chunk_tokens": 4096, "profile": True},
    {"name": "fp8 chunks profile", "fp8": "tensorwise", "pack_chunk_tokens": 4096, "profile": True},
]
FULL = {"recompute_language": "full", "recompute_vision": "full"}
WHOLE = {"pack_chunk_tokens": 1 << 20}
CALIBRATION = [
    {"name": "8192"},
    {"name": "4096", "seq_length": 4096},
    {"name": "8192 vision full", "recompute_vision": "full"},
    {"name": "8192 language full", "recompute_language": "full"},
    {"name": "8192 full", **FULL},
    {"name": "4096 mbs 2", "seq_length": 4096, "micro_batch_size": 2},
    {"name": "16384 full", "seq_length": 16384, **FULL, **WHOLE},
    {"name": "32768 full", "seq_length": 32768, "micro_batches": 1, **FULL, **WHOLE},
    {"name": "16384 vision full", "seq_length": 16384, "micro_batches": 1, "recompute_vision": "full", **WHOLE},
    {"name": "32768 chunks", "seq_length": 32768, "micro_batches": 1},
    {"name": "8192 fp8", "fp8": "tensorwise"},
    {"name": "8192 fp8 full", "fp8": "tensorwise", **FULL},
    {"name": "8192 fp8 vision full", "fp8": "tensorwise", "recompute_vision": "full"},
    {"name": "4096 fp8", "seq_length": 4096, "fp8": "tensorwise"},
]
CALIBRATION = [{"micro_batches": 2, "steps": 5, **case} for case in CALIBRATION]
CALIBRATION_FP32 = [CALIBRATION[2] | {"name": "fp32"}]
CALIBRATION_8B = [
    {"name": "8b 8192 full", **FULL},
    {"name": "8b 8192 vision full, chunks of 4096", "recompute_vision": "full", "pack_chunk_tokens": 4096},
]
CALIBRATION_8B = [{"micro_batches": 2, "steps": 4, **case} for case in CALIBRATION_8B]
SMALL = {"pack_chunk_tokens": 4096, "gpu_gib": 79}  # what fits into 80 GB without recomputation
# Copies of the weights in FP8 take what recomputing the vision tower gives.
SMALL_FP8 = {**SMALL, "fp8": "tensorwise", "recompute_vision": "full"}
CHECKPOINT = [
    {"name": "bf16_8192 80 GB", **SMALL, **BIG, "steps": 3},
    {"name": "bf16_8192 80 GB gbs 4", **SMALL, "steps": 5},
    {"name": "fp8_8192 80 GB", **SMALL_FP8, **BIG, "steps": 3, "checkpoint": True},
]
TWO_GPUS = [{"name": "two gpus gbs 4", **SMALL, "steps": 5}, {"name": "two gpus", **SMALL, **BIG, "steps": 3}]
# `recompute`: what is tried in turn until it fits.
PEER = {"seq_length": 8192, "accumulate": 16, "warm": 1, "steps": 2, "recompute": ["none", "vision", "full"]}
FLEX, PLAIN = {"packed": True, "attention": "flex_attention"}, {"packed": False, "attention": "sdpa"}
PEERS = {
    "transformers": [
        {"name": "transformers flex", **FLEX},
        # At 8,192 tokens the vision tower has to be recomputed, and 100 GiB are in use: here all has to be.
        {"name": "transformers flex 32768", **FLEX, "seq_length": 32768, "accumulate": 4, "recompute": ["full"]},
    ],
    "unpacked": [{"name": "transformers unpacked", **PLAIN, "accumulate": 144, "steps": 1, "recompute": ["full"]}],
}
# Settings of our runs: no validation, no checkpoint, a loader that keeps up.
RUN = {"load": "random", "packing": True, "nodes": 1, "gpus_per_node": 1, "num_workers": 6, "packing_buffer_size": 1000}
RUN |= {"seq_length": 8192, "micro_batch_size": 1, "global_batch_size": 4, "train_iters": 1000}
RUN |= {"lr": 1e-5, "lr_warmup_fraction": 0.002, "weight_decay": 0, "adam_eps": 1e-5, "max_bad_steps": 10**6}
RUN |= {"log_interval": 1, "log_answers": 0, "save_interval": 10**6, "eval_interval": 10**6, "eval_iters": 0}


def run_settings(model: str, overrides: dict) -> ResolvedSettings:
    """Resolved settings of a run of `model` on one GPU."""
    layers.CONFIG_DIR = ROOT / "config"
    return resolve(layers.load_settings("vqa", RUN | {"model": model} | overrides), 1000)[0]
