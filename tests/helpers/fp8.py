"""FP8 on a CPU: what the fused layers need of Transformer Engine, in PyTorch, with one scale a tensor."""

from types import SimpleNamespace

import torch

from llava_sft.model import casts, products

KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Operand(SimpleNamespace):
    """`rows` and `columns` (transposed) in FP8, and the reciprocal of the scale."""

    def update_usage(self, rowwise_usage):
        self.rows = self.rows if rowwise_usage else None

    def values(self):
        """In float32, of the copy in columns."""
        return self.columns.t().float() * self.scale_inv


class Quantizer:
    def __init__(self, dtype: str, counted: list):
        self.dtype, self.counted = dtype, counted

    def quantize_impl(self, x):
        self.counted.append(tuple(x.shape))
        return Operand(
            **dict(
                zip(("rows", "columns", "scale_inv"), cast(x, x.float().abs().max(), KINDS[self.dtype]), strict=True)
            )
        )


def cast(x, largest, kind):
    scale = torch.tensor(casts.LARGEST[kind]) / largest if largest > 0 else torch.tensor(1.0)
    small = (x.float() * scale).to(kind)
    return small, small.t().contiguous(), 1 / scale


def general_gemm(a, b, *, layout="TN", out=None, accumulate=False, out_dtype=None, **named):
    """Of row-major operands: TN a and b in rows, NN and NT in columns where TE takes those. The sixteen of cuBLAS is asked."""
    if layout == "TN":
        result = (b.rows.float() * b.scale_inv) @ (a.rows.float() * a.scale_inv).t()
        tokens = b.rows.size(0)
    elif layout == "NN":
        result, tokens = (b.rows.float() * b.scale_inv) @ a.values(), b.rows.size(0)
    else:
        assert a.rows is None, "only the copy in columns is kept"
        result, tokens = b.values().t() @ a.values(), b.columns.size(1)
    assert tokens % 16 == 0, f"{layout} of {tokens} tokens"
    if out is None:
        return (result.to(out_dtype),)
    out.add_(result) if accumulate else out.copy_(result)
    return (out,)


def use(model, monkeypatch) -> list:
    """FP8 in the fused layers of the language model. Returns a list that gets the shape of each tensor that is cast in the way that
    reads it twice."""
    counted: list = []
    kept = tuple(Quantizer(kind, counted) for kind in ("e4m3", "e4m3", "e5m2"))
    monkeypatch.setattr(products, "quantizers", lambda recipe: kept)
    monkeypatch.setattr(products, "general_gemm", general_gemm, raising=False)
    monkeypatch.setattr(products, "DType", SimpleNamespace(kFloat8E4M3="e4m3"), raising=False)
    monkeypatch.setattr(products, "Float8TensorStorage", storage, raising=False)
    # The interpreter does not round to FP8 as hardware does (test_gpu.py has that); the largest values are the kernels'.
    largest = lambda amax: amax.view(casts.SLOTS, casts.APART)[:, 0].max()  # noqa: E731
    monkeypatch.setattr(casts, "cast", lambda x, amax, kind: cast(x, largest(amax), kind))
    decoder = model.language_model.decoder
    monkeypatch.setattr(decoder.config, "fp8", "hybrid")
    monkeypatch.setattr(decoder.config, "fp8_recipe", "tensorwise")
    for module in decoder.modules():
        if getattr(module, "weight", None) is not None:
            monkeypatch.setitem(vars(module), "is_first_microbatch", True)
    return counted


def storage(data, data_transpose, fp8_scale_inv, fp8_dtype, **named):
    kind = KINDS[fp8_dtype]
    return Operand(rows=data.view(kind), columns=data_transpose.view(kind), scale_inv=fp8_scale_inv)
