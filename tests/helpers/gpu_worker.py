"""Comparisons inside one process on a GPU, for test_gpu.py: prints one JSON line of relative differences.

python tests/helpers/gpu_worker.py HF_FOLDER [lora | dropout]
"""

import json
import os
import sys
from types import SimpleNamespace

import torch

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}

from megatron.core.transformer.transformer_layer import TransformerLayer

from helpers import MODELS
from helpers.gpu import VALUES, samples
from llava_sft.data.loader import VlmTaskEncoder
from llava_sft.megatron import distributed, parallel
from llava_sft.model import fused_layers
from llava_sft.model.config import load_model_config
from llava_sft.model.products import move_back
from llava_sft.model.template import ChatTemplate
from llava_sft.model.tensors import PARTS
from llava_sft.training import forward

BY_PAIRS = {"lora_rank": 8, "lora_alpha": 16.0, "lora_modules": list(PARTS)}
KINDS = {"": {}, "lora": BY_PAIRS, "dropout": BY_PAIRS | {"lora_dropout": 0.25}}


def build(kind: str) -> tuple[torch.nn.Module, torch.device]:
    values = VALUES.model_copy(update={"gpus_per_node": 1, "bf16": True} | KINDS[kind])
    distributed.allow_gradient_fusion()
    device = parallel.start(values, torch.distributed.HashStore())
    made = forward.transformer_config

    def without_buffer(*given):
        config = made(*given)
        config.gradient_accumulation_fusion = False  # without Megatron's wrapper there is no gradient buffer to add to
        return config

    forward.transformer_config = without_buffer
    model = forward.build_model(load_model_config(MODELS / "tiny.yaml"), values).cuda().bfloat16()
    model.ddp_config = SimpleNamespace(overlap_grad_reduce=False)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model, device


def main(tokenizer: str, kind: str) -> None:
    """`kind`: of KINDS; with lora and dropout all parts are trained by LoRA's pairs."""
    model, device = build(kind)
    answer_losses = forward.Forward(model, device)
    limits = ChatTemplate(tokenizer), 2048, 3136, 50_000
    packing, alone = VlmTaskEncoder(*limits, True, pad_multiple=128), VlmTaskEncoder(*limits)  # 128: FP8 wants 16
    encoded = [packing.encode_sample(sample) for sample in samples()]
    packed = packing.batch([packing.pack_selected_samples(encoded)])

    def losses_and_gradients(batches):
        model.zero_grad()
        answer_losses.begin(1)  # the same is left out each time
        losses = torch.cat([answer_losses(batch) for batch in batches])
        losses.sum().backward()
        return losses.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    def differences(ours, reference):
        return [
            ((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(ours, reference, strict=True)
        ]

    fused = losses_and_gradients([packed])
    found = {}
    if kind != "dropout":  # which leaves out other places there
        unpacked, chunks = [alone.batch([one]) for one in encoded], packed.chunks(packed.num_tokens // 3)
        found["packed, from unpacked"] = differences(fused, losses_and_gradients(unpacked))
        found["chunks, from one pack"] = differences(losses_and_gradients(chunks), fused)
    if kind:
        for keeps in (True, False):  # queries, keys and values, and what pairs are multiplied with
            fused_layers.has_memory_for_inputs = lambda layer, tokens, keeps=keeps: keeps
            found[f"inputs {'kept' if keeps else 'made again'}"] = differences(losses_and_gradients([packed]), fused)
    configs = [tower.decoder.config for tower in (model.language_model, model.vision_model)]
    for config in configs:
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    found["recomputed, from kept"] = differences(losses_and_gradients([packed]), fused)
    for config in configs:
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = None, None, None

    def in_fp8():
        config = model.language_model.config
        config.fp8, config.fp8_recipe = "hybrid", "tensorwise"
        result = losses_and_gradients([packed])
        config.fp8 = None
        return result

    cudnn = fused_layers.has_cudnn_attention
    fused_layers.has_cudnn_attention = lambda: False
    found["FlashAttention-2, from cuDNN"] = differences(losses_and_gradients([packed]), fused)
    fused_layers.has_cudnn_attention = cudnn
    fused_fp8 = in_fp8()
    for module in model.modules():
        move_back(module)
    for layer in (fused_layers.FusedLanguageLayer, fused_layers.FusedVisionLayer):
        layer.forward = TransformerLayer.forward
    megatron = losses_and_gradients([packed])
    found["fused layers, from Megatron's"] = differences(fused, megatron)
    found["FP8, from bf16"] = differences(fused_fp8, fused)
    found["FP8 of Megatron's layers, from bf16"] = differences(in_fp8(), megatron)
    print("RESULT", json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], "".join(sys.argv[2:]))
