"""What the rules ask while Snakemake builds its DAG: settings and paths by wildcards, the plan of the conversion.

Notable:
- only the experiments that are asked for are checked, and the first mistake ends the program with its message before the
  DAG is there;
- a job finds its settings by its wildcards alone: on a cluster it starts without the targets that were asked for;
- wildcards match only what the settings name, so that no file of a user's can become the output of a rule.
"""

import contextlib
import json
import os
import re
import shlex
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from llava_sft.checkpoint.start import MARKER, read_hf_config
from llava_sft.config import CONFIG_DIR, NAME_RULE, experiments, load_settings
from llava_sft.data.verify import out_of_date
from llava_sft.errors import SettingsError, SftError, exits_cleanly, shown
from llava_sft.files import read_json
from llava_sft.model.config import ModelConfig, load_model_config
from llava_sft.paths import CONVERTED, EMBEDDED, Paths, Shard

STEPS = {  # what is made at last, of Paths, and what for
    "data": ("dataset", "convert the raw data to a WebDataset and index it"),
    "inspect": ("inspection", "look at the data: JSON and HTML"),
    "preflight": ("resolved", "work out all settings, check data and checkpoint"),
    "train": ("report", "the whole chain, to the report"),
    "export": ("export_done", "train and convert to Hugging Face format"),
    "evaluate": ("evaluation", "export and answer the held-out split"),
    "report": ("report", "evaluate and write report.html"),
}


class Workflow:
    """The experiments of `config/experiments/` under the overrides of `--config`; `words` is the whole command line.

    `cluster`: what the profile of a cluster says of a training (`nodes`, `gpus_per_node`, `cpus_per_task`); empty here.
    """

    @exits_cleanly
    def __init__(self, overrides: dict[str, Any], words: list[str], cluster: dict[str, int] | None = None):
        if not (CONFIG_DIR / "config.yaml").is_file():
            root = Path(__file__).resolve().parents[2]
            raise SettingsError(
                f"{shown(os.getcwd())}: no config/config.yaml here",
                f"cd {shlex.quote(str(root))}, and give the command there; exp_dir may lie anywhere",
            )
        self.overrides, self.cluster = dict(overrides), cluster or {}
        if tags := [word.removeprefix("run_tag=") for word in words if word.startswith("run_tag=")]:
            self.overrides["run_tag"] = tags[-1]  # as typed: Snakemake makes a number of 0103
        self.force: Callable[[list[str]], None] | None = None  # set by the main process
        self._checked: set[Path] = set()
        self.experiments, self.misnamed = experiments(), experiments(misnamed=True)
        for word in words if "--allowed-rules" not in words else ():  # a job of Slurm names rules, not targets
            step, _, experiment = word.partition("_")
            if step not in STEPS or not experiment or re.search("[=/]", experiment) or experiment in self.experiments:
                continue
            if experiment in self.misnamed:
                raise SettingsError(
                    f"config/experiments/{shown(experiment)}.yaml: not a name for an experiment: {NAME_RULE}",
                    "rename the file",
                )
            raise SettingsError(
                f"{shown(word)}: there is no config/experiments/{shown(experiment)[1:-1]}.yaml",
                f"ask for {step}_NAME, NAME one of {', '.join(self.experiments)[:500]}; "
                "a new experiment: make experiment NAME=mydata",
            )

    def overview(self) -> str:
        width = max(map(len, STEPS)) + 2
        lines = ["", "Targets: STEP_EXPERIMENT, as in `snakemake --cores 8 train_vqa`; `-n` shows what would run", ""]
        lines += [f"  {step:{width}} {text}" for step, (_, text) in STEPS.items()]
        lines += ["", "Experiments (config/experiments/): " + ", ".join(self.experiments), ""]
        if self.misnamed:
            lines[-1:] = [f"Left out: {', '.join(map(shown, self.misnamed))[:500]}: {NAME_RULE}", ""]
        return "\n".join(lines) + "\n"

    @cache  # noqa: B019 (one object for the whole program)
    def paths(self, experiment: str) -> Paths:
        plain = self._plain(experiment)
        paths = Paths(plain.settings, self.demo, self._checkpoint_suffix(plain))
        paths.check_apart(self._made)
        for other in self._sound:
            if other.run_dir == paths.run_dir and other.settings.experiment != experiment:
                raise SettingsError(
                    f"{experiment} and {other.settings.experiment}: both runs would be {shown(str(paths.run_dir))}",
                    "rename one of the experiments, or change its run_tag",
                )
        return paths

    @cache  # noqa: B019
    def _plain(self, experiment: str) -> Paths:
        """As if there were no other experiment."""
        demo = self.demo if experiment != EMBEDDED else None
        return Paths(load_settings(experiment, self.overrides, self.cluster), demo)

    @cached_property
    def demo(self) -> Path | None:
        """The folder of the embedded data set."""
        try:
            return self._plain(EMBEDDED).demo if EMBEDDED in self.experiments else None
        except SftError:
            return None

    @cached_property
    def _sound(self) -> list[Paths]:
        """All experiments whose settings are; mistakes of others are reported to those who ask for them."""
        sound = []
        for experiment in self.experiments:
            with contextlib.suppress(SftError):
                sound.append(self._plain(experiment))
        return sound

    @cached_property
    def _made(self) -> dict[Path, str]:
        """Folders whose files the rules make and delete, and whose they are."""
        made = {}
        for exp_dir in {paths.settings.exp_dir for paths in self._sound}:
            for paths in self._sound:
                name = paths.settings.experiment
                made[exp_dir / "data" / name] = f"the data of experiment {name}"
                made[exp_dir / paths.results.name] = f"the results of experiment {name}"
        return {Path(os.path.realpath(folder)): whose for folder, whose in made.items()}

    def _checkpoint_suffix(self, mine: Paths) -> str:
        """Ends the name of the start checkpoint's converted folder where another experiment would make another folder of
        that name. Who has made that folder keeps it."""
        if mine.converted is None:
            return ""
        others = [
            paths
            for paths in self._sound
            if paths.converted == mine.converted and paths.converted_from != mine.converted_from and _fits_model(paths)
        ]
        if not others:
            return ""
        marker = mine.converted / MARKER
        made_from = read_json(marker, {}).get("source") if marker.is_file() else None
        alone = all(paths.settings.load != mine.settings.load for paths in others)
        return "" if alone and made_from == mine.settings.load else mine.fingerprint_suffix

    # --- what wildcards may be ------------------------------------------------------------------------------------------

    def pattern(self, wildcard: str) -> str:
        """Regular expression of all values that the settings give `exp_dir`, `experiment`, `run_name` or `checkpoint`."""
        values = {
            "exp_dir": {str(paths.settings.exp_dir) for paths in self._sound},
            "experiment": set(self.experiments),
            "run_name": {paths.settings.run_name for paths in self._sound},
            "checkpoint": {
                paths.converted.name.removesuffix(CONVERTED) + suffix
                for paths in self._sound
                if paths.converted
                for suffix in ("", paths.fingerprint_suffix)
            },
            "demo": {str(self.demo.parent)} if self.demo else set(),
        }[wildcard]
        longest_first = sorted(values, key=lambda value: (-len(value), value))
        return "|".join(map(re.escape, longest_first)) or "(?!)"

    def target(self, step: str, experiment: str) -> Callable:
        """Input function of the target `step_experiment`."""

        @exits_cleanly
        def files(wildcards) -> list[Path]:
            paths = self.paths(experiment)
            paths.check_inputs(trains=step not in ("data", "inspect"))
            # Named here too: Snakemake does not miss a deleted file in the middle of a finished chain.
            shards = [paths.webdatasets / f"{name}.tar" for name in paths.shards]
            return [*shards, getattr(paths, STEPS[step][0])]

        return files

    # --- by wildcards: {experiment} in data paths, {run_name} in results, {checkpoint} in converted ones -----------

    def of(self, wildcards) -> Paths:
        if hasattr(wildcards, "experiment"):
            found = [self.paths(wildcards.experiment)]
        else:
            named = [paths for paths in self._sound if paths.settings.run_name == wildcards.run_name]
            found = [self.paths(paths.settings.experiment) for paths in named if _lies_in(paths, wildcards)]
        if found and _lies_in(found[0], wildcards):
            return found[0]
        what = getattr(wildcards, "experiment", None) or wildcards.run_name
        raise SettingsError(f"{shown(what)}: no experiment makes this there", "ask for STEP_EXPERIMENT targets")

    def path(self, name: str) -> Callable:
        """Input or params function: one of the paths of the experiment that the wildcards name."""

        @exits_cleanly
        def of_wildcards(wildcards):
            return getattr(self.of(wildcards), name) or []

        return of_wildcards

    def options(self, *names: str) -> Callable:
        """Params function: these settings as options of the rule's script. A change of one of them, and of no other, reruns
        the rule."""

        @exits_cleanly
        def of_wildcards(wildcards) -> str:
            values = self.of(wildcards).settings
            spelled = {name: name.removeprefix("evaluate_").replace("_", "-") for name in names}
            return " ".join(f"--{option}={shlex.quote(str(getattr(values, name)))}" for name, option in spelled.items())

        return of_wildcards

    @exits_cleanly
    def settings(self, wildcards) -> dict[str, str]:
        """All of them: a change of any reruns the rule."""
        return {name: str(value) for name, value in sorted(self.of(wildcards).settings)}

    @exits_cleanly
    def preflight_job(self, wildcards) -> str:
        overrides = (f"{key}={json.dumps(value)}" for key, value in sorted(self.overrides.items()))
        cluster = (f"{key}={value}" for key, value in sorted(self.cluster.items()))
        return shlex.join([self.of(wildcards).settings.experiment, "--config", *overrides, "--cluster", *cluster])

    @exits_cleanly
    def nodes(self, wildcards) -> int:
        """Nodes of a training, for Slurm."""
        nodes = self.of(wildcards).settings.nodes
        return 1 if nodes == "auto" else nodes

    @exits_cleanly
    def gres(self, wildcards) -> str:
        """GPUs of each node of a training, for Slurm."""
        gpus = self.of(wildcards).settings.gpus_per_node
        return f"gpu:{gpus}" if gpus not in ("auto", 0) else ""

    def tasks(self, wildcards) -> int:
        """The Slurm plugin counts tasks a GPU where there are GPUs, and wants none then; else one task a node."""
        return 0 if self.gres(wildcards) else self.nodes(wildcards)

    @exits_cleanly
    def shard(self, wildcards) -> Shard:
        if wildcards.shard not in (shards := self.of(wildcards).shards):
            raise SettingsError(f"{wildcards.shard} is not part of the plan", "ask for data_EXPERIMENT")
        return shards[wildcards.shard]

    def raw_of_shard(self, wildcards) -> Path:
        return self._made_first(wildcards, self.shard(wildcards).raw)

    def _made_first(self, wildcards, path: Path) -> Path:
        """A file of the demo stands for its marker, which a rule makes."""
        paths = self.of(wildcards)
        return paths.demo_done if paths.is_demo(path) else path

    def job_of_shard(self, wildcards) -> str:
        shard, settings = self.shard(wildcards), self.of(wildcards).settings
        # The rule's --input is then the marker; this one comes later and counts.
        demo = f"--input {shlex.quote(str(shard.raw))} " if self.of(wildcards).is_demo(shard.raw) else ""
        return (
            f"{demo}--max-shard-bytes {settings.max_shard_bytes} --decode-images {settings.decode_images}"
            f" --image-root {shlex.quote(str(shard.source.image_root))} --prefix {shard.prefix}"
            f" --shard {shard.range.number} --start {shard.range.start} --end {shard.range.end}"
        )

    @exits_cleanly
    def shard_files(self, wildcards) -> list[Path]:
        """What the index is made from: the shards of the plan, or what a finished folder brings."""
        paths = self.of(wildcards)
        self._redo_out_of_date(paths)
        if paths.adopted:
            return sorted(paths.adopted.rglob("*.tar"))
        if paths.settings.webdatasets:
            return [paths.webdatasets / ".nv-meta" / "split.yaml"]
        return [paths.webdatasets / f"{name}.tar" for name in paths.shards]

    def _redo_out_of_date(self, paths: Paths) -> None:
        """Let Snakemake run the jobs whose outputs are there and not what they should be, as `--forcerun` would."""
        if self.force and paths.dataset not in self._checked:
            self._checked.add(paths.dataset)
            planned = {name: (shard.raw, shard.range) for name, shard in paths.shards.items()}
            tars, index = out_of_date(paths.webdatasets, paths.dataset, planned)
            self.force([str(path) for path in [*tars, *([paths.dataset] if index else [])]])

    @exits_cleanly
    def raw_files(self, wildcards) -> list[Path]:
        files = [path for source in self.of(wildcards).sources for paths in source.files.values() for path in paths]
        return list(dict.fromkeys(self._made_first(wildcards, path) for path in files))

    @exits_cleanly
    def index_job(self, wildcards) -> str:
        paths = self.of(wildcards)
        if paths.settings.webdatasets:
            return f"--adopt {shlex.quote(str(paths.settings.webdatasets))}"
        return f"--plan {shlex.quote(json.dumps(paths.plan()))}"

    @exits_cleanly
    def conversion(self, wildcards) -> Paths:
        """The experiment whose start checkpoint is converted to `{checkpoint}_mcore_tp1_pp1`; all of that name agree on what
        it is made from, or the model of the others is another."""
        name = f"{wildcards.checkpoint}{CONVERTED}"
        named = []
        for plain in self._sound:
            if plain.converted and _lies_in(plain, wildcards):
                with contextlib.suppress(SftError):
                    paths = self.paths(plain.settings.experiment)
                    named += [paths] if paths.converted.name == name else []
        for paths in sorted(named, key=lambda paths: not _fits_model(paths)):
            return paths
        raise SettingsError(
            f"{wildcards.checkpoint}: no experiment loads this checkpoint",
            "ask for STEP_EXPERIMENT targets; `load` in config/experiments/ names checkpoints",
        )

    @exits_cleanly
    def checkpoint_folders(self, wildcards) -> list[str]:
        """The folders that the start checkpoint is converted from; a hub id is none."""
        paths = self.conversion(wildcards)
        sources = [paths.settings.load, *paths.settings.load_parts.values()]
        made = [str(paths.demo_done) for source in sources if paths.is_demo(Path(source))]
        return made[:1] + [source for source in sources if not paths.is_demo(Path(source)) and Path(source).is_dir()]

    def checkpoint_job(self, wildcards) -> str:
        settings = self.conversion(wildcards).settings
        words = [settings.load, "--model", settings.model]
        words += [f"--part={part}={source}" for part, source in sorted(settings.load_parts.items())]
        return shlex.join(words + ([f"--sidecars={settings.tokenizer}"] if settings.tokenizer else []))


def _lies_in(paths: Paths, wildcards) -> bool:
    return getattr(wildcards, "exp_dir", str(paths.settings.exp_dir)) == str(paths.settings.exp_dir)


def _fits_model(paths: Paths) -> bool:
    """Whether the experiment's model can be that of the Hugging Face folder it loads, as far as its config.json says."""
    settings = paths.settings
    if settings.load_parts or not (Path(settings.load) / "config.json").is_file():
        return True
    try:
        model = load_model_config(CONFIG_DIR / "models" / f"{settings.model}.yaml")
        found = ModelConfig.from_hf_config(read_hf_config(Path(settings.load)))
    except (SftError, KeyError, TypeError, ValueError, AttributeError):
        return True  # unknown: the conversion says what is wrong
    return (found.language, found.vision) == (model.language, model.vision)


def cluster_numbers(settings: Any) -> dict[str, int]:
    """What a cluster's profile says of a training; `settings`: Snakemake's resource settings. Empty without such a profile."""
    train = settings._parsed_overwrite_resources.get("train", {})
    keys = {"auto_nodes": "nodes", "auto_gpus_per_node": "gpus_per_node", "cpus_per_task": "cpus_per_task"}
    numbers = {name: train[key].value for key, name in keys.items() if key in train}
    return numbers if "nodes" in numbers else {}
