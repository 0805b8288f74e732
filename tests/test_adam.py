"""The optimizer step with bf16 moments, on the CPU through Triton's interpreter, against AdamW in float32."""

from types import SimpleNamespace

import pytest
import torch

from llava_sft.megatron.adam import RoundedAdam, adam_step, keep_precision, round_evenly

SETTINGS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "decay": 0.1, "bias_correction": True}


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 → bf16 rounded to the nearest (ties up), and the 16 bits that it lacks."""
    bits = master.view(torch.int32)
    low = bits << 16 >> 16
    return ((bits >> 16) + (low < 0)).to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def joined(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    low = remainder.to(torch.int32)
    high = weight.view(torch.int16).to(torch.int32) - (low < 0).int()
    return (high << 16 | low & 0xFFFF).view(torch.float32)


def state(size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    master = torch.randn(size)
    weight, remainder = split(master)
    moments = torch.zeros(2, size, dtype=torch.bfloat16)
    return master, [weight, moments[0].clone(), moments[1].clone(), remainder]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_master_weights_take_the_step_of_adamw_in_float32(dtype):
    torch.manual_seed(0)
    master, tensors = state(1500)  # more than a block, and no multiple of it
    assert torch.equal(joined(tensors[0], tensors[3]), master)
    reference = torch.nn.Parameter(master.clone())
    adamw = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for step in (1, 2, 3):
        gradient = torch.randn(1500).to(dtype)
        reference.grad = gradient.float()
        adamw.step()
        adam_step([(gradient, *tensors)], [1], step=step, **SETTINGS)
        # The first moment is rounded to bf16 as before, the second at random: each by half or one part in 128 at most.
        assert (joined(tensors[0], tensors[3]) - reference).abs().max() <= (1e-6 if step == 1 else 3e-4)
    assert torch.equal(tensors[0], split(joined(tensors[0], tensors[3]))[0])


@pytest.mark.parametrize("beta2", [0.99, 0.999])
def test_the_second_moment_falls_again_after_one_large_gradient(beta2):
    _, tensors = state(1024)
    settings = SETTINGS | {"beta2": beta2}
    exact = torch.zeros(1)
    for step in range(1, 400):
        gradient = torch.full((1024,), 1.0 if step == 1 else 1e-2)
        exact = beta2 * exact + (1 - beta2) * gradient[:1] ** 2
        adam_step([(gradient, *tensors)], [1], step=step, **settings)
    assert abs(float(tensors[2].float().mean() / exact) - 1) <= 0.01
    assert float((tensors[2].float() / exact - 1).square().mean().sqrt()) <= 0.05


def test_the_same_seed_step_and_place_round_alike_and_others_do_not():
    def run(seed: int, start: int) -> torch.Tensor:
        torch.manual_seed(1)
        tensors = [state(1024)[1] for _ in range(2)]
        step = RoundedAdam(seed)
        for number in range(start, 3):
            torch.manual_seed(number)
            lists = [[torch.randn(1024) for _ in tensors], *map(list, zip(*tensors, strict=True))]
            step(65536, None, lists, 1e-2, 0.9, 0.999, 1e-8, number, 1, 1, 0.0)
        return torch.stack([moment2 for _, _, moment2, _ in tensors])

    assert torch.equal(run(5, 1), run(5, 1))
    assert not torch.equal(run(5, 1), run(6, 1))
    assert torch.equal(run(5, 2), run(5, 2))  # nothing is remembered from earlier steps: as after a resume
    first, second = run(5, 2)
    assert not torch.equal(first, second)


def test_only_an_adam_that_keeps_both_moments_in_bf16_is_changed():
    class Adam:
        store_param_remainders = True
        multi_tensor_adam_param_remainder = None

        def __init__(self, fuse_unscale: bool):
            self.fuse_unscale = fuse_unscale

    low, full = Adam(True), Adam(False)
    for adam in (low, full):
        round_evenly(adam, seed=3)
    assert isinstance(low.multi_tensor_adam_param_remainder, RoundedAdam)
    assert full.multi_tensor_adam_param_remainder is None


def test_moments_are_saved_in_the_precision_they_are_kept_in():
    class Adam:  # as Transformer Engine's behaves
        name_to_dtype_map = {"exp_avg": torch.bfloat16, "master_param": torch.float32}
        state = {"exp_avg": torch.ones(2, dtype=torch.bfloat16), "master_param": torch.ones(2, dtype=torch.int16)}

        def get_unscaled_state(self, param, name, skip_unscale=False):
            bf16 = self.state[name].dtype == torch.bfloat16
            return self.state[name].float() if bf16 and not skip_unscale else self.state[name]

        def set_scaled_state(self, param, name, state):
            assert state.dtype == (torch.int16 if name == "master_param" else torch.float32)
            self.state[name].copy_(state)

    adam = Adam()
    keep_precision(adam)
    for name in adam.state:
        state = adam.get_unscaled_state(None, name)
        assert state.data_ptr() == adam.state[name].data_ptr()
        adam.set_scaled_state(None, name, 2 * state)
        assert adam.state[name].tolist() == [2, 2]


def test_a_checkpoint_is_read_into_tensors_that_the_optimizer_takes_without_a_copy():
    first, second = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))
    adam = SimpleNamespace(
        get_unscaled_state=None, set_scaled_state=None, state={}, _scales={},
        param_groups=[{"params": [first], "lr": 1.0}, {"params": [second], "lr": 2.0}],
    )  # fmt: skip
    keep_precision(adam)
    tensors = [torch.zeros(2), torch.zeros(3)]
    adam.load_state_dict({
        "state": {number: {"exp_avg": tensor} for number, tensor in enumerate(tensors)},
        "param_groups": [{"params": [0], "lr": 3.0, "step": 7}, {"params": [1], "lr": 4.0, "step": 7}],
    })  # fmt: skip
    for group, parameter, tensor, lr in zip(adam.param_groups, (first, second), tensors, (3.0, 4.0), strict=True):
        assert adam.state[parameter]["exp_avg"] is tensor
        assert group == {"params": [parameter], "lr": lr, "step": 7}
        assert adam._scales[parameter]["exp_avg"].tolist() == [1]
