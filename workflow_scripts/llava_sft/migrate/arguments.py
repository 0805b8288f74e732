"""What became of each argument of the original's training command: one table, then what several arguments decide together.

Source of the names: the original's `aiak_training_llm/train/arguments.py` and Megatron-LM's `training/arguments.py`.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Ignored(NamedTuple):
    """Needs no counterpart."""

    why: str


class Lost(NamedTuple):
    """Has an effect there that nothing has here: the user is told."""

    why: str


class Only(NamedTuple):
    """Refused, unless it has one of these values."""

    values: tuple[str, ...]
    why: str


class Wanted(NamedTuple):
    """Read together with others, in `_settle`."""


OF_MODEL = Ignored("config/models/<model>.yaml and the start checkpoint say this")
OF_MACHINE = Ignored("always on here, or chosen by the machine")
OF_LAUNCH = Ignored("the training starts its processes itself; it finds other nodes by the same variables, or by Slurm")
OF_SAVING = Ignored("checkpoints are sharded (torch_dist) here and hold the position in the data")
OF_LOADING = Ignored("a start from `load` takes the weights; the same command resumes the rest")
OF_DATA = Ignored("the data's layout is recognised")
OF_BF16 = Ignored("bf16 on GPUs, which needs no loss scale")
OF_LOGS = Ignored("TensorBoard's files are in the run's folder: tensorboard/, beside metrics.jsonl")
NO_EXPERTS = "the models here have no experts"
PARTS = ["language_model", "adapter", "vision_model"]

Rule = str | Ignored | Lost | Only | Wanted
OPTIONS: dict[str, Rule] = {
    # model and data
    "model-name": Wanted(), "tokenizer-type": Only(("HFTokenizer",), "the tokenizer is a Hugging Face folder"),
    "hf-tokenizer-path": "tokenizer", "tokenizer-model": "tokenizer", "data-path": Wanted(), "train-data-path": Wanted(),
    "dataloader-type": Only(("external",), "data are WebDatasets"), "split": Wanted(), "num-workers": "num_workers",
    "chat-template": Only(("qwen2-vl", "llava-ov-1.5"), "the model has one chat template"), "padding-side": OF_DATA,
    "training-phase": Only(("sft",), "only answers count in the loss; for stage 1 and 1.5 too the original's scripts say sft"),
    "trainable-modules": Wanted(), "image-resolution": Wanted(), "min-pixels": "min_pixels", "max-pixels": Wanted(),
    "seq-length": "seq_length", "decoder-seq-length": "seq_length", "packing-sft-data": Wanted(),
    "packing-pretrain-data": Wanted(), "packing-batch-size": "packing_buffer_size", "packing-buffer-size": "packing_buffer_size",
    "enable-discard-sample": Ignored("samples whose first answer is beyond seq_length are left out, longer ones are cut"),
    "add-question-in-pretrain": OF_DATA, "length-sort-pool-size": Ignored("packs are filled evenly"),
    "length-sort-desc": Ignored("packs are filled evenly"), "dataloader-save": OF_SAVING, "variable-seq-lengths": OF_MACHINE,
    "max-position-embeddings": OF_MODEL, "init-method-std": OF_MODEL, "norm-epsilon": OF_MODEL, "num-layers": OF_MODEL,
    "hidden-size": OF_MODEL, "ffn-hidden-size": OF_MODEL, "num-attention-heads": OF_MODEL, "num-query-groups": OF_MODEL,
    "group-query-attention": OF_MODEL, "kv-channels": OF_MODEL, "rotary-base": OF_MODEL, "swiglu": OF_MODEL,
    "normalization": OF_MODEL, "qk-layernorm": OF_MODEL, "position-embedding-type": OF_MODEL, "vocab-size": OF_MODEL,
    "language-model-type": OF_MODEL, "disable-bias-linear": OF_MODEL, "untie-embeddings-and-output-weights": OF_MODEL,
    "make-vocab-size-divisible-by": OF_MODEL, "no-rope-fusion": OF_MODEL, "no-rope-in-fp32": OF_MODEL,
    "attention-dropout": Only(("0", "0.0"), "the models here have no dropout"),
    "hidden-dropout": Only(("0", "0.0"), "the models here have no dropout"),
    "fps": Lost("videos are not trained on"), "video-max-pixels": Lost("videos are not trained on"),
    "frame-max-pixels": Lost("videos are not trained on"), "frame-min-pixels": Lost("videos are not trained on"),
    "train-on-prompt": Only((), "only answers count in the loss"),
    # batches, optimizer, schedule
    "micro-batch-size": "micro_batch_size", "global-batch-size": "global_batch_size", "train-iters": "train_iters",
    "train-samples": Wanted(), "rampup-batch-size": Lost("the batch has one size; set global_batch_size to the last"),
    "lr": "lr", "min-lr": "min_lr", "lr-decay-style": "lr_decay_style", "lr-decay-iters": Wanted(),
    "lr-warmup-fraction": "lr_warmup_fraction", "lr-warmup-iters": Wanted(), "lr-warmup-init": Lost("it rises from 0"),
    "weight-decay": "weight_decay", "start-weight-decay": Lost("weight decay is constant"),
    "end-weight-decay": Lost("weight decay is constant"), "clip-grad": "clip_grad", "adam-beta1": "adam_beta1",
    "adam-beta2": "adam_beta2", "adam-eps": "adam_eps", "optimizer": Only(("adam",), "the optimizer is AdamW"), "seed": "seed",
    "override-opt-param-scheduler": OF_LOADING, "use-checkpoint-opt-param-scheduler": OF_LOADING,
    # precision, memory, parallelism
    "bf16": OF_BF16, "fp16": Only((), "GPUs train in bf16"), "initial-loss-scale": OF_BF16, "loss-scale": OF_BF16,
    "fp8-format": Wanted(), "fp8-recipe": Wanted(), "attention-softmax-in-fp32": OF_MACHINE,
    "recompute-granularity": Wanted(), "recompute-method": Ignored("every layer is recomputed, or none"),
    "recompute-num-layers": Ignored("every layer is recomputed, or none"), "recompute-activations": Wanted(),
    "optimizer-cpu-offload": Lost("Adam's state stays on the GPU: 10 bytes a parameter (optimizer_precision), or LoRA"),
    "optimizer-offload-fraction": Lost("Adam's state stays on the GPU: 10 bytes a parameter (optimizer_precision), or LoRA"),
    "tensor-model-parallel-size": "tensor_model_parallel_size", "pipeline-model-parallel-size": "pipeline_model_parallel_size",
    "context-parallel-size": Only(("1",), "a sequence lies on one GPU; pack_chunk_tokens and recompute_* save memory"),
    "context-parallel-ulysses-degree": Only(("1",), "a sequence lies on one GPU"),
    "expert-model-parallel-size": Only(("1",), NO_EXPERTS), "num-experts": Only((), NO_EXPERTS),
    "custom-pipeline-layers": Ignored("first_stage_layers: auto makes all stages equally slow"),
    "num-layers-per-virtual-pipeline-stage": OF_MACHINE,
    **dict.fromkeys(
        ["use-distributed-optimizer", "use-precision-aware-optimizer", "overlap-grad-reduce", "overlap-param-gather",
         "distributed-backend", "attention-backend", "use-flash-attn", "sequence-parallel", "transformer-impl", "use-mcore-models",
         "no-gradient-accumulation-fusion", "no-masked-softmax-fusion", "disable-turn-off-bucketing", "manual-gc",
         "tp-comm-overlap", "cross-entropy-loss-fusion", "distributed-timeout-minutes"], OF_MACHINE,
    ),
    # start, saving, watching
    "load": Wanted(), "pretrained-checkpoint": Wanted(), "ckpt-step": Wanted(), "save": Wanted(),
    "save-interval": "save_interval", "eval-interval": "eval_interval", "eval-iters": "eval_iters", "log-interval": "log_interval",
    "async-save": "async_save", "exit-duration-in-mins": "max_minutes",
    **dict.fromkeys(["finetune", "no-load-optim", "no-load-rng", "auto-detect-ckpt-format", "exit-on-missing-checkpoint",
                     "ckpt-fully-parallel-load", "dist-ckpt-strictness", "ckpt-assume-constant-structure"], OF_LOADING),
    **dict.fromkeys(["ckpt-format", "use-dist-ckpt", "ckpt-fully-parallel-save", "no-save-rng"], OF_SAVING),
    "no-save-optim": Lost("checkpoints are whole; keep_last: 2 keeps few"),
    **dict.fromkeys(["tensorboard-dir", "tensorboard-log-interval", "tensorboard-queue-size", "log-timers-to-tensorboard",
                     "log-validation-ppl-to-tensorboard", "log-memory-to-tensorboard", "log-throughput", "timing-log-level",
                     "no-detail-log", "detail-log-interval", "log-params-norm", "log-num-zeros-in-grad"], OF_LOGS),
    "wandb-project": Wanted(), "wandb-exp-name": Wanted(), "wandb-save-dir": OF_LOGS,
    # torchrun
    "nproc-per-node": Wanted(), "nnodes": Wanted(),
    **dict.fromkeys(["node-rank", "master-addr", "master-port", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "rdzv-conf",
                     "standalone", "max-restarts", "log-dir", "redirects", "tee"], OF_LAUNCH),
}  # fmt: skip

# Variables that a script exports. Others (NCCL_…, CUDA_VISIBLE_DEVICES) are told: a setting cannot stand for them.
EXPORTS: dict[str, Rule] = {
    "OFFLINE_PACKED_DATA": Wanted(), "OFFLINE_PACKING_VQA": OF_DATA, "WANDB_PROJECT": Wanted(), "WANDB_NAME": Wanted(),
    "WANDB_API_KEY": Lost("a secret is not copied: `wandb login`, or export it before you train"),
    "PYTORCH_CUDA_ALLOC_CONF": OF_MACHINE, "CUDA_DEVICE_MAX_CONNECTIONS": OF_MACHINE, "PYTHONPATH": OF_MACHINE,
    "OMP_NUM_THREADS": OF_MACHINE, "TOKENIZERS_PARALLELISM": OF_MACHINE,
    **dict.fromkeys(["MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "NNODES", "WORLD_SIZE", "RANK", "GPUS_PER_NODE"], OF_LAUNCH),
}  # fmt: skip

# What Megatron-LM does where an argument is not given, and a stage here would do otherwise.
DEFAULTS = {
    "min_lr": 0.0, "lr_decay_style": "linear", "lr_warmup_fraction": 0.0, "weight_decay": 0.01, "clip_grad": 1.0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8,
}  # fmt: skip


class Found:
    """What a script's arguments became. `settings`: name → (value, where it stands there)."""

    def __init__(self) -> None:
        self.settings: dict[str, tuple[object, str]] = {}
        self.ignored: dict[str, list[str]] = {}  # why → arguments
        self.lost: list[str] = []
        self.refused: list[str] = []
        self.name: str | None = None


def translate(options: dict[str, list[str]], exports: dict[str, str], shown: Callable[[str], str]) -> Found:
    """Settings for the options (`seq-length` → its values) and exported variables of a script.

    `shown`: spells a value in which something is not known as the script does; of one that it leaves alone all is known.
    """
    found, known = Found(), dict[str, list[str]]()
    found.settings |= {name: (value, "not given there: Megatron-LM's default") for name, value in DEFAULTS.items()}
    for option, values in options.items():
        spelled, rule = " ".join([f"--{option}", *map(shown, values)]), OPTIONS.get(option)
        unsure = any(shown(value) != value for value in values)
        if rule is None:
            found.lost.append(f"{spelled}: not known here")
        elif isinstance(rule, Ignored):
            found.ignored.setdefault(rule.why, []).append(f"--{option}")
        elif isinstance(rule, Lost):
            found.lost.append(f"{spelled}: {rule.why}")
        elif isinstance(rule, Only):
            if values not in [[value] for value in rule.values]:
                allowed = f"; it may be {' or '.join(rule.values)}" if rule.values else ""
                found.refused.append(f"{spelled}: {rule.why}{allowed}")
        elif unsure and option != "save":  # whose name may end with a date
            if option not in ("nnodes", "wandb-project", "wandb-exp-name"):  # the environment says it here, too
                found.lost.append(f"{spelled}: only running the script would tell its value")
        elif isinstance(rule, str):
            found.settings[rule] = (_plain(values), f"--{option}")
        else:
            known[option] = values
    for name in exports:
        rule = EXPORTS.get(name, Lost("export it in the shell, or the Slurm profile, that starts the training"))
        if isinstance(rule, Lost):
            found.lost.append(f"export {name}: {rule.why}")
        elif isinstance(rule, Ignored):
            found.ignored.setdefault(rule.why, []).append(name)
    _settle(found, known, options, exports, shown)
    return found


def _plain(values: list[str]) -> object:
    """An option's values as YAML has them; without any it is a switch."""
    plain = [_number(text) for text in values]
    return True if not plain else plain[0] if len(plain) == 1 else plain


def _number(text: str) -> int | float | str:
    try:
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)
    except ValueError:
        return text


def _settle(
    found: Found, known: dict[str, list[str]], options: dict[str, list[str]], exports: dict[str, str], shown: Callable
) -> None:
    def one(option: str) -> str | None:
        return next(iter(known.get(option, [])), None)

    def take(setting: str, value: object, where: str) -> None:
        found.settings[setting] = value, where

    _model(found, one("model-name"))
    data = known.get("data-path") or known.get("train-data-path") or []
    if len(data) == 1 and not data[0].endswith((".yaml", ".yml")):
        take("webdatasets", data[0], "--data-path")
    elif data:
        found.lost.append(
            f"--data-path {' '.join(data)}: a blend; name its folders under `sources`, each with its weight"
        )
    modules = known.get("trainable-modules", ["all"])
    take("trainable_modules", PARTS if modules == ["all"] else modules, "--trainable-modules")
    # Unset, the original shrinks images to a longest side of 512.
    side, most = int(one("image-resolution") or 512), int(one("max-pixels") or 16384 * 28 * 28)
    where = "" if "image-resolution" in known else "not given, which is 512; "
    take("max_pixels", min(side * side, most), f"--image-resolution: {where}the longest side, here pixels in all")
    packs = exports.get("OFFLINE_PACKED_DATA") == "1" or "packing-sft-data" in known
    why = (
        "as there, a batch counts packs" if packs else "as there, a batch counts samples; true is several times faster"
    )
    take("packing", packs, f"OFFLINE_PACKED_DATA, --packing-sft-data: {why}")
    split = re.split(r"[,/ ]+", one("split") or "100")
    if len(split) > 1 and float(split[1]):
        found.lost.append(
            f"--split {one('split')}: energon's split.yaml decides; val_fraction holds samples out of raw data"
        )
    _schedule(found, one)
    if one("fp8-format"):
        recipe = one("fp8-recipe") or "delayed"
        take("fp8", "blockwise" if recipe == "blockwise" else "tensorwise", f"--fp8-recipe {recipe}")
        if recipe not in ("tensorwise", "blockwise"):
            found.lost.append(f"--fp8-recipe {recipe}: fp8: tensorwise instead, with scales of the step itself")
    full = one("recompute-granularity") == "full"
    if full:
        take("recompute_language", "full", "--recompute-granularity; `none` is faster: preflight says whether it fits")
    elif "recompute-granularity" in known or "recompute-activations" in known:
        found.lost.append(
            "--recompute-granularity selective: recompute_language is none or full; preflight says what fits"
        )
    for option, setting in (("nproc-per-node", "gpus_per_node"), ("nnodes", "nodes")):
        count = one(option) or "1"
        if count.isdigit() and (option != "nnodes" or count != "1"):  # one node, or as many as the platform starts
            take(setting, int(count), f"--{option}")
    project = one("wandb-project") or exports.get("WANDB_PROJECT")
    if "WANDB_API_KEY" in os.environ or "WANDB_API_KEY" in exports or project:
        take("trackers", ["wandb"], "--wandb-project")
        if project and shown(project) == project:
            take("tracker_project", project, "--wandb-project")
    elif "wandb-project" in options:
        found.lost.append(
            "--wandb-project: it asks for WANDB_API_KEY, which is not set here; trackers: [wandb] turns it on"
        )
    _places(found, one("load") or one("pretrained-checkpoint"), one("ckpt-step"), one("save"), shown)


def _model(found: Found, name: str | None) -> None:
    size = re.fullmatch(r"llava-?(?:ov|onevision)-1[._]5-([48])b", (name or "llava-ov-1.5-4b").lower())
    if size is None:
        found.refused.append(f"--model-name {name}: LLaVA-OneVision-1.5 of 4B and 8B are trained here")
    else:
        found.settings["model"] = f"{size[1]}b", "--model-name" + ("" if name else " is missing")


def _schedule(found: Found, one: Callable[[str], str | None]) -> None:
    batch, steps = (found.settings.get(key, (None, ""))[0] for key in ("global_batch_size", "train_iters"))
    if (samples := one("train-samples")) and isinstance(batch, int) and batch:
        steps = -(-int(samples) // batch)
        found.settings["train_iters"] = steps, "--train-samples / --global-batch-size"
    decay = one("lr-decay-iters")
    if decay and int(decay) != steps:
        found.settings["lr_decay_iters"] = int(decay), "--lr-decay-iters"
    length = int(decay) if decay else steps
    if (warmup := one("lr-warmup-iters")) and isinstance(length, int) and length:
        found.settings["lr_warmup_fraction"] = int(warmup) / length, "--lr-warmup-iters / --lr-decay-iters"


def _places(found: Found, load: str | None, step: str | None, save: str | None, shown: Callable[[str], str]) -> None:
    """Where it starts from, and its run: `$EXP_DIR/stage2_sft_<name>_<MMDD>`."""
    if load:
        folder = re.sub(r"/iter_0*(\d+)/*$", lambda step: f"/iter_{int(step[1]):07d}", load)
        found.settings["load"] = f"{folder.rstrip('/')}/iter_{int(step):07d}" if step else folder, "--load"
    if not save:
        return
    above, name = Path(save).parent, Path(save).name
    stage = re.match(r"stage_?(1\.5|1|2)_(?:sft|mid(?:_training)?|align(?:ment)?|instruct)_(.+)", name)
    if stage:
        found.settings["stage"] = {"1": "align", "1.5": "mid", "2": "sft"}[stage[1]], "--save"
        name = stage[2]
    if shown(name) != name:
        found.lost.append(
            f"--save {shown(save)}: the name changes with every start; here the same command resumes one run"
        )
        name = re.sub("[_.-]*[\ue000-\uf8ff].*", "", name)
    if date := re.fullmatch(r"(.+)_(\d{4,8})", name):
        name = date[1]
        found.settings["run_tag"] = date[2], "--save"
    found.name = re.sub(r"[^\w.-]", "_", name)
    if shown(str(above)) == str(above) and above != Path("."):
        found.settings["exp_dir"] = str(above), "--save"
    if not (Path(save) / "run.json").exists() and (
        (load and Path(load).is_relative_to(save)) or any(Path(save).glob("iter_*"))
    ):
        tag = found.settings.get("run_tag", ("", ""))[0]
        found.settings["run_tag"] = f"{tag}_imported".lstrip("_"), "--save, where the original's checkpoints are"
