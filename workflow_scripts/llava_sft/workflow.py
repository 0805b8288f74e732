"""What the rules ask while Snakemake builds its DAG: inputs and parameters by wildcards, the targets.

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
from pathlib import Path
from typing import Any

from llava_sft.checkpoint.start import with_old_names
from llava_sft.checkpoint.verify import is_export
from llava_sft.data.verify import out_of_date
from llava_sft.errors import SettingsError, exits_cleanly, nearest, shown
from llava_sft.experiments import Experiments
from llava_sft.inputs import check_inputs
from llava_sft.nodes import this_node
from llava_sft.paths import Paths
from llava_sft.settings.layers import CONFIG_DIR, NAME_RULE, TEXTS
from llava_sft.settings.schema import DEFAULTS, Settings
from llava_sft.sources import Shard

STEPS = {  # target → (attribute of Paths that it produces, help text)
    "data": ("dataset", "convert the raw data to a WebDataset and index it"),
    "inspect": ("inspection", "look at the data: JSON and HTML"),
    "preflight": ("resolved", "work out all settings, check data and checkpoint"),
    "train": ("report", "the whole chain, to the report"),
    "export": ("export_done", "train and convert to Hugging Face format"),
    "evaluate": ("evaluation", "export and answer the held-out split"),
    "report": ("report", "evaluate and write report.html"),
}
OUTCOME = {  # target → (rule, the lines of its log that say what came out)
    "data": ("index_webdataset", slice(1)),
    "inspect": ("inspect_webdataset", slice(-1, None)),
    "preflight": ("preflight", slice(5)),
    "train": ("report", slice(None)),
    "export": ("convert_checkpoint_mcore2hf", slice(-1, None)),
    "evaluate": ("evaluate", slice(2)),
    "report": ("report", slice(None)),
}


def check_targets(words: list[str], known: Experiments) -> None:
    """Raise SettingsError for a target of an experiment that there is not."""
    for word in words:
        step, _, experiment = word.partition("_")
        if step not in STEPS or not experiment or re.search("[=/]", experiment) or experiment in known.experiments:
            continue
        if experiment in known.misnamed:
            raise SettingsError(
                f"config/experiments/{shown(experiment)}.yaml: not a name for an experiment: {NAME_RULE}",
                "rename the file",
            )
        problem = f"{shown(word)}: there is no config/experiments/{shown(experiment)[1:-1]}.yaml"
        near = nearest(experiment.removesuffix(".yaml").removesuffix(".yml"), known.experiments)
        if stray := misplaced(experiment, known):
            moved = CONFIG_DIR / "experiments" / f"{experiment}.yaml"
            raise SettingsError(f"{problem}, but {shown(str(stray))}", shlex.join(["mv", str(stray), str(moved)]))
        raise SettingsError(
            problem,
            (f"did you mean {step}_{near}? " if near else "")
            + f"ask for {step}_NAME, NAME one of {', '.join(known.experiments)[:500]}; "
            "a new experiment: make experiment NAME=mydata",
        )


def misplaced(experiment: str, known: Experiments) -> Path | None:
    """A file that may have been meant as this experiment's: X.yml, X.YAML, X.yaml.txt, X, or one folder too high."""
    name = re.compile(re.escape(experiment) + r"(\.(ya?ml|txt|json))*", re.IGNORECASE)
    for folder in (CONFIG_DIR / "experiments", CONFIG_DIR, Path(".")):
        for path in sorted(folder.glob("*")):
            taken = path.suffix == ".yaml" and path.stem in known.experiments
            if name.fullmatch(path.name) and path.suffix and path.is_file() and not taken:
                return path
    return None


def overview(known: Experiments) -> str:
    width = max(map(len, STEPS)) + 2
    lines = ["", "Targets: STEP_EXPERIMENT, as in `make train_vqa`; `make train_vqa ARGS=-n` shows what would run", ""]
    lines += [f"  {step:{width}} {text}" for step, (_, text) in STEPS.items()]
    lines += ["", "Experiments (config/experiments/): " + ", ".join(known.experiments), ""]
    if known.misnamed:
        lines[-1:] = [f"Left out: {', '.join(map(shown, known.misnamed))[:500]}: {NAME_RULE}", ""]
    return "\n".join(lines) + "\n"


def _require_project() -> None:
    if not (CONFIG_DIR / "config.yaml").is_file():
        root = Path(__file__).resolve().parents[2]
        raise SettingsError(
            f"{shown(os.getcwd())}: no config/config.yaml here",
            f"cd {shlex.quote(str(root))}, and give the command there; exp_dir may lie anywhere",
        )


class Workflow(Experiments):
    """The experiments as the rules see them; `words` is the whole command line, the rest is of `Experiments`."""

    @exits_cleanly
    def __init__(self, overrides: dict[str, Any], words: list[str], cluster: dict[str, int] | None = None):
        _require_project()
        super().__init__(_texts_as_typed(dict(overrides), words), cluster or {})
        self.force: Callable[[list[str]], None] | None = None  # set by the main process, as:
        self.jobs_run: Callable[[], str] = lambda: "here"
        self._checked: set[Path] = set()
        if "--allowed-rules" not in words:  # a job of Slurm names rules, not targets
            check_targets(words, self)

    def target(self, step: str, experiment: str) -> Callable:
        """Input function of the target `step_experiment`."""

        @exits_cleanly
        def files(wildcards) -> list[Path]:
            paths = self.paths(experiment)
            elsewhere, trains = bool(self.cluster) or self.jobs_run() != "here", step not in ("data", "inspect")
            if trains and self.cluster:
                _require_gpus_said(paths.settings)
            check_inputs(paths, trains, elsewhere=elsewhere)
            # Named here too: Snakemake does not miss a deleted file in the middle of a finished chain.
            shards = [paths.webdatasets / f"{name}.tar" for name in paths.shards]
            return [*shards, getattr(paths, STEPS[step][0])]

        return files

    # --- by wildcards: {experiment} in data paths, {run_name} in results, {checkpoint} in converted ones -----------

    def path(self, name: str) -> Callable:
        """Input or params function: one of the paths of the experiment that the wildcards name."""

        @exits_cleanly
        def of_wildcards(wildcards):
            return getattr(self.of(wildcards), name) or []

        return of_wildcards

    def options(self, *names: str, without: str = "") -> Callable:
        """Params function: these settings as options of the rule's script, whose names begin `without` this. The rule
        reruns only when one of these changes."""

        @exits_cleanly
        def of_wildcards(wildcards) -> str:
            values = self.of(wildcards).settings
            options = {name.removeprefix(without).replace("_", "-"): getattr(values, name) for name in names}
            return " ".join(word for option, value in options.items() for word in as_words(option, value))

        return of_wildcards

    @exits_cleanly
    def settings(self, wildcards) -> dict[str, str]:
        """All of them, and how many nodes `auto` is where a platform has started several: a change of any reruns the rule."""
        values = {name: str(value) for name, value in sorted(self.of(wildcards).settings)}
        return values | _nodes_started(values)

    @exits_cleanly
    def preflight_job(self, wildcards) -> str:
        overrides = (f"{key}={json.dumps(value)}" for key, value in sorted(self.overrides.items()))
        numbers = self.cluster or ({"nodes": 1} if self.jobs_run() == "elsewhere" else {})
        cluster = (f"{key}={value}" for key, value in sorted(numbers.items()))
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
        return paths.demo_done if paths.demo_done and paths.is_demo(path) else path

    def job_of_shard(self, wildcards) -> str:
        shard, settings = self.shard(wildcards), self.of(wildcards).settings
        # The rule's --input is then the marker; this one comes later and counts.
        demo = f"--input {shlex.quote(str(shard.raw))} " if self.of(wildcards).is_demo(shard.raw) else ""
        return (
            f"{demo}--max-shard-bytes {settings.max_shard_bytes} --decode-images {settings.decode_images}"
            f" --image-root {shlex.quote(str(shard.source.image_root))} --prefix {shard.prefix}"
            f" --shard {shard.range.number} --start {shard.range.start} --end {shard.range.end}{_reading_options(shard, settings)}"
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
            self.force(list(map(str, out_of_date(paths.webdatasets, paths.dataset, planned))))

    @exits_cleanly
    def raw_files(self, wildcards) -> list[Path]:
        return list(dict.fromkeys(self._made_first(wildcards, path) for path in self.of(wildcards).raw_files))

    @exits_cleanly
    def index_job(self, wildcards) -> str:
        paths = self.of(wildcards)
        if paths.settings.webdatasets:
            return f"--adopt {shlex.quote(str(paths.settings.webdatasets))}"
        return f"--plan {shlex.quote(json.dumps(paths.plan()))}"

    @exits_cleanly
    def checkpoint_folders(self, wildcards) -> list[str]:
        """The folders that the start checkpoint is converted from; a hub id is none."""
        paths = self.converting(wildcards)
        sources = paths.start_names
        made = [str(paths.demo_done) for source in sources if paths.is_demo(Path(source))]
        return made[:1] + [source for source in sources if not paths.is_demo(Path(source)) and Path(source).is_dir()]

    @exits_cleanly
    def checkpoint_job(self, wildcards) -> str:
        settings = self.converting(wildcards).settings
        words = [settings.load, "--model", settings.model]
        words += [f"--part={part}={source}" for part, source in with_old_names(settings.load_parts).items()]
        return shlex.join(words + ([f"--sidecars={settings.tokenizer}"] if settings.tokenizer else []))


def _texts_as_typed(overrides: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """What `--config` says, with text as it was typed: Snakemake makes numbers of 0103 and 1.10, and None of nothing."""
    typed = dict(word.split("=", 1) for word in words if "=" in word)
    for key, value in overrides.items():
        of_nothing = value is None and DEFAULTS.get(key) == ""
        if key in typed and key in TEXTS and (of_nothing or type(value) in (int, float)):
            overrides[key] = typed[key]
    return overrides


def _require_gpus_said(settings: Settings) -> None:
    if settings.gpus_per_node == "auto":
        raise SettingsError(
            "gpus_per_node is auto, and the profile does not say what that is on the cluster",
            "auto_gpus_per_node beside auto_nodes in the profile: the GPUs of a node, 0 to train on CPUs",
        )


def _nodes_started(values: dict[str, str]) -> dict[str, str]:
    node = this_node() if values["nodes"] == "auto" else None
    return {"nodes": f"auto: {node.nodes}"} if node else {}


def _reading_options(shard: Shard, settings: Settings) -> str:
    """How records are read; only where it is not the default: a change of the job converts again."""
    options = f" --columns {shlex.quote(json.dumps(shard.source.columns))}" if shard.source.columns else ""
    for name in ("caption_prompt", "image_first"):
        if (value := getattr(settings, name)) != DEFAULTS[name]:
            options += f" --{name.replace('_', '-')}={shlex.quote(str(value))}"
    return options


def to_export(flow: Workflow) -> Callable:
    """Input function: what an export is made from. One whose folder somebody has deleted is made again, as messages advise:
    what Snakemake looks for lies beside that folder."""

    @exits_cleanly
    def of_wildcards(wildcards) -> Path:
        paths = flow.of(wildcards)
        if flow.force and paths.export_done.is_file() and not is_export(paths.export):
            flow.force([str(paths.export_done)])
        return paths.train_done

    return of_wildcards


def outcome(flow: Workflow, words: list[str], shown_rules: set[str]) -> list[str]:
    """What came out of the targets that were asked for, but of those whose rule's log the terminal has shown."""
    lines: list[str] = []
    for step, _, experiment in (word.partition("_") for word in words):
        if step in OUTCOME and experiment in flow.experiments and OUTCOME[step][0] not in shown_rules:
            rule, which = OUTCOME[step]
            paths = flow.paths(experiment)
            name = experiment if step in ("data", "inspect") else paths.settings.run_name
            with contextlib.suppress(OSError):
                log = paths.settings.exp_dir / "logs" / rule / f"{name}.log"
                lines += log.read_text("utf-8", "replace").splitlines()[which]
    return lines


def as_words(option: str, value: Any) -> list[str]:
    """An option of a script with its value, or with each of several; none where there is no value."""
    values = value if isinstance(value, tuple) else () if value is None else (value,)
    return [f"--{option}={shlex.quote(str(each))}" for each in values]


def where_jobs_run(executor: Any) -> str:
    """`here`, `elsewhere`, or, where they are only planned, `nowhere`; `executor`: Snakemake's plugin."""
    if executor is None or executor.common_settings.dryrun_exec or executor.common_settings.touch_exec:
        return "nowhere"
    return "here" if executor.common_settings.local_exec else "elsewhere"


def cluster_numbers(settings: Any) -> dict[str, int]:
    """What a cluster's profile says of a training; `settings`: Snakemake's resource settings. Empty without such a profile."""
    train = settings._parsed_overwrite_resources.get("train", {})
    keys = {"auto_nodes": "nodes", "auto_gpus_per_node": "gpus_per_node", "cpus_per_task": "cpus_per_task"}
    numbers = {name: train[key].value for key, name in keys.items() if key in train}
    return numbers if "nodes" in numbers else {}
