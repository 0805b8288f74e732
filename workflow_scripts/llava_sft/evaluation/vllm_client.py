"""Answers through vLLM, in a process of an interpreter that has it: this one, or one of another environment."""

import json
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from llava_sft.data.records import Sample
from llava_sft.errors import RunError
from llava_sft.evaluation.judge import Answer
from llava_sft.evaluation.questions import image_token_counts
from llava_sft.files import read_json
from llava_sft.machine import WITHOUT_VLLM, gpu_count

WORKER = Path(__file__).with_name("vllm_worker.py")
# What vLLM needs where there is no GPU; what the user sets counts.
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def generate_with_vllm(
    folder: Path, questions: list[Sample], python: Path, max_new_tokens: int
) -> Iterator[tuple[int, Answer]]:
    """Yield (number of the question, answer): as `generate`, equal in float32. Errors: RunError with vLLM's last words."""
    from transformers import AutoProcessor

    from llava_sft.evaluation.export import read_answer
    from llava_sft.model.export_files import tokenizer_token_ids
    from llava_sft.model.tokens import END_OF_TEXT, END_OF_TURN

    processor, token_ids = AutoProcessor.from_pretrained(folder, trust_remote_code=True), tokenizer_token_ids(folder)
    ends = [token_ids[END_OF_TURN], token_ids[END_OF_TEXT]]
    texts = [processor.apply_chat_template(q.messages, add_generation_prompt=True, tokenize=False) for q in questions]
    lengths = [
        len(ids) + count
        for ids, count in zip(
            processor.tokenizer(texts)["input_ids"], image_token_counts(folder, questions), strict=True
        )
    ]
    config = read_json(folder / "config.json")
    job = {
        "llm": {
            "model": str(folder.resolve()), "trust_remote_code": True, "model_impl": "transformers",
            "dtype": config["dtype"], "enforce_eager": True, "max_model_len": max(lengths) + max_new_tokens,
            "limit_mm_per_prompt": {"image": max([1, *(len(question.images) for question in questions)])},
            "skip_mm_profiling": not gpu_count(), "seed": 0,
        },
        "sampling": {"temperature": 0, "max_tokens": max_new_tokens, "stop_token_ids": ends, "detokenize": False},
    }  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment = ({} if gpu_count() else ON_CPU) | {"VLLM_LOGGING_LEVEL": "WARNING"} | environment
    reading, writing = os.pipe()
    alive, held = os.pipe()  # closed by the end of this process, however it ends
    with tempfile.TemporaryFile() as said, open(reading) as results, open(held, "wb"):
        worker = subprocess.Popen(
            [python, WORKER, str(writing), str(alive)], stdin=subprocess.PIPE, stdout=said, stderr=said,
            pass_fds=[writing, alive], env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(writing)
        os.close(alive)
        try:
            assert worker.stdin
            errors, done = list[Exception](), 0
            threading.Thread(target=_feed, args=(worker.stdin, job, texts, questions, errors), daemon=True).start()
            # Its engine holds the pipe of the results too: it would be waited for where the worker alone is killed.
            threading.Thread(target=_end_group_of, args=(worker,), daemon=True).start()
            for line in results:
                done += 1
                number, tokens = json.loads(line)
                yield number, read_answer(processor.tokenizer, tokens, ends)
            if errors:
                raise errors[0]
            if worker.wait() or done < len(questions):
                said.seek(0)
                last = "\n".join(f"    {text[:600]}" for text in last_words(said.read().decode(errors="replace")))
                raise RunError(f"vLLM ({python}) ended with exit code {worker.returncode}:\n{last}", WITHOUT_VLLM)
        finally:
            worker.kill()
            _end_group_of(worker)


def _end_group_of(worker: subprocess.Popen) -> None:
    """Wait for the worker, and end what it has started: vLLM's engine, which holds the GPU."""
    worker.wait()
    with suppress(ProcessLookupError):
        os.killpg(worker.pid, signal.SIGKILL)


def _feed(pipe: BinaryIO, job: dict, texts: list[str], questions: list[Sample], errors: list[Exception]) -> None:
    """Write the job and the questions, pictures decoded as the training sees them, as the worker reads them."""
    from llava_sft.data.images import decode_rgb

    try:
        with pipe:
            pipe.write(json.dumps(job).encode() + b"\n")
            for text, question in zip(texts, questions, strict=True):
                images = [decode_rgb(data) for data in question.images]
                pipe.write(json.dumps({"prompt": text, "sizes": [image.size for image in images]}).encode() + b"\n")
                for image in images:
                    pipe.write(image.tobytes())
    except BrokenPipeError:
        pass  # the worker has ended, and its exit code says so
    except Exception as error:  # a picture that cannot be read
        errors.append(error)


def last_words(said: str) -> list[str]:
    """The errors that vLLM names, the cause first; without one, what it said last."""
    causes = []
    for line in said.splitlines():
        # The lines of its engine begin with (EngineCore pid=…).
        text = line.split(") ", 1)[-1] if line.startswith("(") else line
        name = text.split(":")[0]
        if name.replace(".", "_").isidentifier() and name.endswith(("Error", "Exception")):
            causes.append(text)
    # The process that waits for the engine says that there is a cause above.
    named = [text for text in dict.fromkeys(causes) if "root cause" not in text]
    return named[:3] or said.splitlines()[-15:]
