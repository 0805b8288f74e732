"""The last lines on the terminal: what failed and what to do, what was left undone, or what a dry run would do."""

import re

from snakemake_logger_plugin_llava_sft.state import State, many
from snakemake_logger_plugin_llava_sft.words import NOT_TAKEN, disk_full, message

SAVED = "same command resumes"  # of train.py's last line
RERUN = "fix it and run the same command again: finished steps are kept"
NOTHING = "Nothing to be done: all is there."
# Printed on every run, or printed again, better, at the end.
NOISE = re.compile(
    r"Building DAG|Assuming unrestricted|Using shell|Provided |Using (workflow specific )?profile|Select jobs|Execute \d+ jobs"
    r"|Complete log|host: |Job counts|Rules claiming|singularity|Finished job|Conda env|Shutting down|Exiting because"
    r"|At least one job did not|Removing output files of failed|Terminating processes|Workflow finished|WorkflowError"
    r"|Elapsed time|Waiting at most|Will exit after|\[|Trying to restart|Nothing to be done|Group jobs|\d+ jobs have"
    r"|Shell command: None|Cannot restore |Failed to setup log file|Job \S+ has been submitted|SLURM run ID|No SLURM account|No account was given|Unable to guess SLURM|No partition"
)


def failure(state: State) -> list[str]:
    """Nothing, where nothing failed and nobody stopped it."""
    # Ended by Ctrl-C, Snakemake waits for its jobs and names none.
    stopped = [(number, job.logs) for number, job in state.running.items() if state.interrupted]
    failures = [_said(state, number, logs) for number, logs in list(state.failed.items()) or stopped]
    failures = [entry for entry in failures if entry[2]] or failures[:1]  # of a group, those that say something
    count, by_text = len(failures), {entry[2]: entry for entry in reversed(failures)}
    failures = list(by_text.values())[::-1]
    if not failures:
        errors = list(filter(None, state.errors))
        ours = [text for text in errors if not NOISE.match(text)] or errors  # a silent end would be worse
        return ["", *ours[-1:]] if ours else []
    lines: list[str] = []
    rerun = False
    for number, log, text in failures[:3]:
        name = state.jobs[number].name if number in state.jobs else "a job"
        refused = text.startswith("error: ")  # its fix may end as the last line of a training that has saved
        if not refused and (saved := next((line for line in text.splitlines() if SAVED in line), "")):
            lines += ["", f"{name} was stopped and has saved:", saved]
        elif state.interrupted and not refused:
            lines += ["", f"{name} was stopped; the same command does it again"]
            continue
        else:
            lines += ["", f"{name} failed:", text or f"error: it says nothing{disk_full(log)}"]
            rerun = True
        lines += [f"  log: {log}"] if log else []
    if count > len(failures[:3]):
        lines.append(f"… and {count - len(failures[:3])} more")
    return [*lines, f"  then: {RERUN}"] if rerun else lines


def _said(state: State, number: int, logs: list[str]) -> tuple[int, str, str]:
    """Of a job: its number, the log that says what went wrong, and that."""
    why = state.refused.get(number, "")
    if why.startswith(NOT_TAKEN):
        return number, "", why  # what its log says, an earlier job has said
    log, text = message(logs)
    return number, log, text or why


def plan(state: State) -> list[str]:
    """What a dry run says: each rule with the number of its jobs, and why."""
    width = max(map(len, state.counts), default=0)
    rows = [f"{count:6,}  {rule:{width}}  {state.reasons.get(rule, '')}" for rule, count in state.counts.items()]
    if not rows:
        return [NOTHING] if state.nothing else []
    last = "Nothing was run (-n); -n -p shows the commands, -n --verbose all that Snakemake says."
    return [f"{many(sum(state.counts.values()))} would run:", *rows, last]
