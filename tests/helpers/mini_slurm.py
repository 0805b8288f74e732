"""A throw-away Slurm on this machine: real daemons, two nodes on loopback. As root, with Debian's slurm-wlm and munge.

    python tests/helpers/mini_slurm.py start|stop FOLDER

Its slurm.conf is linked into /etc/slurm, because Snakemake's jobs lose SLURM_CONF; a cluster that is there already is left
alone. Unlike a real one it has neither accounting nor cgroups, and both nodes have this machine's host name.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

LINK = Path("/etc/slurm/slurm.conf")
CONFIG = """\
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.own.pid
SlurmdPidFile={folder}/%n.own.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core,CR_LLN
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=5
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MinJobAge=86400
MaxJobCount=20000
MaxArraySize=10001
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=8 RealMemory=32000 State=UNKNOWN\n"
NODES = ("node1", "node2")
PORT = 26900


def missing() -> str:
    """Why there can be no such Slurm here; empty when there can."""
    if os.getuid():
        return "a Slurm of the tests needs root"
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # where Debian has the daemons
    absent = [tool for tool in ("munged", "slurmctld", "slurmd", "srun") if not shutil.which(tool)]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"
    if LINK.is_symlink() and not is_alive(LINK.resolve().parent):
        LINK.unlink()  # of tests that were killed; every Snakemake would ask it, and wait for some seconds
    return f"{LINK} is there: a Slurm that is not the tests'" if LINK.exists() else ""


def is_alive(folder: Path) -> bool:
    """Whether the Slurm of this folder runs."""
    try:
        return "slurmctld" in psutil.Process(int((folder / "slurmctld.own.pid").read_text())).name()
    except (OSError, ValueError, psutil.Error):
        return False


class MiniSlurm:
    """The daemons; a context manager. `folder` holds their state, logs and pids."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "MiniSlurm":
        folder, host = self.folder, os.uname().nodename.split(".")[0]
        (folder / "state").mkdir(parents=True, exist_ok=True)
        key = folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        nodes = [NODE.format(name=name, host=host, port=PORT + n) for n, name in enumerate(NODES, 1)]
        config = CONFIG.format(host=host, port=PORT, folder=folder) + "".join(nodes)
        (folder / "slurm.conf").write_text(config + "PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE\n")
        LINK.parent.mkdir(exist_ok=True)
        LINK.symlink_to(folder / "slurm.conf")
        try:
            munge = [f"--{what}={folder}/munge.{what}" for what in ("socket", "pid-file", "log-file", "seed-file")]
            self.start("munged", "munged", "--foreground", "--force", f"--key-file={key}", *munge)
            self.wait("munged", lambda: (folder / "munge.socket").exists())
            self.start("slurmctld", "slurmctld", "-D")
            for name in NODES:
                self.start_node(name)
            self.wait("the nodes", lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D") == str(len(NODES)))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error) -> None:
        try:
            if jobs := self.jobs():
                self.ask("scancel", *(job["id"] for job in jobs))
                self.wait("the jobs' end", lambda: not self.jobs())
        finally:
            for daemon in reversed(self.daemons.values()):
                daemon.terminate()
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            LINK.unlink(missing_ok=True)

    def start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as output:
            self.daemons[name] = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str, everything: bool = False) -> None:
        """`kill -9` of a slurmd, whose jobs go on; or, like a power cut, of all processes of its node."""
        self.daemons[name].kill()
        self.daemons[name].wait()
        if everything:
            tasks = self.tasks(name)
            for process in {q for p in tasks if (q := p.parent()) and "slurmstepd" in q.name()} | set(tasks):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()

    def tasks(self, name: str) -> list[psutil.Process]:
        """The processes of jobs on a node."""
        mark = f"SLURMD_NODENAME={name}"
        return [process for process in psutil.process_iter(["environ"]) if mark in self._variables(process)]

    @staticmethod
    def _variables(process: psutil.Process) -> list[str]:
        return [f"{key}={value}" for key, value in (process.info["environ"] or {}).items()]

    def ask(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()

    def jobs(self, *options: str) -> list[dict[str, str]]:
        """Jobs in the queue; with `--states=all` those of the last minutes too."""
        lines = self.ask("squeue", "--noheader", "--format=%A|%T|%k|%N|%r", *options).splitlines()
        return [
            dict(zip(("id", "state", "comment", "nodes", "reason"), line.split("|"), strict=True)) for line in lines
        ]

    def wait(self, what: str, there: Callable[[], bool], seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not there():
            if time.monotonic() > end:
                raise TimeoutError(f"{what}: not within {seconds} s; see {self.folder}")
            time.sleep(0.2)


GONE = 'echo "${0##*/}: error: Unable to contact slurm controller (connect failure)" >&2; exit 1'


def stand_ins(folder: Path, **programs: str) -> str:
    """PATH on which Slurm is these shell scripts."""
    folder.mkdir()
    for tool in ("bash", "sh", "which", "sleep"):
        (folder / tool).symlink_to(shutil.which(tool))
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return f"{Path(sys.executable).parent}:{folder}"


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2]).absolute()
    if what == "stop":
        os.kill(int((folder / "pid").read_text()), signal.SIGTERM)
        return
    if reason := missing():
        sys.exit(reason)
    signal.signal(signal.SIGTERM, lambda *args: sys.exit())
    with MiniSlurm(folder) as cluster:
        (folder / "pid").write_text(str(os.getpid()))
        print(cluster.ask("sinfo", "-N"), flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
