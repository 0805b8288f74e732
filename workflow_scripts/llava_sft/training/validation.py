"""The held-out split during training: the same batches at every validation, and a few samples answered in words.

Nothing here touches the training's data position or random state: a run with validation is bit for bit the run without.
"""

import contextlib
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from megatron.energon import SkipSample

from llava_sft.data.images import decode_rgb
from llava_sft.data.loader import VlmBatch, VlmTaskEncoder
from llava_sft.data.records import Sample
from llava_sft.data.stored import read_split
from llava_sft.errors import SHOWN, DataError, RunError, many
from llava_sft.files import write_json
from llava_sft.megatron.distributed import unwrapped
from llava_sft.model.tokens import ANSWER_OPENING
from llava_sft.report.pictures import data_uri
from llava_sft.run.layout import BEST, VALIDATION, checkpoint_dir
from llava_sft.run.records import append, read_jsonl

MOST_NEW_TOKENS = 32


class HeldOut:
    """Endless micro-batches of this data-parallel rank's share of the first held-out samples, kept in memory."""

    def __init__(
        self, path: str, encoder: VlmTaskEncoder, rank: int, replicas: int, micro_batch_size: int, batches: int
    ):
        self.path, self.encoder, self.rank, self.replicas = path, encoder, rank, replicas
        self.micro_batch_size, self.count, self.place = micro_batch_size, batches, 0
        self.batches: list[VlmBatch] = []
        self.stored: list[Sample] = []

    def __iter__(self):
        return self

    def __next__(self) -> VlmBatch:
        self.load()
        self.place += 1
        return self.batches[(self.place - 1) % self.count]

    def rewind(self) -> None:
        self.place = 0

    def load(self) -> None:
        if self.batches:
            return
        size = self.count * self.micro_batch_size
        self.stored = list(islice(read_split(self.path, "val"), size * self.replicas))
        encoded = []
        for i in range(10 * size if self.stored else 0):
            with contextlib.suppress(SkipSample):
                encoded.append(self.encode(self.stored[(self.rank + i * self.replicas) % len(self.stored)]))
            if len(encoded) == size:
                break
        else:
            raise RunError(
                f"{self.path}: of {many(len(self.stored), 'held-out sample')} too few fit into seq_length {self.encoder.seq_length}",
                "a larger seq_length, other held-out data, or eval_iters: 0",
            )
        starts = range(0, size, self.micro_batch_size)
        self.batches = [self.encoder.batch(encoded[start : start + self.micro_batch_size]) for start in starts]

    def encode(self, sample: Sample):
        try:
            return self.encoder.encode(sample.id or "", sample)
        except SkipSample:
            raise
        except Exception as error:  # Pillow raises errors of many kinds
            raise DataError(
                f"{self.path}: held-out sample {sample.id}: an image cannot be read: {str(error)[:SHOWN]}",
                "mend that image and convert again, with decode_images: true, which finds such images; or eval_iters: 0",
            ) from None

    def examples(self, count: int) -> list[Sample]:
        """`count` samples spread over those that are validated, always the same."""
        self.load()
        return self.stored[:: max(1, len(self.stored) // max(1, count))][:count]


@contextlib.contextmanager
def evaluating(model) -> Iterator[None]:
    """Without dropout, and without FP8. Samples that stand alone have any number of tokens: FP8 would refuse most, and layers
    of Transformer Engine would keep the weights of the first validation as their copies. In bf16 they are what the export has.
    """
    config = unwrapped(model).config
    kept, config.fp8 = config.fp8, None
    model.eval()
    try:
        yield
    finally:
        config.fp8 = kept
        model.train()


def answers(model, held_out: HeldOut, count: int, limit: int, device: torch.device) -> list[dict]:
    """Answers to the first questions of `count` held-out samples, those left out whose question is too long."""
    found = []
    for sample in held_out.examples(count):
        with contextlib.suppress(SkipSample):
            found.append(answer(model, held_out, sample, limit, device))
    return found


@torch.no_grad()
def answer(model, held_out: HeldOut, sample: Sample, limit: int, device: torch.device) -> dict:
    """The model's greedy answer to the first question of a sample: no cache, one forward per token.

    Raises SkipSample when the question alone is longer than seq_length.
    """
    template = held_out.encoder.template
    turn = sample.answers()[0]
    question = sample.before(turn)
    batch = held_out.encoder.batch([held_out.encode(question)])
    opening = torch.tensor([template.tokenizer.encode(ANSWER_OPENING, add_special_tokens=False).ids])
    ids = torch.cat((batch.input_ids, opening), dim=1).to(device)
    pixels, index = batch.pixels.to(device), batch.image_index.to(device)
    grids = [tuple(grid) for grid in batch.grids.tolist()]
    made: list[int] = []
    while len(made) < min(limit, MOST_NEW_TOKENS):
        # Each tensor-parallel rank has the logits of its share of the vocabulary.
        token = int(gather_from_tensor_model_parallel_region(model(ids, pixels, grids, index)[0, -1:])[0].argmax())
        if token == template.end_token_id:
            break
        made.append(token)
        ids = torch.cat((ids, ids.new_tensor([[token]])), dim=1)
    return {
        "id": sample.id,
        "question": question.questions,
        "answer": sample.messages[turn]["content"],
        "prediction": template.tokenizer.decode(made),
    }


def record(
    run_dir: Path, iteration: int, loss: float, answers: list[dict], examples: list[Sample], tensorboard
) -> None:
    """Note a validation: validation.jsonl, best.json, and TensorBoard."""
    earlier = read_jsonl(run_dir / VALIDATION)
    best = math.isfinite(loss) and all(not loss >= one["lm loss validation"] for one in earlier)
    noted = {"iteration": iteration, "lm loss validation": loss, "best": best, "answers": answers}
    if not earlier:  # once, for the report
        noted["images"] = {sample.id: [data_uri(image) for image in sample.images] for sample in examples}
    append(run_dir / VALIDATION, noted)
    finite = [one for one in read_jsonl(run_dir / VALIDATION) if math.isfinite(one["lm loss validation"])]
    lowest: dict[str, Any] = min(
        finite, key=lambda one: one["lm loss validation"], default={"iteration": iteration, "lm loss validation": loss}
    )
    checkpoint = str(checkpoint_dir(run_dir, lowest["iteration"]))  # saved right after, when the intervals are the same
    write_json(
        run_dir / BEST,
        {key: lowest[key] for key in ("iteration", "lm loss validation")} | {"checkpoint": checkpoint},
        sealed=True,
    )
    if tensorboard:
        tensorboard.add_scalar("lm loss validation", loss, iteration)
    for given in answers if tensorboard else ():
        text = f"{given['question']}\n\n**{given['prediction']}** (expected: {given['answer']})"
        tensorboard.add_text(f"answers/{given['id']}", text, iteration)
    for sample in examples if tensorboard and not earlier else ():
        for number, data in enumerate(sample.images):
            tensorboard.add_image(
                f"answers/{sample.id}/{number}", np.asarray(decode_rgb(data)), iteration, dataformats="HWC"
            )
