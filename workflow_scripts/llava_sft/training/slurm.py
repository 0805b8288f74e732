"""What is asked of Slurm: by the workflow, whether it answers; by a training, from inside its job."""

import os
import platform
import pwd
import re
import shutil
import subprocess
import time
from dataclasses import dataclass

from llava_sft.errors import RunError, SettingsError, exits_cleanly
from llava_sft.nodes import in_slurm
from llava_sft.programs import Answer, ask

REQUEUE_WITHIN_S = 600  # a job that asked to be queued again and still runs after this gives up
ANSWERS_WITHIN_S = 60
TRIED_FOR_S = 30
try:
    MY_JOBS = (f"--user={pwd.getpwuid(os.getuid()).pw_uid}",)  # squeue before 20.02 knows no --me
except KeyError:  # in a container, say: squeue takes no number without a name
    MY_JOBS = ("--me",)
STATUS = {"sacct": ("-X", "--noheader", "--starttime=now"), "squeue": (*MY_JOBS, "--noheader")}
DEFINITE = re.compile(
    "accounting storage is disabled|unrecognized option|invalid option"
)  # asked again, it says the same
PROFILE = "profiles/slurm/config.yaml"
ASK_SLURM = "check `scontrol ping`: if it says UP, run the same command again; if DOWN, ask whoever runs the cluster"


@exits_cleanly
def require_slurm(status_command: str) -> None:
    """Raise SettingsError unless jobs can be submitted from here and their end be seen, with this command of Slurm's.

    Asked once, before the first job: of a Slurm that is not there each job would hear for itself, after a while.
    """
    if not shutil.which("sbatch"):
        raise SettingsError(
            "--profile slurm: there is no sbatch on PATH",
            "on a login node: load Slurm's module; on any other machine: the same command without --profile slurm",
        )
    if trouble := ask_slurm("sinfo", "--noheader", "--format=%P").trouble:
        raise SettingsError(
            f"--profile slurm: Slurm does not answer: {trouble}",
            "wait until `scontrol ping` says UP, or ask whoever runs the cluster; on a machine outside any cluster: the "
            "same command without --profile slurm",
        )
    if trouble := ask_slurm(status_command, *STATUS.get(status_command, ())).trouble:
        other = "squeue" if status_command == "sacct" else "sacct"
        raise SettingsError(
            f"slurm-status-command: {status_command}: the end of a job would not be seen: {trouble}",
            f"slurm-status-command: {other} in {PROFILE}",
        )


def ask_slurm(*command: str) -> Answer:
    """The answer of a Slurm command, asked again for half a minute: a busy controller does not always give one."""
    until = time.monotonic() + TRIED_FOR_S
    while (answer := ask(*command, seconds=ANSWERS_WITHIN_S)).trouble and shutil.which(command[0]):
        if time.monotonic() > until or DEFINITE.search(answer.trouble):
            break
        time.sleep(3)
    return answer


@dataclass(frozen=True)
class Job:
    """The job that this process runs in. Of Slurm's variables Snakemake passes on only the job id."""

    number: str
    first_address: str  # of the first node, where rank 0 listens
    nodes: int
    cpus_per_node: int

    def signal_steps(self) -> None:
        """SIGTERM to all steps, not to the batch script; never to srun, which would kill its tasks at once."""
        subprocess.run(["scancel", "--signal=TERM", self.number], check=False)

    def requeue(self) -> None:
        """Have this job queued again and wait until Slurm ends it; return when it cannot be. A cancelled job stays so."""
        state = _output("squeue", "--noheader", "--jobs", self.number, "--format=%T")  # or COMPLETING, out of time too
        if state == "RUNNING" and not subprocess.run(["scontrol", "requeue", self.number], check=False).returncode:
            time.sleep(REQUEUE_WITHIN_S)


def this_job() -> Job | None:
    """The Slurm job that this process runs in, None outside. Raises RunError when Slurm does not answer."""
    if not in_slurm():
        return None
    number = os.environ["SLURM_JOB_ID"]
    described = _output("scontrol", "--oneliner", "show", "job", number)
    found = dict(re.findall(r"\b(NodeList|NumNodes|NumCPUs)=(\S+)", described))
    if len(found) < 3:
        raise RunError(f"Slurm job {number}: `scontrol show job {number}` says: {described!r}", ASK_SLURM)
    first = _output("scontrol", "show", "hostnames", found["NodeList"]).split("\n")[0]
    # The address by which Slurm itself reaches the node; its name need not resolve.
    address = re.search(r"\bNodeAddr=(\S+)", _output("scontrol", "--oneliner", "show", "node", first))
    nodes, cpus = int(found["NumNodes"].split("-")[0]), int(found["NumCPUs"])
    return Job(number, address[1] if address else first or platform.node(), nodes, max(1, cpus // nodes))


def _output(*command: str) -> str:
    answer = ask_slurm(*command)
    if answer.trouble:
        raise RunError(f"`{' '.join(command)}`: {answer.trouble}", ASK_SLURM)
    return answer.output
