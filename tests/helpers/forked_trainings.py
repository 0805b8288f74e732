"""Trainings in processes forked from one that has Megatron imported: seconds each, in place of a quarter of a minute.

What train.py does before and after is left out; test_training_life.py has it.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

from helpers import ROOT, SCRIPTS
from helpers.trainings import ENVIRONMENT, Run
from llava_sft.run.identity import open_run
from llava_sft.run.layout import RUN_FILE
from llava_sft.settings.resolved import Resolved
from llava_sft.training.launcher import STORE


class ForkedTrainings:
    def __init__(self, process: subprocess.Popen):
        self.process = process

    def train(self, run: Run) -> None:
        """To the run's last step. Raises what keeps it from beginning."""
        open_run(run.folder, Resolved.read(run.resolved))
        self.process.stdin.write(f"{run.folder}\n")
        self.process.stdin.flush()
        code = self.process.stdout.readline().strip()
        assert code == "0", run.said()[-3000:]


@contextlib.contextmanager
def forked_trainings() -> Iterator[ForkedTrainings]:
    environment = ENVIRONMENT | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"PYTHONPATH": f"{ROOT / 'tests'}:{SCRIPTS}"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen([sys.executable, __file__], env=environment, **pipes) as process:
        yield ForkedTrainings(process)
        process.stdin.close()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    from llava_sft.training import process  # imports Megatron

    for folder in map(str.strip, sys.stdin):
        child = os.fork()
        if not child:
            log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ[STORE] = f"{folder}.store"
            process.main(f"{folder}/{RUN_FILE}", folder)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)


if __name__ == "__main__":
    main()
