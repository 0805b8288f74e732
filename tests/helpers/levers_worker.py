"""Faster ways beside what they replace, at 4B's widths on a GPU, in one process: prints each figure when it is
there, and all of them as one line of JSON.

python tests/helpers/levers_worker.py HF_FOLDER [levers] [seams]

seams: what has no lever but was read as risky: gradients summed in bf16 over many micro-batches, packed beside unpacked
validation, FP8 copies of weights after these have changed.
"""

import json
import os
import sys
import time

import torch

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}

from contextlib import nullcontext
from types import SimpleNamespace

from helpers import ROOT
from helpers.gpu import VALUES, samples
from llava_sft.data.loader import VlmTaskEncoder
from llava_sft.megatron import distributed, parallel
from llava_sft.model import casts, flash4, fused_layers, products
from llava_sft.model.config import load_model_config
from llava_sft.model.template import ChatTemplate
from llava_sft.training import forward
from llava_sft.training.validation import evaluating

LAYERS = 3
FLASH4 = {"flash4_vision": False, "flash4_language": True}  # and whether attention is causal
LEVERS = {
    "flash4_vision": ({"flash4_vision"}, None),
    "flash4_language": ({"flash4_language"}, None),
    "amax": ({"amax"}, "tensorwise"),
    "all": ({"amax", *FLASH4}, "tensorwise"),
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
                x_scaled.largest_values = amax
                ours = products.in_fp8(x_scaled, quantizer, "tensorwise")
                found = [(ours._data != theirs._data).sum(), (ours._transpose != theirs._transpose).sum()]
                found.append(ours._scale_inv != theirs._scale_inv)
                differ[f"{'e4m3' if not number else 'e5m2'} {rows} x {columns} times {scale:g}"] = int(
                    sum(map(int, found))
                )
    return differ


def largest_values_are_right() -> dict[str, bool]:
    """What each kernel leaves in `amax`, beside what PyTorch finds in what it wrote, at 4B's widths."""
    from llava_sft.model import activations, rotary
    from llava_sft.model import kernels as k

    def r(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, device="cuda").to(dtype)

    def right(tensor) -> bool:
        return bool(tensor.largest_values.view(casts.SLOTS, casts.APART)[:, 0].max() == tensor.float().abs().max())

    n, device, found = 4100, torch.device("cuda"), {}
    width, bias = 2560, None
    x, weight, sums = r(n, width), r(width), k.PartialSums(4 * width, device)
    total, out, mean, scale = k.norm(x, weight, bias, 1e-6, r(n, width), amax=casts.places(device))
    found[f"norm {width}"] = right(out)
    given = r(n, width), total, weight, bias, mean, scale, r(n, width), sums, bias is not None
    found[f"norm_backward {width}"] = right(k.norm_backward(*given, amax=casts.places(device)))
    gate_and_up = r(n, 2 * 9728)
    found["swiglu"] = right(activations.swiglu(gate_and_up, amax=casts.places(device)))
    found["swiglu_backward"] = right(activations.swiglu_backward(r(n, 9728), gate_and_up, amax=casts.places(device)))
    for heads, groups, head_dim, weights in ((32, 8, 128, (r(128), r(128))), (16, 16, 64, None)):
        qkv = r(n, (heads + 2 * groups) * head_dim)
        angles = r(n, 1, head_dim, dtype=torch.float32), r(n, 1, head_dim, dtype=torch.float32)
        sums = k.PartialSums(qkv.size(1), device)
        grads = rotary.rope(qkv, groups, *angles, weights, 1e-6)
        found[f"rope_backward {heads}"] = right(
            rotary.rope_backward(grads, qkv, *angles, sums, weights, 1e-6, casts.places(device))
        )
    return found


def small_model():
    """4B's widths with few layers and the test tokenizer's vocabulary."""
    model = load_model_config(ROOT / "config/models/4b.yaml")
    language = model.language.model_copy(update={"num_layers": LAYERS, "vocab_size": 8192})
    return model.model_copy(
        update={"language": language, "vision": model.vision.model_copy(update={"num_layers": LAYERS})}
    )


class Trained:
    """The model, a pack, and what is computed with them."""

    def __init__(self, tokenizer: str):
        values = VALUES.model_copy(update={"gpus_per_node": 1, "bf16": True, "fp8": "tensorwise", "seq_length": 8192})
        distributed.allow_gradient_fusion()
        device = parallel.start(values, torch.distributed.HashStore())
        made = forward.transformer_config

        def without_buffer(*given):
            config = made(*given)
            config.gradient_accumulation_fusion = False
            return config

        forward.transformer_config = without_buffer
        self.model = forward.build_model(small_model(), values).cuda().bfloat16()
        self.model.ddp_config = SimpleNamespace(overlap_grad_reduce=False)
        self.answer_losses = forward.Forward(self.model, device)
        limits = ChatTemplate(tokenizer), 8192, 3136, 602_112
        packing, alone = VlmTaskEncoder(*limits, True, pad_multiple=128), VlmTaskEncoder(*limits)
        encoded = [packing.encode_sample(sample) for sample in samples(scale=4)]
        self.packed = packing.batch([packing.pack_selected_samples(encoded)])
        # Samples alone have the tokens that they have: the trainer pads those that it trains on in FP8.
        self.unpacked = [alone.batch([one]) for one in encoded]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.seconds = 0.0

    def use(self, tried=frozenset(), fp8=None) -> None:
        flash4._chosen = {causal for name, causal in FLASH4.items() if name in tried}
        fused_layers.places = products.places if "amax" in tried else lambda *given: None
        config = self.model.language_model.decoder.config
        config.fp8, config.fp8_recipe = ("hybrid", fp8) if fp8 else (None, None)
        self.cast_again()

    def cast_again(self) -> None:
        for module in self.model.modules():
            if hasattr(module, "is_first_microbatch"):
                module.is_first_microbatch = True

    def losses_and_gradients(self, tried=frozenset(), fp8=None):
        self.use(tried, fp8)
        self.model.zero_grad()
        self.answer_losses.begin(1)
        began = time.perf_counter()
        losses = self.answer_losses(self.packed)
        losses.sum().backward()
        torch.cuda.synchronize()
        self.seconds = round(time.perf_counter() - began, 2)
        return losses.detach(), torch.cat([p.grad.flatten() for p in self.parameters])

    @torch.no_grad()
    def validation(self, batches) -> float:
        """Packed: in the training's precision. Samples alone: as the trainer does it, without FP8."""
        self.model.eval()
        with nullcontext() if batches[0].segments else evaluating(self.model):
            sums = self.answer_losses.evaluate(batches)
        self.model.train()
        return float(sums[0] / sums[1])

    @torch.no_grad()
    def alone_in_fp8(self) -> str:
        """What becomes of samples that stand alone, and have any number of tokens, in FP8."""
        self.use(fp8="tensorwise")
        self.model.eval()
        try:
            return str(float(self.answer_losses.evaluate(self.unpacked)[0]))
        except ValueError as error:
            return str(error)[:300]
        finally:
            self.model.train()


def differences(ours, reference) -> list[float]:
    return [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(ours, reference, strict=True)]


def levers(trained: Trained, found: dict) -> None:
    found["bytes of casts that differ"] = {k: v for k, v in casts_beside_transformer_engine().items() if v}
    found["largest values that are wrong"] = [name for name, right in largest_values_are_right().items() if not right]
    bf16 = trained.losses_and_gradients()
    found["bf16 again"] = differences(trained.losses_and_gradients(), bf16)
    fp8 = trained.losses_and_gradients(fp8="tensorwise")
    found["FP8 again"] = differences(trained.losses_and_gradients(fp8="tensorwise"), fp8)
    found["FP8, from bf16"] = differences(fp8, bf16)
    for name, (tried, recipe) in LEVERS.items():
        try:
            ours = trained.losses_and_gradients(tried, recipe)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:600]
            continue
        found[name] = differences(ours, fp8 if recipe else bf16)
        if recipe:
            found[f"{name}, from bf16"] = differences(ours, bf16)
        found[f"{name}: seconds, first pass"] = trained.seconds
    found["fell back"] = sorted(flash4._failed)
    found["tokens, patches"] = [trained.packed.input_ids.numel(), len(trained.packed.pixels)]


def summed(trained: Trained, micro_batches: int) -> list[float]:
    """[cosine, length over length] of gradients in Megatron's buffer in bf16, beside sums in float32."""
    chunks = trained.packed.chunks(1024, 128)
    trained.use()
    for p in trained.parameters:
        p.exact, p.main_grad = torch.zeros_like(p, dtype=torch.float32), torch.zeros_like(p)
    for number in range(micro_batches):
        for buffered in (False, True):
            kept = [p.main_grad for p in trained.parameters]
            if not buffered:
                for p in trained.parameters:
                    del p.main_grad
            trained.answer_losses(chunks[number % len(chunks)]).sum().backward()
            for p, buffer in zip(trained.parameters, kept, strict=True):
                if not buffered:
                    p.main_grad = buffer
                    p.exact += 0 if p.grad is None else p.grad
                elif p.grad is not None and not getattr(p, "grad_added_to_main_grad", False):
                    buffer += p.grad  # as Megatron's hook does
                p.grad, p.grad_added_to_main_grad = None, False
    ours = torch.cat([p.main_grad.flatten().float() for p in trained.parameters])
    exact = torch.cat([p.exact.flatten() for p in trained.parameters])
    for p in trained.parameters:
        del p.main_grad, p.exact
    return [torch.dot(ours / ours.norm(), exact / exact.norm()).item(), (ours.norm() / exact.norm()).item()]


def seams(trained: Trained, found: dict) -> None:
    for fp8 in (None, "tensorwise"):
        trained.use(fp8=fp8)
        kind = "FP8" if fp8 else "bf16"
        found[f"validation in {kind}: packed, unpacked"] = [
            trained.validation([trained.packed]), trained.validation(trained.unpacked)
        ]  # fmt: skip
    found["samples alone, in FP8"] = trained.alone_in_fp8()
    for micro_batches in (1, 16, 224):
        found[f"gradients of {micro_batches} micro-batches"] = summed(trained, micro_batches)
    trained.use(fp8="tensorwise")
    # As in a training: validated, a step that changes weights, validated again; then as a process that starts with them.
    with torch.no_grad():
        for p in trained.parameters:
            if p.dim() == 2:
                p *= 1.3
    stale = [trained.validation([trained.packed]), trained.validation(trained.unpacked)]
    trained.cast_again()
    fresh = [trained.validation([trained.packed]), trained.validation(trained.unpacked)]
    for module in trained.model.modules():
        vars(module).pop("weight_in_fp8", None)
        getattr(module, "_fp8_workspaces", {}).clear()
    trained.cast_again()
    found["weights changed, not cast again: packed, unpacked"] = stale
    found["weights changed: packed, unpacked"] = fresh
    found["a new process: packed, unpacked"] = [
        trained.validation([trained.packed]), trained.validation(trained.unpacked)
    ]  # fmt: skip


class Found(dict):
    """Figures, each printed when it is there."""

    def __setitem__(self, name, figure) -> None:
        super().__setitem__(name, figure)
        print("FOUND", name, json.dumps(figure), flush=True)


if __name__ == "__main__":
    trained, found = Trained(sys.argv[1]), Found()
    for part in sys.argv[2:] or ["levers"]:
        {"levers": levers, "seams": seams}[part](trained, found)
    print("RESULT", json.dumps(found))
