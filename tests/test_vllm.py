"""What vLLM is given, and what is made of its tokens: a stand-in for it, in an interpreter of its own."""

import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from helpers.questions import asked_of, write_test_set
from llava_sft.data.images import decode_rgb
from llava_sft.data.records import Sample
from llava_sft.errors import RunError
from llava_sft.evaluation.export import Export
from llava_sft.evaluation.judge import Answer
from llava_sft.evaluation.vllm_client import generate_with_vllm, last_words

VLLM = """
import hashlib, json, os, subprocess, time, types
from pathlib import Path
class SamplingParams(types.SimpleNamespace):
    def __init__(self, **given):
        super().__init__(**given)
class LLM:
    def __init__(self, **given):
        if "STARTED" in os.environ:
            engine = subprocess.Popen(["sleep", "300"], close_fds=False)  # forked, it has all pipes
            Path(os.environ["STARTED"]).write_text(f"{engine.pid}\\n")
            time.sleep(300)
        if os.environ.get("NO_MEMORY"):
            raise MemoryError("no room for 3 blocks")
        self.given = given
    def generate(self, prompts, sampling, use_tqdm):
        for n, prompt in enumerate(prompts):
            images = prompt.get("multi_modal_data", {"image": []})["image"]
            digest = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()
            row = [prompt["prompt"], [image.size for image in images], digest, self.given, vars(sampling)]
            with open(os.environ["SEEN"], "a") as file:
                file.write(json.dumps(row) + "\\n")
            tokens = [len(images) + 5] * sampling.max_tokens if n % 2 else [len(images) + 5, sampling.stop_token_ids[0]]
            yield types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tokens)])
"""


def stand_in(folder: Path) -> Path:
    """An interpreter whose vLLM is the stand-in."""
    python = folder / "python"
    (folder / "vllm.py").write_text(VLLM)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_vllm_gets_the_rendered_questions_with_their_pictures_and_answers_in_order(
    small_checkpoint, tmp_path, monkeypatch
):
    """A stand-in for vLLM in another environment: what it was given, and what is made of its tokens."""
    python = stand_in(tmp_path)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("PYTHONPATH", "/nothing/of/ours")
    asked, loaded = asked_of(write_test_set(tmp_path)), Export(small_checkpoint, 2)
    found = dict(generate_with_vllm(small_checkpoint, asked, python, 2))
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert [row[0] for row in seen] == [loaded.render(question.messages) for question in asked]
    images = [[decode_rgb(image) for image in question.images] for question in asked]
    assert [row[1] for row in seen] == [[list(image.size) for image in each] for each in images]
    digests = [hashlib.sha256(b"".join(image.tobytes() for image in each)).hexdigest() for each in images]
    assert [row[2] for row in seen] == digests
    given, sampling = seen[0][3:]
    longest = max(len(loaded.encode([row[0]], each)["input_ids"][0]) for row, each in zip(seen, images, strict=True))
    assert given["max_model_len"] == longest + 2 and given["dtype"] == "float32"
    assert given["limit_mm_per_prompt"] == {"image": 2} and sampling["temperature"] == 0
    tokens = [loaded.processor.tokenizer.decode([len(each) + 5]) for each in images]
    assert found == {n: Answer(token * (1 + n % 2), bool(n % 2)) for n, token in enumerate(tokens)}
    monkeypatch.setenv("NO_MEMORY", "1")
    with pytest.raises(
        RunError, match=r"(?s)ended with exit code 1:.*no room for 3 blocks.*evaluate_with: transformers"
    ):
        dict(generate_with_vllm(small_checkpoint, asked, python, 2))


def test_the_cause_of_an_engine_that_did_not_start_is_named_and_no_traceback_is():
    engine = "(EngineCore pid=7) "
    short = "ValueError: Free memory on device cuda:0 (4.1/79.2 GiB) on startup is less than desired"
    told = [f"{engine}ERROR 11-28 07:31:47 [core.py:1330] {short}", f"{engine}Traceback (most recent call last):"]
    waiting = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
    called = ["Traceback (most recent call last):", *['  File "vllm/v1/engine/utils.py", line 7, in wait'] * 20]
    assert last_words("\n".join([*told, f"{engine}{short}", *called, waiting])) == [short]
    memory = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    dead = "vllm.v1.engine.exceptions.EngineDeadError: EngineCore met an issue. See stack trace (above) for the root cause."
    assert last_words(f"{engine}{memory}\n{dead}") == [memory]
    assert last_words("loading\nKilled") == ["loading", "Killed"]


def gone(engine: psutil.Process) -> None:
    deadline = time.monotonic() + 200
    while engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine still runs"
        time.sleep(0.05)


def test_a_terminated_evaluation_leaves_no_engine_behind(small_checkpoint, tmp_path):
    python, started = stand_in(tmp_path), tmp_path / "started"
    ask = f"""
from pathlib import Path
from llava_sft.data.records import Sample
from llava_sft.evaluation.vllm_client import generate_with_vllm
asked = [Sample("1", [{{"role": "user", "content": "How many?"}}], [], {{}})]
dict(generate_with_vllm(Path({str(small_checkpoint)!r}), asked, Path({str(python)!r}), 2))
"""
    environment = os.environ | {"STARTED": str(started), "PYTHONPATH": os.pathsep.join(sys.path)}
    evaluation = subprocess.Popen([sys.executable, "-c", ask], env=environment)
    try:
        deadline = time.monotonic() + 200
        while not (started.is_file() and started.read_text().endswith("\n")):
            assert evaluation.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        engine = psutil.Process(int(started.read_text()))
        evaluation.terminate()
        evaluation.wait(60)
        gone(engine)
    finally:
        evaluation.kill()


def test_a_worker_that_is_killed_alone_is_no_endless_wait_for_its_engine(small_checkpoint, tmp_path, monkeypatch):
    """As the kernel does where memory is short: the engine, which holds the pipe of the answers, lives on."""
    python, started = stand_in(tmp_path), tmp_path / "started"
    monkeypatch.setenv("STARTED", str(started))
    asked = [Sample("1", [{"role": "user", "content": "How many?"}], [], {})]

    def kill_it() -> psutil.Process:
        while not (started.is_file() and started.read_text().endswith("\n")):
            time.sleep(0.05)
        engine = psutil.Process(int(started.read_text()))
        engine.parent().kill()
        return engine

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_it)
        with pytest.raises(RunError, match="ended with exit code -9"):
            dict(generate_with_vllm(small_checkpoint, asked, python, 2))
        gone(killing.result())
