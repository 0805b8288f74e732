"""The settings of an experiment from their layers, checked before anything runs.

Notable:
- precedence: config/config.yaml < config/stages/<stage>.yaml < config/experiments/X.yaml < the command line
  (`--config lr=5e-6`); what is then still `auto` and known of the cluster (profiles/slurm) is taken from there;
- an unknown key, a wrong type or an impossible combination is one message with file, key, value, rule and fix;
- imported while Snakemake builds its DAG: no torch.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llava_sft.errors import SettingsError, shown
from llava_sft.model.config import ModelConfig, load_model_config
from llava_sft.settings.conflicts import Conflict, check_combinations, check_global_batch_size, processes_per_node
from llava_sft.settings.schema import DEFAULTS, STAGES, Settings
from llava_sft.settings.yaml_file import read_yaml

CONFIG_DIR = Path("config")

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
    "lora_r": "lora_rank", "r": "lora_rank", "gradient_checkpointing": "recompute_language", "max_image_pixels": "max_pixels",
}  # fmt: skip
NAME_RULE = "letters, digits, . _ - and at most 100 bytes, beginning with a letter, a digit or _"


def experiments(misnamed: bool = False) -> list[str]:
    """Names of all experiments: the files of config/experiments/ but for the template; or of those that are no name."""
    stems = sorted(path.stem for path in (CONFIG_DIR / "experiments").glob("*.yaml") if path.stem != "TEMPLATE")
    named = {stem for stem in stems if re.fullmatch(r"\w[\w.-]*", stem) and len(os.fsencode(stem)) <= 100}
    return [stem for stem in stems if (stem in named) != misnamed]


def load_model(name: str) -> ModelConfig:
    """The sizes in config/models/<name>.yaml. Raises SettingsError."""
    return load_model_config(CONFIG_DIR / "models" / f"{name}.yaml")


def load_settings(
    experiment: str, overrides: dict[str, Any] | None = None, cluster: dict[str, int] | None = None
) -> Settings:
    """Read and check the settings of one experiment; `overrides` are those of the command line.

    `cluster`: `nodes` and `gpus_per_node` of the profile, used where the settings say `auto`; None on this machine.
    """
    experiment_file = CONFIG_DIR / "experiments" / f"{experiment}.yaml"
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, layer in _layers(experiment_file, overrides or {}):
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
    except ValidationError as error:
        raise SettingsError(*_explain(error, values, origin, str(experiment_file))) from None
    settings._origin.update(origin)
    try:
        check_combinations(settings)
    except Conflict as conflict:
        raise _placed(conflict, settings) from None
    return settings


def _layers(experiment_file: Path, overrides: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Where settings are given, and what is given there; what comes later counts."""
    defaults = DEFAULTS | read_yaml(CONFIG_DIR / "config.yaml")
    own = read_yaml(experiment_file)
    layers = [(str(CONFIG_DIR / "config.yaml"), defaults), (str(experiment_file), own), ("--config", overrides)]
    stage = {**defaults, **own, **overrides}.get("stage")
    if isinstance(stage, str) and stage in STAGES:  # any other is reported with the other settings
        preset = CONFIG_DIR / "stages" / f"{stage}.yaml"
        layers.insert(1, (str(preset), read_yaml(preset)))
    return layers


def check_batch(settings: Settings, gpus: int) -> None:
    """Raise SettingsError unless processes and global batch size go together on nodes of so many GPUs."""
    nodes = 1 if settings.nodes == "auto" else settings.nodes
    try:
        processes = nodes * processes_per_node(settings, gpus)
        if settings.global_batch_size != "auto" and settings.micro_batch_size != "auto":
            replicas = processes // settings.model_parallel_size
            check_global_batch_size(settings.global_batch_size, settings.micro_batch_size, replicas)
    except Conflict as conflict:
        raise _placed(conflict, settings) from None


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


def _placed(conflict: Conflict, settings: Settings) -> SettingsError:
    """The conflict with where to mend it: where its key was set, or the experiment's file where it has its default."""
    experiment_file = str(CONFIG_DIR / "experiments" / f"{settings.experiment}.yaml")
    place = settings.origin.get(conflict.key)
    if place not in ("--config", "the profile", experiment_file):
        place = experiment_file
    return SettingsError(f"{place}: {conflict.problem}", conflict.fix)


def _explain(error: ValidationError, values: dict, origin: dict[str, str], experiment_file: str) -> tuple[str, str]:
    """The first fault as (problem, fix)."""
    fault = error.errors()[0]
    key = str(fault["loc"][0])
    where = origin.get(key, experiment_file)
    if key == "sources" and len(fault["loc"]) > 2:
        entry, *inner = fault["loc"][1:]
        key = f"sources: entry {int(entry) + 1}: {shown('.'.join(map(str, inner)))[1:-1]}"
        return f"{where}: {key}: {fault['msg'].lower()}", "an entry has path, heldout, image_root, weight, name"
    if fault["type"] == "extra_forbidden":
        near = (
            [name]
            if (name := OTHER_NAMES.get(key) or OTHER_NAMES.get(key.lower().replace("-", "_")))
            else difflib.get_close_matches(key[:100], Settings.model_fields, n=1)
        )
        return (
            f"{where}: unknown setting {shown(key)}",
            f"did you mean {near[0]}?" if near else "see config/config.yaml",
        )
    faults = [
        f["msg"].removeprefix("Value error, ").replace("tuple", "list")
        for f in error.errors()
        if f["loc"] and f["loc"][0] == key
    ]
    rules = " or ".join(sorted({text[0].lower() + text[1:] for text in faults}))[:400]
    return f"{where}: {key}: {shown(values.get(key))}: {rules}", f"change {key}; config/config.yaml explains it"
