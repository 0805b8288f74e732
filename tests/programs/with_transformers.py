"""transformers of any version: the questions in batches as the folder's own settings pad them; and, asked for, every call of
consumers/calls.py."""

import sys
from pathlib import Path

from asked import Job

sys.path.insert(1, str(Path(__file__).parents[1]))
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from consumers import calls

BATCH = 5


def main() -> None:
    job = Job()
    processor = AutoProcessor.from_pretrained(job.export, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(
        job.export, trust_remote_code=True, dtype=getattr(torch, job.dtype)
    )
    answers = []
    for batch in (job.questions[start : start + BATCH] for start in range(0, len(job.questions), BATCH)):
        texts = [processor.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in batch]
        images = [image for messages in batch for image in job.pictures(messages)]
        inputs = processor(text=texts, images=images or None, padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=job.max_new_tokens, do_sample=False)
        answers += processor.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    checks = {}
    if job.calls:
        found = calls.run(calls.Export(job.export))["calls"]
        checks = {name: outcome.get("error", "") for name, outcome in found.items()}
    called = "AutoProcessor, AutoModelForImageTextToText.from_pretrained(trust_remote_code=True).generate"
    job.give(called, answers, ["transformers", "torch", "tokenizers"], checks)


if __name__ == "__main__":
    main()
