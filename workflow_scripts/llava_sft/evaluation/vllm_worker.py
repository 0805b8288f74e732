"""Answer questions with vLLM, in an interpreter that has it and nothing of this project.

Standard input: a line of JSON with the arguments of LLM and SamplingParams; then for each question a line {prompt, sizes} and
the RGB bytes of its pictures. Each answer is a line [number of the question, [token, …]] to the first file descriptor that is
given; the second one is open as long as the process that asks lives.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from typing import BinaryIO

AT_ONCE = 256  # questions that vLLM gets at a time, and that are in memory


def questions(source: BinaryIO) -> Iterator[dict]:
    """vLLM's prompts."""
    from PIL import Image

    for line in source:
        asked = json.loads(line)
        images = [Image.frombytes("RGB", (w, h), source.read(3 * w * h)) for w, h in asked["sizes"]]
        yield {"prompt": asked["prompt"]} | ({"multi_modal_data": {"image": images}} if images else {})


def end_with(alive: int) -> None:
    """End with the process that asks, vLLM's engine too: killed, it cannot say so, and the GPU's memory would stay taken."""
    os.read(alive, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    threading.Thread(target=end_with, args=(int(sys.argv[2]),), daemon=True).start()
    sys.path.pop(0)  # this folder, whose modules are none of vLLM's business
    job = json.loads(sys.stdin.buffer.readline())
    from vllm import LLM, SamplingParams

    llm, sampling = LLM(**job["llm"]), SamplingParams(**job["sampling"])
    asked, number = questions(sys.stdin.buffer), 0
    with os.fdopen(int(sys.argv[1]), "w") as results:
        while batch := list(islice(asked, AT_ONCE)):
            for output in llm.generate(batch, sampling, use_tqdm=False):
                results.write(json.dumps([number, list(output.outputs[0].token_ids)]) + "\n")
                number += 1
            results.flush()


if __name__ == "__main__":
    main()
