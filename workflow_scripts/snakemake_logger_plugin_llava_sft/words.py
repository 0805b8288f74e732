"""What went wrong, in words: a failed job's own message, and Snakemake's errors as people meet them."""

import difflib
import errno
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Collection
from pathlib import Path

from snakemake.common import get_appdirs

STEPS = ("data", "inspect", "preflight", "train", "export", "evaluate", "report")
SHOWN_LINES, SHOWN_BYTES = 25, 1 << 16
ANOTHER = "or choose another folder: --config exp_dir=FOLDER"
FILE_FIXES = dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), f"make it writable for you, {ANOTHER}")
FILE_FIXES |= dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"free some space on that disk, {ANOTHER}")
FILE_FIXES |= dict.fromkeys((errno.ENOTDIR, errno.EEXIST), f"move that file out of the way, {ANOTHER}")
ALIVE = Path(".snakemake/alive")  # a line for each Snakemake that works here, by llava_sft.locks

ENDED = {
    "TIMEOUT": "a larger runtime for this rule in profiles/slurm/config.yaml",
    "OUT_OF_MEMORY": "a larger mem_mb for this rule in profiles/slurm/config.yaml",
}
PROFILE = "profiles/slurm/config.yaml"
NOT_TAKEN = "error: Slurm did not take the job"
SLURM_FIXES = {  # what Slurm says of a job that it does not take → what to do
    "slurm_extra|unrecognized option": f"slurm_extra in {PROFILE}: options of sbatch, and none that a key of its own sets",
    "account": f"slurm_account in {PROFILE}: one that `sacctmgr show associations user=$USER` lists",
    "partition": f"slurm_partition in {PROFILE}: one that `sinfo -s` lists",
    "time limit": f"runtime in {PROFILE}: at most the partition's limit (`sinfo -s`)",
    "qos": f"qos in {PROFILE}: one that `sacctmgr show associations user=$USER` lists",
    "node configuration|cpu count|memory|gres|node count": f"cpus_per_task, mem_mb, gres and auto_nodes in {PROFILE}: at most what "
    "`scontrol show nodes` says of a node",
    "sinfo|contact|configuration source|not found": "`scontrol ping` shows whether Slurm answers here; where there is none, the same command without "
    "--profile slurm",
}


def own_words(kind: str, text: str, targets: Collection[str] = ()) -> str:
    """Snakemake's error as ours, where it is one that people meet."""
    if kind == "LockException":
        return locked()
    if found := re.search(r"No rule to produce (.+?) \(if", text):
        return (
            f"error: {found[1][:200]}: neither a target nor a file that a rule makes\n"
            f"  fix: {near(found[1][:200], targets)}`make` alone lists the targets; settings: make train_X lr=1e-5"
        )
    if "Target rules may not contain wildcards" in text and (steps := [word for word in sys.argv[1:] if word in STEPS]):
        return (
            f"error: {steps[0]}: of which experiment?\n"
            f"  fix: {near(steps[0], targets)}`make` alone lists the experiments"
        )
    if found := re.search(r"Resource '(\w+)' with value '([^']*)' could not be parsed as (\w+)", text):
        return f"error: {found[1]}: {found[2][:200]!r}: not a number of {found[3]}\n  fix: write one for {found[1]} in {PROFILE}"
    if of_file := re.findall(r"Error: \[Errno (\d+)\] ([^:\n]+): '([^'\n]+)'", text):
        number, reason, path = of_file[-1]
        return f"error: {path}: {reason}\n  fix: {FILE_FIXES.get(int(number), 'mend that path')}"
    return text.strip()


def refusal(text: str) -> str:
    """Why Slurm took no job, or ended it, from what its executor says; empty for any other text."""
    text = text.partition("For further error details")[0]
    lines = re.findall(r"(?:sbatch|sinfo): (?:error: |fatal: )?([^\n]+)", text)
    lines = lines or re.findall(r"submission failed with exception: ([^\n]+)", text)
    if lines:
        fixes = (fix for words, fix in SLURM_FIXES.items() if re.search(words, " ".join(lines), re.IGNORECASE))
        return f"{NOT_TAKEN}: {lines[-1].strip().removesuffix("'.")}\n  fix: {next(fixes, f'mend {PROFILE}')}"
    if found := re.search(r"SLURM status is: '(\w+)", text):
        return f"error: Slurm ended the job: {found[1]}\n  fix: {ENDED.get(found[1], 'see the log')}"
    return ""


def profile_missed(text: str) -> str:
    """Snakemake's line about a profile that is not there, as ours; any other as it is."""
    if not (found := re.match(r"Error: profile directory given \((.*?)\), but no", text)):
        return text
    ours = (path.parent.name for path in sorted(Path("profiles").glob("*/config.yaml")))
    users = (path.parent.name for path in sorted(Path(get_appdirs().user_config_dir).glob("*/config.yaml")))
    there = [name if Path(name).exists() else f"profiles/{name}" for name in ours if name != "default"] + list(users)
    return (
        f"error: --profile {found[1][:200]}: there is no such profile\n"
        f"  fix: --profile {' or '.join(there) or 'slurm, in the folder of this project; or a folder that holds a config.yaml'}"
    )


def near(word: str, targets: Collection[str]) -> str:
    """The targets that may be meant."""
    of_step = [target for target in sorted(targets) if target.startswith(f"{word}_")]
    whole = [f"train_{word}"] if f"train_{word}" in targets else []
    meant = of_step[:4] or whole or difflib.get_close_matches(word.replace("-", "_"), targets, n=1, cutoff=0.75)
    return f"did you mean {' or '.join(meant)}? " if meant else ""


def message(logs: list[str]) -> tuple[str, str]:
    """Of the first log that says something: its path, and its `error:` lines or, without any, its last lines."""
    for wanted in ("error", "any"):
        for log in logs:
            try:
                with open(log, "rb") as file:
                    file.seek(max(0, os.path.getsize(log) - SHOWN_BYTES))
                    lines = file.read().decode(errors="replace").rstrip().splitlines()
            except OSError:
                continue
            starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
            if starts:
                return log, "\n".join(lines[starts[-1] :][:SHOWN_LINES])
            if lines and wanted == "any":
                return log, "\n".join(lines[-12:])
    return (logs[0] if logs else ""), ""


def disk_full(log: str) -> str:
    folder = next((path for path in Path(log or ".").absolute().parents if path.is_dir()), Path("."))
    if shutil.disk_usage(folder).free > 1 << 20:
        return f"; its log ({log or 'none'}) is empty"
    return f": no space left in {folder}, for the log neither\n  fix: make room there"


def locked() -> str:
    """Who works in this folder, as `lift_stale_lock` noted it."""
    working = []
    try:
        for line in ALIVE.read_text("utf-8").splitlines():
            holder = json.loads(line)
            away = holder["host"] != socket.gethostname()
            if holder["pid"] != os.getpid() and (away or os.path.exists(f"/proc/{holder['pid']}")):
                since, command = holder["since"], holder["command"][:200]
                working.append(f"process {holder['pid']} on {holder['host']}, since {since}: {command}")
    except (OSError, ValueError, KeyError, TypeError):
        pass
    if working:
        return (
            "error: another Snakemake works on these files: " + "\n       or ".join(working) + "\n"
            "  fix: wait until it has ended, or end it with Ctrl-C there (it saves); then give this command again"
        )
    return (
        "error: this folder is locked by a Snakemake that left no note of itself\n"
        "  fix: look for it with `ps ax | grep snakemake` on the machines that use this folder and wait for its end; when there "
        "is none, `.venv/bin/snakemake --unlock`"
    )


def command_line_mistake(words: list[str]) -> str | None:
    """What Snakemake answers with a traceback, or not at all: what stands after --config and is no KEY=VALUE; two of them."""
    if sum(word in ("--config", "-C") for word in words) > 1:
        return "--config stands twice: Snakemake would drop the first\n  fix: all settings after one, as --config lr=1e-3 seed=7"
    for start, word in enumerate(words):
        if word not in ("--config", "-C"):
            continue
        for number, entry in enumerate(words[start + 1 :], start + 1):
            if entry.startswith("-"):
                break
            key, equals, _ = entry.partition("=")
            if equals and key:
                continue
            spaced = [*words[number + 1 :], ""][0].startswith("=") or entry.startswith("=")
            if entry.partition("_")[0] in STEPS and not spaced:
                rest = [other for other in words if other != entry]
                return (
                    f"{entry[:200]} stands after --config, where settings stand as KEY=VALUE\n"
                    f"  fix: targets first: snakemake {entry[:200]} {' '.join(rest)[:300]}"
                )
            near = "without spaces, as in --config lr=1e-3" if spaced else "as in --config lr=1e-3 seed=7"
            return f"--config: {entry[:200]!r} is not KEY=VALUE\n  fix: write it {near}"
    return None


def why(reason: str) -> str:
    """Snakemake's reason for a job in a few words."""
    first = reason.partition(": ")[0].partition(";")[0]
    named = reason[len(first) :].removeprefix(": ").partition("; ")[0].split(", ")
    files = named[0] + (f" and {len(named) - 1} more" if len(named) > 1 else "")
    return {
        "Missing output files": f"{files}: not there yet",
        "Incomplete output files": f"{files}: not complete",
        "Updated input files": f"{files}: newer",
        "Input files updated by another job": "what it is made from is made anew",
        "Params have changed since last execution": "its settings have changed",
        "Set of input files has changed since last execution": "it is made from other files than before",
        "Code has changed since last execution": "the rule has changed",
        "Forced execution": "asked for, or not what was written any more",
    }.get(first, reason[:120])


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
