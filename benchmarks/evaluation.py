"""How many questions a second the evaluation answers with transformers, by batch size, and its peak memory.

    python benchmarks/evaluation.py --work /tmp/evaluation     # 4 minutes and 9 GB of disk, on an H100

The model is 4B of random weights in bf16. A question has one photograph of 1,024 tokens; its answer has all 32 tokens, for
random weights never stop. Speeds are those of all batches but the first.
"""

import argparse
import io
import random
import time
from pathlib import Path

import torch
from PIL import Image

from llava_sft.checkpoint.safetensors_io import write_safetensors
from llava_sft.data.records import Sample
from llava_sft.evaluation.answers import generate
from llava_sft.model.config import ModelConfig, load_model_config
from llava_sft.model.export_files import write_hf_sidecars
from llava_sft.model.tensors import hf_shapes
from llava_sft.model.tiny import train_tokenizer
from results import ROOT, row, write_results

SIDE, NEW_TOKENS = 896, 32
QUESTIONS = {1: 24, 16: 160, 64: 448}  # by batch size


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
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    write_random_export(args.work / "export", load_model_config(ROOT / f"config/models/{args.model}.yaml"), device)
    photographs = [question(number) for number in range(64)]
    rows = []
    for batch_size, count in QUESTIONS.items():
        torch.cuda.reset_peak_memory_stats()
        asked = [photographs[number % len(photographs)] for number in range(count)]
        times = [time.perf_counter() for _ in generate(args.work / "export", asked, batch_size, NEW_TOKENS)]
        speed = (count - batch_size) / (times[-1] - times[batch_size - 1])
        at = {"model": args.model, "batch_size": batch_size}
        rows.append(
            row("evaluation_questions_per_s", speed, "1/s", None, "higher", "1,024 image tokens, 32 new ones", **at)
        )
        rows.append(row("evaluation_peak_gib", torch.cuda.max_memory_allocated() / 2**30, "GiB", None, "lower", **at))
    write_results("evaluation", rows)


if __name__ == "__main__":
    main()
