"""How many questions a second the evaluation answers, with transformers by batch size, and with vLLM; peak memory.

    python benchmarks/evaluation.py --work /tmp/evaluation     # 4 minutes and 9 GB of disk, on an H100
    python benchmarks/evaluation.py --work /tmp/evaluation --batch-size 64 --vllm vllm/bin/python

The model is 4B of random weights in bf16. A question has one photograph of 1,024 tokens; its answer has all 32 tokens, for
random weights never stop. Speeds are those of all batches but the first; vLLM's of all but its first answers, which also
wait for its start.
"""

import argparse
import io
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from llava_sft.checkpoint.safetensors_io import write_safetensors
from llava_sft.data.records import Sample
from llava_sft.evaluation.answers import generate
from llava_sft.evaluation.vllm_client import generate_with_vllm
from llava_sft.evaluation.vllm_worker import AT_ONCE
from llava_sft.model.config import ModelConfig, load_model_config
from llava_sft.model.export_files import write_hf_sidecars
from llava_sft.model.tensors import hf_shapes
from llava_sft.model.tiny import train_tokenizer
from results import ROOT, row, write_results

SIDE, NEW_TOKENS = 896, 32
QUESTIONS = {1: 24, 16: 160, 64: 448}  # by batch size
WITH_VLLM = 3 * AT_ONCE


def write_random_export(folder: Path, model: ModelConfig, device: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"What does row {number} of this photograph show?" for number in range(200)]
    train_tokenizer(texts, model.language.vocab_size, 32768).save_pretrained(folder)
    write_hf_sidecars(folder, folder, model, 3136, 1_000_000, dtype="bfloat16")
    generator = torch.Generator(device).manual_seed(0)

    def tensors():
        for name, shape in hf_shapes(model).items():
            tensor = 0.02 * torch.randn(shape, generator=generator, device=device)
            yield name, (1 + tensor if "norm" in name or "ln_q" in name else tensor).bfloat16().cpu()

    write_safetensors(folder, hf_shapes(model), torch.bfloat16, tensors())


def question(number: int) -> Sample[bytes]:
    grain = Image.frombytes("RGB", (56, 56), random.Random(number).randbytes(3 * 56 * 56))
    buffer = io.BytesIO()
    grain.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
    text = f"<image>\nWhat does row {number} of this photograph show?"
    return Sample(str(number), [{"role": "user", "content": text}], [buffer.getvalue()], {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the export")
    parser.add_argument("--model", default="4b", help="of config/models/ (%(default)s)")
    parser.add_argument("--batch-size", type=int, choices=QUESTIONS, help="of transformers (default: each in turn)")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="interpreter of an environment with vLLM: that too")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    export = args.work / "export"
    write_random_export(export, load_model_config(ROOT / f"config/models/{args.model}.yaml"), device)
    photographs = [question(number) for number in range(64)]
    rows = []

    def speed(answers: Iterator, count: int, first: int, **at: object) -> None:
        times = [time.perf_counter() for _ in answers]
        note = "1,024 image tokens, 32 new ones"
        value = (count - first) / (times[-1] - times[first - 1])
        rows.append(row("evaluation_questions_per_s", value, "1/s", None, "higher", note, model=args.model, **at))

    if args.vllm:  # before this process fills the GPU
        torch.cuda.empty_cache()
        asked = [question(number) for number in range(WITH_VLLM)]  # vLLM would not look at a photograph twice
        speed(generate_with_vllm(export, asked, args.vllm, NEW_TOKENS), WITH_VLLM, AT_ONCE, engine="vllm")
    for batch_size in [args.batch_size] if args.batch_size else QUESTIONS:
        torch.cuda.reset_peak_memory_stats()
        count = QUESTIONS[batch_size]
        asked = [photographs[number % len(photographs)] for number in range(count)]
        speed(generate(export, asked, batch_size, NEW_TOKENS), count, batch_size, batch_size=batch_size)
        peak = torch.cuda.max_memory_allocated() / 2**30
        at = {"model": args.model, "batch_size": batch_size}
        rows.append(row("evaluation_peak_gib", peak, "GiB", None, "lower", **at))
    write_results("evaluation", rows)


if __name__ == "__main__":
    main()
