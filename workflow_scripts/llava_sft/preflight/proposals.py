"""Changed settings that would fit, where a run does not, and the forecast as a whole."""

from itertools import product
from typing import Any, NamedTuple

from llava_sft.model.config import ModelConfig
from llava_sft.preflight.cost import MicroBatch
from llava_sft.preflight.predict import Calibration, Case, Prediction, calibration_for, fits, predict
from llava_sft.run.remedies import less_memory
from llava_sft.settings.resolve import ResolvedSettings


def proposals(case: Case, calibration: Calibration) -> list[tuple[dict[str, Any], Prediction]]:
    """Changed settings that would fit, the fastest first; those that train the same before LoRA, and those that keep
    seq_length before those that do not."""
    values = case.values
    piece = min(values.seq_length, values.chunk_tokens)  # what goes through the model at once
    smaller = less_memory(values, values.seq_length)
    choices = {name: [getattr(values, name), *others] for name, others in smaller.items()}
    sizes = choices["tensor_model_parallel_size"]
    choices["tensor_model_parallel_size"] = [size for size in sizes if _divides(case.model, size)]
    found = []
    ways = product(_lora(values), *(dict.fromkeys(options) for options in choices.values()))
    for lora, *picked in ways:
        changed = {name: value for name, value in zip(choices, picked, strict=True) if getattr(values, name) != value}
        changed |= lora
        tried = values.model_copy(update=changed)
        rows = tried.micro_batch_size / values.micro_batch_size
        scales = tried.seq_length / values.seq_length, min(tried.seq_length, tried.chunk_tokens) / piece
        if not changed or tried.global_batch_size % (tried.micro_batch_size * tried.data_parallel_size):
            continue
        mean, largest = (
            MicroBatch(*(rows * scale * each for each in batch))
            for scale, batch in zip(scales, (case.mean, case.largest), strict=True)
        )
        prediction = predict(case._replace(values=tried, mean=mean, largest=largest), calibration)
        if fits(prediction, case.machine):
            found.append((changed, prediction))
    found.sort(key=lambda each: ("seq_length" in each[0], "lora_rank" in each[0], -each[1].tokens_per_s, len(each[0])))
    needless = [a for a, _ in found if any(b.items() < a.items() for b, _ in found)]  # less of a change would do
    return [each for each in found if each[0] not in needless]


def _lora(values: ResolvedSettings) -> list[dict[str, Any]]:
    """As it is, and with LoRA on the language model alone, where that is trained whole."""
    if "language_model" not in values.trained.whole or values.load == "random":
        return [{}]
    return [{}, {"lora_rank": 32, "trainable_modules": ["language_model"], "lr": max(values.lr, 1e-4)}]


def _divides(model: ModelConfig, size: int) -> bool:
    return not (model.language.num_query_groups % size or model.vision.num_attention_heads % size)


class Forecast(NamedTuple):
    """The prediction of a case, the fit behind it, and the changed settings that would fit where it does not."""

    case: Case
    prediction: Prediction
    calibration: Calibration
    would_fit: list[tuple[dict[str, Any], Prediction]]


def forecast_of(case: Case) -> Forecast:
    calibration = calibration_for(case.machine.device)
    prediction = predict(case, calibration)
    near = [] if fits(prediction, case.machine) else proposals(case, calibration)
    return Forecast(case, prediction, calibration, near)


def proposal_lines(found: list[tuple[dict[str, Any], Prediction]]) -> list[str]:
    """The three fastest settings that would fit, a line each."""
    return [
        ", ".join(f"{name}: {_shown(value)}" for name, value in changed.items())
        + f" ({prediction.memory_gib:.1f} GiB, {prediction.tokens_per_s:,.0f} tokens/s)"
        for changed, prediction in found[:3]
    ]


def _shown(value: Any) -> str:
    """As YAML would have it."""
    return (
        f"[{', '.join(value)}]" if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else str(value)
    )
