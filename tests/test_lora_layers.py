"""LoRA's pairs in the model: their gradients, on Megatron's layers and on the GPU's, and what dropout leaves out."""

from types import SimpleNamespace

import pytest
import torch

from helpers.conversations import VALUES, conversation, loader_batch
from helpers.megatron_model import (
    assert_same,
    greatest_difference,
    losses_and_gradients,
    megatron_here,
    recompute_all,
    use_fused_layers,
)
from llava_sft.machine import GIB
from llava_sft.model.kernels import leave_out, leave_out_on_cpu
from llava_sft.model.tensors import PARTS
from llava_sft.preflight.cost import MicroBatch, activation_bytes, stages, state_bytes
from llava_sft.settings.layers import load_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU layer changes nothing where there is a GPU")
RANK, SCALE = 8, 2.0  # what products of both at once want: 8 columns


@pytest.fixture(scope="module")
def models(small_model):
    """`with_pairs(parts, dropout)`, none of whose pairs is zero, and the same model with the pairs added to its weights."""
    with megatron_here() as build_model:

        def with_pairs(parts=PARTS, dropout=0.0):
            torch.manual_seed(3)
            given = {"trainable_modules": list(parts), "lora_modules": list(parts), "lora_dropout": dropout}
            values = VALUES.model_copy(update=given | {"lora_rank": RANK, "lora_alpha": RANK * SCALE})
            model = build_model(small_model, values).train()
            for name, parameter in model.named_parameters():
                if "norm" not in name and not name.endswith("lora_a"):
                    torch.nn.init.normal_(parameter, std=0.05)
            return model

        def merged(model):
            dense = build_model(small_model, VALUES).train()
            dense.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" not in k})
            modules = dict(dense.named_modules())
            for name, module in model.named_modules():
                if hasattr(module, "lora_a"):
                    modules[name].weight.data += SCALE * (module.lora_b @ module.lora_a).detach()
            return dense

        yield with_pairs, merged


@pytest.fixture(scope="module")
def batch(small_checkpoint):
    """A pack of a picture and a text, one turn each: the interpreter takes most of this file's time."""
    messages, pictures = conversation(1)
    turns = [(messages[2:], pictures), (conversation(0, 1)[0][:2], [])]
    return loader_batch(small_checkpoint, turns, packing=True, pad_multiple=16)


def expected_of(model, dense, batch):
    """Losses and gradients of pairs, out of those of the merged weights: W + s·B·A has gradient G, so A has s·Bᵀ·G and B
    s·G·Aᵀ."""
    losses, gradients = losses_and_gradients(dense, [batch])
    expected = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_a"):
            gradient = gradients[f"{name}.weight"]
            expected[f"{name}.lora_a"] = SCALE * module.lora_b.detach().t() @ gradient
            expected[f"{name}.lora_b"] = SCALE * gradient @ module.lora_a.detach().t()
    return losses, expected


def test_gradients_of_pairs_are_those_of_plain_pytorch(models, batch, monkeypatch):
    """Of all parts, on Megatron's layers and on the GPU's, which keep what is cheap to compute or make it again."""
    from llava_sft.model import fused_layers
    from llava_sft.model.lora_layers import settle
    from llava_sft.model.products import move_back

    with_pairs, merged = models
    model = with_pairs()
    expected = expected_of(model, merged(model), batch)
    assert len(expected[1]) == 2 * (4 + 4 + 4 + 4 + 2)
    assert_same(losses_and_gradients(model, [batch]), expected)
    seen = use_fused_layers(model, monkeypatch)
    assert_same(losses_and_gradients(model, [batch]), expected)
    assert seen == {True, False}
    monkeypatch.setattr(fused_layers, "has_memory_for_inputs", lambda layer, tokens: True)
    assert_same(losses_and_gradients(model, [batch]), expected)
    linear = model.language_model.decoder.layers[0].mlp.linear_fc1
    before = linear.weight.detach().clone()
    assert not linear.weight.is_contiguous()  # B lies beside it
    model.eval()
    move_back(linear)  # as a validation of unpacked samples does
    assert linear.weight.is_contiguous() and linear.weight.equal(before)
    settle(model.train())
    assert not linear.weight.is_contiguous() and linear.weight.equal(before)
    move_back(linear)  # samples are trained unpacked: it stays there
    settle(model)
    assert linear.weight.is_contiguous()


@pytest.mark.parametrize("pairs, ranks", [(True, 1), (False, 1), (False, 2)])
def test_what_is_cheap_to_compute_is_kept_where_memory_is_to_spare_as_preflight_predicts(monkeypatch, pairs, ranks):
    """Of a GPU of 80 GiB of which PyTorch may take a part; others hold some of it, and some blocks of PyTorch's are free."""
    from llava_sft.model.fused_layers import has_memory_for_inputs

    lora = {"trainable_modules": ["language_model"], "lora_rank": 32, "lora_alpha": 32}
    here = {"gpus_per_node": ranks, "nproc_per_node": ranks, "tensor_model_parallel_size": ranks, "bf16": True}
    given = lora if pairs else {"trainable_modules": ["adapter"]}
    values, model = VALUES.model_copy(update=given | here), load_model("4b")
    (whole,) = stages(model, values)
    t, tokens, state = model.language, 8192, sum(state_bytes(model, values, whole).values())

    def linear(out, columns, frozen=True):
        shape = (out, columns)
        weight = SimpleNamespace(is_cuda=True, requires_grad=not frozen, size=shape.__getitem__, element_size=lambda: 2)
        return SimpleNamespace(weight=weight)

    heads = t.num_attention_heads * t.kv_channels // ranks
    own = heads + 2 * t.num_query_groups * t.kv_channels // ranks
    attention = SimpleNamespace(linear_qkv=linear(own, t.hidden_size), linear_proj=linear(t.hidden_size, heads))
    mlp = SimpleNamespace(linear_fc1=linear(2 * t.ffn_hidden_size // ranks, t.hidden_size))
    vars(mlp.linear_fc1).update({"lora_a": None} if pairs else {})
    layer = SimpleNamespace(self_attention=attention, mlp=mlp, config=SimpleNamespace(num_layers=t.num_layers))

    def kept(gib, others=0.0):
        all_of_it, cached = 80 * GIB, GIB
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: gib / 80)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (all_of_it - others * GIB - state - cached, all_of_it))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: state)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: state + cached)
        return has_memory_for_inputs(layer, tokens)

    def predicted(gib):
        batch = MicroBatch(tokens, 0, 0, 0)
        return activation_bytes(model, values, batch, gib * GIB, whole)["language activations"]

    extra = 2 * t.num_layers * tokens * (own + pairs * (2 * t.hidden_size + t.ffn_hidden_size))
    for gib in range(22, 80, 2):
        assert kept(gib) == (predicted(gib) > predicted(1)), gib
    assert predicted(80) == predicted(1) + extra and kept(56) and not kept(22)
    assert not kept(80, others=50)
    layer.self_attention.linear_qkv = linear(own, t.hidden_size, frozen=False)  # they are kept anyway
    assert not kept(80)


def test_a_recomputed_text_without_pictures_has_gradients_in_every_layer(models, small_checkpoint, monkeypatch):
    with_pairs, _ = models
    model = with_pairs(["language_model"])
    batch = loader_batch(small_checkpoint, [conversation(0, 2)], packing=True, pad_multiple=16)
    expected = losses_and_gradients(model, [batch])
    recompute_all(model, monkeypatch)
    assert_same(losses_and_gradients(model, [batch]), expected)
    assert len(expected[1]) == 2 * 4 * 2


def test_with_a_the_identity_b_learns_as_the_dense_weight_does(models, batch):
    """Gradients, and a step of Adam."""
    with_pairs, _ = models
    model = with_pairs(["language_model", "vision_model"])
    dense = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_a"):
            out, columns = module.weight.shape
            module.lora_a = torch.nn.Parameter(torch.eye(columns), requires_grad=False)
            module.lora_b = torch.nn.Parameter(torch.zeros(out, columns))
            module.lora_scale = 1.0
            dense[f"{name}.lora_b"] = f"{name}.weight"
    losses, gradients = losses_and_gradients(model, [batch])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in dense.values())
    expected = losses_and_gradients(model, [batch])
    assert greatest_difference(losses, expected[0]) <= 1e-5
    parameters = dict(model.named_parameters())
    for b, weight in dense.items():
        assert greatest_difference(gradients[b], expected[1][weight]) <= 1e-5, b
        before = parameters[weight].detach().clone()
        for name, gradient in ((b, gradients[b]), (weight, expected[1][weight])):
            parameters[name].grad = gradient
            torch.optim.Adam([parameters[name]], lr=1e-2, eps=1e-5).step()
        assert greatest_difference(parameters[b].detach(), parameters[weight].detach() - before) <= 1e-5, b


def test_dropout_is_the_same_in_both_kinds_of_layer_and_when_recomputed(models, batch, monkeypatch):
    from llava_sft.model import fused_layers
    from llava_sft.model.lora_dropout import begin_pass

    with_pairs, _ = models
    model = with_pairs(dropout=0.5)

    def run(step, number=0):
        begin_pass(7, step, 0, number)
        return losses_and_gradients(model, [batch])

    first = run(1)
    assert_same(run(1), first)
    assert greatest_difference(run(2)[0], first[0]) > 1e-4
    assert greatest_difference(run(1, 1)[0], first[0]) > 1e-4
    recompute_all(model, monkeypatch)
    assert_same(run(1), first)
    use_fused_layers(model, monkeypatch)
    assert_same(run(1), first)
    monkeypatch.setattr(fused_layers, "has_memory_for_inputs", lambda layer, tokens: True)
    assert_same(run(1), first)
    monkeypatch.undo()
    model.eval()
    without = run(1)
    assert_same(run(2), without)
    assert greatest_difference(without[0], first[0]) > 1e-4


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_dropout_leaves_out_its_share_evenly_and_keeps_the_mean(share):
    x = torch.ones(400, 300)
    kept = leave_out_on_cpu(x, share, 12345, 0, 300)
    assert torch.equal(kept, leave_out(x, share, 12345, 0, 300))  # the GPU's kernel
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / (1 - share)).item()}
    out = (kept == 0).float()
    bound = 5 * (share * (1 - share)) ** 0.5
    assert abs(out.mean() - share) < bound / 120_000**0.5
    assert (out.mean(0) - share).abs().max() < bound / 400**0.5
    assert (out.mean(1) - share).abs().max() < bound / 300**0.5
    other = (leave_out_on_cpu(x, share, 54321, 0, 300) == 0).float()
    for shifted in (other, out.roll(1, 0), out.roll(1, 1)):  # neighbours and other layers are independent
        assert abs((out * shifted).mean() - share**2) < bound / 120_000**0.5
    halves = [leave_out_on_cpu(x[:, :150], share, 12345, first, 300) for first in (0, 150)]
    assert torch.equal(torch.cat(halves, 1), kept)  # columns of two tensor-parallel ranks
