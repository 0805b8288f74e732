"""The gradients of weights are summed in bf16 over the micro-batches of a step, in Megatron's buffer (`optimizer_precision:
bf16`): beside the same sums in float32, whether micro-batches agree on the direction or not."""

import pytest
import torch

from llava_sft.model.products import weight_gradient


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
