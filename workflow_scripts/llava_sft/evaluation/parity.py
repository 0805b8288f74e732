"""Check that an exported folder, loaded as a user would, computes what the Megatron model it was made from computes.

Notable:
- real samples with 0, 1 and 3 images of different sizes; where the data has none, one is made of its images;
- training's own template and patches on Megatron's side, the exported processor on the other: ids are compared too;
- one model in memory at a time: Megatron runs in a process of its own (parity_megatron.py), which imports while the
  export is loaded and starts when that is gone; what passes between them are files;
- one Megatron pass checks the greedy answer: if each token is Megatron's best after those before it, so is the whole.

Bounds are shares of the greatest logit. Two right implementations differ by rounding alone, measured 1e-6 in float32 and
1.6e-2 in bfloat16; the smallest fault tried, a LayerNorm eps of 1e-4 in place of 1e-5, by 1.1e-4 to 2.6e-4, two biases
in each other's place by 4e-2. Only float32 tells them apart for sure, and is used wherever it fits into memory.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import psutil
import torch
from PIL import Image

from llava_sft.data.images import decode_rgb
from llava_sft.data.records import Sample
from llava_sft.data.stored import read_split
from llava_sft.errors import CheckpointError
from llava_sft.evaluation.export import answer_greedily, load_export
from llava_sft.files import read_json, write_json
from llava_sft.model.config import ModelConfig
from llava_sft.model.export_files import tokenizer_token_ids
from llava_sft.model.processing import image_tokens, to_patches
from llava_sft.model.template import ChatTemplate, UnusableSample
from llava_sft.model.tensors import parameter_count
from llava_sft.model.tokens import IMAGE
from llava_sft.run.layout import PARITY
from llava_sft.training.launcher import python_path

BOUNDS = {
    "float32": {"logits": 3e-5, "loss": 1e-5, "greedy": 3e-5},
    "bfloat16": {"logits": 5e-2, "loss": 1e-2, "greedy": 5e-2},
}
COUNTS = (0, 1, 3)
LONGEST = 2048  # tokens of a sample
POSITIONS, NEW_TOKENS = 256, 16  # logits compared, beside those of the answers; tokens answered
SIDES = (56, 112, 84)  # of made images; photographs are made larger than digits


def check_parity(checkpoint: Path, model: ModelConfig, webdatasets: Path, where: str, folder: Path) -> None:
    """Compare the export in `folder` with `checkpoint`, and write parity.json into it.

    Args:
        where: "cpu", "gpu", "check" (a GPU if there is one), or "skip".

    Raises CheckpointError, with the figures, when a difference is above its bound.
    """
    if where == "skip":
        print(
            "warning: parity is not checked (parity: skip): nothing says that this export answers as the trained model"
        )
        write_json(folder / PARITY, {"passed": None, "note": "not checked: parity: skip"}, sealed=True)
        return
    if where == "gpu" and not torch.cuda.is_available():
        raise CheckpointError("parity: gpu, and there is no GPU here", "parity: cpu, or export on a machine with a GPU")
    device = "cuda" if where != "cpu" and torch.cuda.is_available() else "cpu"
    dtype = computing_dtype(model, read_json(folder / "config.json")["dtype"], device)
    with tempfile.TemporaryDirectory(prefix="parity-") as temporary:
        work = Path(temporary)
        cases = list(make_cases(folder, webdatasets))
        job = {"checkpoint": str(checkpoint.resolve()), "model": model.model_dump(), "device": device, "dtype": dtype}
        (work / "job.json").write_text(json.dumps(job))
        with start_megatron(work, device) as megatron:
            (work / "export").symlink_to(folder.resolve())
            torch.save(run_export(work / "export", cases, device, dtype), work / "cases.pt")
            output = megatron.communicate("go\n")[0]
        if megatron.returncode:
            raise RuntimeError(f"the Megatron model could not be run:\n{output[-3000:]}")
        results = torch.load(work / "megatron.pt")
        cases = torch.load(work / "cases.pt")
    rows = [compare(case, logits, answer) for case, (logits, answer) in zip(cases, results, strict=True)]
    bounds = BOUNDS[dtype]
    passed = all(row["same ids"] and all(row[name] <= bound for name, bound in bounds.items()) for row in rows)
    write_json(
        folder / PARITY,
        {"passed": passed, "device": device, "dtype": dtype, "bounds": bounds, "samples": rows},
        sealed=True,
    )
    figures = "\n    ".join(", ".join(f"{key} {value}" for key, value in row.items()) for row in rows)
    print(f"parity ({dtype} on {device}, bounds {bounds}):\n    {figures}", flush=True)
    if not passed:
        raise CheckpointError(
            f"the export does not answer as the Megatron model ({dtype} on {device}, bounds {bounds}):\n    {figures}",
            "this is a fault of the conversion or the model's code: report it; nothing was exported",
        )


def computing_dtype(model: ModelConfig, stored: str, device: str) -> str:
    """float32, whose rounding hides no fault, where the model fits into memory with a fifth to spare; else as stored."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    return "float32" if 4 * parameter_count(model) * 1.2 < free else stored


# ------------------------------------------------------------------------------------------------- samples


def make_cases(folder: Path, webdatasets: Path) -> Iterator[dict]:
    """Each sample as training encodes it, a batch of one, beside what a user has: messages and images."""
    template, size = ChatTemplate(folder), read_json(folder / "preprocessor_config.json")["size"]
    pool = list(islice(chain(read_split(webdatasets, "val"), read_split(webdatasets, "train")), 200))
    for count in COUNTS:
        natural = (sample for sample in pool if len(sample.images) == count)
        for sample in chain(natural, (with_images(sample, count, pool) for sample in pool)):
            images = [decode_rgb(data) for data in sample.images]
            patches = [to_patches(image, size["shortest_edge"], size["longest_edge"]) for image in images]
            grids = [grid for _, grid in patches]
            try:
                encoded = template.encode(sample.messages, list(map(image_tokens, grids)), LONGEST)
            except UnusableSample:
                continue
            ends_well = not encoded.turns_cut and sample.messages[-1]["role"] == "assistant"
            if ends_well and len({image.size for image in images}) == count:
                break
        else:
            raise CheckpointError(
                f"{webdatasets}: no sample of at most {LONGEST} tokens to compare the export on", "parity: skip"
            )
        yield {
            "sample": sample.id,
            "messages": sample.messages,
            "images": images,
            "ids": torch.from_numpy(encoded.input_ids),
            "answer": torch.from_numpy(encoded.answer_mask),
            "pixels": torch.cat([torch.from_numpy(p) for p, _ in patches]) if patches else None,
            "grids": grids,
        }


def with_images(sample: Sample, count: int, pool: list[Sample]) -> Sample:
    """The sample with `count` images of the data in front of its first question, each resized to another shape."""
    found = [decode_rgb(data) for data in islice((data for other in [sample, *pool] for data in other.images), count)]
    found = found or [Image.linear_gradient("L")]  # text-only data
    images = []
    for i in range(count):
        image, buffer = found[i % len(found)], io.BytesIO()
        scale = max(1, min(4, max(image.size) // 56))
        image.resize((scale * SIDES[i], scale * SIDES[i - 1])).save(buffer, "PNG")
        images.append(buffer.getvalue())
    messages = [{**message, "content": message["content"].replace(IMAGE, "")} for message in sample.messages]
    first = next(message for message in messages if message["role"] == "user")
    first["content"] = IMAGE * count + first["content"]
    return sample._replace(id=f"{sample.id} with {count} images", messages=messages, images=images)


# ------------------------------------------------------------------------------------------------- the two models


@torch.inference_mode()
def run_export(folder: Path, cases: list[dict], device: str, dtype: str) -> list[dict]:
    """What the exported folder makes of each case: its own `hf_ids`, `logits` at `positions`, and the greedy `reply`."""
    processor, model = load_export(folder, dtype, device)
    answer_greedily(model, tokenizer_token_ids(folder), NEW_TOKENS)
    done = []
    for case in cases:
        images, messages = case["images"], case["messages"]

        def encode(messages, images=images, **options):
            text = processor.apply_chat_template(messages, tokenize=False, **options)
            return processor(text=[text], images=images or None, return_tensors="pt").to(device)

        inputs = encode(messages)
        answers = (case["answer"][1:]).nonzero().flatten()
        spread = torch.linspace(0, len(case["ids"]) - 1, POSITIONS).long()
        positions = torch.cat([answers[:POSITIONS], spread]).unique()
        logits = model(**inputs, logits_to_keep=positions.to(device)).logits[0]
        prompt = encode(messages[:-1], add_generation_prompt=True)
        output = model.generate(**prompt)[0]
        length = prompt["input_ids"].shape[1]
        made = {
            "prompt": length,
            "reply": output.cpu(),
            "text": processor.decode(output[length:]),
            "hf_ids": inputs["input_ids"][0].cpu(),
            "positions": positions,
            "logits": logits.float().cpu(),
        }
        done.append({key: case[key] for key in ("sample", "ids", "answer", "pixels", "grids")} | made)
    return done


def start_megatron(work: Path, device: str) -> subprocess.Popen:
    environment = os.environ | python_path() | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    command = [sys.executable, "-m", "llava_sft.evaluation.parity_megatron", str(work)]
    return subprocess.Popen(
        command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def compare(case: dict, logits: torch.Tensor, answer: torch.Tensor) -> dict:
    """The figures of one case; `logits` and `answer` (those that the greedy answer was chosen by) are Megatron's."""
    scale = case["logits"].abs().max()
    ids, positions, last = case["ids"], case["positions"], len(case["ids"]) - 1
    answers = case["answer"][positions.clamp(max=last - 1) + 1] & (positions < last)
    labels = ids[positions[answers] + 1]
    theirs, ours = (float(torch.nn.functional.cross_entropy(x[answers], labels)) for x in (case["logits"], logits))
    chosen = answer.gather(1, case["reply"][case["prompt"] :, None])[:, 0]
    gap = (answer.max(dim=1).values - chosen).max() / scale  # 0 unless rounding makes two tokens change places
    return {
        "images": len(case["grids"]),
        "sample": case["sample"],
        "tokens": len(ids),
        "grids": case["grids"],
        "same ids": torch.equal(case["hf_ids"], ids),
        "logits": float((case["logits"] - logits).abs().max() / scale),
        "loss of the export": theirs,
        "loss": abs(theirs - ours) / max(1.0, ours),
        "answer": case["text"],
        "greedy": float(gap),
    }
