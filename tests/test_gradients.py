"""Matrix products and the gradients of their weights, in Megatron's buffer: added in place, and in bf16 (`optimizer_precision:
bf16`) beside the same sums in float32, whether the micro-batches of a step agree on the direction or not."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from llava_sft.megatron import distributed
from llava_sft.model.kernels import scale_
from llava_sft.model.products import AccumulatingLinear, has_room, weight_gradient


@pytest.mark.parametrize("agree", [0.0, 1.0, 100.0])
@pytest.mark.parametrize(("micro_batches", "error"), [(1, 0.003), (16, 0.006), (224, 0.025)])
def test_sums_in_bf16_keep_direction_and_length(micro_batches, error, agree):
    torch.manual_seed(0)
    weight, direction = torch.nn.Parameter(torch.zeros(48, 96, dtype=torch.bfloat16)), torch.randn(96, 48)
    weight.main_grad, exact = torch.zeros_like(weight.detach()), torch.zeros(48, 96)
    for _ in range(micro_batches):
        x = torch.randn(128, 96).bfloat16()
        grad = (agree * x.float() @ direction / 10 + torch.randn(128, 48)).bfloat16()
        weight_gradient(weight, grad, x)
        exact += grad.float().t() @ x.float()
    found = weight.main_grad.float()
    assert (found - exact).norm() < error * exact.norm()
    assert torch.cosine_similarity(found.flatten(), exact.flatten(), 0) > 0.9997
    assert found.norm() == pytest.approx(exact.norm().item(), rel=0.005)


@pytest.mark.parametrize("recomputed", [False, True])
def test_weight_gradients_are_added_to_megatrons_buffer_in_place(recomputed):
    x, weight = torch.randn(7, 5, requires_grad=True), torch.nn.Parameter(torch.randn(3, 5))
    weight.main_grad = torch.ones(3, 5)
    if recomputed:
        out = checkpoint(AccumulatingLinear.apply, x, weight, use_reentrant=False)
    else:
        out = AccumulatingLinear.apply(x, weight)
    out.sum().backward()
    assert weight.grad_added_to_main_grad
    torch.testing.assert_close(weight.main_grad, 1 + x.detach().sum(0).expand(3, 5))


def test_a_product_with_a_frozen_weight_keeps_no_input():
    x, weight, kept = torch.randn(7, 5, requires_grad=True), torch.nn.Parameter(torch.randn(3, 5)), []
    for trained in (True, False):
        weight.requires_grad_(trained)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda saved: saved
        ):
            AccumulatingLinear.apply(x, weight).sum().backward()
    assert [tuple(tensor.shape) for tensor in kept] == [(7, 5)] and weight.grad.shape == weight.shape
    torch.testing.assert_close(x.grad, 2 * weight.detach().sum(0).expand(7, 5))


def test_one_row_has_no_room_beside_it_whatever_its_stride():
    assert has_room(torch.empty(2, 12)[:, :8]) and not has_room(torch.empty(2, 8))
    assert not has_room(torch.empty(1, 8).as_strided((1, 8), (12, 1)))


def test_gradients_are_scaled_in_place():
    gradients = torch.randn(5000)
    expected = gradients / 4633
    scale_(gradients, torch.tensor(1 / 4633))
    torch.testing.assert_close(gradients, expected)


def test_gradients_of_what_sees_images_are_summed_over_the_ranks_in_one_call(monkeypatch):
    calls = []

    class Group:
        def size(self):
            return 2

        def allreduce_coalesced(self, gradients):
            calls.append(gradients)
            return SimpleNamespace(wait=lambda: [gradient.mul_(2) for gradient in gradients])

    monkeypatch.setattr(distributed.parallel_state, "get_tensor_model_parallel_group", Group)
    model = torch.nn.ModuleDict({part: torch.nn.Linear(3, 2) for part in ("vision_model", "adapter", "language_model")})
    model.pre_process = True
    model["vision_model"].bias.requires_grad_(False)
    for parameter in model.parameters():
        parameter.main_grad = torch.ones_like(parameter)
    distributed.sum_over_images(model)
    summed = {name for name, parameter in model.named_parameters() if bool((parameter.main_grad == 2).all())}
    assert len(calls) == 1 and summed == {"vision_model.weight", "adapter.weight", "adapter.bias"}
    model.requires_grad_(False)
    distributed.sum_over_images(model)
    assert len(calls) == 1
