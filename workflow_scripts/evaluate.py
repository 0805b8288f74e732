"""Answer the held-out split with the exported model, as a user of it would, and count exact matches.

Every assistant turn is generated (greedily) after the true turns before it; a sample counts as right when each of its
answers equals the true one, white space at both ends aside. All answers stand in predictions.jsonl beside the result.
"""

import argparse
import json
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from llava_sft.checkpoint.start import MARKER
from llava_sft.checkpoint.verify import require_whole as require_whole_export
from llava_sft.data.index import leak_note
from llava_sft.data.records import Sample
from llava_sft.data.stored import read_split
from llava_sft.data.verify import require_whole as require_whole_data
from llava_sft.errors import CheckpointError, DamagedFileError, RunError, SettingsError, exits_cleanly
from llava_sft.files import file_fingerprint, fingerprint, read_json, write_json, write_text
from llava_sft.report.pictures import data_uri

WRONG_KEPT, RIGHT_KEPT = 24, 12  # answers kept with their pictures, which the report shows
PREDICTIONS = "predictions.jsonl"
RULES = 2  # of how answers are generated and judged: another number answers anew


class Answer(NamedTuple):
    text: str
    cut: bool  # after max_new_tokens, with no end token among them


@exits_cleanly
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_dir", type=Path, help="exported Hugging Face folder")
    parser.add_argument("webdatasets", type=Path, help="WebDataset folder with .nv-meta")
    parser.add_argument("--dataset", type=Path, required=True, help="dataset.json of that folder")
    parser.add_argument("--output", type=Path, required=True, help="evaluation.json")
    parser.add_argument("--by", default="kind", help="the record's key that accuracy is reported by")
    parser.add_argument("--samples", default="all", help="all, or the number of samples")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()

    for path in (args.model_dir / MARKER, args.dataset):
        if not path.is_file():
            raise RunError(
                f"{path}: no such file", "an export of convert_checkpoint.py, and the file of index_webdataset.py"
            )
    if args.samples != "all" and not (args.samples.isdecimal() and int(args.samples)):
        raise SettingsError(f"--samples {args.samples}: neither `all` nor a number of samples", "evaluate_samples: all")
    require_whole_export(args.model_dir)
    require_whole_data(args.webdatasets, args.dataset)
    model, data = fact(args.model_dir / MARKER, "depends"), fact(args.dataset, "fingerprint")
    options = [args.by, args.samples, args.batch_size, args.max_new_tokens]
    depends = fingerprint([model, data, options, RULES])
    kept = args.output.with_name(f".{args.output.name}.kept")  # Snakemake deletes the output itself before a rerun
    if earlier := kept_result(kept, depends):
        write_json(args.output, earlier, sealed=True)
        print(f"{args.output}: the same model and data, nothing to evaluate")
        return

    result, rows = evaluate(args)
    predictions = args.output.with_name(PREDICTIONS)
    write_text(predictions, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    result |= {"depends": depends, "predictions": file_fingerprint(predictions)}
    write_json(kept, result, sealed=True)
    write_json(args.output, result, sealed=True)
    tell(args, result)


def fact(path: Path, key: str) -> str:
    """A value that a file of ours must have."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get(key), str):
        raise DamagedFileError(f"{path}: has no {key}", "delete it and run the same command: it is made again")
    return content[key]


def kept_result(kept: Path, depends: str) -> dict[str, Any] | None:
    """The result of the last evaluation, where it was of the same and its files are whole."""
    try:
        earlier = read_json(kept, None)
    except DamagedFileError as error:
        print(f"{error.problem}: evaluating again", file=sys.stderr)
        return None
    predictions = kept.with_name(PREDICTIONS)
    if not isinstance(earlier, dict) or earlier.get("depends") != depends:
        return None
    if not predictions.is_file() or file_fingerprint(predictions) != earlier.get("predictions"):
        print(f"{predictions}: missing, or not what was written: evaluating again", file=sys.stderr)
        return None
    return earlier


def tell(args: argparse.Namespace, result: dict[str, Any]) -> None:
    if not result["samples"]:
        print(f"{args.webdatasets} has no held-out split: there is no accuracy", file=sys.stderr)
        return
    print(f"{args.output}: {result['correct']} of {result['samples']} right = {result['accuracy']:.1%}")
    for name, group in result["groups"].items():
        print(f"  {name:20} {group['correct']:5} of {group['samples']:5} = {group['correct'] / group['samples']:.1%}")
    if result["cut"]:
        print(
            f"  {result['cut']:,} of {result['answers']:,} answers were cut after {args.max_new_tokens} tokens "
            "(max_new_tokens), which makes most of them wrong"
        )
    if leak := leak_note(read_json(args.dataset)):
        print(f"  {leak}")


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The content of evaluation.json, and the rows of predictions.jsonl."""
    limit = None if args.samples == "all" else int(args.samples)
    samples = list(islice(read_split(args.webdatasets, "val"), limit))
    began = time.monotonic()
    questions = [sample.before(turn) for sample in samples for turn in sample.answers()]
    answers = answer(args, questions) if questions else []
    rows, examples = judge(samples, answers, args.by)
    groups: dict[str, dict[str, int]] = {}
    for row in rows:
        group = groups.setdefault(row["group"], {"samples": 0, "correct": 0})
        group["samples"] += 1
        group["correct"] += row["correct"]
    correct = sum(row["correct"] for row in rows)
    result = {
        "split": "val",
        "by": args.by,
        "samples": len(rows),
        "correct": correct,
        "accuracy": correct / len(rows) if rows else None,
        "groups": dict(sorted(groups.items())),
        "answers": len(answers),
        "cut": sum(each.cut for each in answers),
        "max_new_tokens": args.max_new_tokens,
        "seconds": round(time.monotonic() - began, 1),
        "examples": examples,
    }
    return result, rows


def judge(samples: list[Sample], answers: list[Answer], by: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A row for each sample; and of the first wrong and right ones the same with texts joined and pictures embedded.

    `answers`: one for each assistant turn of the samples, in their order.
    """
    rows, examples = [], {True: [], False: []}
    given = iter(answers)
    for sample in samples:
        turns = [
            {
                "answer": sample.messages[turn]["content"].strip(),
                "prediction": (mine := next(given)).text,
                "cut": mine.cut,
            }
            for turn in sample.answers()
        ]
        right = all(turn["prediction"] == turn["answer"] for turn in turns)
        row = {
            "id": sample.id,
            "group": str(sample.meta.get(by, "all")),
            "question": sample.questions,
            "correct": right,
        }
        rows.append(row | {"turns": turns})
        if len(examples[right]) < (RIGHT_KEPT if right else WRONG_KEPT):
            joined = {key: "\n".join(turn[key] for turn in turns) for key in ("answer", "prediction")}
            pictures = [data_uri(data) for data in sample.images]
            examples[right].append(row | joined | {"cut": any(turn["cut"] for turn in turns), "images": pictures})
    return rows, examples[False] + examples[True]


def answer(args: argparse.Namespace, questions: list[Sample]) -> list[Answer]:
    """Greedy answers, in order; batches hold questions of like length, so that little is padded."""
    import torch
    from tqdm import tqdm
    from transformers import GenerationConfig

    from llava_sft.checkpoint.parity import load_export
    from llava_sft.data.images import decode_rgb
    from llava_sft.model.export_files import END_OF_TEXT, END_OF_TURN, tokenizer_token_ids

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = tokenizer_token_ids(args.model_dir)
    stop, pad = [ids[END_OF_TURN], ids[END_OF_TEXT]], ids[END_OF_TEXT]
    try:
        processor, model = load_export(args.model_dir, "auto", device)
    except Exception as error:  # of many libraries
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        raise CheckpointError(
            f"{args.model_dir}: transformers cannot load this export: {str(error)[:300]}",
            "delete the folder and run the same command: it is exported again",
        ) from error
    # Whatever generation_config.json and the tokenizer's own settings say: an answer ends, and it is the greedy one.
    model.generation_config = GenerationConfig(
        eos_token_id=stop, pad_token_id=pad, do_sample=False, max_new_tokens=args.max_new_tokens
    )
    processor.tokenizer.pad_token = END_OF_TEXT
    render = partial(processor.apply_chat_template, add_generation_prompt=True, tokenize=False)
    texts = [render(question.messages) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].images), len(texts[i])))
    answers: dict[int, Answer] = {}
    for start in tqdm(range(0, len(order), args.batch_size), "evaluating", unit="batch", disable=None):
        rows = order[start : start + args.batch_size]
        images = [decode_rgb(data) for i in rows for data in questions[i].images]
        inputs = processor(
            text=[texts[i] for i in rows], images=images or None, padding=True, padding_side="left", return_tensors="pt"
        ).to(device)
        with torch.inference_mode():
            output = model.generate(**inputs)
        generated = output[:, inputs["input_ids"].shape[1] :].tolist()
        answers.update(
            (i, read_answer(processor.tokenizer, tokens, stop)) for i, tokens in zip(rows, generated, strict=True)
        )
    return [answers[i] for i in range(len(questions))]


def read_answer(tokenizer: Any, tokens: list[int], stop: list[int]) -> Answer:
    """The text before the first end token; grounding tokens are special to the tokenizer and content to us."""
    end = next((place for place, token in enumerate(tokens) if token in stop), None)
    text = tokenizer.decode(tokens[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Answer(text.strip(), end is None)


if __name__ == "__main__":
    main()
