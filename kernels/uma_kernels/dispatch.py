"""Which back end an op takes, and why.

Knows the back ends that exist on this machine; does not know what any op computes.

A choice is made by device: CUDA tensors take `triton`, CPU tensors take `cpp` where the extension is compiled, else
`numba` where the op has it and it is installed, else `reference`. `UMA_BACKEND=reference|cpp|numba|triton` or
`use_backend(...)` forces one. `UMA_ISA=portable|avx2|avx512` picks the instruction set of `cpp`. `triton` takes CPU
tensors only under Triton's interpreter (`TRITON_INTERPRET=1`), for tests.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

BACKENDS = ("reference", "cpp", "numba", "triton")
# Ops and the back ends each has, the CPU's preferred one first. An op's folder registers nothing: this table is the registry.
OPS: dict[str, tuple[str, ...]] = {
    "linear": ("cpp", "reference", "triton"),
    "lora": ("cpp", "reference", "triton"),
    "attention.tree": ("cpp", "reference", "triton"),
    "attention.paged_decode": ("cpp", "reference", "triton"),
    "norm": ("cpp", "reference", "triton"),
    "rope": ("cpp", "reference", "triton"),
    "activation": ("cpp", "reference", "triton"),
    "kv_cache": ("cpp", "reference", "triton"),
    "label_head": ("cpp", "reference", "triton"),
    "sampling": ("cpp", "reference", "triton"),
    "topk": ("cpp", "numba", "reference", "triton"),
    "topk.maxsim": ("cpp", "numba", "reference", "triton"),
}

_FROM_ENVIRONMENT = os.environ.get("UMA_BACKEND") or None  # read once: `choose` runs for each op call
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("uma_backend", default=None)


@dataclass(frozen=True, slots=True)
class Choice:
    op: str
    backend: str
    reason: str


class BackendUnavailable(RuntimeError):
    """A back end was forced that this machine or this op does not have."""


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        return import_module("uma_kernels._C"), ""
    except ImportError as error:
        return None, str(error)


C, C_ERROR = _load_extension()
if C is not None and (_wanted := os.environ.get("UMA_ISA")) and C.isa() != _wanted:
    raise BackendUnavailable(
        f"`UMA_ISA` is `{_wanted}` but this machine and build offer {', '.join(C.available_isas())}"
    )


def extension() -> Any:
    """The compiled extension; raises BackendUnavailable where it is not built."""
    if C is None:
        raise BackendUnavailable(f"the compiled extension is not available: {C_ERROR}")
    return C


@functools.cache
def triton_error() -> str | None:
    """Why Triton cannot be imported, None where it can."""
    try:
        import_module("triton")
    except ImportError as error:
        return str(error)
    return None


@functools.cache
def numba_error() -> str | None:
    """Why numba cannot be imported, None where it can."""
    try:
        import_module("numba")
    except ImportError as error:
        return str(error)
    return None


def interpreted() -> bool:
    """Triton kernels run in its interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class _Timed:
    """The extension with a clock at each of its functions."""

    def __init__(self, extension: ModuleType, seconds: dict[str, list[float]]) -> None:
        self._extension = extension
        self._seconds = seconds

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._extension, name)
        if not callable(call):
            return call
        times = self._seconds.setdefault(name, [])

        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args)
            finally:
                times.append(time.perf_counter() - began)

        setattr(self, name, timed)
        return timed


@contextlib.contextmanager
def profiled() -> Iterator[dict[str, list[float]]]:
    """Inside, the seconds of every call of a compiled kernel, by its name: of all threads of the process."""
    global C
    plain = extension()
    seconds: dict[str, list[float]] = {}
    C = _Timed(plain, seconds)  # type: ignore[assignment]
    try:
        yield seconds
    finally:
        C = plain


def forced_backend() -> str | None:
    name = _forced.get() or _FROM_ENVIRONMENT
    if name is not None and name not in BACKENDS:
        raise BackendUnavailable(f"back end `{name}` is not one of {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force a back end for the calls made inside, in this thread or task."""
    token = _forced.set(name)
    try:
        forced_backend()
        yield
    finally:
        _forced.reset(token)


def explain(op: str, device: str = "cpu") -> Choice:
    """The back end that `op` takes for tensors on `device`, with the reason in words."""
    available = OPS[op]
    forced = forced_backend()
    if forced is not None:
        if forced not in available:
            raise BackendUnavailable(f"`{op}` has no `{forced}` back end; it has {', '.join(available)}")
        if forced == "cpp":
            extension()
        if forced == "numba" and numba_error() is not None:
            raise BackendUnavailable(f"numba is not available: {numba_error()}")
        if forced == "triton":
            if triton_error() is not None:
                raise BackendUnavailable(f"Triton is not available: {triton_error()}")
            if device == "cpu" and not interpreted():
                raise BackendUnavailable("`triton` takes CPU tensors only with `TRITON_INTERPRET=1`")
        return Choice(op, forced, "forced")
    if device == "cuda" and "triton" in available:
        if triton_error() is None:
            return Choice(op, "triton", "CUDA tensors")
        return Choice(op, "reference", f"Triton not available ({triton_error()})")
    if device != "cpu":
        return Choice(op, "reference", f"no kernel for device `{device}`")
    if "cpp" in available and C is not None:
        return Choice(op, "cpp", f"CPU tensors, extension compiled, instruction set {C.isa()}")
    if "numba" in available and numba_error() is None:
        return Choice(op, "numba", f"extension not available ({C_ERROR}), numba compiles")
    return Choice(op, "reference", f"extension not available ({C_ERROR})" if C is None else "no compiled kernel")


def choose(op: str, device: str = "cpu") -> str:
    """The name of the back end for `op`; cheap enough to be called for each op call."""
    if device == "cpu" and C is not None and _FROM_ENVIRONMENT is None and _forced.get() is None:
        return OPS[op][0]
    return explain(op, device).backend


def isa() -> str | None:
    """Instruction set of the `cpp` back end, None where it is not built."""
    return C.isa() if C is not None else None


def description() -> str:
    """The CPU back end in one word, e.g. `cpp-avx2`: results have the same bits only within one."""
    backend = choose("linear")
    return f"{backend}-{isa()}" if backend == "cpp" else backend


def num_threads() -> int:
    """Threads the kernels use when called from this thread: UMA_NUM_THREADS, else the CPUs this process may use."""
    if C is not None:
        return int(C.get_num_threads())
    wanted = os.environ.get("UMA_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) else len(os.sched_getaffinity(0))


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """`set_num_threads(n)` for the calling thread while inside; what its owner had set comes back."""
    import torch

    before = torch.get_num_threads(), C.get_num_threads() if C is not None else 0
    set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        if C is not None:
            C.set_num_threads(before[1])


def set_num_threads(n: int) -> None:
    """Threads for kernels called from the calling thread.

    With compiled kernels torch itself gets one: it only moves small things between them, and its OpenMP workers would
    spin for milliseconds after each of its calls on a CPU that our pool needs. Memory that tensors free stays with the
    process (csrc/bindings/runtime.cpp).
    """
    import torch

    torch.set_num_threads(1 if C is not None and forced_backend() in (None, "cpp") else n)
    if C is not None:
        C.set_num_threads(n)
        C.keep_freed_memory()
