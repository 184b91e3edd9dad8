"""The ops of a decoder layer in bf16, fp16 and fp8: against fp64, beside torch in the same dtype, and independent of the batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import BACKENDS
from uma_kernels import dispatch, kv_cache
from uma_kernels.activation import geglu_tanh, swiglu
from uma_kernels.check import ShapeError
from uma_kernels.label_head import label_head, token_logprobs
from uma_kernels.linear import FP8, gated_linear, gather_rows, linear, pack
from uma_kernels.linear.cases import WeightFormat
from uma_kernels.linear.reference import quantize_fp8
from uma_kernels.norm import add_rms_norm, rms_norm
from uma_kernels.rope import rope, rotary_table
from uma_kernels.testing import assert_exact, assert_invariant, assert_reduction

HALVES = (torch.bfloat16, torch.float16)
# Compiled CPU kernels take fp32 alone: 16-bit tensors of the CPU go to the reference, whatever cpp could do.
both = pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("reference", "triton")], indirect=True)
triton_only = pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "triton"], indirect=True)
by_dtype = pytest.mark.parametrize("dtype", HALVES, ids=str)


@both
@by_dtype
@pytest.mark.parametrize(("tokens", "rows", "width"), [(0, 3, 16), (1, 1, 1), (3, 33, 40), (17, 50, 130), (70, 40, 96)])
def test_linear(tokens: int, rows: int, width: int, dtype: torch.dtype, backend: str) -> None:
    x, w, bias = torch.randn(tokens, width).to(dtype), torch.randn(rows, width).to(dtype), torch.randn(rows).to(dtype)
    packed = pack(w)
    assert packed.dtype is dtype
    for b in (None, bias):
        true = F.linear(x.double(), w.double(), None if b is None else b.double())
        out = linear(x, packed, b)
        assert out.dtype is dtype
        assert_reduction(out, F.linear(x, w, b), true, dtype)
    wide = torch.full((tokens, rows + 7), 7.0, dtype=dtype)
    linear(x, packed, bias, wide[:, 3 : 3 + rows])
    assert_exact(wide[:, 3 : 3 + rows].contiguous(), linear(x, packed, bias))
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 3 + rows :] == 7).all()
    ids = torch.randint(rows, (5,))
    assert_exact(gather_rows(packed, ids), w[ids])
    before = torch.randn(tokens, rows).to(dtype)
    out = before.clone()
    linear(x, packed, bias, out, add=True)
    true = F.linear(x.double(), w.double(), bias.double()) + before.double()
    assert_reduction(out, F.linear(x, w, bias) + before, true, dtype)


@triton_only
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, FP8], ids=str)
@pytest.mark.parametrize(
    ("rows", "width"), [(1024, 3072), (2048, 1000), (4096, 4096), (6144, 96), (24576, 512), (70, 130)]
)
def test_a_row_has_the_same_bits_in_every_batch(rows: int, width: int, dtype: torch.dtype, backend: str) -> None:
    """Numbers of tokens on both sides of every change of tile; with the interpreter small shapes alone."""
    if dispatch.interpreted() and rows * width > 10_000:
        pytest.skip("too large for the interpreter")
    if dtype is FP8 and width % 16:
        width += 16 - width % 16
    counts = (2, 5, 17, 40) if dispatch.interpreted() else (2, 16, 63, 64, 65, 128, 200, 513, 1024, 2048, 4100)
    packed = pack(torch.randn(rows, width).to(torch.float32 if dtype is FP8 else dtype), FP8 if dtype is FP8 else None)
    x = torch.randn(max(counts), width).to(packed.dtype)
    picked = [0, 1, max(counts) // 2, max(counts) - 1]
    alone = {t: linear(x[t : t + 1].clone(), packed) for t in picked}
    for count in counts:
        for first in {0, max(counts) - count}:
            together = linear(x[first : first + count], packed)
            for t in picked:
                if first <= t < first + count:
                    assert_invariant(together[t - first], alone[t][0])


@triton_only
@pytest.mark.parametrize("mode", ["audit", "fast"])
def test_both_modes_multiply(mode: str, backend: str) -> None:
    x, w, bias = torch.randn(9, 64), torch.randn(40, 64), torch.randn(40)
    for dtype in (torch.float32, *HALVES):
        args = [v.to(dtype) for v in (x, w, bias)]
        out = torch.zeros(9, 50, dtype=dtype)[:, 4:44]
        linear(args[0], pack(args[1], mode=mode), args[2], out)
        assert_reduction(out, F.linear(*args), F.linear(*(v.double() for v in args)), dtype)
        before = out.clone()
        linear(args[0], pack(args[1], mode=mode), args[2], out, add=True)
        true = F.linear(*(v.double() for v in args)) + before.double()
        assert_reduction(out, F.linear(*args) + before, true, dtype)


GATED_SHAPES = [(0, 3, 16), (1, 1, 1), (1, 100, 96), (3, 33, 130), (17, 50, 40), (40, 32, 64), (70, 45, 160)]
LARGE_GATED_SHAPES = [
    (1, 3072, 1024),
    (16, 12288, 512),
    (64, 3000, 512),
    (200, 1000, 96),
    (1024, 3072, 1024),
    (4100, 1096, 512),
]


@triton_only
@pytest.mark.parametrize("activation", [swiglu, geglu_tanh])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, FP8], ids=str)
@pytest.mark.parametrize(("tokens", "half", "width"), GATED_SHAPES + LARGE_GATED_SHAPES)
def test_a_gated_product_has_the_bits_of_a_product_and_its_activation(
    tokens: int, half: int, width: int, dtype: torch.dtype, activation: Callable[..., torch.Tensor], backend: str
) -> None:
    """One tile and several, halves that end inside a tile, one row; with a bias and without."""
    if dispatch.interpreted() and (tokens, half, width) in LARGE_GATED_SHAPES:
        pytest.skip("too large for the interpreter")
    if dtype is FP8 and width % 16:
        width += 16 - width % 16
    packed = pack(torch.randn(2 * half, width).to(torch.float32 if dtype is FP8 else dtype), dtype)
    x, bias = torch.randn(tokens, width).to(packed.dtype), torch.randn(2 * half).to(packed.dtype)
    for b in (None, bias):
        out = gated_linear(x, packed, activation, b)
        assert_exact(out, activation(linear(x, packed, b)))
        if tokens:
            assert_invariant(gated_linear(x[-1:].clone(), packed, activation, b), out[-1:])


@triton_only
@pytest.mark.skipif(not dispatch.interpreted(), reason="a GPU chooses by itself")
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize(("tokens", "half", "width"), [(70, 45, 160), (40, 96, 48), (3, 33, 16)])
def test_descriptors_name_the_elements_that_pointers_do(
    tokens: int, half: int, width: int, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boxes that end past the rows of x, of the weight, of its gate and of K; two of 4 programs' tiles follow each other."""
    from uma_kernels.linear import triton_gated, triton_kernel

    packed, x = pack(torch.randn(2 * half, width).bfloat16(), dtype), torch.randn(tokens, width).bfloat16()
    by_pointers = linear(x, packed), gated_linear(x, packed, swiglu)
    for module in (triton_kernel, triton_gated):
        monkeypatch.setattr(module, "device_limits", lambda device: (4, 9))
    assert isinstance(
        triton_kernel.operands(x, packed.data, triton_kernel.EMULATED, 64)[1], triton_kernel.TensorDescriptor
    )
    assert_exact(linear(x, packed), by_pointers[0])
    assert_exact(gated_linear(x, packed, swiglu), by_pointers[1])


@both
def test_fp8_multiplies_what_its_quants_and_scales_say(backend: str) -> None:
    x, w, bias = torch.randn(19, 160).bfloat16(), torch.randn(37, 160), torch.randn(37).bfloat16()
    x[3], w[5] = 0, 0
    packed = pack(w, FP8)
    assert packed.nbytes == 37 * 160 + 37 * 4
    (qx, sx), (qw, sw) = quantize_fp8(x), quantize_fp8(w)
    rounded_x, rounded_w = qx.double() * sx[:, None].double(), qw.double() * sw[:, None].double()
    true = F.linear(rounded_x, rounded_w, bias.double())
    assert_reduction(linear(x, packed, bias), true.bfloat16(), true, torch.bfloat16)
    assert_exact(gather_rows(packed, torch.tensor([36, 0])), rounded_w[[36, 0]].bfloat16())


def test_another_dtype_or_mode_is_refused() -> None:
    for bad in ({"dtype": torch.float64}, {"dtype": torch.int8}, {"mode": "slow"}):
        with pytest.raises(ValueError):
            pack(torch.randn(3, 32), **bad)
    with pytest.raises(ShapeError):
        linear(torch.randn(2, 32), pack(torch.randn(3, 32), torch.bfloat16))


@both
def test_a_quantised_weight_becomes_the_dtype_asked_for(backend: str) -> None:
    weight = WeightFormat(4, 32, True).random(33, 64)
    assert not isinstance(weight, torch.Tensor)
    packed = pack(weight, torch.bfloat16)
    assert_exact(gather_rows(packed, torch.arange(33)), weight.dequantize().bfloat16())


@both
@by_dtype
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 65), (5, 576), (33, 128)])
def test_norms(tokens: int, width: int, dtype: torch.dtype, backend: str) -> None:
    x, residual = torch.randn(2, tokens, width).to(dtype)
    weight = torch.randn(width).to(dtype)
    out = rms_norm(x, weight, 1e-5)
    true = F.rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert_reduction(out, F.rms_norm(x, (width,), weight, 1e-5), true, dtype)
    summed = x + residual
    assert_invariant(add_rms_norm(x, residual, weight, 1e-5), rms_norm(summed, weight, 1e-5))
    assert_exact(residual, summed)


@both
@by_dtype
def test_rope(dtype: torch.dtype, backend: str) -> None:
    table = rotary_table(10000.0 ** (-torch.arange(0, 80, 2, dtype=torch.float32) / 80), 50)
    q, k, positions = torch.randn(7, 3, 80).to(dtype), torch.randn(7, 1, 80).to(dtype), torch.randint(50, (7,))
    wide = q.float().clone(), k.float().clone()
    with dispatch.use_backend("reference"):
        rope(*wide, positions, table)
    rope(q, k, positions, table)
    for ours, true in zip((q, k), wide, strict=True):
        assert_reduction(ours, true.to(dtype), true.double(), dtype)


@both
@by_dtype
def test_gated_activations(dtype: torch.dtype, backend: str) -> None:
    gate_up = (torch.randn(5, 2600) * 3).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    for ours, plain in ((swiglu, F.silu(gate)), (geglu_tanh, F.gelu(gate, approximate="tanh"))):
        true = plain * up
        assert_reduction(ours(gate_up), true.to(dtype), true, dtype)


@both
@by_dtype
def test_cache_moves(dtype: torch.dtype, backend: str) -> None:
    k, v = torch.randn(2, 5, 2, 24).to(dtype)
    k_cache, v_cache = torch.zeros(2, 9, 2, 24, dtype=dtype)
    slots = torch.tensor([8, 0, -1, 3, 5], dtype=torch.int32)
    kv_cache.write(k, v, k_cache, v_cache, slots)
    kept = slots[slots >= 0]
    assert_exact(kv_cache.gather(k_cache, kept), k[slots >= 0])
    assert_exact(kv_cache.gather(v_cache, kept), v[slots >= 0])


@both
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "vocabulary", "width", "labels"), [(1, 1, 8, 1), (6, 131, 40, 1), (5, 300, 96, 3)])
def test_label_logits_and_log_probabilities(
    tokens: int, vocabulary: int, width: int, labels: int, dtype: torch.dtype, backend: str
) -> None:
    w, hidden = torch.randn(vocabulary, width).to(dtype), torch.randn(tokens, width).to(dtype)
    weight, rows = pack(w), torch.randint(tokens, (tokens + 2,))
    x = hidden[rows].double()
    ids = torch.randint(vocabulary, (labels,))
    assert_reduction(
        label_head(hidden, rows, weight, ids), x.float() @ w[ids].float().T, x @ w[ids].double().T
    )  # fp32 sums whatever the dtype
    chosen = torch.randint(vocabulary, (tokens + 2, labels))
    true = (x @ w.double().T).log_softmax(1).gather(1, chosen)
    plain = (x.float() @ w.float().T).log_softmax(1).gather(1, chosen)
    ours = token_logprobs(hidden, rows, weight, chosen)
    assert_reduction(ours, plain, true)
    assert (ours <= 0).all()
    if backend == "triton":
        alone = token_logprobs(hidden[rows[-1:]].clone(), torch.zeros(1, dtype=torch.int64), weight, chosen[-1:])
        assert_invariant(alone[0], ours[-1])


@both
def test_log_probabilities_refuse_what_is_out_of_range(backend: str) -> None:
    weight, hidden = pack(torch.randn(5, 8)), torch.randn(3, 8)
    good, row = torch.tensor([[0]]), torch.tensor([0])
    for rows, ids in ((torch.tensor([3]), good), (row, torch.tensor([[5]])), (row, torch.tensor([[-1]]))):
        with pytest.raises(IndexError):
            token_logprobs(hidden, rows, weight, ids)
    with pytest.raises(ShapeError):
        token_logprobs(hidden, row, weight, torch.tensor([0]))
    assert token_logprobs(hidden, row, weight, torch.zeros(1, 0, dtype=torch.int64)).shape == (1, 0)
