"""lmms-eval with a local task: its own model `llava_onevision1_5`, which puts the pictures before the text."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from asked import Job

TASK = """\
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.pictures
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {new_tokens}, temperature: 0}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
UTILS = """\
from PIL import Image


def pictures(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["text"]
"""


def row_of(number: int, messages: list[dict]) -> dict | None:
    kinds = [part["type"] for part in messages[0]["content"]]
    if len(messages) > 1 or kinds != sorted(kinds):  # "image" before "text"
        return None
    parts = messages[0]["content"]
    images = [part["path"] for part in parts if part["type"] == "image"]
    return {"number": number, "images": images, "text": "".join(p.get("text", "") for p in parts), "answer": ""}


def main() -> None:
    job = Job()
    rows = [row for number, messages in enumerate(job.questions) if (row := row_of(number, messages))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "local.yaml").write_text(TASK.format(data=folder / "test.jsonl", new_tokens=job.max_new_tokens))
        (folder / "utils.py").write_text(UTILS)
        limits = json.loads(Path(job.export, "preprocessor_config.json").read_text())["size"]
        model = f"pretrained={job.export},device=cpu,device_map=cpu,min_pixels={limits['shortest_edge']},max_pixels={limits['longest_edge']}"
        command = [sys.executable, "-m", "lmms_eval", "--model", "llava_onevision1_5", "--model_args", model, "--batch_size", "4",
                   "--tasks", "local", "--include_path", name, "--log_samples", "--output_path", name]  # fmt: skip
        subprocess.run(command, check=True)
        logged = next(folder.rglob("*samples_local.jsonl")).read_text().splitlines()
    answers: list[str | None] = [None] * len(job.questions)
    for sample in map(json.loads, logged):
        answer = sample["filtered_resps"]
        answers[rows[sample["doc_id"]]["number"]] = answer if isinstance(answer, str) else answer[0]
    job.give(
        "lmms_eval --model llava_onevision1_5 --model_args pretrained=…,min_pixels=…,max_pixels=… --batch_size 4",
        answers,
        ["lmms-eval", "transformers", "torch"],
    )


if __name__ == "__main__":
    main()
