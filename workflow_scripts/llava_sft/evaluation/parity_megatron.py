"""The other process of parity.py: the Megatron model alone, on a CPU or one GPU, to be asked and not trained."""

import os
import sys
from collections.abc import Collection
from pathlib import Path

import torch

from llava_sft.megatron import cpu

ON_CPU = cpu.apply()

from megatron.core import dist_checkpointing  # noqa: E402

from llava_sft.checkpoint.base import lora_of  # noqa: E402
from llava_sft.checkpoint.torch_dist import TorchDistReader  # noqa: E402
from llava_sft.files import read_json  # noqa: E402
from llava_sft.megatron import parallel  # noqa: E402
from llava_sft.model import lora_layers  # noqa: E402
from llava_sft.model.config import ModelConfig  # noqa: E402
from llava_sft.model.llava import LlavaOneVision  # noqa: E402
from llava_sft.model.processing import image_tokens  # noqa: E402
from llava_sft.model.template import ChatTemplate  # noqa: E402
from llava_sft.settings.resolve import ResolvedSettings  # noqa: E402
from llava_sft.training.forward import build_model  # noqa: E402


def load_model(model: ModelConfig, checkpoint: Path, bf16: bool) -> LlavaOneVision:
    """The model with the weights of one checkpoint folder, whatever parallel sizes wrote it; layers of plain PyTorch."""
    values = ResolvedSettings(experiment="", bf16=bf16)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    parallel.start(values, torch.distributed.HashStore())
    built = build_model(model, values, random_weights=False)
    built = built.to(torch.bfloat16 if bf16 else torch.float32).to("cpu" if ON_CPU else "cuda")
    if found := lora_of(checkpoint):
        lora, base = found
        _load(built, base)
        lora_layers.attach(built, lora, seed=0)
        _load(built, checkpoint, ours=TorchDistReader(checkpoint).tensors().keys())
    else:
        _load(built, checkpoint)
    return built.eval()


def _load(built: LlavaOneVision, folder: Path, ours: Collection[str] | None = None) -> None:
    """Read all weights, or `ours` alone."""
    wanted = built.sharded_state_dict()
    if ours is not None:
        wanted = {name: entry for name, entry in wanted.items() if entry.key in ours}
    built.load_state_dict(dist_checkpointing.load({"model": wanted}, str(folder))["model"], strict=ours is None)


@torch.inference_mode()
def main(work: Path) -> None:
    """Wait for `cases.pt`, build the model from the checkpoint, write `megatron.pt`."""
    if not sys.stdin.readline():
        return  # the other side has failed
    job = read_json(work / "job.json")
    model = load_model(ModelConfig(**job["model"]), Path(job["checkpoint"]), bf16=job["dtype"] == "bfloat16")
    device = torch.device(job["device"])
    image_token = ChatTemplate(work / "export").image_token_id

    def forward(ids: torch.Tensor, case: dict) -> torch.Tensor:
        """Logits [tokens, vocabulary]. An image token that the answer brings up is text: only the prompt's are images."""
        places = (ids == image_token).nonzero().flatten()[: sum(map(image_tokens, case["grids"]))]
        pixels = case["pixels"].to(device) if case["grids"] else None
        return model(ids[None].to(device), pixels, case["grids"], places.to(device))[0]

    results = []
    for case in torch.load(work / "cases.pt"):
        logits = forward(case["ids"], case)[case["positions"].to(device)].float().cpu()
        answer = forward(case["reply"], case)[case["prompt"] - 1 : -1].float().cpu()
        results.append((logits, answer))
    torch.save(results, work / "megatron.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
