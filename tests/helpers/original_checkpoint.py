"""A checkpoint as the original project writes it (`torch` format, any TP and PP)."""

import argparse
import io
import random
from pathlib import Path

import numpy as np
import torch

from llava_sft.checkpoint.safetensors_io import SafetensorsReader
from llava_sft.model.tensors import tensor_rows


def shard(key: str, tensor: torch.Tensor, rank: int, tp: int) -> torch.Tensor:
    """As facts/legacy.md says; written anew and by other means than the reader's."""
    name, kind = key.split(".")[-2], key.split(".")[-1]
    if key.startswith("adapter.") or "layernorm" in name or "layer_norm" in kind or "embed." in key or "class_" in key:
        return tensor.clone()
    if name == "linear_fc1" and key.startswith("language"):
        half = tensor.shape[0] // 2
        size = half // tp
        return torch.cat(
            [tensor[rank * size : (rank + 1) * size], tensor[half + rank * size : half + (rank + 1) * size]]
        )
    if name in ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer"):
        size = tensor.shape[0] // tp
        return tensor[rank * size : (rank + 1) * size].clone()
    if kind == "weight":  # linear_proj, linear_fc2
        size = tensor.shape[1] // tp
        return tensor[:, rank * size : (rank + 1) * size].clone()
    return tensor.clone()


def write_original(top: Path, hf: Path, model, tp: int, pp: int, trained: bool = False) -> Path:
    reader = SafetensorsReader(hf)
    whole = {row.mcore: row.join([reader.read(name) for name in row.hf]) for row in tensor_rows(model)}
    for key in ("language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"):
        padding = -len(whole[key]) % (128 * tp)
        whole[key] = torch.cat([whole[key], whole[key][-1:].expand(padding, -1)])
    embed = whole.pop("vision_model.patch_embed.weight")
    whole["vision_model.patch_embed.proj.weight"] = embed.view(-1, 3, 14, 14)
    layers = model.language.num_layers
    first = [sum(divmod(layers, pp)), layers][pp == 1] if pp == 1 else layers - layers // pp
    folder = top / ("iter_0000400" if trained else "release")
    for stage in range(pp):
        for rank in range(tp):
            state = {}
            for key, tensor in whole.items():
                words = key.split(".")
                if key.startswith("language_model.decoder.layers."):
                    number = int(words[3])
                    if pp > 1 and (number >= first) != bool(stage):
                        continue
                    words[3] = str(number - first * stage)
                elif (key.startswith("language_model.decoder.final") or "output_layer" in key) != (
                    stage == pp - 1
                ) and pp > 1:
                    continue
                part = shard(key, tensor, rank, tp)
                state[".".join(words)] = torch.nn.Parameter(part) if trained else part
                if words[-2] == "linear_qkv":
                    state[".".join([*words[:-1], "_extra_state"])] = io.BytesIO(b"scales")
            content = {
                "model": state,
                "checkpoint_version": 3.0,
                "iteration": 0,
                "args": argparse.Namespace(tensor_model_parallel_size=tp),
            }
            if trained:
                random_states = [
                    {
                        "random_rng_state": random.getstate(),
                        "np_rng_state": np.random.get_state(),
                        "rng_tracker_states": {"a": torch.zeros(8)},
                    }
                ]
                content |= {
                    "rng_state": random_states,
                    "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}},
                    "num_floating_point_operations_so_far": 1.5,
                }
                content["args"].params_dtype, content["args"].path = torch.bfloat16, Path("x")
            path = folder / (f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else ""))
            path.mkdir(parents=True)
            torch.save(content, path / "model_optim_rng.pt")
    (top / "latest_checkpointed_iteration.txt").write_text("400\n" if trained else "release\n")
    return folder
