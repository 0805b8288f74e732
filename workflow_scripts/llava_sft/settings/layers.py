"""The settings of an experiment from their layers, checked before anything runs.

Notable:
- precedence: config/config.yaml < config/stages/<stage>.yaml < config/experiments/X.yaml < the command line
  (`--config lr=5e-6`); what is then still `auto` and known of the cluster (profiles/slurm) is taken from there;
- an unknown key, a wrong type or an impossible combination is one message with file, key, value, rule and fix;
- imported while Snakemake builds its DAG: no torch.
"""

import itertools
import os
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llava_sft.errors import SettingsError, shown
from llava_sft.model.config import ModelConfig, load_model_config
from llava_sft.settings.conflicts import (
    DATA,
    OF_RECORDS,
    Conflict,
    check_combinations,
    check_global_batch_size,
    processes_per_node,
)
from llava_sft.settings.mistakes import QUOTES, explain, fix_of, misread
from llava_sft.settings.schema import DEFAULTS, STAGES, Settings
from llava_sft.settings.yaml_file import read_yaml

CONFIG_DIR = Path("config")

PATHS = (
    "exp_dir", "raw_data", "heldout_data", "image_root", "sources", "webdatasets", "load", "load_parts", "tokenizer", "vllm_python",
)  # fmt: skip
NAME_RULE = "letters, digits, . _ - and at most 100 bytes, beginning with a letter, a digit or _"


def can_name(stem: str) -> bool:
    """Whether an experiment may be called so."""
    return re.fullmatch(r"\w[\w.-]*", stem) is not None and len(os.fsencode(stem)) <= 100


def experiments(misnamed: bool = False) -> list[str]:
    """Names of all experiments: the files of config/experiments/ but for the template; or of those that are no name."""
    stems = sorted(path.stem for path in (CONFIG_DIR / "experiments").glob("*.yaml") if path.stem != "TEMPLATE")
    named = set(filter(can_name, stems))
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
    for key in _of_other_data(
        values, {key for key, name in origin.items() if name in (str(experiment_file), "--config")}
    ):
        values[key] = DEFAULTS[key]
    of_cluster = {key: value for key, value in (cluster or {}).items() if values.get(key) == "auto"}
    values.update(of_cluster)
    origin.update(dict.fromkeys(of_cluster, "the profile"))
    if "experiment" in values:
        raise SettingsError(
            f"{origin['experiment']}: experiment is no setting", "remove it: the name of the file is the name"
        )
    values["experiment"] = experiment
    for key in PATHS[1:]:
        values[key] = _filled(values.get(key), str(values.get("exp_dir")))
    for key, value in values.items():
        rule, where = _impossible(key, value), origin.get(key, str(experiment_file))
        not_meant = key in PATHS and isinstance(value, bool)  # `heldout_data: no` names no folder `no`
        if (rule or key in TEXTS) and not not_meant and (found := misread(key, value, where)):
            raise SettingsError(*found)
        if rule:
            raise SettingsError(f"{where}: {shown(key)[1:-1]}: {shown(value)}: {rule}", fix_of(key, value, where))
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise SettingsError(*explain(error, values, origin, str(experiment_file))) from None
    settings._origin.update(origin)
    try:
        check_combinations(settings)
    except Conflict as conflict:
        raise _placed(conflict, settings) from None
    return settings


def _filled(value: Any, exp_dir: str) -> Any:
    """A path, or what holds several, with the value of {exp_dir} in its place."""
    if isinstance(value, dict):
        return {key: _filled(each, exp_dir) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(each, exp_dir) for each in value]
    return value.replace("{exp_dir}", exp_dir) if isinstance(value, str) else value


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


def _of_other_data(values: dict[str, Any], own: set[str]) -> set[str]:
    """The settings that are given for all experiments, and cannot be of this one's data; `own`: those given for this one."""
    named = {key for key in DATA if values.get(key)}
    others = named - own if named & own else set()
    # Tars may hold captions, of which the prompt is the question: whether they do is asked when they are looked at.
    unread = {"webdatasets": {*OF_RECORDS, "heldout_data"} - {"caption_prompt"}, "sources": {"heldout_data"}}
    return (others | set().union(*(unread.get(key, ()) for key in named - others))) - own


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


TEXTS = {
    name for name, field in Settings.model_fields.items() if field.annotation in (str, str | None, Path, Path | None)
}
YES_NO = {name for name, field in Settings.model_fields.items() if "bool" in str(field.annotation)}


def _impossible(key: str, value: Any) -> str | None:
    """What is wrong with a value that no type tells: the rule it breaks."""
    if isinstance(value, bool):
        return None if key in YES_NO or key not in Settings.model_fields else "this is yes or no to YAML, not a value"
    if isinstance(value, list | tuple):
        return next(filter(None, (_impossible(key, item) for item in value)), None)
    if isinstance(value, dict):
        pairs = ((name if name == "columns" else key, pair) for pair in value.items() for name in pair[:1])
        texts = [(of, text) for of, pair in pairs for text in pair if not isinstance(text, bool)]
        return next(filter(None, itertools.starmap(_impossible, texts)), None)
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "a number beyond 64 bits"
    if not isinstance(value, str):
        return None
    if re.search("[\x00-\x1f\x7f\ud800-\udfff]", value):
        return "a control character in it"
    if key in PATHS and re.match("~|.*[$][{]?[A-Za-z_]", value) and not os.path.lexists(value):
        return "~ and $NAME stay as they are: no shell reads settings"
    if key in PATHS and value != value.strip():
        return "a blank at its beginning or end"
    if key not in ("caption_prompt", "columns") and len(value) > 1 and {value[0], value[-1]} <= set(QUOTES):
        return "its quotes are part of the value: YAML does not read them as quotes"
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
