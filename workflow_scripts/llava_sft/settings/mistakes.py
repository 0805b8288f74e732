"""What is said of a wrong setting: where it stands, the rule it breaks, and the line to write.

Notable: what may have been meant is guessed by one list of transformations, whoever made the mistake; a guess is shown only
where the settings take it, so that the fix is never a second mistake.
"""

import datetime
import os
import re
import shlex
import unicodedata
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from llava_sft.errors import nearest, shown
from llava_sft.settings.data import SourceSettings
from llava_sft.settings.schema import DEFAULTS, Settings
from llava_sft.settings.yaml_file import as_typed

# Names of the by-hand guide and of other trainers, for people who write them here.
OTHER_NAMES = {
    "EXP_DIR": "exp_dir", "DATA_PATH": "webdatasets", "MBS": "micro_batch_size", "GBS": "global_batch_size",
    "NSTEP": "train_iters", "CHECKPOINT_PATH": "load", "GPUS_PER_NODE": "gpus_per_node", "SEQ_LEN": "seq_length",
    "TOKENIZER_PATH": "tokenizer", "TP": "tensor_model_parallel_size", "PP": "pipeline_model_parallel_size",
    "learning_rate": "lr", "max_lr": "lr", "min_learning_rate": "min_lr", "vit_lr": "lr_vision", "aligner_lr": "lr_adapter",
    "batch_size": "global_batch_size", "train_batch_size": "global_batch_size", "micro_batch": "micro_batch_size",
    "per_device_train_batch_size": "micro_batch_size", "max_length": "seq_length", "max_seq_length": "seq_length",
    "max_seq_len": "seq_length", "model_max_length": "seq_length", "cutoff_len": "seq_length", "context_length": "seq_length",
    "num_epochs": "epochs", "num_train_epochs": "epochs", "max_steps": "train_iters", "num_steps": "train_iters",
    "steps": "train_iters", "warmup_ratio": "lr_warmup_fraction", "warmup": "lr_warmup_fraction",
    "lr_scheduler_type": "lr_decay_style", "scheduler": "lr_decay_style", "max_grad_norm": "clip_grad", "grad_clip": "clip_grad",
    "save_steps": "save_interval", "eval_steps": "eval_interval", "logging_steps": "log_interval",
    "dataloader_num_workers": "num_workers", "workers": "num_workers", "model_name_or_path": "load", "model_path": "load",
    "checkpoint": "load", "init_from": "load", "data_path": "raw_data", "train_data": "raw_data", "dataset": "raw_data",
    "eval_data": "heldout_data", "val_data": "heldout_data", "image_folder": "image_root", "image_dir": "image_root",
    "output_dir": "exp_dir", "beta1": "adam_beta1", "beta2": "adam_beta2", "eps": "adam_eps", "wd": "weight_decay",
    "tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "num_gpus": "gpus_per_node", "gpus": "gpus_per_node",
    "lora_r": "lora_rank", "r": "lora_rank", "lora": "lora_rank", "use_lora": "lora_rank", "lora_enable": "lora_rank",
    "train_type": "lora_rank", "tuner_type": "lora_rank", "finetuning_type": "lora_rank", "lora_target": "lora_modules",
    "lora_target_modules": "lora_modules", "target_modules": "lora_modules", "freeze_vit": "trainable_modules",
    "freeze_llm": "trainable_modules", "freeze_aligner": "trainable_modules", "freeze_vision_tower": "trainable_modules",
    "freeze_language_model": "trainable_modules", "modules_to_save": "trainable_modules", "precision": "bf16", "fp16": "bf16",
    "dtype": "bf16", "torch_dtype": "bf16", "mixed_precision": "bf16", "lr_warmup_iters": "lr_warmup_fraction",
    "gradient_accumulation_steps": "global_batch_size", "save_total_limit": "keep_last", "report_to": "trackers",
    "val_size": "val_fraction", "split_dataset_ratio": "val_fraction", "attn_impl": "attention", "flash_attn": "attention",
    "gradient_checkpointing": "recompute_language",
    "max_image_pixels": "max_pixels",
}  # fmt: skip
# Of the parts of the model, and of languages, as others call them.
OTHER_VALUES = {
    **dict.fromkeys(("llm", "language", "text", "lm", "llm_model"), "language_model"),
    **dict.fromkeys(("vit", "vision", "visual", "vision_tower", "vision_encoder", "image_encoder"), "vision_model"),
    **dict.fromkeys(("projector", "merger", "aligner", "mlp", "connector"), "adapter"),
    **dict.fromkeys(("中文", "cn", "zh_cn", "zh-cn", "chinese"), "zh"),
    **dict.fromkeys(("en_us", "en-us", "english"), "en"),
}
QUOTES = "\"'`“”„‟‘’‚‛«»「」"
MINUS = str.maketrans("−–—‐‑", "-----")
THOUSAND = {"k": 1, "m": 2, "g": 3, "b": 3, "t": 4}
MINUTES = {"s": 1 / 60, "m": 1, "h": 60, "d": 1440}
# What may stand behind a number.
COUNTED = r"(tokens?|steps?|iters?|epochs?|gpus?|px|pixels?|samples?|workers?|bytes?|b)?"


def explain(error: ValidationError, values: dict, origin: dict[str, str], experiment_file: str) -> tuple[str, str]:
    """The first fault as (problem, fix)."""
    fault = error.errors()[0]
    key = str(fault["loc"][0])
    where, value = origin.get(key, experiment_file), values.get(key)
    if found := misread(key, value, where):
        return found
    if key == "sources" and len(fault["loc"]) > 2:
        entry, *below = fault["loc"][1:]
        name = ".".join(map(str, below))
        near = (
            OTHER_NAMES.get(name, nearest(name, SourceSettings.model_fields))
            if fault["type"] == "extra_forbidden"
            else None
        )
        meant = f"did you mean {near}? " if near in SourceSettings.model_fields else ""
        what = f"sources: entry {int(entry) + 1}: {shown(name)[1:-1]}"
        return (
            f"{where}: {what}: {fault['msg'].lower()}",
            f"{meant}an entry has {', '.join(SourceSettings.model_fields)}",
        )
    if isinstance(value, dict) and (inner := _below(key, value)):
        return (
            f"{where}: {shown(key)} stands as a heading: settings are in no groups",
            f"remove the line `{shown(key)[1:-1]}:`, and write what is below it without indentation: {inner}: …",
        )
    if key.lower() == "gpu":
        return (
            f"{where}: unknown setting {shown(key)}",
            "gpus_per_node: a number; what a GPU that is not here would need: "
            ".venv/bin/python workflow_scripts/preflight.py EXPERIMENT --gpu H100",
        )
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown setting {shown(key)}", fix_of(key, value, where)
    typed = None if isinstance(value, str) else as_typed(Path(where), key)
    quoted = typed if isinstance(typed, str) else shown(value)
    rule = f"{quoted}: {_rules(error, key)}" if value is not None else "nothing stands behind the colon"
    return f"{where}: {key}: {rule}", fix_of(key, value, where)


def fix_of(key: str, value: Any, where: str) -> str:
    """The line to write in the place of `value`, where one can be guessed; else one with the default, as an example."""
    if key not in Settings.model_fields:
        near = _meant(key)
        return f"did you mean {near}?" if near else "config/config.yaml has all settings"
    if (line := mended(key, value)) is not None:
        return shlex.quote(f"{key}={line}") if where == "--config" else f"{key}: {line}"
    default = DEFAULTS.get(key)
    example = f", for example {key}: {written(default)}" if default not in (None, "", (), {}) else ""
    return f"change {shown(key)[1:-1]}{example}; config/config.yaml explains it"


def misread(key: str, value: Any, where: str) -> tuple[str, str] | None:
    """What is said of text that is something else to YAML, such as 1.10 or no: (problem, fix). None where there is no such
    text, or quotes would not mend it."""
    typed = as_typed(Path(where), key)
    changed = list(_no_text(value, typed))
    if not changed or (_accepts(key, value) and all(str(read) == text for text, read in changed)):
        return None
    if (guess := next((guess for guess in (typed, [typed]) if _accepts(key, guess)), None)) is None:
        return None
    given: dict[str, Any] = {key: guess}
    if getattr(Settings(experiment="x", **given), key) == value:  # a number is wanted
        return None
    text, read = changed[0]
    kind = (
        "yes or no" if isinstance(read, bool) else f"the number {read}" if isinstance(read, int | float) else "a date"
    )
    line = f"put it in quotes: {_in_quotes(text)}" if key == "sources" else f"{key}: {_in_quotes(guess)}"
    return f"{where}: {key}: {shown(text)[1:-1]}: to YAML this is {kind}, not text", line


def _no_text(value: Any, typed: Any) -> Iterator[tuple[str, Any]]:
    """What stands in a value and is no text to YAML: (as typed, as read)."""
    if isinstance(value, dict) and isinstance(typed, dict):
        for key in value:
            if key != "weight":  # of a source: a number
                yield from _no_text(value[key], typed.get(key))
    elif isinstance(value, list | tuple) and isinstance(typed, list):
        for each, text in zip(value, typed, strict=False):
            yield from _no_text(each, text)
    elif isinstance(typed, str) and isinstance(value, bool | int | float | datetime.date):
        yield typed, value


def _in_quotes(value: Any) -> str:
    """A value as YAML has it in one line, with quotes wherever text would be something else."""
    line = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False)
    return line.removesuffix("...\n").strip()


def _accepts(key: str, value: Any) -> bool:
    try:
        Settings(experiment="x", **{key: value})
    except ValidationError:
        return False
    return True


def _meant(key: str) -> str | None:
    near = OTHER_NAMES.get(key) or nearest(key, [*OTHER_NAMES, *Settings.model_fields])
    return OTHER_NAMES.get(near, near) if near else None


def _below(heading: str, values: dict) -> str | None:
    """The name of the first setting that stands below a heading of the user's."""
    if heading in ("load_parts", "columns"):
        return None
    for key in map(str, values):
        for name in (key, f"{heading}_{key}"):
            if name in Settings.model_fields or (name == key and key in OTHER_NAMES):
                return OTHER_NAMES.get(name, name)
    return None


def _rules(error: ValidationError, key: str) -> str:
    faults = [
        re.sub(r" for <class .*", "", f["msg"]).removeprefix("Value error, ").replace("tuple", "list")
        for f in error.errors()
        if f["loc"] and f["loc"][0] == key
    ]
    return " or ".join(sorted({text[0].lower() + text[1:] for text in faults}))[:400]


def mended(key: str, value: Any) -> str | None:
    """What may have been meant, as it is written, if the setting takes it."""
    for guess in _guesses(key, value):
        if guess != value and _accepts(key, guess) and len(written(guess)) <= 200:
            return written(guess)
    return None


def written(value: Any) -> str:
    """A value as YAML has it in one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, str):
        return value if yaml.safe_load(value) == value or value in ("true", "false") else yaml.safe_dump(value).strip()
    return str(value).lower() if isinstance(value, bool) else str(value)


def _guesses(key: str, value: Any) -> Iterator[Any]:
    choices = _choices(Settings.model_fields[key].annotation)
    if isinstance(value, str):
        plain = unquoted(value)
        yield from _numbers(key, plain)
        yield os.path.expandvars(os.path.expanduser(plain))
        words = [unquoted(word) for word in re.split(r"[,;、\s]+", plain.strip("[](){}")) if word]
        yield from filter(None, [_choice(plain, choices)])
        if words == ["all"]:
            yield [choice for choice in choices if choice != "auto"]
        yield [_choice(word, choices) or word for word in words]
    elif isinstance(value, list | tuple) and value:
        words = [
            word for item in value if isinstance(item, str) for word in re.split(r"[,;、\s]+", unquoted(item)) if word
        ]
        yield [_choice(word, choices) or word for word in words]
        yield value[0] if len(value) == 1 else None
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from (str(value), [str(value)])


def unquoted(text: str) -> str:
    """Without quotes that YAML takes for characters, and with the forms of letters, digits and signs that it knows."""
    return unicodedata.normalize("NFKC", text.translate(MINUS)).strip(QUOTES + " \t")


def _choices(annotation: Any) -> list[str]:
    """The words that a type takes."""
    if annotation is bool:
        return ["true", "false"]
    if isinstance(annotation, str):
        return [annotation]
    return [word for inner in get_args(annotation) for word in _choices(inner)]


def _choice(word: str, choices: list[str]) -> str | None:
    known = OTHER_VALUES.get(word.lower())
    return known if known in choices else nearest(word, choices)


def _numbers(key: str, text: str) -> Iterator[int | float]:
    """Numbers that people write and YAML takes for text: 1e6, 8k, 10,000, 1280*28*28, 4 GiB, 2%, 2h, 8xH100."""
    text = text.replace("_", "").replace("^", "**").replace("×", "*").lower()
    if re.fullmatch(r"\d{1,3}(,\d{3})+", text):
        text = text.replace(",", "")
    text = re.sub(r"\s+", "", text).replace(",", ".")
    if found := re.fullmatch(r"(10)\*\*(-?\d\d?)", text):
        yield _whole(float(f"1e{found[2]}"))
    elif found := re.fullmatch(r"\d{1,9}(\*\d{1,9}){1,3}", text):
        yield prod(map(int, text.split("*")))
    elif found := re.fullmatch(r"(\d+)[x*]?[a-z]+\d*[a-z]*", text) if key == "gpus_per_node" else None:
        yield int(found[1])
    elif found := re.fullmatch(
        r"([-+]?\d*\.?\d+(?:e[-+]?\d{1,3})?)\.?(%|min|[smhd]|hours?|[kmgbt]i?)?" + COUNTED, text
    ):
        number, unit = float(found[1]), found[2] or ""
        if unit == "%":
            yield number / 100
        elif key == "max_minutes":
            yield _whole(number * MINUTES.get(unit[:1] or "m", 1))
        elif unit == "" or unit[0] in THOUSAND:
            base = 1024 if "i" in unit or key in ("seq_length", "pack_chunk_tokens") else 1000
            yield _whole(number * base ** THOUSAND.get(unit[:1], 0))


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() else number
