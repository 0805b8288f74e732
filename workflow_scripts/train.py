"""Train with Megatron what preflight resolved. Started again, it goes on from the newest whole checkpoint.

When the run has already done all its steps with the same settings and data it says so within a second.
"""

import argparse
import datetime
import os
import platform
import shutil
import sys
import time
from pathlib import Path

from llava_sft.errors import RunError, exits_cleanly
from llava_sft.files import fingerprint, read_json, write_json
from llava_sft.model.config import ModelConfig
from llava_sft.training.checkpoints import check_disk, checkpoint_dir, expected_bytes, iterations_done, prune
from llava_sft.training.launcher import launch
from llava_sft.training.run import give_back, identity, lock, open_run, start_dir
from llava_sft.training.watch import forget_after, read_metrics

FAILURE = "failure.json"  # written by the training when it knows the cause

EXIT_GO_ON = 75  # stopped in good order before the last step: the same command goes on


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("resolved", type=Path, help="resolved.json, written by preflight.py")
    parser.add_argument("--run-dir", type=Path, required=True, help="Megatron's run directory (SAVE_CKPT_PATH)")
    parser.add_argument("--done", type=Path, required=True, help="written when all steps are done")
    args = parser.parse_args()

    resolved = read_json(args.resolved)
    settings, run_dir = resolved["settings"], args.run_dir
    train_iters = settings["train_iters"]
    held = lock(run_dir)
    start = open_run(run_dir, resolved)
    if start == train_iters:
        print(f"{run_dir}: all {train_iters} steps are done, with the same data and settings: nothing to train")
        finish(args.done, run_dir, resolved)
        give_back(held)
        return

    check_machine(settings)
    prune(run_dir, settings["keep_last"], settings["keep_every"])
    check_space(run_dir, resolved)
    (run_dir / FAILURE).unlink(missing_ok=True)
    forget_after(run_dir, start)
    log = run_dir / f"run_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{platform.node()}.log"
    print(f"{run_dir}: " + (f"going on from step {start} of {train_iters}" if start else f"{train_iters} steps"))
    print(f"everything that Megatron prints: {log}", flush=True)
    began = time.monotonic()
    start_folder = start_dir(run_dir, resolved["start"]["folder"])
    code = launch(
        settings["nproc_per_node"],
        [str(run_dir / "run.json"), str(run_dir), str(start_folder or "")],
        run_dir,
        log,
        held,
        say=lambda line: print(line, flush=True),
    )
    reached = iterations_done(run_dir)
    give_back(held)
    if reached == train_iters:
        print(f"{run_dir}: {train_iters} steps done in {time.monotonic() - began:.0f} s")
        finish(args.done, run_dir, resolved)
    elif code == 0:
        print(f"{run_dir}: stopped at step {reached} of {train_iters}; the same command goes on from there")
        sys.exit(EXIT_GO_ON)
    elif (run_dir / FAILURE).is_file():
        known = read_json(run_dir / FAILURE)
        raise RunError(f"training stopped at step {reached} of {train_iters}: {known['problem']}", known["fix"])
    else:
        raise RunError(
            f"training ended with exit code {code} at step {reached} of {train_iters}.\n{last_lines(log)}", f"see {log}"
        )


def finish(done: Path, run_dir: Path, resolved: dict) -> None:
    """Write the marker: the same bytes for the same run, whenever and however often it was interrupted."""
    train_iters = resolved["settings"]["train_iters"]
    metrics = read_metrics(run_dir)
    write_json(
        done,
        {
            "run_dir": str(run_dir),
            "checkpoint": str(checkpoint_dir(run_dir, train_iters)),
            "iteration": train_iters,
            "lm loss": metrics[-1]["lm loss"] if metrics else None,
            "fingerprint": fingerprint([identity(resolved), train_iters]),
        },
    )


def check_machine(settings: dict) -> None:
    """Raise RunError when this machine can not train as asked."""
    from llava_sft.config import gpu_count

    found = gpu_count()
    if settings["gpus_per_node"] > found:
        raise RunError(
            f"gpus_per_node is {settings['gpus_per_node']}, {platform.node()} has {found}",
            f"gpus_per_node: {found}" + ("" if found else " trains on the CPU"),
        )
    if shared := Path("/dev/shm"):
        free = os.statvfs(shared).f_bavail * os.statvfs(shared).f_frsize if shared.is_dir() else None
        if free is not None and free < 64 << 20:
            raise RunError(f"/dev/shm has {free >> 20} MiB free, the loader needs 64", "free it, or mount it larger")


def check_space(run_dir: Path, resolved: dict) -> None:
    """Raise RunError when not one checkpoint fits on the disk; warn when not all of them do."""
    settings, parameters = resolved["settings"], ModelConfig(**resolved["model"]).parameter_count()
    size = expected_bytes(parameters, parameters, settings)
    check_disk(run_dir, size, "a checkpoint")
    kept = min(-(-settings["train_iters"] // settings["save_interval"]), settings["keep_last"] or 10**9)
    free = shutil.disk_usage(run_dir).free
    if free < kept * size:
        print(
            f"warning: {kept} checkpoints may take {kept * size / 2**30:,.1f} GiB, the disk has {free / 2**30:,.1f} GiB free: set keep_last"
        )


def last_lines(log: Path, count: int = 12) -> str:
    """The end of the log, where the cause stands: the traceback's last frames and its message."""
    lines = log.read_text(errors="replace").splitlines()
    return "\n".join(f"    {line[:200]}" for line in lines[-count:])


if __name__ == "__main__":
    main()
