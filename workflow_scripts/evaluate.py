"""Answer the held-out split with the exported model, as a user of it would, and count exact matches.

Every assistant turn is generated (greedily) after the true turns before it; a sample counts as right when each of its
answers equals the true one, surrounding space aside.
"""

import argparse
import sys
import time
from functools import partial
from itertools import islice
from pathlib import Path

from llava_sft.checkpoint.start import MARKER
from llava_sft.data.heldout import data_uri, read_split
from llava_sft.data.records import Sample
from llava_sft.errors import RunError, exits_cleanly
from llava_sft.files import fingerprint, read_json, write_json

EXAMPLES = 12  # of right answers, and of wrong ones, kept with their pictures for the report


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
    model, data = read_json(args.model_dir / MARKER)["depends"], read_json(args.dataset)["fingerprint"]
    depends = fingerprint([model, data, [args.by, args.samples, args.batch_size, args.max_new_tokens]])
    kept = args.output.with_name(f".{args.output.name}.kept")  # Snakemake deletes the output itself before a rerun
    if read_json(kept, {}).get("depends") == depends:
        write_json(args.output, read_json(kept))
        print(f"{args.output}: the same model and data, nothing to evaluate")
        return

    result = evaluate(args) | {"depends": depends}
    write_json(kept, result)
    write_json(args.output, result)
    if result["samples"]:
        print(f"{args.output}: {result['correct']} of {result['samples']} right = {result['accuracy']:.1%}")
    for name, group in result["groups"].items():
        print(f"  {name:20} {group['correct']:5} of {group['samples']:5} = {group['correct'] / group['samples']:.1%}")


def evaluate(args: argparse.Namespace) -> dict:
    limit = None if args.samples == "all" else int(args.samples)
    samples = list(islice(read_split(args.webdatasets, "val"), limit))
    empty = {"split": "val", "samples": 0, "correct": 0, "accuracy": None, "by": args.by, "groups": {}, "examples": []}
    if not samples:
        print(f"{args.webdatasets} has no held-out split: nothing to evaluate", file=sys.stderr)
        return empty

    began = time.monotonic()
    answers = iter(answer(args, [sample.before(turn) for sample in samples for turn in sample.answers()]))
    groups: dict[str, dict[str, int]] = {}
    examples: dict[bool, list[dict]] = {True: [], False: []}
    for sample in samples:
        pairs = [(sample.messages[turn]["content"].strip(), next(answers).strip()) for turn in sample.answers()]
        right = all(truth == prediction for truth, prediction in pairs)
        group = groups.setdefault(str(sample.meta.get(args.by, "all")), {"samples": 0, "correct": 0})
        group["samples"] += 1
        group["correct"] += right
        if len(examples[right]) < EXAMPLES:
            examples[right].append(example(sample, pairs, right, args.by))
    correct = sum(group["correct"] for group in groups.values())
    return empty | {
        "samples": len(samples),
        "correct": correct,
        "accuracy": correct / len(samples),
        "groups": dict(sorted(groups.items())),
        "seconds": round(time.monotonic() - began, 1),
        "examples": examples[False] + examples[True],
    }


def answer(args: argparse.Namespace, questions: list[Sample]) -> list[str]:
    """Greedy answers, in order; batches hold questions of like length, so that little is padded."""
    import torch
    from tqdm import tqdm

    from llava_sft.checkpoint.parity import load_export
    from llava_sft.data.images import decode_rgb

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor, model = load_export(args.model_dir, "auto", device)
    render = partial(processor.apply_chat_template, add_generation_prompt=True, tokenize=False)
    texts = [render(question.messages) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].images), len(texts[i])))
    answers: dict[int, str] = {}
    for start in tqdm(range(0, len(order), args.batch_size), "evaluating", unit="batch", disable=None):
        rows = order[start : start + args.batch_size]
        images = [decode_rgb(data) for i in rows for data in questions[i].images]
        inputs = processor(
            text=[texts[i] for i in rows], images=images or None, padding=True, padding_side="left", return_tensors="pt"
        ).to(device)
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=args.max_new_tokens)
        generated = output[:, inputs["input_ids"].shape[1] :]
        answers.update(zip(rows, processor.batch_decode(generated, skip_special_tokens=True), strict=True))
    return [answers[i] for i in range(len(questions))]


def example(sample: Sample, pairs: list[tuple[str, str]], right: bool, by: str) -> dict:
    return {
        "id": sample.id,
        "group": str(sample.meta.get(by, "all")),
        "question": sample.questions,
        "answer": "\n".join(truth for truth, _ in pairs),
        "prediction": "\n".join(prediction for _, prediction in pairs),
        "correct": right,
        "images": [data_uri(data) for data in sample.images],
    }


if __name__ == "__main__":
    main()
