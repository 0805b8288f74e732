"""Train with Megatron what preflight resolved; started again, resume from the newest whole checkpoint.

A run that has done all its steps with the same settings and data says so within a second. In a Slurm job it trains on the
job's nodes, saves before the time limit, and has the job queued again as long as there is progress. Where a platform has
started several nodes, it trains on them (llava_sft/training/meeting.py).

Exit codes: 0 all steps are done; 75 stopped cleanly by a signal or max_minutes, with a checkpoint; 130 ended at once by a
second Ctrl-C, without one; 1 an error, with its message.
"""

import argparse
import datetime
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import BinaryIO

from llava_sft.command_line import Parser
from llava_sft.data.nv_meta import folder_of
from llava_sft.data.verify import require_whole
from llava_sft.errors import RunError, exits_cleanly, many
from llava_sft.files import fingerprint, write_json
from llava_sft.nodes import Node, is_settled, this_node
from llava_sft.run.checkpoints import iterations_done, prune
from llava_sft.run.coverage import count_samples
from llava_sft.run.identity import identity, open_run, read_run
from llava_sft.run.layout import METRICS, RUN_FILE, SAMPLE_COUNTS, checkpoint_dir, data_dir
from llava_sft.run.lock import DEAD_AFTER_S, give_back, lock
from llava_sft.run.records import forget_after, read_metrics
from llava_sft.run.sessions import note_end, note_start
from llava_sft.settings.resolved import Resolved
from llava_sft.training.checks import check_node, check_nodes, check_space
from llava_sft.training.launcher import STOPPED, cut_short, launch
from llava_sft.training.meeting import Host, Meeting, join
from llava_sft.training.ranks import forget_failure, noted_failure
from llava_sft.training.slurm import Job, this_job
from llava_sft.training.trackers import followed, require_packages

EXIT_RESUMABLE = 75  # stopped cleanly before the last step: the same command resumes
LAST_LINES = 12  # of the log: the traceback's last frames and its message


@exits_cleanly
def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("resolved", type=Path, help="resolved.json, written by preflight.py")
    parser.add_argument("--run-dir", type=Path, required=True, help="Megatron's run directory (SAVE_CKPT_PATH)")
    parser.add_argument("--done", type=Path, required=True, help="written when all steps are done")
    parser.add_argument("--srun-options", default="", help="of this cluster, for the srun that starts the nodes' tasks")
    args = parser.parse_args()

    resolved = Resolved.read(args.resolved)
    job = this_job()
    node = None if job else this_node()
    if node and node.rank:  # started by hand on every node: the Snakefile does this by itself
        sys.exit(join(node))
    host = Host(node) if node and not is_settled() else None
    # A job that Slurm starts again may meet the last processes of its predecessor.
    held = lock(args.run_dir, patience_s=2 * DEAD_AFTER_S if job else 0)
    try:
        (host.until_end(train) if host else train)(args, resolved, job, node, held)
    finally:  # a run that is refused leaves no lock of a dead one
        give_back(held)


def train(args: argparse.Namespace, resolved: Resolved, job: Job | None, node: Node | None, held: BinaryIO) -> None:
    settings, run_dir = resolved.settings, args.run_dir
    train_iters = settings.train_iters
    start = open_run(run_dir, resolved)
    if start == train_iters:
        print(f"{run_dir}: {many(train_iters, 'step')} done, with the same data and settings: nothing to train")
        if settings.log_samples and not (run_dir / SAMPLE_COUNTS).is_file():
            count_samples(run_dir, resolved.data, train_iters)
        finish(args.done, run_dir, resolved)
        return

    if dataset := resolved.data.dataset_file:
        require_whole(folder_of(Path(resolved.data.path)), Path(dataset))
    check_nodes(settings, job, node)
    check_node(read_run(run_dir))  # a run that goes on keeps its own cut into pipeline stages
    require_packages(settings.trackers)
    prune(run_dir, settings.keep_last, settings.keep_every)
    check_space(run_dir, resolved)
    forget_failure(run_dir)
    forget_after(run_dir, start)
    log = run_dir / f"run_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{platform.node()}.log"
    print(f"{run_dir}: " + (f"resuming from step {start} of {train_iters}" if start else many(train_iters, "step")))
    print(f"everything that Megatron prints: {log}", flush=True)
    began = time.monotonic()
    check_what_is_loaded(run_dir, start, resolved)
    note_start(run_dir, start, settings.gpus_per_node > 0, settings.nodes)
    arguments = [str(run_dir / RUN_FILE), str(run_dir)]
    with followed(run_dir, settings.trackers):
        if node:
            meeting = Meeting(node, run_dir, run_dir / RUN_FILE)
            with meeting as place:
                code = launch(settings, arguments, run_dir, log, held, place=place, trouble=meeting.trouble)
                if code not in (0, STOPPED):
                    with cut_short():
                        meeting.last_words(run_dir)
        else:
            code = launch(settings, arguments, run_dir, log, held, job, shlex.split(args.srun_options))
    reached = iterations_done(run_dir)
    note_end(run_dir, reached)
    if reached == train_iters:
        print(f"{run_dir}: {many(train_iters, 'step')} done in {time.monotonic() - began:.0f} s")
        finish(args.done, run_dir, resolved)
        count_samples(run_dir, resolved.data, train_iters)
    elif code == STOPPED:
        sys.exit(STOPPED)
    elif code:
        raise failure(run_dir, f"at step {reached} of {train_iters}", code, log)
    else:
        stopped = f"{run_dir}: stopped at step {reached} of {train_iters}"
        if job and reached == start:
            raise RunError(
                f"{stopped}: no step was completed in this job; requeueing would not help",
                "a longer `runtime` for train in the profile, or fewer seconds in its --signal=TERM@SECONDS",
            )
        print(f"{stopped}; the same command resumes from there", flush=True)
        if job:
            give_back(held)
            job.requeue()
        sys.exit(EXIT_RESUMABLE)


def failure(run_dir: Path, where: str, code: int, log: Path) -> RunError:
    """Why the training ended with exit code `code`: the cause that it noted, a full disk, or the end of its log."""
    end = log.read_text("utf-8", "replace").splitlines()[-LAST_LINES:]
    if known := noted_failure(run_dir):
        lines, fix = known.get("lines", ()), known.get("fix") or f"see {log}"
        if "crashed" in known:  # and could not say why
            fix = f"see {log}; {fix}"
            lines = end if this_job() or known["crashed"] == platform.node() else ()
        shown = "".join(f"\n    {line[:200]}" for line in lines)
        return RunError(f"training stopped {where}: {known['problem']}{shown}", fix)
    if (free := shutil.disk_usage(run_dir).free) < 1 << 20:  # too little for the note
        return RunError(
            f"training stopped {where}: {run_dir} is on a full disk: {free >> 10} KiB free",
            "free space there; the same command resumes from the newest checkpoint",
        )
    shown = "\n".join(f"    {line[:200]}" for line in end)
    return RunError(f"training ended with exit code {code} {where}.\n{shown}", f"see {log}")


def check_what_is_loaded(run_dir: Path, step: int, resolved: Resolved) -> None:
    """Raise CheckpointError unless Megatron and energon can load what they start from without running code in it."""
    from llava_sft.checkpoint.pickles import check_pickles  # imports torch, which a finished run need not wait for

    start, needs_base = resolved.start, resolved.settings.trained.lora
    if step:
        check_pickles(checkpoint_dir(run_dir, step), *sorted(data_dir(run_dir, step).rglob("*.pt")))
    if start.folder and (needs_base or not step):
        check_pickles(start.folder)
    if start.pairs and not step:
        check_pickles(start.pairs)


def finish(done: Path, run_dir: Path, resolved: Resolved) -> None:
    """Write the marker: the same bytes for the same run, whenever and however often it was interrupted."""
    train_iters = resolved.settings.train_iters
    metrics = read_metrics(run_dir)
    if metrics and metrics[-1]["iteration"] != train_iters:
        print(f"warning: {run_dir / METRICS}: the record of step {train_iters} is lost, and its loss with it")
        metrics = []
    marker = {
        "run_dir": str(run_dir),
        "checkpoint": str(checkpoint_dir(run_dir, train_iters)),
        "iteration": train_iters,
        "lm loss": metrics[-1]["lm loss"] if metrics else None,
        "fingerprint": fingerprint([identity(resolved), train_iters]),
    }
    write_json(done, marker, sealed=True)


if __name__ == "__main__":
    main()
