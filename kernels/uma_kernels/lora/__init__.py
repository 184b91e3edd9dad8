"""Low-rank updates for a batch in which each row names its adapter, or none.

Knows rows, slots and factors; does not know where adapters come from or which request a row belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from uma_kernels.check import FLOATS, ShapeError, check
from uma_kernels.dispatch import choose
from uma_kernels.linear import PackedLinear, linear
from uma_kernels.lora import cpp, plans, reference
from uma_kernels.lora.pool import LoraPool, PoolFull
from uma_kernels.lora.routing import DeviceRouting

__all__ = [
    "DeviceRouting",
    "LoraPool",
    "LoraRouting",
    "LoraSlice",
    "PackedLora",
    "PoolFull",
    "lora",
    "lora_linear",
    "lora_merged",
    "pack_lora",
]


@dataclass(frozen=True, slots=True, eq=False)
class PackedLora:
    """The two factors of one adapter at one layer, prepared for `backend`."""

    backend: str
    rank: int
    in_features: int  # K
    out_features: int  # N
    data: tuple[torch.Tensor, ...]  # cpp: one uint8 buffer, see csrc/cpu/lora.h; else: lora_a, scaling * lora_b
    address: int  # of the cpp buffer, else 0

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.data)


def pack_lora(lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float) -> PackedLora:
    """
    Semantics:  prepares the update scaling * lora_b @ lora_a of a layer
    Shapes:     lora_a [R, K] . lora_b [N, R], none of them 0; both in one of fp32, bf16, fp16. cpp keeps them in that type and gives
                the bits that the same values give in fp32
    Errors:     ShapeError when the factors do not fit together or are empty; NotFinite where one holds NaN or infinity
    """
    backend = choose("lora", lora_a.device.type)
    check("lora_a", lora_a, (None, None), FLOATS)
    check("lora_b", lora_b, (None, lora_a.shape[0]), lora_a.dtype)
    if not lora_a.numel() or not lora_b.numel():
        raise ShapeError(f"`lora_a` {list(lora_a.shape)} and `lora_b` {list(lora_b.shape)} must not be empty")
    data, address = (cpp if backend == "cpp" else reference).pack_lora(lora_a, lora_b, scaling)
    return PackedLora(backend, lora_a.shape[0], lora_a.shape[1], lora_b.shape[0], data, address)


@dataclass(frozen=True, slots=True, eq=False)
class LoraRouting:
    """Which rows of a batch each slot's adapter takes: built once a step, read by every layer.

    Rows of slot `slots[i]` are `order[offsets[i]:offsets[i + 1]]`, ascending; rows without adapter are not in `order`.
    """

    num_tokens: int
    slots: tuple[int, ...]  # that have rows, ascending
    order: torch.Tensor  # [rows with an adapter] int32
    offsets: torch.Tensor  # [len(slots) + 1] int32

    @classmethod
    def build(cls, token_lora_mapping: Sequence[int] | torch.Tensor, num_slots: int) -> LoraRouting:
        """
        Semantics:  groups the rows by slot
        Shapes:     token_lora_mapping [T], int32 tensor or integers: a slot 0 .. num_slots - 1, or -1 for the base
        Errors:     IndexError when a slot is out of range
        """
        mapping = torch.as_tensor(token_lora_mapping, dtype=torch.int32)
        if mapping.numel() and not -1 <= int(mapping.min()) <= int(mapping.max()) < num_slots:
            raise IndexError(
                f"`token_lora_mapping` holds {int(mapping.min())} .. {int(mapping.max())}"
                f" but must be in -1 .. {num_slots - 1}"
            )
        counts = torch.bincount(mapping + 1, minlength=num_slots + 1)
        slots = torch.nonzero(counts[1:]).flatten()
        order = torch.argsort(mapping, stable=True)[int(counts[0]) :].to(torch.int32)
        offsets = torch.zeros(len(slots) + 1, dtype=torch.int32)
        offsets[1:] = counts[1:][slots].cumsum(0)
        return cls(mapping.numel(), tuple(slots.tolist()), order, offsets)

    @property
    def is_empty(self) -> bool:
        """No row has an adapter."""
        return not self.slots


def lora(x: torch.Tensor, out: torch.Tensor, adapters: Sequence[PackedLora | None], routing: LoraRouting) -> None:
    """
    Semantics:  out[t] += scaling[a] * (x[t] @ lora_a[a].T) @ lora_b[a].T  in place, where a is the slot of row t;
                a row without a slot, or whose slot holds None, keeps its value
    Shapes:     x [T, K] . adapters[a]: lora_a [R_a, K], lora_b [N, R_a], any ranks . out [T, N], its rows at any stride, apart
                from `x`
    Numerics:   fp32 accumulate; cpp, triton: batch-invariant: the update is summed from 0 in a fixed order and added once.
                triton takes fp32, bf16 and fp16 and prepares a pool for each call: an engine uses `lora_merged`
    Errors:     ShapeError when shapes do not fit or an adapter was packed for another back end; IndexError when a slot
                has no entry in `adapters`
    Source:     Punica (arXiv 2310.18547); S-LoRA (arXiv 2311.03285)
    """
    backend = choose("lora", x.device.type)
    check("x", x, (routing.num_tokens, None), torch.float32 if backend == "cpp" else FLOATS)
    check("out", out, (routing.num_tokens, None), x.dtype, strided=True)
    if routing.is_empty:
        return
    if backend == "cpp":
        cpp.lora(x, out, (LoraSlice(out.shape[1], adapters),), routing)
        return
    chosen = [adapters[slot] for slot in routing.slots]
    expected = (backend, x.shape[1], out.shape[1])
    for slot, adapter in zip(routing.slots, chosen, strict=True):
        if adapter is None:
            continue
        actual = (adapter.backend, adapter.in_features, adapter.out_features)
        if actual != expected:
            raise ShapeError(f"the adapter in slot {slot} has back end, K, N {actual} but the batch needs {expected}")
    if backend == "triton":
        _lora_by_pool(x, out, chosen, routing)
    else:
        reference.lora(x, out, chosen, routing.order, routing.offsets)


def _lora_by_pool(x: torch.Tensor, out: torch.Tensor, chosen: list[PackedLora | None], routing: LoraRouting) -> None:
    present = [adapter for adapter in chosen if adapter is not None]
    if not present:
        return
    blocks = sum(-(-adapter.rank // 16) for adapter in present)
    most = max(adapter.rank for adapter in present)
    pool = LoraPool(x.shape[1], [out.shape[1]], len(chosen), blocks, max_rank=most, dtype=x.dtype, device=x.device)
    mapping = torch.full((routing.num_tokens,), -1, dtype=torch.int32, device="cpu")
    bounds = routing.offsets.tolist()
    for i, adapter in enumerate(chosen):
        mapping[routing.order[bounds[i] : bounds[i + 1]].cpu().long()] = i
        if adapter is not None:
            lora_a, scaled_b = adapter.data
            pool.load(i, [(lora_a, scaled_b, 1.0)])
    on_device = DeviceRouting(routing.num_tokens, len(chosen), [pool])
    on_device.build(mapping.to(x.device))
    lora_merged(x, out, pool, on_device)


@dataclass(frozen=True, slots=True, eq=False)
class LoraSlice:
    """Some columns of a merged output, and the adapters of the projection they belong to, indexed by slot."""

    num_columns: int
    adapters: Sequence[PackedLora | None]


def lora_merged(
    x: torch.Tensor,
    out: torch.Tensor,
    slices: LoraPool | Sequence[LoraSlice],
    routing: DeviceRouting | LoraRouting,
) -> None:
    """
    Semantics:  `lora` for projections that share x and whose outputs lie side by side in `out` (q, k, v; gate, up)
    Shapes:     x [T, K] . out [T, sum N_i], apart from `x`, its rows at any stride; those of x too where the slices are a
                pool . routing: of these T rows
    Numerics:   as `lora`, bit for bit in cpp. A pool (triton): one or two launches for all slices, no synchronisation, no
                memory taken; x, out and dense factors of one dtype, s = x A^T rounded to it once, out rounded once. Same
                bits for a row in any batch and with any plan
    Errors:     ShapeError when x, out, pool and routing do not fit, or a pool is asked for on another back end
    Source:     as `lora`; ordered partial sums by the last arriver: stream-K (arXiv 2301.03598)
    """
    if not isinstance(slices, LoraPool):
        if not isinstance(routing, LoraRouting):
            raise ShapeError("slices without a pool need a LoraRouting")
        check("out", out, (routing.num_tokens, sum(part.num_columns for part in slices)), x.dtype, strided=True)
        if choose("lora", x.device.type) == "cpp":
            check("x", x, (routing.num_tokens, None), torch.float32)
            if slices and not routing.is_empty:
                cpp.lora(x, out, slices, routing)
            return
        first = 0
        for part in slices:
            lora(x, out[:, first : first + part.num_columns], part.adapters, routing)
            first += part.num_columns
        return
    check_site(x, out, slices, routing)
    if routing.num_tokens:
        from uma_kernels.lora import triton_kernel

        assert isinstance(routing, DeviceRouting)
        plan = plans.pair_plan(routing.num_tokens, x.element_size())
        triton_kernel.lora_merged(x, out, slices, routing, plan)


def lora_linear(
    x: torch.Tensor,
    weight: PackedLinear,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    pool: LoraPool,
    routing: DeviceRouting,
    add: bool = False,
) -> None:
    """
    Semantics:  out = x @ w.T + bias, and of each row's adapter the update that `lora_merged` adds: a whole site. With `add` all
                of it is added to what `out` holds
    Shapes:     x [T, K] . weight [sum N_i, K] packed for triton . bias [sum N_i] or None . out [T, sum N_i], apart from `x`; rows
                of both at any stride . routing: of these T rows
    Numerics:   s = x A^T is rounded to the dtype once, as in `lora_merged`. Mode `audit`: one fp32 sum over K, then over the
                rank of the row's adapter, bias last, rounded once; a row has the same bits in any batch, and a row of the
                base those of `linear`. Mode `fast`: the form that `plans` names for T, and other bits with another one
    Errors:     ShapeError when x, out, weight, pool and routing do not fit, or another back end is in force
    Source:     a product over [x | s] and [W | B]: Punica (arXiv 2310.18547) has the two apart
    """
    check_site(x, out, pool, routing)
    rows, width = weight.shape
    if (width, rows, weight.dtype) != (pool.in_features, pool.out_features, pool.dtype):
        raise ShapeError(
            f"`weight` has K, N, dtype {(width, rows, weight.dtype)} but the pool"
            f" {(pool.in_features, pool.out_features, pool.dtype)}"
        )
    if weight.backend != "triton":
        raise ShapeError(f"`weight` was packed for `{weight.backend}` but a pool needs triton")
    if bias is not None:
        check("bias", bias, (rows,), weight.dtype)
    if not routing.num_tokens:
        return
    from uma_kernels.lora import triton_augmented, triton_kernel, triton_site

    tokens = routing.num_tokens
    form = plans.site_form(tokens, weight.mode, weight.scales is None and x.element_size() == 2, pool.in_features)
    if form == plans.BESIDE and x.is_cuda:
        pair = replace(plans.pair_plan(tokens, x.element_size()), pdl=False)  # it follows a kernel of another stream
        routing.fork()
        with torch.cuda.stream(routing.side):
            triton_kernel.run_pair(x, out, pool, routing, pair, shrink=True, expand=False)
        linear(x, weight, bias, out, add=add)
        routing.join()
        triton_kernel.run_pair(x, out, pool, routing, pair, shrink=False, expand=True)
    elif form in (plans.PAIR, plans.BESIDE):
        linear(x, weight, bias, out, add=add)
        triton_kernel.lora_merged(x, out, pool, routing, plans.pair_plan(tokens, x.element_size()))
    elif form == plans.DECODE:
        site = plans.site_plan(tokens, pool.in_features, pool.out_features)
        assert site is not None, f"no plan for {tokens} rows"
        triton_site.site_decode(x, weight.data, bias, out, pool, routing, site, add)
    else:
        pair = plans.pair_plan(tokens, x.element_size())
        triton_kernel.run_pair(x, out, pool, routing, pair, shrink=True, expand=False)
        triton_augmented.augmented(x, weight, bias, out, pool, routing, add)


def check_site(x: torch.Tensor, out: torch.Tensor, pool: LoraPool, routing: DeviceRouting | LoraRouting) -> None:
    """Raise ShapeError unless a pool's kernels can take these."""
    if not isinstance(routing, DeviceRouting):
        raise ShapeError("a pool needs a DeviceRouting")
    if choose("lora", x.device.type) != "triton":
        raise ShapeError(f"a pool needs the triton back end, not `{choose('lora', x.device.type)}`")
    for name, tensor, width in (("x", x, pool.in_features), ("out", out, pool.out_features)):
        if tensor.shape != (routing.num_tokens, width) or tensor.stride(1) != 1 or tensor.stride(0) < width:
            raise ShapeError(
                f"`{name}` has shape {list(tensor.shape)} and strides {list(tensor.stride())} but must have rows of {width}"
                f" adjacent elements, [{routing.num_tokens}, {width}]"
            )
        if tensor.dtype is not pool.dtype or tensor.device != pool.device:
            raise ShapeError(
                f"`{name}` is {tensor.dtype} on {tensor.device} but the pool has {pool.dtype} on {pool.device}"
            )
    if routing.device != pool.device or routing.num_slots != pool.num_slots:
        raise ShapeError("the pool and the routing differ in device or `num_slots`")
    if routing.shrunk.shape[1] < pool.max_stacked_rows or routing.shrunk.dtype is not pool.dtype:
        raise ShapeError("the routing was made for other pools: its scratch does not fit this one")
