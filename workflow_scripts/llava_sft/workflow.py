"""What the rules ask while Snakemake builds its DAG: settings and paths by wildcards, the plan of the conversion.

Notable:
- only the experiments that are asked for are read and checked, and the first mistake ends the program with its message
  before the DAG is there;
- a lock that a killed run left behind is recognised by the kernel's own lock, which dies with its process;
- Slurm jobs that a killed run left behind are waited for: their results are used, and none is submitted twice.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from llava_sft.config import experiments, load_settings
from llava_sft.data.verify import out_of_date
from llava_sft.errors import SettingsError, SftError, exits_cleanly
from llava_sft.paths import Paths, Shard

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
        self.overrides, self.cluster = dict(overrides), cluster or {}
        if tags := [word.removeprefix("run_tag=") for word in words if word.startswith("run_tag=")]:
            self.overrides["run_tag"] = tags[-1]  # as typed: Snakemake makes a number of 0103
        self.experiments = experiments()
        self.asked: list[str] = []
        self.force: Callable[[list[str]], None] | None = None  # set by the main process
        self._checked: set[Path] = set()
        for word in words if "--allowed-rules" not in words else ():  # a job of Slurm names rules, not targets
            step, _, experiment = word.partition("_")
            if step in STEPS and re.fullmatch(r"\w+", experiment) and experiment not in self.experiments:
                raise SettingsError(
                    f"{word}: there is no config/experiments/{experiment}.yaml",
                    f"one of {', '.join(self.experiments)}; a new one starts as a copy of TEMPLATE.yaml",
                )

    def overview(self) -> str:
        width = max(map(len, STEPS)) + 2
        lines = ["", "Targets: STEP_EXPERIMENT, as in `snakemake --cores 8 train_vqa`; `-n` shows what would run", ""]
        lines += [f"  {step:{width}} {text}" for step, (_, text) in STEPS.items()]
        lines += ["", "Experiments (config/experiments/): " + ", ".join(self.experiments), ""]
        return "\n".join(lines) + "\n"

    @cache  # noqa: B019 (one object for the whole program)
    def paths(self, experiment: str) -> Paths:
        return Paths(load_settings(experiment, self.overrides, self.cluster))

    def target(self, step: str, experiment: str) -> Callable:
        """Input function of the target `step_experiment`."""

        @exits_cleanly
        def files(wildcards) -> list[Path]:
            paths = self.paths(experiment)
            paths.check_inputs()
            self.asked.append(experiment)
            # Named here too: Snakemake does not miss a deleted file in the middle of a finished chain.
            shards = [paths.webdatasets / f"{name}.tar" for name in paths.shards]
            return [*shards, getattr(paths, STEPS[step][0])]

        return files

    # --- by wildcards: {experiment} in data paths, {run_name} in results, {checkpoint} in converted ones -----------

    def of(self, wildcards) -> Paths:
        if hasattr(wildcards, "experiment"):
            return self.paths(wildcards.experiment)
        for paths in self._asked_first():
            if paths.settings.run_name == wildcards.run_name:
                return paths
        raise SettingsError(f"{wildcards.run_name}: no experiment has this run_name", "ask for STEP_EXPERIMENT targets")

    def _asked_first(self) -> Iterator[Paths]:
        """All experiments whose settings are sound, those asked for in front: with `--config load=…` all load the same."""
        for experiment in dict.fromkeys([*self.asked, *self.experiments]):
            try:
                yield self.paths(experiment)
            except SftError:
                continue  # not asked for, or it would have been reported

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
        return self.shard(wildcards).raw

    def job_of_shard(self, wildcards) -> str:
        shard, settings = self.shard(wildcards), self.of(wildcards).settings
        return (
            f"--max-shard-bytes {settings.max_shard_bytes} --decode-images {settings.decode_images}"
            f" --image-root {shlex.quote(str(shard.source.image_root))} --prefix {shard.prefix}"
            f" --shard {shard.range.index} --start {shard.range.start} --end {shard.range.end}"
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
            tars, index = out_of_date(paths)
            self.force([str(path) for path in [*tars, *([paths.dataset] if index else [])]])

    @exits_cleanly
    def raw_files(self, wildcards) -> list[Path]:
        sources = self.of(wildcards).sources
        return [path for source in sources for files in source.files.values() for path in files]

    @exits_cleanly
    def index_job(self, wildcards) -> str:
        paths = self.of(wildcards)
        if paths.settings.webdatasets:
            return f"--adopt {shlex.quote(str(paths.settings.webdatasets))}"
        return f"--plan {shlex.quote(json.dumps(paths.plan()))}"

    @exits_cleanly
    def conversion(self, wildcards) -> Paths:
        """The experiment whose start checkpoint is converted to `{checkpoint}_mcore_tp1_pp1`."""
        for paths in self._asked_first():
            if paths.converted and paths.converted.name == f"{wildcards.checkpoint}_mcore_tp1_pp1":
                return paths
        raise SettingsError(f"{wildcards.checkpoint}: no experiment loads this checkpoint", "see `load`")

    @exits_cleanly
    def checkpoint_folders(self, wildcards) -> list[str]:
        """The folders that the start checkpoint is converted from; a hub id is none."""
        paths = self.conversion(wildcards)
        sources = [paths.settings.load, *paths.settings.load_parts.values()]
        return [source for source in sources if paths.is_demo(Path(source)) or Path(source).is_dir()]

    def checkpoint_job(self, wildcards) -> str:
        settings = self.conversion(wildcards).settings
        words = [settings.load, "--model", settings.model]
        words += [f"--part={part}={source}" for part, source in sorted(settings.load_parts.items())]
        return shlex.join(words + ([f"--sidecars={settings.tokenizer}"] if settings.tokenizer else []))


def cluster_numbers(settings: Any) -> dict[str, int]:
    """What a cluster's profile says of a training; `settings`: Snakemake's resource settings. Empty without such a profile."""
    train = settings._parsed_overwrite_resources.get("train", {})
    keys = {"auto_nodes": "nodes", "auto_gpus_per_node": "gpus_per_node", "cpus_per_task": "cpus_per_task"}
    numbers = {name: train[key].value for key, name in keys.items() if key in train}
    return numbers if "nodes" in numbers else {}


# ------------------------------------------------------------------------------------------------- locks

_held = None  # keeps the shared lock for the life of the process


def lift_stale_lock(wait: bool = True) -> None:
    """Remove Snakemake's lock files when the run that made them is dead, after the last of its Slurm jobs.

    Every Snakemake main process of this folder holds a shared kernel lock as long as it lives. Whoever can have it alone
    knows that nobody else lives, so that lock files left by a `kill -9` or a power cut mean nothing.
    `wait`: for the Slurm jobs; a dry run does not.
    """
    global _held
    directory = Path(".snakemake")
    directory.mkdir(exist_ok=True)
    _held = open(directory / "alive", "a")  # noqa: SIM115
    try:
        fcntl.flock(_held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(_held, fcntl.LOCK_SH)
        return
    except OSError:
        return  # a file system without locks: Snakemake's own message says what to do
    if wait:
        wait_for_jobs()
    stale = list((directory / "locks").glob("*"))
    for path in stale:
        path.unlink(missing_ok=True)
    if stale:
        print("The last run was killed and left its lock: lifted, going on where it was.", file=sys.stderr)
    fcntl.flock(_held, fcntl.LOCK_SH)


def jobs_left() -> list[str]:
    """Number and rule of each Slurm job that a Snakemake of this folder submitted and that has not ended."""
    fields = "%A|%T|%k|%Z"  # number, state, comment (the plugin puts the rule there), working directory
    listing = subprocess.run(["squeue", "--me", "--noheader", f"--format={fields}"], capture_output=True, text=True)
    jobs = [line.split("|") for line in listing.stdout.splitlines() if line.count("|") == 3]
    return [
        f"{number} {comment} ({state})"
        for number, state, comment, folder in jobs
        if comment.startswith("rule_") and os.path.realpath(folder) == os.path.realpath(os.curdir)
    ]


def wait_for_jobs() -> None:
    """Wait until no Slurm job of an earlier run of this folder is left; a second one would do its work beside it."""
    if not shutil.which("squeue") or not (jobs := jobs_left()):
        return
    shown = "".join(f"    {job}\n" for job in jobs[:5]) + (f"    … {len(jobs)} in all\n" if len(jobs) > 5 else "")
    print("Slurm jobs of an earlier run are still there: waiting for them, their results are used", file=sys.stderr)
    print(f"{shown}  fix: to begin without them, scancel these numbers", file=sys.stderr, flush=True)
    try:
        while jobs_left():
            time.sleep(5)
    except KeyboardInterrupt:
        print("Stopped waiting; the jobs go on.", file=sys.stderr)
        sys.exit(130)
