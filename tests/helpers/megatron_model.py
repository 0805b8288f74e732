"""Megatron in the tests' own process: the model, its losses and gradients, and the GPU's layers on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from helpers.conversations import VALUES
from llava_sft.megatron import cpu


@contextmanager
def megatron_here() -> Iterator[Callable]:
    """`build_model`, with Megatron set up as training does it; taken back at the end."""
    with pytest.MonkeyPatch.context() as patch:
        real = {}
        replace = cpu._replace

        def remember(owner, name, value):
            real.setdefault((owner, name), vars(owner).get(name))
            replace(owner, name, value)

        patch.setattr(cpu, "_replace", remember)
        cpu.apply()
        from megatron.core import parallel_state

        from llava_sft.megatron import parallel
        from llava_sft.training.forward import build_model

        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        parallel.start(VALUES, torch.distributed.HashStore())
        yield build_model
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
        for (owner, name), value in real.items():
            delattr(owner, name) if value is None else setattr(owner, name, value)
        cpu.PATCHED.clear()


def answer_losses(model, batch):
    """Loss of every answer token of a batch, packed or padded."""
    from llava_sft.model.attention import packed_seq_params

    return mcore_forward(
        model,
        batch,
        answer_index=batch.answer_index,
        answer_labels=batch.answer_labels,
        packed_seq_params=packed_seq_params(batch.segments, torch.device("cpu")) if batch.segments else None,
    )


def mcore_forward(model, batch, **kwargs):
    grids = [tuple(grid) for grid in batch.grids.tolist()]
    return model(batch.input_ids, batch.pixels, grids, batch.image_index, **kwargs)


def greatest_difference(ours, theirs):
    """Relative to the greatest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def losses_and_gradients(model, batches):
    model.zero_grad()
    losses = torch.cat([answer_losses(model, batch) for batch in batches])
    losses.sum().backward()
    return losses.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    assert greatest_difference(ours[0], theirs[0]) <= 1e-5
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        difference = greatest_difference(ours[1][name], gradient)
        assert difference <= 1e-5, f"{name}: {difference:.1e}"


def use_fused_layers(model, monkeypatch) -> set[bool]:
    """The GPU's layers in the place of Megatron's, with PyTorch's attention in the place of cuDNN's, and the kernels run by
    Triton's interpreter. Returns a set that gets, of each tower that is used, whether it is causal."""
    from megatron.core.transformer.enums import AttnMaskType

    from llava_sft.model import fused_layers
    from llava_sft.model.attention import SegmentAttention

    seen = set()

    def attend(query, key, value, segments, causal):
        seen.add(causal)
        kind = AttnMaskType.causal if causal else AttnMaskType.no_mask
        attention = SegmentAttention(SimpleNamespace(attention_dropout=0.0), 1, kind, "self")
        return attention(query, key, value, packed_seq_params=segments).view_as(query), None

    def attend_backward(grad, inputs, out, statistics, segments, causal):
        inputs = [tensor.detach().requires_grad_() for tensor in inputs]
        with torch.enable_grad():
            out = attend(*inputs, segments, causal)[0]
        return torch.autograd.grad(out, inputs, grad.view_as(out))

    monkeypatch.setattr(fused_layers, "attend", attend)
    monkeypatch.setattr(fused_layers, "attend_backward", attend_backward)
    for kind, tower in (
        (fused_layers.FusedLanguageLayer, model.language_model),
        (fused_layers.FusedVisionLayer, model.vision_model),
    ):
        for layer in tower.decoder.layers:
            monkeypatch.setattr(layer, "__class__", kind)
            for linear, norm in (
                (layer.self_attention.linear_qkv, layer.input_layernorm),
                (layer.mlp.linear_fc1, layer.pre_mlp_layernorm),
            ):  # where Transformer Engine keeps them
                monkeypatch.setitem(vars(linear), "layer_norm_weight", norm.weight)
                monkeypatch.setitem(vars(linear), "layer_norm_bias", getattr(norm, "bias", None))
    return seen


def recompute_all(model, monkeypatch) -> None:
    for tower in (model.language_model, model.vision_model):
        recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        for name, value in recompute.items():
            monkeypatch.setattr(tower.decoder.config, name, value)
