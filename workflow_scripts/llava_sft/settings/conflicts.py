"""Settings that are impossible together, or on the machines that train."""

from llava_sft.errors import SettingsError
from llava_sft.model.config import ModelConfig
from llava_sft.settings.schema import DEFAULTS, AllSettings, Settings

DATA = ("raw_data", "sources", "webdatasets")  # an experiment has one of them
FOR_ALL = "config/config.yaml"  # what stands there is given for all experiments
OF_RECORDS = ("columns", "caption_prompt", "image_first")


class Conflict(SettingsError):
    """A setting that is impossible beside another; `key` is the one to change, whose place the message is yet to name."""

    def __init__(self, key: str, rule: str, fix: str):
        super().__init__(f"{key}: {rule}", fix)
        self.key = key


def check_combinations(settings: Settings) -> None:
    """Raise Conflict for settings of which each alone is possible."""
    given = [key for key in DATA if getattr(settings, key)]
    if len(given) != 1:
        raise Conflict(
            given[0] if given else "raw_data",
            "exactly one of raw_data, sources (to convert) and webdatasets (a finished folder) is needed",
            "set the one you have and leave the others out",
        )
    if not settings.raw_data and settings.heldout_data is not None:
        finished = "a finished folder brings its own validation split"
        rule = "sources have their own `heldout`" if settings.sources else finished
        raise Conflict("heldout_data", f"goes with raw_data only: {rule}", "remove heldout_data")
    of_records = [key for key in OF_RECORDS if getattr(settings, key) != DEFAULTS[key]]
    if settings.origin.get("caption_prompt") == FOR_ALL:
        of_records = [key for key in of_records if key != "caption_prompt"]
    if settings.webdatasets and of_records:
        raise no_record(of_records[0])
    if settings.min_pixels > settings.max_pixels:
        raise Conflict(
            "min_pixels", f"{settings.min_pixels} is above max_pixels {settings.max_pixels}", "lower min_pixels"
        )
    if settings.min_lr != "auto" and settings.min_lr > settings.lr:
        raise Conflict(
            "lr",
            f"{settings.lr:g} is below min_lr {settings.min_lr:g}",
            "raise lr, or set min_lr: auto (lr / 10)",
        )
    for key, part in (("lr_vision", "vision_model"), ("lr_adapter", "adapter")):
        if getattr(settings, key) != "auto" and part not in settings.trainable_modules:
            raise Conflict(key, f"{part} is not trained", f"add {part} to trainable_modules, or leave {key} out")
    if settings.lora_rank:
        _check_lora(settings)
    if settings.run_tag.endswith("results"):
        raise Conflict("run_tag", f"{settings.run_tag!r} would name the results folder of a run", "choose another tag")


def no_record(key: str) -> Conflict:
    """The mistake of one of OF_RECORDS beside a finished folder."""
    fix = f"remove {key}, or set raw_data"
    if key == "caption_prompt":
        asked = f"the question of captions in tars is {DEFAULTS[key]!r}"
        fix = f"remove {key}: {asked}; or make records of the tars (docs/data.md, A finished folder), and set raw_data"
    return Conflict(key, "applies to records that are converted; a finished folder is read as it is", fix)


def _check_lora(settings: Settings) -> None:
    if frozen := [part for part in settings.lora_modules if part not in settings.trainable_modules]:
        trained = f"lora_modules: [{', '.join(settings.trainable_modules)}]"
        raise Conflict(
            "lora_modules", f"{frozen[0]} is not trained", f"add {frozen[0]} to trainable_modules, or {trained}"
        )
    if settings.load == "random":
        raise Conflict(
            "lora_rank", "load is random, and the random base of the adapter would not be kept", "load: a trained model"
        )


def check_fp8(settings: AllSettings, gpus: int) -> None:
    if settings.fp8 != "none" and not gpus:
        raise Conflict(
            "fp8",
            f"{settings.fp8} needs a GPU, and this training has none",
            "fp8: none, or train on a GPU (Ada, Hopper or newer)",
        )


def processes_per_node(settings: Settings, gpus: int) -> int:
    """One a GPU, else nproc_per_node, else those of one model replica, which lies within one node.

    Raises Conflict when replicas cannot be made of them.
    """
    model_parallel = settings.model_parallel_size
    asked = settings.nproc_per_node
    if gpus and asked not in ("auto", gpus):
        raise Conflict("nproc_per_node", f"{asked} is not gpus_per_node {gpus}", "nproc_per_node: auto (one a GPU)")
    name, count = ("gpus_per_node", gpus) if gpus or asked == "auto" else ("nproc_per_node", asked)
    if count % model_parallel:
        raise Conflict(
            name,
            f"{count} is not a multiple of tensor_model_parallel_size × pipeline_model_parallel_size = {model_parallel}",
            f"{name}: {model_parallel} or a multiple of it, or smaller parallel sizes",
        )
    return count or model_parallel


def check_parallel_sizes(settings: Settings, model: ModelConfig) -> None:
    """Raise Conflict unless TP and PP divide the model. They must divide the vocabulary too: padded rows would take part
    in the softmax."""
    tp, pp, language = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size, model.language
    for key, size, what, number in (
        ("tensor_model_parallel_size", tp, "key/value groups", language.num_query_groups),
        ("tensor_model_parallel_size", tp, "embeddings", language.vocab_size),
        ("pipeline_model_parallel_size", pp, "layers", language.num_layers),
    ):
        if number % size:
            raise Conflict(
                key,
                f"{size} does not divide the {number} {what} of model {model.name}",
                f"{key}: a divisor of {number}",
            )
    first = settings.first_stage_layers
    if pp > 1 and first != "auto" and first not in (possible := possible_cuts(language.num_layers, pp)):
        raise Conflict(
            "first_stage_layers",
            f"{first} of {language.num_layers} layers leave the other {pp - 1} stages unequal shares",
            f"first_stage_layers: auto, or one of {', '.join(map(str, possible))}",
        )


def possible_cuts(layers: int, stages: int) -> list[int]:
    """Numbers of layers that the first of several stages can have so that the others share the rest evenly."""
    return [first for first in range(1, layers) if not (layers - first) % (stages - 1)]


def check_global_batch_size(global_batch_size: int, micro_batch_size: int, replicas: int) -> None:
    """Raise Conflict, naming the two nearest, unless it is a multiple of MBS × data-parallel size."""
    unit = micro_batch_size * replicas
    if global_batch_size % unit:
        below = global_batch_size // unit * unit
        near = f"{below} or {below + unit}" if below else f"{unit}"
        raise Conflict(
            "global_batch_size",
            f"{global_batch_size} is not a multiple of micro_batch_size {micro_batch_size} × data-parallel size "
            f"{replicas} = {unit}",
            f"global_batch_size: {near}",
        )
