"""Matrix products on a GPU: one kernel whose sums do not know how many rows there are.

Knows tiles, dtypes and scales; does not know layers, or how a quantised file stores its weights.

Every element of the result is one chain of tensor-core instructions over K in ascending order, 16 (8 bits: 32) at a step,
into one fp32 accumulator; fp32 itself takes chains of 8 steps that are added in order, since one long chain rounds too
often. Tiles differ with the number of rows, the instruction (wgmma m64k16 on sm_90, mma m16k16 on sm_80) and the order of
its steps do not, and padding adds exact zeros: so a row has the same bits alone and in any batch.
There is no split along K.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from uma_kernels.aot import AotCase
from uma_kernels.dispatch import interpreted
from uma_kernels.linear.reference import FP8, FP8_LARGEST


@dataclass(frozen=True)
class Tile:
    rows: int  # BLOCK_M
    columns: int  # BLOCK_N
    depth: int  # BLOCK_K, in bytes: one tile serves 16-bit and 8-bit weights
    warps: int
    stages: int
    rate: float = 1.0  # share of the best tile's speed where the GPU is full: what `plan` weighs against idle SMs
    tma: bool = True  # loads by tensor descriptors where the GPU has them
    persistent: bool = True  # one program an SM, which overlaps a tile's stores with the next one's loads


# Large tiles for many rows; narrow ones so that the weight of a decode step is read by all SMs.
WIDE = (
    Tile(128, 256, 128, 8, 3, 1.0),
    Tile(128, 128, 128, 8, 4, 0.9),
    Tile(64, 128, 128, 4, 5, 0.75),
    Tile(64, 64, 256, 4, 4, 0.6),
)
NARROW = (Tile(64, 128, 128, 4, 6), Tile(64, 64, 256, 4, 5), Tile(64, 32, 512, 4, 4), Tile(64, 16, 512, 4, 5))
FP32 = Tile(32, 128, 64, 8, 2)
FP32_FLUSH = 8  # steps of 16: chains of 128 products
AMPERE = (Tile(128, 128, 128, 8, 3), Tile(64, 64, 128, 4, 4))
EMULATED = Tile(32, 64, 256, 4, 2)  # each program and each step of K costs the interpreter milliseconds


def plan(tokens: int, rows: int, dtype: torch.dtype, sms: int, capability: int) -> Tile:
    """The tile for T = `tokens`, N = `rows`. It decides speed, never a bit of the result."""
    if dtype is torch.float32:
        return FP32
    if capability < 9:
        return AMPERE[0] if -(-tokens // 128) * -(-rows // 128) >= sms else AMPERE[1]
    if tokens <= 64:
        return next((tile for tile in NARROW if -(-rows // tile.columns) >= 0.7 * sms), NARROW[-1])

    def cost(tile: Tile) -> float:
        tiles = -(-tokens // tile.rows) * -(-rows // tile.columns)
        return -(-tiles // sms) * tile.rows * tile.columns / tile.rate

    return min(WIDE, key=cost)


@triton.jit
def place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP tiles of rows at a time, so that neighbours share what the L2 holds."""
    group = tile // (GROUP * tiles_n)
    height = min(tiles_m - group * GROUP, GROUP)
    inside = tile - group * GROUP * tiles_n
    return group * GROUP + inside % height, inside // height


@triton.jit
def weight_rows(first_n, end_n, BLOCK_N: tl.constexpr, PAIRED: tl.constexpr):
    """The rows of w that are a tile's columns, and which of them there are. PAIRED: w is two matrices of `end_n` rows one after
    the other (gate, up), and the tile has BLOCK_N / 2 rows of the first, then the same rows of the second."""
    n = tl.arange(0, BLOCK_N)
    if PAIRED:
        row = first_n + n % (BLOCK_N // 2)
        return row + n // (BLOCK_N // 2) * end_n, row < end_n
    else:
        return first_n + n, first_n + n < end_n


@triton.jit
def products(
    x, w, first_m, first_n, end_m, end_n, K, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLUSH: tl.constexpr, TMA_X: tl.constexpr,
    TMA_W: tl.constexpr, INTERPRETED: tl.constexpr, PAIRED: tl.constexpr = False,
):  # fmt: skip
    """Rows of x from `first_m` times rows of w from `first_n`, [BLOCK_M, BLOCK_N] in fp32; of rows from `end_m` and `end_n` on
    nothing is asked. This is where the bits of every product come from.

    INTERPRETED: the interpreter's dot has no 16-bit types, and in its BLAS the place of a row in a tile decides its bits.
    PAIRED: see `weight_rows`; a descriptor of w is then [2, end_n, K], and a box that ends past the gate's rows holds zeros.
    """
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n, in_n = weight_rows(first_n, end_n, BLOCK_N, PAIRED)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    chain = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)  # of FLUSH steps
    for first_k in range(0, K, BLOCK_K):
        offs_k = first_k + tl.arange(0, BLOCK_K)
        in_k = offs_k[None, :] < K
        if TMA_X:
            a = x.load([first_m, first_k])
        else:
            from_x = x + offs_m.to(tl.int64)[:, None] * stride_x + offs_k[None, :]
            a = tl.load(from_x, (offs_m[:, None] < end_m) & in_k, 0.0)
        if TMA_W:
            b = w.load([0, first_n, first_k]).reshape(BLOCK_N, BLOCK_K) if PAIRED else w.load([first_n, first_k])
        else:
            from_w = w + offs_n.to(tl.int64)[:, None] * stride_w + offs_k[None, :]
            b = tl.load(from_w, in_n[:, None] & in_k, 0.0)
        if INTERPRETED:
            sums += tl.sum(a.to(tl.float32)[:, None, :] * b.to(tl.float32)[None, :, :], 2)
        elif FLUSH:
            chain = tl.dot(a, b.T, chain, input_precision="ieee")
            full = (first_k // BLOCK_K) % FLUSH == FLUSH - 1
            sums += tl.where(full, chain, 0.0)
            chain = tl.where(full, 0.0, chain)
        else:
            sums = tl.dot(a, b.T, sums, input_precision="ieee")
    if FLUSH:
        sums += chain
    return sums


@triton.jit
def finished(
    sums, x_scales, w_scales, bias, offs_m, offs_n, in_m, in_n, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """sums * x_scales * w_scales + bias: a tile of the product before it is rounded."""
    if SCALED:
        sums *= tl.load(x_scales + offs_m, in_m, 0.0)[:, None] * tl.load(w_scales + offs_n, in_n, 0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + offs_n, in_n, 0.0).to(tl.float32)[None, :]
    return sums


@triton.jit(do_not_specialize=["T"])
def matmul_kernel(
    x, w, bias, x_scales, w_scales, out, T, N, K, stride_x, stride_w, stride_out,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, FLUSH: tl.constexpr,
    TMA_X: tl.constexpr, TMA_W: tl.constexpr, PERSISTENT: tl.constexpr, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    ADD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out = (x @ w.T) * x_scales * w_scales + bias, with ADD added to what `out` holds before it is rounded.

    Each program takes every num_programs-th tile."""
    tiles_m, tiles_n = tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=PERSISTENT):
        row, column = place(tile, tiles_m, tiles_n, GROUP)
        first_m, first_n = row * BLOCK_M, column * BLOCK_N
        offs_m = first_m + tl.arange(0, BLOCK_M)
        offs_n = first_n + tl.arange(0, BLOCK_N)
        in_m, in_n = offs_m < T, offs_n < N
        sums = products(
            x, w, first_m, first_n, T, N, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, FLUSH, TMA_X, TMA_W, INTERPRETED
        )  # fmt: skip
        sums = finished(sums, x_scales, w_scales, bias, offs_m, offs_n, in_m, in_n, SCALED, HAS_BIAS)
        to = out + offs_m.to(tl.int64)[:, None] * stride_out + offs_n[None, :]
        inside_out = in_m[:, None] & in_n[None, :]
        if ADD:
            sums += tl.load(to, inside_out, 0.0).to(tl.float32)
        tl.store(to, sums.to(out.dtype.element_ty), inside_out)


@triton.jit
def quantize_rows_kernel(x, out, scales, K, stride_x, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Row by row in 8 bits: scale = max |x| / LARGEST (1 for a row of zeros), out = x / scale."""
    row = tl.program_id(0).to(tl.int64)
    top = 0.0
    for first in range(0, K, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.max(tl.abs(tl.load(x + row * stride_x + offs, offs < K, 0.0).to(tl.float32)), 0))
    scale = tl.where(top == 0.0, 1.0, top / LARGEST)
    for first in range(0, K, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        values = tl.load(x + row * stride_x + offs, offs < K, 0.0).to(tl.float32) / scale
        values = tl.minimum(tl.maximum(values, -LARGEST), LARGEST)
        tl.store(out + row * K + offs, values.to(out.dtype.element_ty), offs < K)
    tl.store(scales + row, scale)


@triton.jit
def gather_rows_kernel(w, w_scales, ids, out, N, K, stride_w, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """out[m] = w[ids[m]]; a row whose id is out of range is not written."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(ids + row)
    if (index >= 0) & (index < N):
        values = tl.load(w + index * stride_w + offs, offs < K)
        if SCALED:
            values = values.to(tl.float32) * tl.load(w_scales + index)
        tl.store(out + row * K + offs, values.to(out.dtype.element_ty), offs < K)


@functools.cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """SMs and the major compute capability; for the interpreter those of a small old GPU."""
    if device.type != "cuda":
        return 4, 8
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.major


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] as e4m3 with one scale a row."""
    tokens, width = x.shape
    out = torch.empty(tokens, width, dtype=FP8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block = min(triton.next_power_of_2(width), 4096)
    if tokens:
        quantize_rows_kernel[(tokens,)](x, out, scales, width, x.stride(0), LARGEST=FP8_LARGEST, BLOCK=block)
    return out, scales


def linear(
    x: torch.Tensor,
    data: torch.Tensor,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    mode: str = "audit",
    add: bool = False,
    tile: Tile | None = None,
) -> None:
    """`tile` is for benches that look for a better one."""
    if not out.numel():
        return
    x_scales = None
    if scales is not None:
        x, x_scales = quantize_rows(x)
    if mode == "fast":
        _library(x, data, x_scales, scales, bias, out, add)
        return
    tokens, width = x.shape
    rows = data.shape[0]
    sms, capability = device_limits(x.device)
    if tile is None:
        tile = EMULATED if interpreted() else plan(tokens, rows, x.dtype, sms, capability)
    depth = max(16, tile.depth // data.element_size())
    a, b, how = operands(x, data, tile, depth)
    persistent = tile.persistent and how["TMA_W"]
    tiles = -(-tokens // tile.rows) * -(-rows // tile.columns)
    matmul_kernel[(min(tiles, sms) if persistent else tiles,)](
        a, b, bias, x_scales, scales, out, tokens, rows, width, x.stride(0), data.stride(0), out.stride(0),
        GROUP=8, PERSISTENT=persistent, HAS_BIAS=bias is not None, SCALED=scales is not None, ADD=add, **how,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def operands(
    x: torch.Tensor, data: torch.Tensor, tile: Tile, depth: int, paired: bool = False
) -> tuple[Any, Any, dict[str, Any]]:
    """x and w as `products` takes them, and its constants: by descriptors where device, type and addresses allow it."""
    tma = tile.tma and device_limits(x.device)[1] >= 9 and data.dtype is not torch.float32 and fits_tma(data)
    # A box most of whose rows do not exist loads slowly: T = 1 took 28 us where T = 64 took 17 (N 6,144, K 4,096, H200). So x
    # goes by a descriptor where all its rows have memory, whatever that holds, and by pointers elsewhere.
    rows = x.shape[0] if x.shape[0] >= tile.rows else tile.rows if _rows_in_memory(x) >= tile.rows else 0
    tma_x = tma and rows > 0 and fits_tma(x)
    a: Any = TensorDescriptor(x, [rows, x.shape[1]], list(x.stride()), [tile.rows, depth]) if tma_x else x
    b: Any = data
    if tma and paired:
        b = TensorDescriptor.from_tensor(data.unflatten(0, (2, -1)), [2, tile.columns // 2, depth])
    elif tma:
        b = TensorDescriptor.from_tensor(data, [tile.columns, depth])
    return a, b, constants(tile, depth, data.dtype is torch.float32, tma_x, tma, interpreted())


def _rows_in_memory(x: torch.Tensor) -> int:
    """How many rows at x's stride lie inside of its storage, x's own first."""
    elements = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return (elements - x.shape[1]) // max(1, x.stride(0)) + 1


def constants(
    tile: Tile, depth: int, fp32: bool, tma_x: bool, tma_w: bool, interpreted: bool = False
) -> dict[str, Any]:
    return {
        "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": depth, "FLUSH": FP32_FLUSH if fp32 else 0, "TMA_X": tma_x,
        "TMA_W": tma_w, "INTERPRETED": interpreted,
    }  # fmt: skip


def operand_types(dtype: str, tile: Tile, depth: int, tma_x: bool, tma_w: bool) -> dict[str, str]:
    """Of x and w, for compiling ahead of time."""
    sides = (("x", tile.rows, tma_x), ("w", tile.columns, tma_w))
    return {name: f"tensordesc<{dtype}[{n},{depth}]>" if tma else f"*{dtype}" for name, n, tma in sides}


def fits_tma(matrix: torch.Tensor) -> bool:
    size = matrix.element_size()
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) * size % 16 == 0 and matrix.stride(1) == 1


def _library(
    x: torch.Tensor,
    data: torch.Tensor,
    x_scales: torch.Tensor | None,
    scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    add: bool,
) -> None:
    """cuBLAS, which takes another kernel, and other bits, for another number of rows."""
    if add and bias is not None:
        out.add_(bias)
        bias = None
    if x_scales is not None and scales is not None:
        product = torch._scaled_mm(
            x, data.T, x_scales[:, None], scales[None, :], out_dtype=torch.bfloat16, use_fast_accum=False
        )
        product = product if bias is None else product + bias
        out.copy_(out + product if add else product)
    elif add:
        torch.addmm(out, x, data.T, out=out)
    elif bias is None:
        torch.mm(x, data.T, out=out)
    else:
        torch.addmm(bias, x, data.T, out=out)


def gather_rows(data: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor, out: torch.Tensor) -> None:
    if not out.numel():
        return
    rows, width = data.shape
    block = min(triton.next_power_of_2(width), 2048)
    gather_rows_kernel[(ids.shape[0], triton.cdiv(width, block))](
        data, scales, ids, out, rows, width, data.stride(0), SCALED=scales is not None, BLOCK=block
    )


def _matmul_case(
    name: str, tile: Tile, dtype: str, tma: bool, bias: bool = False, add: bool = False, few: bool = False
) -> AotCase:
    """`few`: fewer rows than the tile has."""
    scaled = dtype == "fp8e4nv"
    size = {"fp32": 4, "fp8e4nv": 1}.get(dtype, 2)
    depth = max(16, tile.depth // size)
    kind = operand_types(dtype, tile, depth, tma and not few, tma)
    constexprs = constants(tile, depth, dtype == "fp32", tma and not few, tma) | {
        "GROUP": 8, "PERSISTENT": tma and tile.persistent, "HAS_BIAS": bias, "SCALED": scaled, "ADD": add,
    }  # fmt: skip
    constexprs |= {} if bias else {"bias": None}
    constexprs |= {} if scaled else {"x_scales": None, "w_scales": None}
    out = "bf16" if scaled else dtype
    return AotCase(
        f"matmul-{name}-{dtype}" + ("-tma" if tma else "") + ("-add" if add else "") + ("-few" if few else ""),
        matmul_kernel,
        {
            **kind, "bias": f"*{out}", "x_scales": "*fp32", "w_scales": "*fp32", "out": f"*{out}",
            "T": "i32", "N": "i32:16", "K": "i32:16", "stride_x": "i32:16", "stride_w": "i32:16", "stride_out": "i32:16",
        },
        constexprs,
        tile.warps,
        tile.stages,
        is_matmul=dtype != "fp32",
        only=90 if tma else None,
    )  # fmt: skip


AOT_CASES = [
    *(_matmul_case(f"{t.rows}x{t.columns}", t, "bf16", True) for t in WIDE),
    *(_matmul_case(f"narrow-{t.rows}x{t.columns}", t, "bf16", True, bias=t.columns == 32) for t in NARROW),
    *(_matmul_case(f"narrow-{t.rows}x{t.columns}", t, "bf16", True, few=True) for t in NARROW),
    _matmul_case("128x256", WIDE[0], "bf16", True, add=True),
    _matmul_case("narrow-64x32", NARROW[2], "bf16", True, add=True),
    _matmul_case("128x256", WIDE[0], "fp16", True),
    _matmul_case("128x256", WIDE[0], "fp8e4nv", True),
    _matmul_case("narrow-64x32", NARROW[2], "fp8e4nv", True),
    *(_matmul_case(f"{t.rows}x{t.columns}", t, "bf16", False, bias=True, add=True) for t in AMPERE),
    _matmul_case("32x128", FP32, "fp32", False),
    AotCase(
        "quantize_rows",
        quantize_rows_kernel,
        {"x": "*bf16", "out": "*fp8e4nv", "scales": "*fp32", "K": "i32:16", "stride_x": "i32:16"},
        {"LARGEST": FP8_LARGEST, "BLOCK": 4096},
        only=90,
    ),
    AotCase(
        "gather_rows",
        gather_rows_kernel,
        {"w": "*bf16", "ids": "*i64", "out": "*bf16", "N": "i32", "K": "i32:16", "stride_w": "i32:16"},
        {"w_scales": None, "SCALED": False, "BLOCK": 2048},
    ),
]
