"""Other people's multi-LoRA kernels, run on the same work: vLLM's, SGLang's two, and plain torch in several ways.

    bench/gpu/fetch_anchors.sh                  brings vLLM's and SGLang's kernels into .anchors/
    TRITON_INTERPRET=1 python -m bench.gpu.anchors [NAME ...]      checks each of them against torch, no GPU needed

Knows how to feed each of them and their own settings; does not time and does not know our kernels. Their packages are not
installed: what their kernel files import is stubbed here, in this process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent.parent.parent / ".anchors"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Pair = Callable[[torch.Tensor, torch.Tensor], object]  # (x, out): out += the update


@dataclass
class Problem:
    """One site and one batch. Factors are 16-bit; scaling is 1, so that every contestant does the same work."""

    k: int
    slices: tuple[int, ...]
    mapping: torch.Tensor  # [T] int32 on the device, -1 for the base
    ranks: tuple[int, ...]  # of each slot, the same for every slice
    a: list[list[torch.Tensor]]  # [slot][slice] [R, K]
    b: list[list[torch.Tensor]]  # [slot][slice] [N, R]

    @classmethod
    def random(
        cls,
        k: int,
        slices: Sequence[int],
        mapping: Sequence[int],
        ranks: Sequence[int],
        device: str,
        dtype: torch.dtype,
    ) -> Problem:
        def draw(*shape: int) -> torch.Tensor:
            return (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(dtype)

        a = [[draw(r, k) for _ in slices] for r in ranks]
        b = [[draw(n, r) for n in slices] for r in ranks]
        return cls(k, tuple(slices), torch.tensor(mapping, dtype=torch.int32, device=device), tuple(ranks), a, b)

    def copy(self) -> Problem:
        """The same numbers at other addresses."""
        clone = lambda factors: [[t.clone() for t in row] for row in factors]  # noqa: E731
        return dataclasses.replace(self, a=clone(self.a), b=clone(self.b))

    @property
    def rows_of(self) -> list[tuple[int, torch.Tensor]]:
        """(slot, its rows) of each slot in the batch."""
        rows = self.mapping.cpu()
        return [
            (s, torch.nonzero(rows == s).flatten().to(self.mapping.device)) for s in sorted(set(rows.tolist()) - {-1})
        ]

    def padded(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A [slots, slices, R, K] and B of each slice [slots, N, R], zeros up to the largest rank, at least 16."""
        most = max(16, *self.ranks)
        first = self.a[0][0]
        a = first.new_zeros(len(self.ranks), len(self.slices), most, self.k)
        b = [first.new_zeros(len(self.ranks), n, most) for n in self.slices]
        for slot, rank in enumerate(self.ranks):
            for i in range(len(self.slices)):
                a[slot, i, :rank] = self.a[slot][i]
                b[i][slot, :, :rank] = self.b[slot][i]
        return a, b

    def true_update(self, x: torch.Tensor) -> torch.Tensor:
        """[T, sum N] fp32, s rounded nowhere."""
        update = torch.zeros(x.shape[0], sum(self.slices), device=x.device)
        for slot, rows in self.rows_of:
            parts = [
                x[rows].float() @ a.float().T @ b.float().T for a, b in zip(self.a[slot], self.b[slot], strict=True)
            ]
            update[rows] = torch.cat(parts, 1)
        return update


# ---- plain torch ----


def torch_loop(problem: Problem) -> Pair:
    """For each adapter: rows gathered, two products a slice, the sum added back (as PEFT does for a mixed batch)."""
    rows_of = problem.rows_of

    def run(x: torch.Tensor, out: torch.Tensor) -> None:
        for slot, rows in rows_of:
            gathered = x.index_select(0, rows)
            parts = [gathered @ a.T @ b.T for a, b in zip(problem.a[slot], problem.b[slot], strict=True)]
            out.index_add_(0, rows, torch.cat(parts, 1) if len(parts) > 1 else parts[0])

    return run


def torch_addmm(problem: Problem) -> Pair:
    """One adapter for all rows: the plain products, written in place. None of the mixed work."""
    ((slot, _),) = problem.rows_of
    columns = torch.tensor([0, *problem.slices]).cumsum(0).tolist()

    def run(x: torch.Tensor, out: torch.Tensor) -> None:
        for i, (a, b) in enumerate(zip(problem.a[slot], problem.b[slot], strict=True)):
            out[:, columns[i] : columns[i + 1]].addmm_(x @ a.T, b.T)

    return run


def torch_bmm(problem: Problem) -> Pair:
    """Each row gathers its own factors; two batched products a slice."""
    a, b = problem.padded()
    slots = problem.mapping.clamp(min=0).long()
    live = (problem.mapping >= 0)[:, None].to(a.dtype)
    columns = torch.tensor([0, *problem.slices]).cumsum(0).tolist()

    def run(x: torch.Tensor, out: torch.Tensor) -> None:
        for i in range(len(b)):
            s = torch.bmm(a[:, i].index_select(0, slots), x[:, :, None])
            update = torch.bmm(b[i].index_select(0, slots), s)[:, :, 0]
            out[:, columns[i] : columns[i + 1]].add_(update * live)

    return run


def torch_grouped(problem: Problem) -> Pair:
    """torch._grouped_mm over rows sorted by slot."""
    grouped_mm = torch._grouped_mm
    a, b = problem.padded()
    order = torch.cat([rows for _, rows in problem.rows_of])
    counts = torch.bincount(problem.mapping[problem.mapping >= 0].long(), minlength=len(problem.ranks))
    offsets = counts.cumsum(0).to(torch.int32)
    columns = torch.tensor([0, *problem.slices]).cumsum(0).tolist()
    a_t = [a[:, i].contiguous().transpose(1, 2) for i in range(len(b))]
    b_t = [part.transpose(1, 2) for part in b]

    def run(x: torch.Tensor, out: torch.Tensor) -> None:
        rows = x.index_select(0, order)
        for i in range(len(b_t)):
            update = grouped_mm(grouped_mm(rows, a_t[i], offs=offsets), b_t[i], offs=offsets)
            out[:, columns[i] : columns[i + 1]].index_add_(0, order, update)

    return run


# ---- vLLM ----


def _module(name: str, **attributes: Any) -> types.ModuleType:
    module = sys.modules.get(name)
    if module is None:
        module = types.ModuleType(name)
        module.__path__ = []
        sys.modules[name] = module
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(_module(parent), leaf, module)
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def _package(name: str) -> types.ModuleType:
    """A package whose own __init__ is skipped, its other files found."""
    module = _module(name)
    module.__path__ = [str(FOLDER / Path(*name.split(".")))]
    return module


class _Silent:
    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


_vllm: dict[str, Any] = {}


def vllm_modules() -> dict[str, Any]:
    """vLLM's two ops and their helpers, imported once."""
    if _vllm:
        return _vllm
    import triton
    import triton.language as tl

    def no_custom_op(*args: Any, **kwargs: Any) -> None:
        raise AttributeError("the plain functions are wanted")

    def to_device(data: Any, dtype: torch.dtype, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype, device=device)

    _module("vllm", envs=types.SimpleNamespace(
        VLLM_BATCH_INVARIANT=False, VLLM_TUNED_CONFIG_FOLDER=None, VLLM_LORA_DISABLE_PDL=False,
        VLLM_LORA_ENABLE_DUAL_STREAM=False,
    ))  # fmt: skip
    _module("vllm.logger", init_logger=lambda name: _Silent())
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    _module("vllm.platforms", current_platform=types.SimpleNamespace(
        is_cuda=lambda: torch.cuda.is_available(), has_device_capability=lambda _: hopper, is_device_capability=lambda _: hopper
    ))  # fmt: skip
    _module("vllm.triton_utils", tl=tl, triton=triton)
    _module("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
    _module("vllm.utils.torch_utils", async_tensor_h2d=to_device, direct_register_custom_op=no_custom_op)
    _package("vllm.lora.ops.triton_ops")
    base = "vllm.lora.ops.triton_ops."
    names = ("utils", "lora_shrink_op", "lora_expand_op", "lora_kernel_metadata")
    _vllm.update({name: import_module(base + name) for name in names})
    return _vllm


VLLM_SHRINK = [  # of the search space in its tuning readme, what can win for few rows and many
    {"block_m": m, "block_n": n, "block_k": k, "split_k": s, "num_warps": 4, "num_ctas": 1, "group_size_m": 8, "num_stages": st,
     "max_nreg": None}
    for m, n, k, s, st in ((16, 16, 256, 16, 3), (16, 16, 256, 8, 3), (16, 16, 128, 32, 3), (16, 32, 256, 8, 3), (64, 16, 64, 4, 4),
                           (64, 32, 64, 1, 4))
]  # fmt: skip
VLLM_EXPAND = [
    {"block_m": m, "block_n": n, "block_k": k, "num_warps": w, "num_ctas": 1, "num_stages": 2, "max_nreg": None}
    for m, n, k, w in ((16, 128, 16, 4), (16, 256, 16, 4), (32, 128, 16, 4), (64, 128, 16, 8))
]


class Vllm:
    """`lora_shrink` and `lora_expand`; `configs` None: as shipped."""

    def __init__(self, problem: Problem) -> None:
        modules = vllm_modules()
        a, self.b = problem.padded()
        self.a = [a[:, i].contiguous() for i in range(len(problem.slices))]
        self.meta = modules["lora_kernel_metadata"].LoRAKernelMeta.make(
            len(problem.ranks), len(problem.mapping), problem.mapping.device
        )
        self.meta.prepare_tensors(problem.mapping)
        self.s = torch.empty(
            len(problem.slices), len(problem.mapping), a.shape[2], dtype=torch.float32, device=a.device
        )

    def pair(self, configs: tuple[dict, dict] | None = None) -> Pair:
        modules = vllm_modules()
        shrink, expand = modules["lora_shrink_op"], modules["lora_expand_op"]
        original = modules["utils"].get_lora_op_configs

        def run(x: torch.Tensor, out: torch.Tensor) -> None:
            chosen = original if configs is None else lambda op_type, **_: configs[op_type == "expand"]
            shrink.get_lora_op_configs = expand.get_lora_op_configs = chosen
            meta = self.meta.meta_args(x.shape[0], True)
            self.s.zero_()  # its caller clears it where K is split
            shrink._lora_shrink(x, self.a, self.s, *meta, 1.0)
            expand._lora_expand(self.s, self.b, out, *meta, offset_start=0, add_inputs=True)

        return run

    def tunings(self) -> Iterator[tuple[dict, dict]]:
        """Shrinks beside one expand, then expands beside one shrink."""
        for shrink in VLLM_SHRINK:
            yield shrink, VLLM_EXPAND[0]
        for expand in VLLM_EXPAND[1:]:
            yield VLLM_SHRINK[0], expand

    def close(self) -> None:
        """Forget the addresses it has cached: they are never evicted, and memory is used again."""
        for name in ("_LORA_A_PTR_DICT", "_LORA_B_PTR_DICT"):
            getattr(vllm_modules()["utils"], name).clear()


# ---- SGLang ----


class _Phase(StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class _Struct:
    """As much of msgspec.Struct as a route needs: keyword arguments become attributes."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__()

    def __init__(self, **values: Any) -> None:
        for name in self.__class__.__annotations__:
            setattr(self, name, values.get(name, getattr(self.__class__, name, None)))


class _Flag:
    def __init__(self, value: Any) -> None:
        self.value = value

    def get(self) -> Any:
        return self.value


_sglang: dict[str, Any] = {}


def _import(name: str) -> Any:
    """A module whose names are replaced here."""
    return import_module(name)


def sglang_modules() -> dict[str, Any]:
    if _sglang:
        return _sglang

    def no_jit(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("routes are built by its Triton kernels here")

    _module("sglang")
    flags = (
        "SGLANG_ENABLE_LORA_CSGMV_SPLIT_K",
        "SGLANG_ENABLE_DETERMINISTIC_INFERENCE",
        "SGLANG_LORA_DENSE_CONFIG_DIR",
    )
    envs = types.SimpleNamespace(**{flag: _Flag(None) for flag in flags})
    _module("sglang.srt.environ", envs=envs)
    _module(
        "sglang.srt.lora.utils",
        LoRABatchInfo=types.SimpleNamespace,
        Phase=_Phase,
        architecture_for_capability=lambda major: f"sm{major}0",
    )
    _module(
        "sglang.srt.utils",
        cached_triton_kernel=lambda *a, **k: lambda kernel: kernel,
        get_device_name=lambda *a: "NVIDIA H200",
    )
    _module("sglang.kernels.jit.utils", is_arch_support_pdl=lambda: torch.cuda.is_available())
    _module("sglang.kernels.ops.lora.moe.virtual_experts", _align_block_size_jit=no_jit)
    try:
        import_module("msgspec")
    except ImportError:
        _module("msgspec", Struct=_Struct)
    try:
        import_module("pydantic")
    except ImportError:
        _module(
            "pydantic",
            BaseModel=type("BaseModel", (), {}),
            ConfigDict=dict,
            Field=lambda **k: None,
            model_validator=lambda **k: lambda method: method,
        )
    for name in ("kernels.ops.lora.common", "kernels.ops.lora.dense", "srt.lora.dense", "srt.lora"):
        _package("sglang." + name)
    _sglang["shrink"] = import_module("sglang.kernels.ops.lora.dense.chunked_sgmv_shrink")
    _sglang["expand"] = import_module("sglang.kernels.ops.lora.dense.chunked_sgmv_expand")
    _sglang["plan"] = import_module("sglang.srt.lora.dense.plan")
    _sglang["runner"] = runner = _import("sglang.srt.lora.dense.runner")
    _sglang["workspace"] = import_module("sglang.srt.lora.workspace")
    _sglang["plan"].load_plans = runner.load_plans = _load_plans
    built = runner.build_route
    # Between 513 and 16383 rows its aligner is a CUDA file; a capacity asks for the Triton builder, outside of what is timed.
    runner.build_route = lambda slots, **k: built(slots, **k, **({"capacity": 1} if slots.numel() > 512 else {}))
    if INTERPRETED:
        import contextlib

        lora_b = _import("sglang.kernels.ops.lora.common.lora_b")
        lora_b.torch = types.SimpleNamespace(
            **vars(torch)
        )  # its table builder enters a CUDA device, which there is none of
        lora_b.torch.cuda = types.SimpleNamespace(
            device=lambda _: contextlib.nullcontext(), is_current_stream_capturing=lambda: False
        )
        runner.slice_geometry = lambda offsets, n, device: lora_b._build_geometry(
            *lora_b._geometry_inputs(offsets, n, None)[:1], n, device, lora_b._geometry_inputs(offsets, n, None)[1]
        )
    return _sglang


def _load_plans(architecture: str) -> Any:
    """Its table of plans without pydantic."""
    plan = _sglang["plan"]
    path = FOLDER / "sglang/srt/lora/dense/configs" / f"{architecture}.plans.json"
    if not path.exists():
        return None
    fields = "phase kinds max_tokens max_rank min_in_features max_in_features min_out_features max_out_features"
    rows = []
    for raw in json.loads(path.read_text())["rows"]:
        spec = {"a_tiles": plan._a_tiles(), "b_tiles": plan._b_tiles()} | raw.get("spec", {})
        enums = {"a_family": plan.AFamily, "b_family": plan.BFamily, "overlap": plan.Overlap}
        spec = {key: enums[key](value) if key in enums else value for key, value in spec.items()}
        row = types.SimpleNamespace(name=raw["name"], **{field: raw.get(field) for field in fields.split()})
        row.phase = _Phase(row.phase) if row.phase else None
        row.kinds = [plan.DenseLoraKind(kind) for kind in row.kinds] if row.kinds else None
        row.spec = types.SimpleNamespace(
            a_family=spec.get("a_family", plan.AFamily.GROUPED), model_dump=lambda spec=spec: dict(spec)
        )
        rows.append(row)
    return types.SimpleNamespace(rows=rows)


def _packed_at_live_rank(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """A [slots, slices * R, K], slice i of a slot at [i * rank, (i + 1) * rank); B [slots, sum N, R]."""
    a, b = problem.padded()
    packed = a.new_zeros(a.shape[0], a.shape[1] * a.shape[2], problem.k)
    for slot, rank in enumerate(problem.ranks):
        packed[slot, : len(problem.slices) * rank] = torch.cat(problem.a[slot])
    return packed, torch.cat(b, 1).contiguous()


def _offsets(problem: Problem) -> tuple[int, ...]:
    return tuple(torch.tensor([0, *problem.slices]).cumsum(0).tolist())


CSGMV = [
    ({"BLOCK_N": n, "BLOCK_K": k, "num_warps": 4, "num_stages": st}, split, {"BLOCK_N": en, "BLOCK_K": 16, "num_warps": 4})
    for n, k, st, split, en in ((16, 256, 4, 8, 64), (64, 128, 4, 8, 128), (16, 256, 4, 16, 128), (64, 128, 4, 1, 128),
                                (16, 256, 4, 4, 64))
]  # fmt: skip


class Csgmv:
    """SGLang's default backend; chunks of an adapter's rows as its server makes them."""

    def __init__(self, problem: Problem) -> None:
        self.a, self.b = _packed_at_live_rank(problem)
        self.offsets = _offsets(problem)
        device, tokens = self.a.device, len(problem.mapping)
        chunk = 16 if tokens < 64 else 32 if tokens < 256 else 128
        starts, weights, order = [0], [], []
        groups = [*problem.rows_of]
        for slot, rows in groups:
            for first in range(0, len(rows), chunk):
                part = rows[first : first + chunk]
                order.append(part)
                starts.append(starts[-1] + len(part))
                weights.append(slot)
        self.info = types.SimpleNamespace(
            max_len=chunk,
            use_cuda_graph=False,
            num_segments=len(weights),
            seg_indptr=torch.tensor(starts, dtype=torch.int32, device=device),
            weight_indices=torch.tensor(weights, dtype=torch.int32, device=device),
            lora_ranks=torch.tensor(problem.ranks, dtype=torch.int32, device=device),
            scalings=torch.ones(len(problem.ranks), device=device),
            permutation=torch.cat(order).to(torch.int32),
        )
        self.device_offsets = torch.tensor(self.offsets, dtype=torch.int32, device=device)

    def pair(self, config: tuple[dict, int, dict] | None = None) -> Pair:
        modules = sglang_modules()
        shrink, expand = modules["shrink"], modules["expand"]
        kept = self.__dict__.setdefault("kept", (shrink.get_lora_shrink_config, expand.get_lora_expand_config))
        cpu = torch.tensor(self.offsets)
        widest = max(high - low for low, high in zip(self.offsets, self.offsets[1:], strict=False))

        def run(x: torch.Tensor, out: torch.Tensor) -> None:
            split = None
            if config is not None:
                split = config[1]
                shrink.get_lora_shrink_config = lambda **_: config[0]
                expand.get_lora_expand_config = lambda **_: config[2]
            try:
                s = shrink.chunked_sgmv_lora_shrink_forward(x, self.a, self.info, len(self.offsets) - 1, split_k=split)
                expand.chunked_sgmv_lora_expand_forward(
                    s, self.b, self.info, self.device_offsets, widest, out, slice_offsets_cpu=cpu
                )
            finally:
                shrink.get_lora_shrink_config, expand.get_lora_expand_config = kept

        return run

    def tunings(self) -> Iterator[tuple[dict, int, dict]]:
        yield from CSGMV

    def close(self) -> None:
        pass


class TritonV2:
    """SGLang's plan-driven backend: its shipped plan of the cell, or others of its families."""

    def __init__(self, problem: Problem) -> None:
        modules = sglang_modules()
        self.a, self.b = _packed_at_live_rank(problem)
        self.offsets = _offsets(problem)
        self.tokens = len(problem.mapping)
        device = self.a.device
        self.runner = modules["runner"].DenseLoraRunner(
            modules["workspace"].LoraWorkspace(), max_loras=len(problem.ranks), device=device, architecture="sm90"
        )
        self.runner.begin_batch(
            token_slots=problem.mapping,
            lora_ranks=torch.tensor(problem.ranks, dtype=torch.int32, device=device),
            scalings=torch.ones(len(problem.ranks), device=device),
            num_tokens=self.tokens,
            phase=_Phase.DECODE if self.tokens <= 256 else _Phase.PREFILL,
            graph_mode=False,
        )
        self.shipped = self.runner.plan_for(
            modules["plan"].DenseLoraKind.LINEAR,
            self.a.shape[1] // len(problem.slices),
            problem.k,
            self.offsets[-1],
            num_tokens=self.tokens,
        )

    def pair(self, plan: Any = None) -> Pair:
        plan = plan or self.shipped

        def run(x: torch.Tensor, out: torch.Tensor) -> None:
            bridge = self.runner.run_a(x, self.a, stack=len(self.offsets) - 1, plan=plan)
            self.runner.run_b(bridge, self.b, out, offsets=self.offsets, plan=plan)

        return run

    def site(self, base: Callable[[], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Base and update with the shipped plan's overlap of streams; `base` writes and returns out."""
        return lambda x: self.runner.apply(x, base, self.shipped, a=self.a, b=self.b, offsets=self.offsets)

    def tunings(self) -> Iterator[Any]:
        plan = sglang_modules()["plan"]
        shipped = self.shipped
        for split, mode in ((4, "serial"), (8, "serial"), (8, "planes"), (16, "planes")):
            tiles = {**plan._a_tiles(), "SPLIT_K": split, "SPLIT_MODE": mode}
            block = 16 if self.tokens <= 256 else 64
            yield dataclasses.replace(
                shipped, a_family=plan.AFamily.GROUPED, b_family=plan.BFamily.GROUPED, block_size=block, a_tiles=tiles
            )
        if self.tokens <= 64:
            yield dataclasses.replace(
                shipped, a_family=plan.AFamily.ALL_SLOTS, b_family=plan.BFamily.PER_ROW, a_tiles=plan._a_tiles()
            )

    def close(self) -> None:
        pass


ANCHORS: dict[str, Callable[[Problem], Any]] = {"vllm": Vllm, "csgmv": Csgmv, "triton_v2": TritonV2}


def available() -> bool:
    return (FOLDER / "vllm").is_dir() and (FOLDER / "sglang").is_dir()


def check(problem: Problem, pair: Pair) -> float:
    """Largest error of a pair relative to the largest update, and base rows must keep their bits. Raises where wrong."""
    tokens = len(problem.mapping)
    dtype = problem.a[0][0].dtype
    x = torch.randn(tokens, problem.k, device=problem.mapping.device).to(dtype)
    base = torch.randn(tokens, sum(problem.slices), device=x.device).to(dtype)
    out = base.clone()
    pair(x, out)
    update = problem.true_update(x)
    error = ((out.float() - base.float() - update).abs().max() / update.abs().max()).item()
    if not error < 0.05:
        raise AssertionError(f"error {error:.3g} of the largest update")
    if not torch.equal(out[problem.mapping < 0], base[problem.mapping < 0]):
        raise AssertionError("rows of the base have changed")
    return error


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    dtype = torch.float16 if INTERPRETED else torch.bfloat16
    failed = 0
    for slices, ranks, mapping in (
        ((64, 32, 32), (16, 16, 16), [0, 2, -1, 1, 2, 0, 0]),
        ((128,), (8, 32), [1, -1, 0, 0, 1]),
        ((96, 96), (16,), [0] * 20),
    ):
        problem = Problem.random(256, slices, mapping, ranks, device, dtype)
        pairs: dict[str, Pair] = {"torch loop": torch_loop(problem), "torch bmm": torch_bmm(problem)}
        for name, make in ANCHORS.items() if available() else ():
            if sys.argv[1:] and name not in sys.argv[1:]:
                continue
            anchor = make(problem)
            pairs[name] = anchor.pair()
            pairs |= {f"{name} tuning {i}": anchor.pair(t) for i, t in enumerate(anchor.tunings())}
        for name, pair in pairs.items():
            try:
                print(f"{slices!s:16} {name:24} error {check(problem, pair):.2e}")
            except Exception as error:
                failed += 1
                print(f"{slices!s:16} {name:24} {type(error).__name__}: {str(error)[:300]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
