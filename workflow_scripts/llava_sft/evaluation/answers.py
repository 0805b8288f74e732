"""Greedy answers of an exported model to held-out questions: every assistant turn after the true turns before it."""

from pathlib import Path

from llava_sft.data.records import Sample
from llava_sft.evaluation.judge import Answer


def generate(model_dir: Path, questions: list[Sample], batch_size: int, max_new_tokens: int) -> list[Answer]:
    """One answer a question, in order; batches hold questions of similar length, so that little is padded.

    Errors: CheckpointError where transformers cannot load `model_dir`.
    """
    from tqdm import tqdm

    from llava_sft.data.images import decode_rgb
    from llava_sft.evaluation.export import Export

    export = Export(model_dir, max_new_tokens)
    texts = [export.render(question.messages) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].images), len(texts[i])))
    answers: dict[int, Answer] = {}
    for start in tqdm(range(0, len(order), batch_size), "evaluating", unit="batch", disable=None):
        batch = order[start : start + batch_size]
        images = [decode_rgb(data) for i in batch for data in questions[i].images]
        answers |= zip(batch, export.answer([texts[i] for i in batch], images), strict=True)
    return [answers[i] for i in range(len(questions))]
