"""The gated activation of an MLP as the end of its product with gate | up, which then never lies in memory.

Knows a weight of two halves and the two activations; does not check shapes.

A tile's columns are some rows of the gate's weight and the same rows of up's, in one accumulator: the loads, instructions and
sums of the plain product over a weight whose rows lie in another order, and the tiles that `plan` names for it. Both halves are
rounded as `linear` stores them before the activation's own function sees them, so that a row has the bits it has where
another kernel comes between (an adapter's).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from uma_kernels.activation.triton_kernel import gated
from uma_kernels.aot import AotCase
from uma_kernels.dispatch import interpreted
from uma_kernels.linear.triton_kernel import (
    AMPERE,
    EMULATED,
    FP32,
    NARROW,
    WIDE,
    Tile,
    constants,
    device_limits,
    finished,
    operand_types,
    operands,
    place,
    plan,
    products,
    quantize_rows,
    weight_rows,
)


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """x in fp32 with the values that `dtype` has for it. bf16 by pairs: as written below, the compiler would convert one after
    the other, by an instruction (F2F) of which an SM begins few."""
    if dtype == tl.bfloat16 and not INTERPRETED:
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 pair;
            cvt.rn.bf16x2.f32 pair, $3, $2;
            shl.b32 $0, pair, 16;
            and.b32 $1, pair, 0xffff0000;
            }""",
            "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return x.to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def gated_matmul_kernel(
    x, w, bias, x_scales, w_scales, out, T, N, K, stride_x, stride_w, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, FLUSH: tl.constexpr,
    TMA_X: tl.constexpr, TMA_W: tl.constexpr, PERSISTENT: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    GELU: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out = act(gate) * up, where gate | up = (x @ w.T) * x_scales * w_scales + bias, N columns each. A tile of BLOCK_N
    columns gives BLOCK_N / 2 of out; they are taken in the order of `matmul_kernel`."""
    HALF: tl.constexpr = BLOCK_N // 2
    tiles_m, tiles_n = tl.cdiv(T, BLOCK_M), tl.cdiv(N, HALF)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=PERSISTENT):
        row, column = place(tile, tiles_m, tiles_n, GROUP)
        first_m, first_n = row * BLOCK_M, column * HALF
        offs_m = first_m + tl.arange(0, BLOCK_M)
        in_m = offs_m < T
        rows_w, in_w = weight_rows(first_n, N, BLOCK_N, True)
        sums = products(
            x, w, first_m, first_n, T, N, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, FLUSH, TMA_X, TMA_W, INTERPRETED,
            PAIRED=True,
        )  # fmt: skip
        sums = finished(sums, x_scales, w_scales, bias, offs_m, rows_w, in_m, in_w, SCALED, HAS_BIAS)
        both = rounded(sums, out.dtype.element_ty, INTERPRETED)
        g, u = both.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        offs_n = first_n + tl.arange(0, HALF)
        to = out + offs_m.to(tl.int64)[:, None] * stride_out + offs_n[None, :]
        tl.store(to, gated(g, u, GELU).to(out.dtype.element_ty), in_m[:, None] & (offs_n < N)[None, :])


def gated_linear(
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    gelu: bool,
    tile: Tile | None = None,
) -> None:
    """`tile` is for benches that look for a better one."""
    if not out.numel():
        return
    x_scales = None
    if scales is not None:
        x, x_scales = quantize_rows(x)
    tokens, width = out.shape
    sms, capability = device_limits(x.device)
    if tile is None:
        tile = EMULATED if interpreted() else plan(tokens, 2 * width, x.dtype, sms, capability)
    depth = max(16, tile.depth // data.element_size())
    a, b, how = operands(x, data, tile, depth, paired=True)
    persistent = tile.persistent and how["TMA_W"]
    tiles = -(-tokens // tile.rows) * -(-width // (tile.columns // 2))
    gated_matmul_kernel[(min(tiles, sms) if persistent else tiles,)](
        a, b, bias, x_scales, scales, out, tokens, width, x.shape[1], x.stride(0), data.stride(0), out.stride(0),
        GROUP=8, PERSISTENT=persistent, HAS_BIAS=bias is not None, SCALED=scales is not None, GELU=gelu, **how,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _case(
    name: str, tile: Tile, dtype: str, tma: bool, bias: bool = False, gelu: bool = False, few: bool = False
) -> AotCase:
    """`few`: fewer rows than the tile has."""
    scaled = dtype == "fp8e4nv"
    depth = max(16, tile.depth // {"fp32": 4, "fp8e4nv": 1}.get(dtype, 2))
    signature = operand_types(dtype, tile, depth, tma and not few, tma)
    if tma:
        signature["w"] = f"tensordesc<{dtype}[2,{tile.columns // 2},{depth}]>"
    plain = "bf16" if scaled else dtype
    signature |= {"bias": f"*{plain}", "x_scales": "*fp32", "w_scales": "*fp32", "out": f"*{plain}", "T": "i32"}
    signature |= dict.fromkeys(("N", "K", "stride_x", "stride_w", "stride_out"), "i32:16")
    constexprs = constants(tile, depth, dtype == "fp32", tma and not few, tma) | {
        "GROUP": 8, "PERSISTENT": tma and tile.persistent, "HAS_BIAS": bias, "SCALED": scaled, "GELU": gelu,
    }  # fmt: skip
    constexprs |= {} if bias else {"bias": None}
    constexprs |= {} if scaled else {"x_scales": None, "w_scales": None}
    return AotCase(
        f"gated-{name}-{dtype}" + ("-tma" if tma else "") + ("-gelu" if gelu else "") + ("-few" if few else ""),
        gated_matmul_kernel,
        signature,
        constexprs,
        tile.warps,
        tile.stages,
        is_matmul=dtype != "fp32",
        only=90 if tma else None,
    )


AOT_CASES = [
    *(_case(f"{t.rows}x{t.columns}", t, "bf16", True) for t in WIDE),
    *(_case(f"narrow-{t.rows}x{t.columns}", t, "bf16", True, bias=t.columns == 32) for t in NARROW),
    *(_case(f"narrow-{t.rows}x{t.columns}", t, "bf16", True, few=True) for t in NARROW),
    _case("128x256", WIDE[0], "bf16", True, bias=True, gelu=True),
    _case("128x256", WIDE[0], "fp16", True),
    _case("128x256", WIDE[0], "fp8e4nv", True),
    _case("narrow-64x32", NARROW[2], "fp8e4nv", True),
    *(_case(f"{t.rows}x{t.columns}", t, "bf16", False, bias=True) for t in AMPERE),
    _case("32x128", FP32, "fp32", False),
]
