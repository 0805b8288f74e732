"""Greedy answers of an exported model to questions: every assistant turn after the true turns before it.

Notable: answers are kept as they come, so that an interrupted evaluation goes on where it was, and another score, or another
run from the same start, asks nothing anew.
"""

import fcntl
import gc
import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from llava_sft.data.records import Sample
from llava_sft.errors import DamagedFileError, RunError, many, verb_of
from llava_sft.evaluation.judge import Answer
from llava_sft.evaluation.questions import image_token_counts
from llava_sft.evaluation.vllm_client import generate_with_vllm
from llava_sft.files import fingerprint, naming_full_disk, read_json, write_json
from llava_sft.progress import Progress

RULES = 3  # version of how answers are generated: another number asks anew


class Options(NamedTuple):
    """How answers are generated. `vllm`: the interpreter whose vLLM answers; None: transformers in this one."""

    batch_size: int = 64
    max_new_tokens: int = 32
    vllm: Path | None = None

    def depends(self) -> list[Any]:
        return [RULES, self.max_new_tokens, *(["vllm"] if self.vllm else ["transformers", self.batch_size])]


class Model(NamedTuple):
    """Who answers: as a message names it, what stands for its content, and its exported folder, there within the block."""

    name: str
    fingerprint: str
    export: Callable[[], AbstractContextManager[Path]]


def answers_of(model: Model, questions: list[Sample], data: str, options: Options, cache: Path) -> list[Answer]:
    """One answer a question, in order. `data`: a fingerprint of the questions; `cache`: the file that keeps the answers."""
    depends = fingerprint([model.fingerprint, data, options.depends()])
    if cache.is_dir():
        raise RunError(f"{cache}: a folder, where the answers are to be kept", "remove it, or name another --output")
    if (known := _known(model, cache, depends, len(questions))) is not None:
        return known
    cache.parent.mkdir(parents=True, exist_ok=True)
    with _alone(cache):
        if (known := _known(model, cache, depends, len(questions))) is not None:  # another one may have asked meanwhile
            return known
        partial = cache.with_name(f"{cache.name}.partial")
        found = _read_partial(partial, depends)
        if len(found) < len(questions):
            before = f", of which {len(found):,} {verb_of(len(found), 'were')} answered before" if found else ""
            print(f"{model.name}: {many(len(questions), 'question')}{before}", flush=True)
            with (
                naming_full_disk(partial),
                model.export() as folder,
                open(partial, "a" if found else "w", buffering=1, encoding="utf-8") as file,
            ):
                file.write("\n" if found else json.dumps(depends) + "\n")  # the last line may be half-written
                _answer_the_rest(folder, questions, found, options, file)
        answers = [found[number] for number in range(len(questions))]
        write_json(cache, {"depends": depends, "answers": answers}, indent=None, sealed=True)
        partial.unlink(missing_ok=True)
    return answers


def _known(model: Model, cache: Path, depends: str, count: int) -> list[Answer] | None:
    """The answers in `cache`, where they are all there, and of this model and these questions."""
    try:
        known = read_json(cache, {"depends": None})
        if known["depends"] == depends and len(known["answers"]) == count:
            print(f"{model.name}: the same model and questions, answered before ({cache})", flush=True)
            return [Answer(*answer) for answer in known["answers"]]
    except (DamagedFileError, KeyError, TypeError) as error:
        print(f"{getattr(error, 'problem', cache)}: answering again", flush=True)
    return None


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Let one evaluation at a time fill `cache`: of several runs from one start, the others wait and read it."""
    path = cache.with_name(f"{cache.name}.lock")
    while True:
        with open(path, "w") as lock:
            with suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    print(f"another evaluation asks these questions ({cache}): waiting for its answers", flush=True)
                    fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_still(path, lock):  # the one before has removed it
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_still(path: Path, file: TextIO) -> bool:
    """Whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _answer_the_rest(
    folder: Path, questions: list[Sample], found: dict[int, Answer], options: Options, file: TextIO
) -> None:
    """Add to `found`, and to the file, the answers that are not there, and say now and then how many are."""
    left = [number for number in range(len(questions)) if number not in found]
    asked = [questions[number] for number in left]
    generated = (
        generate_with_vllm(folder, asked, options.vllm, options.max_new_tokens)
        if options.vllm
        else generate(folder, asked, options.batch_size, options.max_new_tokens)
    )
    progress: Progress | None = None
    for number, answer in generated:
        found[left[number]] = answer
        row = json.dumps([left[number], *answer])
        file.write(f"{zlib.crc32(row.encode()):08x} {row}\n")
        progress = progress or Progress(
            len(questions), "questions", done=len(found) - 1
        )  # not the time to load the model
        progress.add()


def _read_partial(path: Path, depends: str) -> dict[int, Answer]:
    """The answers of an evaluation that was interrupted, by the number of the question; a damaged line is left out."""
    found: dict[int, Answer] = {}
    if path.is_file():
        first, *lines = path.read_text("utf-8", "replace").splitlines() or [""]
        for line in lines if first == json.dumps(depends) else ():
            check, _, row = line.partition(" ")
            if check == f"{zlib.crc32(row.encode()):08x}":
                number, text, cut = json.loads(row)
                found[number] = Answer(text, cut)
    return found


def generate(
    folder: Path, questions: list[Sample], batch_size: int, max_new_tokens: int
) -> Iterator[tuple[int, Answer]]:
    """Yield (number of the question, answer). Batches hold questions of similar length, so that little is padded; the longest
    come first, and need the most memory. The next batch's pictures are prepared meanwhile.

    A batch that does not fit into the GPU's memory is halved. Errors: CheckpointError where transformers cannot load `folder`.
    """
    import torch

    from llava_sft.data.images import decode_rgb
    from llava_sft.evaluation.export import Export

    gc.collect()  # the model that answered before, if any
    torch.cuda.empty_cache()
    export = Export(folder, max_new_tokens)
    texts = [export.render(question.messages) for question in questions]
    tokens = image_token_counts(folder, questions)
    order = sorted(range(len(questions)), key=lambda i: (-tokens[i] - len(texts[i]) // 4, i))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def encode(batch: list[int]) -> Any:
        return export.encode(
            [texts[i] for i in batch], [decode_rgb(data) for i in batch for data in questions[i].images]
        )

    def answer(batch: list[int], inputs: Any) -> list[Answer]:
        with suppress(torch.OutOfMemoryError):
            return export.answer(inputs)
        torch.cuda.empty_cache()
        if len(batch) == 1:
            raise RunError(
                f"a question does not fit into this GPU's memory ({tokens[batch[0]]:,} image tokens, "
                f"{many(len(texts[batch[0]]), 'character')})",
                "fewer or smaller pictures (max_pixels), or a larger GPU",
            )
        halves = batch[: len(batch) // 2], batch[len(batch) // 2 :]
        return [each for half in halves for each in answer(half, encode(half))]

    with ThreadPoolExecutor(1) as pool:
        ready = pool.submit(encode, batches[0])
        for number, batch in enumerate(batches, 1):
            inputs = ready.result()
            if number < len(batches):
                ready = pool.submit(encode, batches[number])
            yield from zip(batch, answer(batch, inputs), strict=True)
