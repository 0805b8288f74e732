"""Every setting of an experiment, checked before anything runs, and the rules that work out what is left at `auto`.

Notable:
- precedence: config/config.yaml < config/stages/<stage>.yaml < config/experiments/X.yaml < the command line
  (`--config lr=5e-6`); what is then still `auto` and known of the cluster (profiles/slurm) is taken from there;
- names are Megatron's; an unknown key, a wrong type or an impossible combination is one message with file, key, value,
  rule and fix;
- this module is imported while Snakemake builds its DAG: it must stay light (no torch).
"""

import datetime
import difflib
import itertools
import math
import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from llava_sft.data.order import GlobalOrder
from llava_sft.errors import SettingsError, shown
from llava_sft.model.config import ModelConfig
from llava_sft.settings_file import read_yaml

CONFIG_DIR = Path("config")
Auto = Literal["auto"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0)]  # `1e-5` too, which is text to YAML
Part = Literal["language_model", "adapter", "vision_model"]  # as the model's modules are named

# Names of run directories begin like this; the values of a stage are in config/stages/.
STAGES = {"align": "stage1_align", "mid": "stage1.5_mid", "sft": "stage2_sft"}

# The by-hand guide's names, for people who type them here.
GUIDE_NAMES = {
    "EXP_DIR": "exp_dir", "DATA_PATH": "webdatasets", "MBS": "micro_batch_size", "GBS": "global_batch_size",
    "NSTEP": "train_iters", "CHECKPOINT_PATH": "load", "GPUS_PER_NODE": "gpus_per_node", "SEQ_LEN": "seq_length",
    "TOKENIZER_PATH": "tokenizer", "TP": "tensor_model_parallel_size", "PP": "pipeline_model_parallel_size",
    "learning_rate": "lr", "save-interval": "save_interval", "num-workers": "num_workers",
}  # fmt: skip


class SourceSettings(BaseModel):
    """One entry of `sources`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    heldout: str | None = None
    image_root: Path | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0
    name: str = Field("", pattern=r"^([A-Za-z0-9_-][A-Za-z0-9._-]*)?$")


class Settings(BaseModel):
    """One experiment's settings as the user gave them; `auto` is still `auto`. Comments: config/config.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    experiment: str
    # where
    exp_dir: Path
    run_tag: str = Field(pattern=r"^[A-Za-z0-9._-]*$", max_length=100)
    # data
    raw_data: Path | None
    heldout_data: Path | None
    image_root: Path | None
    sources: tuple[SourceSettings, ...]
    webdatasets: Path | None
    shard_bytes: Positive | None
    max_shard_bytes: Positive
    decode_images: bool
    max_reject_fraction: Fraction
    val_fraction: Fraction
    split_seed: Annotated[int, Field(ge=0)]
    min_pixels: Positive
    max_pixels: Positive
    # model
    model: str
    load: str
    load_parts: dict[str, str]
    tokenizer: Path | None
    stage: Literal["align", "mid", "sft"]
    trainable_modules: Annotated[list[Part], Field(min_length=1)]
    # batches and length
    seq_length: Positive
    packing: bool
    packing_buffer_size: Positive | Auto
    micro_batch_size: Positive | Auto
    global_batch_size: Positive | Auto
    train_iters: Positive | Auto
    epochs: Annotated[float, Field(gt=0)]
    # optimizer
    lr: Rate
    lr_vision: Rate | Auto
    lr_adapter: Rate | Auto
    min_lr: Annotated[float, Field(ge=0)] | Auto
    lr_decay_style: Literal["cosine", "linear", "constant"]
    lr_decay_iters: Positive | Auto
    lr_warmup_fraction: Fraction
    weight_decay: Annotated[float, Field(ge=0)]
    adam_beta1: Fraction
    adam_beta2: Fraction
    adam_eps: Annotated[float, Field(gt=0)]
    clip_grad: Annotated[float, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)]
    # run
    bf16: bool | Auto
    fp8: Literal["none", "tensorwise", "blockwise"]
    optimizer_precision: Literal["bf16", "fp32"]
    deterministic: bool
    pack_chunk_tokens: Positive
    recompute_language: Literal["none", "selective", "full"]
    recompute_vision: Literal["none", "full"]
    memory_check: Literal["stop", "warn"]
    save_interval: Positive | Auto
    async_save: bool | Auto
    keep_last: Positive | None
    keep_every: Positive | None
    max_minutes: Rate | None
    num_workers: Positive | Auto
    nodes: Positive | Auto
    gpus_per_node: Annotated[int, Field(ge=0)] | Auto
    nproc_per_node: Positive | Auto
    tensor_model_parallel_size: Positive
    pipeline_model_parallel_size: Positive
    # watching
    log_interval: Positive
    eval_interval: Positive | Auto
    eval_iters: Annotated[int, Field(ge=0)] | Auto
    log_answers: Annotated[int, Field(ge=0)]
    log_samples: bool
    max_damaged_samples: Annotated[int, Field(ge=0)]
    max_bad_steps: Positive
    # evaluation
    evaluate_by: str
    evaluate_samples: Positive | Literal["all"]
    evaluate_batch_size: Positive
    max_new_tokens: Positive
    parity: Literal["check", "cpu", "gpu", "skip"]

    _origin: dict[str, str] = PrivateAttr(default_factory=dict)

    @field_validator("trainable_modules")
    @classmethod
    def _each_part_once(cls, parts: list[str]) -> list[str]:
        """In one order: the same parts are the same run."""
        return sorted(set(parts), reverse=True)

    @field_validator("run_tag", mode="before")
    @classmethod
    def _tag_is_text(cls, value: Any) -> Any:
        """`run_tag: 1220` is a number to YAML, and a date to people."""
        return str(value) if isinstance(value, int | datetime.date) else value

    @field_validator("exp_dir")
    @classmethod
    def _a_folder_for_rules(cls, exp_dir: Path) -> Path:
        """Snakemake reads braces as wildcards, scripts a dash as an option, and no shell expands a `~`."""
        if re.search(r"[{}]", str(exp_dir)) or str(exp_dir)[0] in "-~":
            raise ValueError("a folder without braces that begins neither with - nor with ~")
        return exp_dir

    @model_validator(mode="after")
    def _combinations(self) -> "Settings":
        given = [key for key in ("raw_data", "sources", "webdatasets") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(
                f"{given[0] if given else 'raw_data'} | exactly one of raw_data, sources (to convert) and webdatasets "
                "(a finished folder) is needed | set the one you have and leave the others out"
            )
        if not self.raw_data and self.heldout_data is not None:
            finished = "a finished folder brings its own validation split"
            rule = "sources have their own `heldout`" if self.sources else finished
            raise ValueError(f"heldout_data | goes with raw_data only: {rule} | remove heldout_data")
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels | {self.min_pixels} is above max_pixels {self.max_pixels} | lower min_pixels")
        if self.min_lr != "auto" and self.min_lr > self.lr:
            raise ValueError(
                f"lr | {self.lr:g} is below min_lr {self.min_lr:g} | raise lr, or set min_lr: auto (lr / 10)"
            )
        for key, part in (("lr_vision", "vision_model"), ("lr_adapter", "adapter")):
            if getattr(self, key) != "auto" and part not in self.trainable_modules:
                raise ValueError(f"{key} | {part} is not trained | add {part} to trainable_modules, or leave {key} out")
        if self.run_tag.endswith("results"):
            raise ValueError(f"run_tag | {self.run_tag!r} would name the results folder of a run | choose another tag")
        return self

    @property
    def origin(self) -> dict[str, str]:
        """Setting → where its value was given: a file, or `--config`."""
        return self._origin

    @property
    def run_name(self) -> str:
        """`stage2_sft_vqa`, or `stage2_sft_vqa_<run_tag>`."""
        return f"{STAGES[self.stage]}_{self.experiment}" + (f"_{self.run_tag}" if self.run_tag else "")


# ---------------------------------------------------------------------------------------------- reading


NAME_RULE = "letters, digits, . _ - and at most 100 bytes, beginning with a letter, a digit or _"


def experiments(misnamed: bool = False) -> list[str]:
    """Names of all experiments: the files of config/experiments/ but for the template; or of those that are no name."""
    stems = sorted(path.stem for path in (CONFIG_DIR / "experiments").glob("*.yaml") if path.stem != "TEMPLATE")
    named = {stem for stem in stems if re.fullmatch(r"\w[\w.-]*", stem) and len(os.fsencode(stem)) <= 100}
    return [stem for stem in stems if (stem in named) != misnamed]


def load_settings(
    experiment: str, overrides: dict[str, Any] | None = None, cluster: dict[str, int] | None = None
) -> Settings:
    """Read and check the settings of one experiment; `overrides` are those of the command line.

    `cluster`: `nodes` and `gpus_per_node` of the profile, used where the settings say `auto`; None on this machine.
    """
    experiment_file = CONFIG_DIR / "experiments" / f"{experiment}.yaml"
    defaults, own = read_yaml(CONFIG_DIR / "config.yaml"), read_yaml(experiment_file)
    layers = [(str(CONFIG_DIR / "config.yaml"), defaults), (str(experiment_file), own), ("--config", overrides or {})]
    stage = {**defaults, **own, **(overrides or {})}.get("stage")
    if stage in STAGES:  # any other is reported below
        preset = CONFIG_DIR / "stages" / f"{stage}.yaml"
        layers.insert(1, (str(preset), read_yaml(preset)))
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, layer in layers:
        values.update(layer)
        origin.update(dict.fromkeys(layer, name))
    of_cluster = {key: value for key, value in (cluster or {}).items() if values.get(key) == "auto"}
    values.update(of_cluster)
    origin.update(dict.fromkeys(of_cluster, "the profile"))
    if "experiment" in values:
        raise SettingsError(
            f"{origin['experiment']}: experiment is no setting", "remove it: the name of the file is the name"
        )
    values["experiment"] = experiment
    for key in ("raw_data", "heldout_data", "image_root", "webdatasets", "load", "tokenizer"):
        if isinstance(values.get(key), str):
            values[key] = values[key].replace("{exp_dir}", str(values.get("exp_dir")))
    for key, value in values.items():
        if rule := _impossible(key, value):
            problem = f"{origin.get(key, experiment_file)}: {shown(key)[1:-1]}: {shown(value)}: {rule}"
            raise SettingsError(problem, f"change {shown(key)[1:-1]}; config/config.yaml explains it")
    try:
        settings = Settings(**values)
        settings._origin.update(origin)
        return settings
    except ValidationError as error:
        raise SettingsError(*_explain(error, values, origin, str(experiment_file))) from None


YES_NO = {name for name, field in Settings.model_fields.items() if "bool" in str(field.annotation)}


def _impossible(key: str, value: Any) -> str | None:
    """What is wrong with a value that no type tells: the rule it breaks."""
    if isinstance(value, bool):
        return None if key in YES_NO or key not in Settings.model_fields else "this is yes or no to YAML, not a value"
    if isinstance(value, list | tuple):
        return next(filter(None, (_impossible(key, item) for item in value)), None)
    if isinstance(value, dict):
        texts = [text for pair in value.items() for text in pair if not isinstance(text, bool)]
        return next(filter(None, (_impossible(key, item) for item in texts)), None)
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "a number beyond 64 bits"
    if not isinstance(value, str):
        return None
    if re.search("[\x00-\x1f\x7f\ud800-\udfff]", value):
        return "a control character in it"
    if len(value) > 2000 or any(len(part.encode()) > 240 for part in value.split("/")):
        return "longer than a path can be (240 bytes a name, 2,000 characters in all)"
    return None


def _place(key: str, origin: dict[str, str], experiment_file: str) -> str:
    """Where to mend a combination: where the key was set, or the experiment's file where it has its default."""
    return origin[key] if origin.get(key) in ("--config", "the profile", experiment_file) else experiment_file


def _explain(error: ValidationError, values: dict, origin: dict[str, str], experiment_file: str) -> tuple[str, str]:
    """The first fault as (problem, fix)."""
    fault = error.errors()[0]
    if fault["type"] == "value_error" and not fault["loc"]:
        key, rule, fix = fault["msg"].removeprefix("Value error, ").split(" | ")
        return f"{_place(key, origin, experiment_file)}: {key}: {rule}", fix
    key = str(fault["loc"][0])
    where = origin.get(key, experiment_file)
    if key == "sources" and len(fault["loc"]) > 2:
        entry, *inner = fault["loc"][1:]
        key = f"sources: entry {entry + 1}: {shown('.'.join(map(str, inner)))[1:-1]}"
        return f"{where}: {key}: {fault['msg'].lower()}", "an entry has path, heldout, image_root, weight, name"
    if fault["type"] == "extra_forbidden":
        near = (
            [GUIDE_NAMES[key]]
            if key in GUIDE_NAMES
            else difflib.get_close_matches(key[:100], Settings.model_fields, n=1)
        )
        return (
            f"{where}: unknown setting {shown(key)}",
            f"did you mean {near[0]}?" if near else "see config/config.yaml",
        )
    if fault["type"] == "missing":
        return f"{where}: {key} is missing", f"add a line `{key}: …`; config/config.yaml explains it"
    faults = [f["msg"].removeprefix("Value error, ") for f in error.errors() if f["loc"] and f["loc"][0] == key]
    rules = " or ".join(sorted({text[0].lower() + text[1:] for text in faults}))[:400]
    return f"{where}: {key}: {shown(values.get(key))}: {rules}", f"change {key}; config/config.yaml explains it"


# ---------------------------------------------------------------------------------------------- auto


def gpu_count() -> int:
    """GPUs of this machine, without importing torch (`CUDA_VISIBLE_DEVICES` is respected)."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([entry for entry in visible.split(",") if entry.strip() not in ("", "-1")])
    return _installed_gpus()


@cache
def _installed_gpus() -> int:
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def processes_per_node(settings: Settings, gpus: int) -> int:
    """One a GPU, else nproc_per_node, else those of one model replica, which lies within one node.

    Raises SettingsError when replicas can not be made of them.
    """
    model_parallel = settings.tensor_model_parallel_size * settings.pipeline_model_parallel_size
    asked = settings.nproc_per_node
    if gpus and asked not in ("auto", gpus):
        raise SettingsError(f"nproc_per_node: {asked} is not gpus_per_node {gpus}", "nproc_per_node: auto (one a GPU)")
    name, count = ("gpus_per_node", gpus) if gpus or asked == "auto" else ("nproc_per_node", asked)
    if count % model_parallel:
        raise SettingsError(
            f"{name}: {count} is not a multiple of tensor_model_parallel_size × pipeline_model_parallel_size "
            f"= {model_parallel}",
            f"{name}: {model_parallel} or a multiple of it, or smaller parallel sizes",
        )
    return count or model_parallel


def data_parallel_size(values: dict[str, Any]) -> int:
    """Model replicas over all nodes, of resolved settings."""
    model_parallel = values["tensor_model_parallel_size"] * values["pipeline_model_parallel_size"]
    return max(1, values["nproc_per_node"] * values["nodes"] // model_parallel)


def part_rates(values: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Trained part → (lr, min_lr). Every part's rate ends at the same share of where it began."""
    rates = {"language_model": values["lr"], "adapter": values["lr_adapter"], "vision_model": values["lr_vision"]}
    share = values["min_lr"] / values["lr"]
    return {part: (rate, rate * share) for part, rate in rates.items() if part in values["trainable_modules"]}


def check_parallel_sizes(settings: Settings, model: ModelConfig) -> None:
    """Raise SettingsError when the model can not be split as asked. The vocabulary too: padding would count in the loss."""
    tp, pp, language = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size, model.language
    for key, size, what, number in (
        ("tensor_model_parallel_size", tp, "key/value groups", language.num_query_groups),
        ("tensor_model_parallel_size", tp, "attention heads of the vision tower", model.vision.num_attention_heads),
        ("tensor_model_parallel_size", tp, "embeddings", language.vocab_size),
        ("pipeline_model_parallel_size", pp, "layers", language.num_layers),
    ):
        if number % size:
            raise SettingsError(
                f"{key}: {size} does not divide the {number} {what} of model {model.name}",
                f"{key}: a divisor of {number}",
            )


def check_batch(settings: Settings, gpus: int) -> None:
    """Raise SettingsError unless processes and global batch size go together on nodes of so many GPUs."""
    nodes = 1 if settings.nodes == "auto" else settings.nodes
    try:
        known = {"nodes": nodes, "nproc_per_node": processes_per_node(settings, gpus)}
        if "auto" not in (settings.global_batch_size, settings.micro_batch_size):
            replicas = data_parallel_size(settings.model_dump() | known)
            check_global_batch_size(settings.global_batch_size, settings.micro_batch_size, replicas)
    except SettingsError as error:
        file = str(CONFIG_DIR / "experiments" / f"{settings.experiment}.yaml")
        place = _place(error.problem.split(":")[0], settings.origin, file)
        raise SettingsError(f"{place}: {error.problem}", error.fix) from None


def check_global_batch_size(global_batch_size: int, micro_batch_size: int, replicas: int) -> None:
    """Raise SettingsError, naming the two nearest, unless it is a multiple of MBS × data-parallel size."""
    unit = micro_batch_size * replicas
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        raise SettingsError(
            f"global_batch_size: {global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} × "
            f"data-parallel size {replicas} = {unit}",
            f"global_batch_size: {near}",
        )


def auto_train_iters(samples: int, epochs: float, global_batch_size: int) -> int:
    """Steps for `epochs` over `samples`, raised to two significant digits (3,125 → 3,200; 1,250 → 1,300)."""
    steps = math.ceil(epochs * samples / global_batch_size)
    unit = 10 ** max(0, len(str(steps)) - 2)
    return math.ceil(steps / unit) * unit


def auto_save_interval(train_iters: int) -> int:
    """The smallest of {1, 2, 5}·10^k that gives at most 16 checkpoints (3,200 → 200; 1,000 → 100)."""
    intervals = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    return next(interval for interval in intervals if math.ceil(train_iters / interval) <= 16)


EVAL_ITERS = 10


def auto_num_workers(cores: int, processes: int, wanted: float | None = None, prepared: float | None = None) -> int:
    """Loader processes of each of a node's training `processes`, which may take half of its cores.

    `wanted`: tokens a second that a process trains on; `prepared`: that one loader process delivers. Half as many again as
    these ask for, raised to a power of two, so that another measurement seldom says something else; four when they are not known.
    """
    most = max(1, cores // 2 // processes)
    if not (wanted and prepared):
        return min(most, 4)
    return min(most, 2 ** math.ceil(math.log2(max(1.0, 1.5 * wanted / prepared))))


PACKS_AT_ONCE, BUFFER_LIMITS = 200, (2_000, 10_000)


def auto_packing_buffer(lengths: list[int], seq_length: int) -> int:
    """Samples that are packed at a time: of so many packs that the last one, which is not full, hardly counts."""
    mean = sum(lengths) / len(lengths) if lengths else seq_length
    low, high = BUFFER_LIMITS
    return max(low, min(high, math.ceil(PACKS_AT_ONCE * seq_length / mean / 100) * 100))


class Epoch(NamedTuple):
    """One pass over the training samples: the packs of each source as indices, `buffer_size` samples packed at a time; and
    how many packs it takes, those of a source of weight 2 twice."""

    buffer_size: int
    packs: list[list[int]]
    sequences: float


def packing_window(settings: Settings, lengths: list[int]) -> int:
    """`packing_buffer_size`, worked out where it is `auto`."""
    given = settings.packing_buffer_size
    return auto_packing_buffer(lengths, settings.seq_length) if given == "auto" else given


def first_epoch(order: GlobalOrder, buffer_size: int) -> Epoch:
    return Epoch(buffer_size, *order.first_pass())


def resolve(
    settings: Settings, train_samples: int, heldout_samples: int = 0, epoch: Epoch | None = None,
    cores: int | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:  # fmt: skip
    """All values that training uses, and for each that was `auto` the sentence that says where it came from.

    `epoch`: steps are counted in its sequences; without, in samples. `cores`: those of a node that trains, when that is
    not this machine.
    """
    why: dict[str, str] = {}
    values = settings.model_dump(mode="json")

    def settle(name: str, value: Any, reason: str) -> Any:
        if values[name] == "auto":
            values[name], why[name] = value, reason
        return values[name]

    settle("nodes", 1, "this machine")
    found = gpu_count()
    gpus = settle("gpus_per_node", found, "GPUs of this machine" if found else "no GPU here: one process on the CPU")
    if settings.fp8 != "none" and not gpus:
        raise SettingsError(f"fp8: {settings.fp8}, and no GPU", "fp8: none, or train on a GPU (Hopper or newer)")
    settle("nproc_per_node", processes_per_node(settings, gpus), "one a GPU" if gpus else "TP × PP on a CPU")
    replicas = data_parallel_size(values)
    given = settings.global_batch_size
    share = 1 if given == "auto" else math.ceil(given / replicas)
    mbs = settle("micro_batch_size", share, f"a replica's share of the global batch, of {replicas}")
    if "micro_batch_size" in why and given != "auto" and given % replicas:
        values["global_batch_size"] = share * replicas
        why["global_batch_size"] = f"{given}, raised to a multiple of data-parallel size {replicas}"
    gbs = settle("global_batch_size", 4 * replicas * mbs, f"4 × data-parallel size {replicas} × micro_batch_size {mbs}")
    check_global_batch_size(gbs, mbs, replicas)
    cores = cores or len(os.sched_getaffinity(0))
    processes = values["nproc_per_node"]
    settle("num_workers", auto_num_workers(cores, processes), f"four, on at most half of {cores} cores")
    sequences, what = train_samples, "samples"
    buffer_size = epoch.buffer_size if epoch else auto_packing_buffer([], settings.seq_length)
    of_packs = f"samples of {PACKS_AT_ONCE} packs, {BUFFER_LIMITS[0]:,} to {BUFFER_LIMITS[1]:,}"
    settle("packing_buffer_size", buffer_size, of_packs)
    if epoch:
        sequences = round(epoch.sequences)
    if settings.packing and epoch:
        what = f"packed sequences (of {train_samples:,} samples)"
    counted = f"{settings.epochs:g} epochs × {sequences:,} {what} / {gbs}, raised to two digits"
    iters = settle("train_iters", auto_train_iters(sequences, settings.epochs, gbs), counted)
    settle("min_lr", settings.lr / 10, "lr / 10")
    settle("lr_vision", settings.lr, "lr")
    settle("lr_adapter", settings.lr, "lr")
    settle("lr_decay_iters", iters, "train_iters; stays when the run is made longer")
    save = settle("save_interval", auto_save_interval(iters), f"at most 16 checkpoints in {iters:,} steps")
    settle("eval_interval", save, "save_interval: every checkpoint is validated")
    eval_iters = min(EVAL_ITERS, max(1, heldout_samples // gbs)) if heldout_samples else 0
    if not heldout_samples:
        values["eval_iters"] = "auto"  # there is nothing to validate on, whatever is asked for
    settle("eval_iters", eval_iters, f"{heldout_samples:,} held-out samples, at most {EVAL_ITERS} global batches")
    settle("bf16", gpus > 0, "bf16 on GPUs, float32 on a CPU")
    settle(
        "async_save",
        gpus > 0,
        "on GPUs, whose memory is copied in a second (the first time half a minute), and written in a minute",
    )
    return values, why


def warnings(settings: Settings, untrained: bool) -> list[str]:
    """Advice that does not stop a run. `untrained`: the start checkpoint holds random weights."""
    if not untrained and "language_model" in settings.trainable_modules and not 1e-6 <= settings.lr <= 5e-5:
        return [
            f"lr {settings.lr:g} is outside 1e-6 … 5e-5, the range for trained LLM weights: "
            "5e-6 or 1e-6 if the loss is unstable, 2e-5 or 5e-5 if it falls too slowly"
        ]
    return []


# ---------------------------------------------------------------------------------------------- schema


def json_schema() -> dict[str, Any]:
    """JSON schema of an experiment's file, for editors. Descriptions are the comments of config/config.yaml."""
    schema = Settings.model_json_schema()
    del schema["properties"]["experiment"], schema["required"]
    defaults = read_yaml(CONFIG_DIR / "config.yaml")
    for line in (CONFIG_DIR / "config.yaml").read_text(encoding="utf-8").splitlines():
        if match := re.fullmatch(r"(\w+):.*?\s# (.+)", line):
            schema["properties"][match[1]]["description"] = match[2]
    for name, entry in schema["properties"].items():
        entry.pop("title", None)
        entry["default"] = defaults[name]
    return schema | {"title": "An experiment of this workflow", "description": "config/experiments/*.yaml"}
