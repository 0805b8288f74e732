"""Greedy answers of an exported model to held-out questions, and which of them are right.

Every assistant turn is generated after the true turns before it. A sample is correct when each of its answers equals the
true one, white space at both ends aside.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llava_sft.data.records import Sample
from llava_sft.errors import CheckpointError
from llava_sft.report.pictures import data_uri

WRONG_SHOWN, RIGHT_SHOWN = 24, 12  # samples whose answers the report shows, with their pictures


class Answer(NamedTuple):
    text: str
    cut: bool  # after max_new_tokens, before any end token


def generate(model_dir: Path, questions: list[Sample], batch_size: int, max_new_tokens: int) -> list[Answer]:
    """One answer a question, in order; batches hold questions of similar length, so that little is padded.

    Errors: CheckpointError where transformers cannot load `model_dir`.
    """
    import torch
    from tqdm import tqdm

    from llava_sft.data.images import decode_rgb
    from llava_sft.evaluation.export import answer_greedily, load_export
    from llava_sft.model.export_files import tokenizer_token_ids
    from llava_sft.model.tokens import END_OF_TEXT

    device = "cuda" if torch.cuda.is_available() else "cpu"
    token_ids = tokenizer_token_ids(model_dir)
    try:
        processor, model = load_export(model_dir, "auto", device)
    except Exception as error:  # of many libraries
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        raise CheckpointError(
            f"{model_dir}: transformers cannot load this export: {str(error)[:300]}",
            "delete the folder and run the same command: it is exported again",
        ) from error
    ends = answer_greedily(model, token_ids, max_new_tokens)
    processor.tokenizer.pad_token = END_OF_TEXT  # whatever tokenizer_config.json says
    render = partial(processor.apply_chat_template, add_generation_prompt=True, tokenize=False)
    texts = [render(question.messages) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].images), len(texts[i])))
    answers: dict[int, Answer] = {}
    for start in tqdm(range(0, len(order), batch_size), "evaluating", unit="batch", disable=None):
        batch = order[start : start + batch_size]
        images = [decode_rgb(data) for i in batch for data in questions[i].images]
        inputs = processor(
            text=[texts[i] for i in batch],
            images=images or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(device)
        with torch.inference_mode():
            output = model.generate(**inputs)
        for i, tokens in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            answers[i] = read_answer(processor.tokenizer, tokens, ends)
    return [answers[i] for i in range(len(questions))]


def read_answer(tokenizer: Any, tokens: list[int], stop: list[int]) -> Answer:
    """The text before the first end token; grounding tokens are special to the tokenizer and content to us."""
    end = next((position for position, token in enumerate(tokens) if token in stop), None)
    text = tokenizer.decode(tokens[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Answer(text.strip(), end is None)


def judge(samples: list[Sample], answers: list[Answer], by: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each sample; and the first wrong and right ones again, with turns joined and pictures embedded.

    Args:
        answers: one for each assistant turn of the samples, in their order.
        by: the record's key that names a sample's group.
    """
    rows: list[dict[str, Any]] = []
    examples: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    remaining = iter(answers)
    for sample in samples:
        turns = []
        for turn in sample.answers():
            answer = next(remaining)
            truth = sample.messages[turn]["content"].strip()
            turns.append({"answer": truth, "prediction": answer.text, "cut": answer.cut})
        correct = all(turn["prediction"] == turn["answer"] for turn in turns)
        row = {
            "id": sample.id,
            "group": str(sample.meta.get(by, "all")),
            "question": sample.questions,
            "correct": correct,
        }
        rows.append(row | {"turns": turns})
        if len(examples[correct]) < (RIGHT_SHOWN if correct else WRONG_SHOWN):
            joined = {key: "\n".join(str(turn[key]) for turn in turns) for key in ("answer", "prediction")}
            pictures = [data_uri(data) for data in sample.images]
            examples[correct].append(row | joined | {"cut": any(turn["cut"] for turn in turns), "images": pictures})
    return rows, examples[False] + examples[True]


def group_counts(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Samples and correct ones of each group, by name."""
    groups: dict[str, dict[str, int]] = {}
    for row in rows:
        group = groups.setdefault(row["group"], {"samples": 0, "correct": 0})
        group["samples"] += 1
        group["correct"] += row["correct"]
    return dict(sorted(groups.items()))
