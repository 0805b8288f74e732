"""Faults of a running chain, one function each: `fault(reference, folder, chance)` yields an outcome a case."""

import contextlib
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from faults.artefacts import artefacts
from faults.at_rest import TRACEBACK
from faults.live import CONFIG, RULES, Chain, Reference, finish, last_words, lost, whole
from faults.project import NAME, RESULTS, RUN, environment

LONG_STEPS = 150
LONGER = ["--config", f"train_iters={LONG_STEPS}", f"lr_decay_iters={LONG_STEPS}", "save_interval=40"]
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
ODD_NAMES = ("with space", "数据", "it's", 'a"b', "$HOME", "{braces}")


def kills(
    reference: Reference, folder: Path, chance: random.Random, each: int = 10, rules: tuple[str, ...] = tuple(RULES)
) -> Iterator[dict]:
    """kill -9 of everything at a random moment of each rule, `each` times, then the same command to its end."""
    for rule in rules:
        yield killed(reference, folder / "killed", chance, rule, each + 10 if rule == "train" else each)


def killed(reference: Reference, project: Path, chance: random.Random, rule: str, times: int) -> dict:
    """The outcome of `times` kills; only processes that lived count."""
    reference.copy(project, rule)
    done, bad = 0, []
    while done < times and len(bad) < 3:
        kept = whole(project)
        chain = Chain(project, RULES[rule][1], *CONFIG)
        if chain.await_rule(rule):
            pause = chance.uniform(0, 0.8 * reference.seconds.get(rule, 5))
            if rule == "train" and chance.random() < 0.6:  # while it trains and saves, not while it imports
                while chain.process.poll() is None and len(list((project / RUN).glob("iter_*"))) <= len(kept):
                    time.sleep(0.01)
                pause = chance.uniform(0, 1)
            time.sleep(pause)
        if chain.process.poll() is None:
            chain.kill()
            done += 1
            bad += [f"lost: checkpoint {step}" for step in lost(kept, project)]
            continue
        # It got to its end before the kill: that is compared, and the rule begun again.
        bad += [last_words(chain.said())] if chain.process.returncode else reference.unlike(project, rule)
        reference.copy(project, rule)
    found = {"fault": "kill -9", "where": rule, "times": done} | finish(reference, project, rule)
    if bad:
        found |= {"outcome": "lost" if any("lost" in each for each in bad) else "silent", "differ": bad[:8]}
    return found


def signals(reference: Reference, folder: Path, chance: random.Random) -> Iterator[dict]:
    """Each signal to the whole group, to Snakemake alone, to train.py alone, while it trains; then the same command.

    SIGTERM and SIGINT, and to train.py SIGUSR1, have to save a checkpoint and end before the last step.
    """
    undisturbed = reference.copy(folder / "undisturbed", "preflight")
    if finish(reference, undisturbed, "train", LONGER)["code"]:
        raise RuntimeError("the undisturbed training failed")
    wanted = artefacts(undisturbed, timed=True)
    for number in SIGNALS:
        for whom in ("group", "snakemake", "train.py"):
            project = reference.copy(folder / "signalled", "preflight")
            chain = Chain(project, RULES["train"][1], *LONGER)
            while chain.process.poll() is None and not whole(project):
                time.sleep(0.01)
            kept = whole(project)
            if whom == "group":
                os.killpg(chain.process.pid, number)
            elif whom == "snakemake":
                os.kill(chain.process.pid, number)
            else:
                for process in chain.processes(("workflow_scripts/train.py",))[:1]:
                    process.send_signal(number)
            code = chain.wait()
            said, reached = chain.said(), max(whole(project), default=0)
            gone = lost(kept, project)
            chain.kill()
            found = finish(reference, project, "train", LONGER, wanted)
            saves = number in (signal.SIGTERM, signal.SIGINT) or (number == signal.SIGUSR1 and whom == "train.py")
            if saves and (reached in kept or reached == LONG_STEPS):
                why = "no checkpoint was saved" if reached in kept else "not heard"
                found |= {"outcome": "lost", "message": f"{why}; {found['message']}"}
            if gone:
                found |= {"outcome": "lost", "differ": gone}
            if TRACEBACK.search(said):
                found |= {"outcome": "traceback", "message": last_words(said)}
            note = f"exit code {code}, whole checkpoint at step {reached} of {LONG_STEPS}"
            yield {"fault": number.name, "where": whom, "times": 1, "note": note} | found


def full_disks(reference: Reference, folder: Path, chance: random.Random) -> Iterator[dict]:
    """output/ on a file system that fills up while a rule writes; said, and mended by the same command once there is room."""
    for rule in RULES:
        project = reference.copy(folder / "full", rule)
        written = [p for pattern in RULES[rule][2] for p in reference.project.glob(pattern)]
        size = sum(p.stat().st_size for w in written for p in ([w] if w.is_file() else w.rglob("*")) if p.is_file())
        output, aside = project / "output", project / "aside"
        output.rename(aside)
        output.mkdir()
        used = sum(-(-p.stat().st_size // 4096) * 4096 for p in aside.rglob("*") if p.is_file())
        room = used + int(size * chance.uniform(0.1, 0.8)) // 4096 * 4096 + 12288
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room},nr_inodes=100k", "tmpfs", output], check=True)
        try:
            subprocess.run(["cp", "-a", f"{aside}/.", output], check=True)
            chain = Chain(project, RULES[rule][1], *CONFIG)
            code, said = chain.wait(), chain.said()
            subprocess.run(["mount", "-o", "remount,size=1g", output], check=True)
            found = finish(reference, project, rule)
            told = re.search(r"no space left|disk has|disk is full|disk may be full|free some", said, re.IGNORECASE)
            if code and not told:
                found |= {"outcome": "unnamed", "message": last_words(said)}
            elif TRACEBACK.search(said):
                found |= {"outcome": "traceback", "message": last_words(said)}
            yield {"fault": "disk full", "where": rule, "times": 1, "note": "" if code else "there was room"} | found
        finally:
            subprocess.run(["umount", "-l", output], check=False)


def twice(reference: Reference, folder: Path, chance: random.Random) -> Iterator[dict]:
    """The same command from two terminals, and train.py beside a running training: one works, the other says why not."""
    project = reference.copy(folder / "twice", "train")
    first = Chain(project, RULES["train"][1], *CONFIG, log="first.txt")
    first.await_rule("train")
    second = Chain(project, RULES["train"][1], *CONFIG, log="second.txt")
    codes = second.wait(), first.wait()
    found = finish(reference, project, "train")
    if TRACEBACK.search(second.said() + first.said()):
        found |= {"outcome": "traceback", "message": last_words(second.said())}
    yield {"fault": "two copies at once", "where": "snakemake", "times": 1, "note": f"exit codes {codes}"} | found

    project = reference.copy(folder / "twice", "train")
    command = [sys.executable, "workflow_scripts/train.py", f"{RESULTS}/resolved.json", "--run-dir", RUN]
    command += ["--done", f"{RESULTS}/train.done.json"]
    # As many threads as Snakemake gives it: sums of floats depend on their number.
    variables = environment() | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    both = [
        subprocess.Popen(
            command, cwd=project, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate()[0] for process in both]
    refused = [text for process, text in zip(both, said, strict=True) if process.returncode]
    found = finish(reference, project, "train")
    if len(refused) != 1 or "another training" not in refused[0] or TRACEBACK.search(refused[0]):
        found |= {"outcome": "silent" if not refused else "unnamed", "message": str([text[-200:] for text in said])}
    yield {"fault": "two copies at once", "where": "train.py", "times": 1} | found


def odd_places(reference: Reference, folder: Path, chance: random.Random) -> Iterator[dict]:
    """The whole chain in folders with odd names, through a link, from elsewhere, with a strict umask and few descriptors."""
    for name in ODD_NAMES:
        project = reference.copy(folder / "odd" / name)
        yield {"fault": "odd project folder", "where": name, "times": 1} | finish(reference, project)
        shutil.rmtree(folder / "odd")
    for name in ODD_NAMES:
        project = reference.copy(folder / "odd")
        chain = Chain(project, f"data_{NAME}", "--config", f"exp_dir={name}")
        code, said = chain.wait(), chain.said()
        made = (project / name / f"data/{NAME}/dataset.json").is_file()
        refused = code and "error:" in said and not TRACEBACK.search(said)
        outcome = "mended" if made and not code else "reported" if refused else "traceback" if code else "silent"
        found = {"outcome": outcome, "message": last_words(said) if code else "", "differ": []}
        yield {"fault": "odd exp_dir", "where": name, "times": 1} | found
    project = reference.copy(folder / "real")
    (folder / "link").unlink(missing_ok=True)
    (folder / "link").symlink_to(project)
    yield {"fault": "a linked project", "where": "report", "times": 1} | finish(reference, folder / "link")
    project = reference.copy(folder / "elsewhere")
    away = ("--snakefile", str(project / "Snakefile"), "--directory", str(project))
    chain = Chain(project, RULES["report"][1], *away, *CONFIG, cwd=Path("/"))
    code = chain.wait()
    found = (
        finish(reference, project)
        if not code
        else {"outcome": "stuck", "message": last_words(chain.said()), "differ": []}
    )
    yield {"fault": "another working directory", "where": "report", "times": 1} | found
    for fault, before in (("umask 077", "umask 077"), ("256 descriptors", "ulimit -n 256")):
        project = reference.copy(folder / "strict")
        found = finish(reference, project, before=("bash", "-c", f'{before}; exec "$@"', "bash"))
        yield {"fault": fault, "where": "report", "times": 1} | found


FAULTS = {"kills": kills, "signals": signals, "full disks": full_disks, "twice": twice, "odd places": odd_places}


def steady_training(reference: Reference, folder: Path, steps: int = 3000) -> dict[str, float]:
    """Growth of the training's resident memory (MB) and open descriptors over its steps: the last quarter's median less the
    second's, loader processes included."""
    project = reference.copy(folder / "steady", "preflight")
    config = [
        "--config",
        f"train_iters={steps}",
        f"lr_decay_iters={steps}",
        f"save_interval={steps // 6}",
        "keep_last=2",
    ]
    chain, samples = Chain(project, RULES["train"][1], *config), []
    while chain.process.poll() is None:
        memory = descriptors = 0
        for process in chain.processes(("llava_sft.training",)):
            with contextlib.suppress(psutil.Error):
                memory, descriptors = memory + process.memory_info().rss, descriptors + process.num_fds()
        if (project / RUN / "metrics.jsonl").is_file() and memory:
            samples.append((memory / 1e6, descriptors))
        time.sleep(0.5)
    if chain.wait():
        raise RuntimeError(chain.said()[-3000:])
    quarter = len(samples) // 4
    growth = [
        statistics.median(late) - statistics.median(early)
        for early, late in zip(
            zip(*samples[quarter : 2 * quarter], strict=True), zip(*samples[-quarter:], strict=True), strict=True
        )
    ]
    return {"rss_growth_mb": growth[0], "fd_growth": growth[1], "samples": len(samples)}
