"""Faster ways (model/tries.py) beside what they replace, at 4B's widths on a GPU, in one process: prints one JSON line.

python tests/helpers/levers_worker.py HF_FOLDER
"""

import json
import os
import sys
import time

import torch

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}

from types import SimpleNamespace

from helpers import ROOT
from helpers.gpu import VALUES, samples
from llava_sft.data.loader import VlmTaskEncoder
from llava_sft.megatron import distributed, parallel
from llava_sft.model import casts, products, tries
from llava_sft.model.config import load_model_config
from llava_sft.model.template import ChatTemplate
from llava_sft.training import forward

LAYERS = 3
LEVERS = {
    "flash4_vision": ({"flash4_vision"}, None),
    "flash4_language": ({"flash4_language"}, None),
    "amax": ({"amax"}, "tensorwise"),
    "fp8_vision": ({"fp8_vision"}, "tensorwise"),
    "all": (set(tries.NAMES), "tensorwise"),
}


def casts_beside_transformer_engine() -> dict[str, int]:
    """How many bytes differ, of each shape and kind, in rows, columns and scale."""
    differ = {}
    for number, quantizer in enumerate(products.quantizers("tensorwise")[::2]):
        for rows, columns in ((8192, 2560), (8192, 9728), (8192, 19456), (8192, 6144), (4112, 1024), (16, 4096)):
            x = torch.randn(rows, columns, device="cuda") * torch.randn(rows, 1, device="cuda").exp() * 3
            x = x.bfloat16()
            for scale in (1.0, 1e-30, 0.0):
                x_scaled = x * scale
                theirs = quantizer.quantize_impl(x_scaled)
                amax = casts.places(x.device)
                amax[casts.APART * 5] = x_scaled.float().abs().max()
                x_scaled.amax = amax
                ours = products.in_fp8(x_scaled, quantizer, "tensorwise")
                found = [(ours._data != theirs._data).sum(), (ours._transpose != theirs._transpose).sum()]
                found.append(ours._scale_inv != theirs._scale_inv)
                differ[f"{'e4m3' if not number else 'e5m2'} {rows} x {columns} times {scale:g}"] = int(sum(map(int, found)))
    return differ


def largest_values_are_right() -> dict[str, bool]:
    """What each kernel leaves in `amax`, beside what PyTorch finds in what it wrote, at 4B's widths."""
    from llava_sft.model import kernels as k

    def r(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device="cuda").to(dtype)

    def right(tensor) -> bool:
        return bool(tensor.amax.view(casts.SLOTS, casts.APART)[:, 0].max() == tensor.float().abs().max())

    n, device, found = 4100, torch.device("cuda"), {}
    for width, bias in ((2560, None), (1024, r(1024))):
        x, weight, sums = r(n, width), r(width), k.PartialSums(4 * width, device)
        total, out, mean, scale = k.norm(x, weight, bias, 1e-6, r(n, width), amax=casts.places(device))
        found[f"norm {width}"] = right(out)
        given = r(n, width), total, weight, bias, mean, scale, r(n, width), sums, bias is not None
        found[f"norm_backward {width}"] = right(k.norm_backward(*given, amax=casts.places(device)))
    gate_and_up = r(n, 2 * 9728)
    found["swiglu"] = right(k.swiglu(gate_and_up, amax=casts.places(device)))
    found["swiglu_backward"] = right(k.swiglu_backward(r(n, 9728), gate_and_up, amax=casts.places(device)))
    x, sums = r(n, 4096), k.PartialSums(4096, device)
    found["gelu"] = right(k.gelu(x, casts.places(device)))
    found["gelu_backward"] = right(k.gelu_backward(r(n, 4096), x, sums, amax=casts.places(device)))
    for heads, groups, head_dim, weights in ((32, 8, 128, (r(128), r(128))), (16, 16, 64, None)):
        qkv = r(n, (heads + 2 * groups) * head_dim)
        angles = r(n, 1, head_dim, dtype=torch.float32), r(n, 1, head_dim, dtype=torch.float32)
        sums = k.PartialSums(qkv.size(1), device)
        grads = k.rope(qkv, groups, *angles, weights, 1e-6)
        found[f"rope_backward {heads}"] = right(
            k.rope_backward(grads, qkv, *angles, sums, weights, 1e-6, casts.places(device))
        )
    return found


def small_model():
    """4B's widths with few layers and the test tokenizer's vocabulary."""
    model = load_model_config(ROOT / "config/models/4b.yaml")
    language = model.language.model_copy(update={"num_layers": LAYERS, "vocab_size": 8192})
    return model.model_copy(
        update={"language": language, "vision": model.vision.model_copy(update={"num_layers": LAYERS})}
    )


def main(tokenizer: str) -> None:
    values = VALUES.model_copy(update={"gpus_per_node": 1, "bf16": True, "fp8": "tensorwise", "seq_length": 8192})
    distributed.allow_gradient_fusion()
    device = parallel.start(values, torch.distributed.HashStore())
    made = forward.transformer_config

    def without_buffer(*given):
        config = made(*given)
        config.gradient_accumulation_fusion = False
        return config

    forward.transformer_config = without_buffer
    model = forward.build_model(small_model(), values).cuda().bfloat16()
    model.ddp_config = SimpleNamespace(overlap_grad_reduce=False)
    answer_losses = forward.Forward(model, device)
    encoder = VlmTaskEncoder(ChatTemplate(tokenizer), 8192, 3136, 602_112, True, pad_multiple=128)
    encoded = [encoder.encode_sample(sample) for sample in samples(scale=4)]
    packed = encoder.batch([encoder.pack_selected_samples(encoded)])
    towers = model.language_model.decoder.config, model.vision_model.decoder.config

    def losses_and_gradients(tried=frozenset(), fp8=None):
        tries.TRIED = set(tried)
        for config, on in zip(towers, (fp8, fp8 and "fp8_vision" in tried), strict=True):
            config.fp8, config.fp8_recipe = ("hybrid", fp8) if on else (None, None)
        for module in model.modules():
            if hasattr(module, "is_first_microbatch"):
                module.is_first_microbatch = True
        model.zero_grad()
        answer_losses.begin(1)
        began = time.perf_counter()
        losses = answer_losses(packed)
        losses.sum().backward()
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
        return losses.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    def differences(ours, reference):
        return [
            ((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(ours, reference, strict=True)
        ]

    spent: list[float] = []
    found = {"bytes of casts that differ": {k: v for k, v in casts_beside_transformer_engine().items() if v}}
    found["largest values that are wrong"] = [name for name, right in largest_values_are_right().items() if not right]
    bf16 = losses_and_gradients()
    found["bf16 again"] = differences(losses_and_gradients(), bf16)
    fp8 = losses_and_gradients(fp8="tensorwise")
    found["FP8 again"] = differences(losses_and_gradients(fp8="tensorwise"), fp8)
    found["FP8, from bf16"] = differences(fp8, bf16)
    for name, (tried, recipe) in LEVERS.items():
        try:
            ours = losses_and_gradients(tried, recipe)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:600]
            continue
        found[name] = differences(ours, fp8 if recipe else bf16)
        if recipe:
            found[f"{name}, from bf16"] = differences(ours, bf16)
        found[f"{name}: seconds, first pass"] = round(spent[-1], 2)
    found["tokens, patches"] = [packed.input_ids.numel(), len(packed.pixels)]
    print("RESULT", json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
