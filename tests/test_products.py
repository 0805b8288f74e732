"""Products of the fused layers by themselves: where the weight's gradient goes, and what is kept for it."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from llava_sft.model.products import AccumulatingLinear, has_room


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
