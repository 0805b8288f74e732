"""`python -m llava_sft.training RESOLVED RUN_DIR START_DIR`: one training process, started by the launcher.

A file of its own, and empty but for the call: Megatron's first save starts a helper process, which would import a
`__main__` module once more, with all that it imports (a quarter of a minute).
"""

import os
import sys

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

from llava_sft.training.loop import main

main(*sys.argv[1:4])
