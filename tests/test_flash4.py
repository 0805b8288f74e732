"""FlashAttention-4's compiled kernels are called as its own Python function calls them: beside it, without a GPU and without
kernels, on tensors without values. Skipped where it is not installed."""

from types import SimpleNamespace

import pytest
import torch

from llava_sft.model import flash4

interface = pytest.importorskip("flash_attn.cute.interface", exc_type=ImportError)


class Kernels(dict):
    """As if all were compiled: kernels that do nothing."""

    def __contains__(self, key):
        return True

    def __getitem__(self, key):
        return lambda *given: None


@pytest.mark.parametrize(("heads", "groups", "head_dim", "causal"), [(16, 16, 64, False), (32, 8, 128, True)])
def test_kernels_are_called_as_the_library_calls_them(monkeypatch, heads, groups, head_dim, causal):
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setenv("FLASH_ATTENTION_ARCH", "sm_90")
    monkeypatch.setattr(interface, "is_fake_mode", lambda: False)
    monkeypatch.setattr(interface, "get_num_sms_for_selection", lambda *given: 132)
    for name in ("_flash_attn_fwd", "_flash_attn_bwd", "_bwd_preprocess", "_bwd_postprocess_convert"):
        monkeypatch.setattr(getattr(interface, name), "compile_cache", Kernels())
    monkeypatch.setattr(flash4, "_kernels", {})
    with FakeTensorMode():
        query, key, value = (
            torch.empty(2050, number, head_dim, dtype=torch.bfloat16, device="cuda")
            for number in (heads, groups, groups)
        )
        ends = torch.empty(3, dtype=torch.int32, device="cuda")
        segments = SimpleNamespace(cu_seqlens_q=ends, max_seqlen_q=1025)
        for _ in range(2):  # the second time without the library's function
            out, kept = flash4.attend(query, key, value, segments, causal)
            grads = flash4.attend_backward(out, (query, key, value), out, kept, segments, causal)
        assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]
        called = {kind: len(kernels) for kind, kernels in flash4._kernels.items()}
        shape = heads, groups, head_dim, causal
        assert called == {(False, *shape): 1, (True, *shape): 3 if heads == groups else 5}
        wrong = [flash4._backward_arguments(out, (query, key, value), out, kept[0], ends, causal, grads)[0][:-1]]
        with pytest.raises(RuntimeError, match="other arguments"):
            flash4._checked([(None, (*wrong[0], 1.0))], [(*wrong[0], None)])
