"""`python -m llava_sft.training RESOLVED RUN_DIR`: one training process, started by the launcher.

A file of its own, with little but the call: Megatron's first save starts a helper process, which would import a
`__main__` module once more, with all that it imports (a quarter of a minute).
"""

import contextlib
import io
import os
import sys

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
# Packs differ in their number of patches: fixed segments would fragment.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

from llava_sft.machine import end_with_parent
from llava_sft.training.launcher import hold_back

end_with_parent()  # before the long imports
os.register_at_fork(after_in_child=end_with_parent)  # helpers and loader workers, which would keep the lock
os.register_at_fork(after_in_child=hold_back)


class Log(io.FileIO):
    """The run's log, which may lie on a full disk: what it does not take does not end a training."""

    def write(self, data) -> int:
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


sys.stdout, sys.stderr = (
    io.TextIOWrapper(io.BufferedWriter(Log(number, "w", closefd=False)), "utf-8", "replace", line_buffering=True)
    for number in (1, 2)
)

from llava_sft.training.process import main  # noqa: E402

main(*sys.argv[1:3])
