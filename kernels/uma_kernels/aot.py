"""Compiles every Triton kernel ahead of time, for GPUs that need not be there, and reads what the compiler made of it.

    python -m uma_kernels.aot [--only WORD...] [--arch 80 90] [--json]

Knows kernels, signatures and what a cubin says of itself; does not know what a kernel computes, nor run one.

A module `uma_kernels.<op>.triton_kernel` lists its kernels in `AOT_CASES`. Triton's interpreter replaces kernels when they
are defined, so this runs in a process of its own without `TRITON_INTERPRET`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["ARCHITECTURES", "AotCase", "AotResult", "cases", "compile_all"]

ARCHITECTURES = (80, 90)


@dataclass(frozen=True)
class AotCase:
    """One kernel with the types of its arguments.

    signature:  argument -> type as Triton writes it: `*bf16`, `i32`, `fp32`, `tensordesc<bf16[128,64]>`; `i32:16` says that
                the value is a multiple of 16. Pointers are taken as aligned to 16 bytes. Constexprs need no entry
    constexprs: argument -> value
    is_matmul:  a matrix product is the work: on sm_90 it must use wgmma
    only:       the one architecture for which the kernel is meant (it uses TMA, say); None: all
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    is_matmul: bool = False
    only: int | None = None


@dataclass(frozen=True)
class AotResult:
    op: str
    case: str
    arch: int
    is_matmul: bool
    registers: int = 0
    spills: int = 0  # bytes, stores and loads
    shared: int = 0  # bytes
    wgmma: int = 0  # instructions in the PTX
    seconds: float = 0.0  # near 0 where Triton's cache had it
    error: str = ""

    @property
    def problem(self) -> str:
        """What is wrong with it, in words; empty where nothing is."""
        if self.error:
            return self.error
        if self.spills:
            return f"spills {self.spills} bytes"
        if self.is_matmul and self.arch == 90 and not self.wgmma:
            return "no wgmma"
        return ""


def modules() -> list[str]:
    """Every module that may have kernels, by its op's folder (`attention` may hold one per kind)."""
    root = Path(__file__).parent
    found = sorted(root.glob("*/triton_*.py"))
    return [".".join((root.name, *path.relative_to(root).with_suffix("").parts)) for path in found]


def cases(module: str) -> Sequence[AotCase]:
    return getattr(import_module(module), "AOT_CASES", ())


def compile_all(
    only: Sequence[str] = (), architectures: Sequence[int] = ARCHITECTURES, processes: int = 2
) -> list[AotResult]:
    """Compile the cases whose `op/name` contains one of `only`, in new processes without the interpreter; none: all."""
    ops = {word.split("/")[0] for word in only}
    named = [name for name in modules() if name.split(".")[1] in ops]  # others need not even be importable
    wanted = [
        (module, index, arch)
        for module in named or modules()
        for index, case in enumerate(cases(module))
        for arch in architectures
        if case.only in (None, arch) and any(word in f"{module.split('.')[1]}/{case.name}" for word in only or [""])
    ]
    os.environ.pop("TRITON_INTERPRET", None)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return pool.map(_compile, wanted, chunksize=1)


def _compile(job: tuple[str, int, int]) -> AotResult:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, index, arch = job
    op, case = module.split(".")[1], cases(module)[index]
    begin = time.perf_counter()
    signature, attributes = {}, {}
    for position, argument in enumerate(case.fn.arg_names):
        kind, _, multiple = ("constexpr" if argument in case.constexprs else case.signature[argument]).partition(":")
        signature[argument] = kind
        if kind.startswith("*") or multiple == "16":
            attributes[(position,)] = [["tt.divisibility", 16]]
    try:
        compiled = triton.compile(
            ASTSource(case.fn, signature, dict(case.constexprs), attributes),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": case.num_warps, "num_stages": case.num_stages},
        )
        registers, spills = _usage(compiled.asm["ptx"], compiled.asm["cubin"])
    except Exception as error:
        return AotResult(op, case.name, arch, case.is_matmul, error=f"{type(error).__name__}: {error}")
    return AotResult(
        op,
        case.name,
        arch,
        case.is_matmul,
        registers,
        spills,
        compiled.metadata.shared,
        compiled.asm["ptx"].count("wgmma.mma_async"),
        round(time.perf_counter() - begin, 2),
    )


def _usage(ptx: str, cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of spills: a kernel without a stack has none, else ptxas is asked."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        text = _run(tools / "cuobjdump", "-res-usage", binary)
        registers = max(map(int, re.findall(r"REG:(\d+)", text)))
        if not any(map(int, re.findall(r"STACK:(\d+)", text))):
            return registers, 0
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        target = re.findall(r"\.target (\w+)", ptx)[0]
        text = _run(tools / "ptxas", "-v", "-O3", f"-arch={target}", "-o", f"{folder}/again.cubin", source)
        return registers, sum(map(int, re.findall(r"(\d+) bytes spill", text)))


def _run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def table(results: Sequence[AotResult]) -> str:
    lines = [f"{'op/kernel':52} {'sm':>3} {'regs':>5} {'spills':>6} {'shared':>7} {'wgmma':>5} {'s':>6}"]
    for r in results:
        numbers = f"{r.registers:5} {r.spills:6} {r.shared:7} {r.wgmma:5} {r.seconds:6.2f}"
        lines.append(f"{r.op + '/' + r.case:52} {r.arch:3} {numbers} {r.problem.splitlines()[0] if r.problem else ''}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="parts of `op/kernel`")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--json", action="store_true", help="one line of JSON in place of the table")
    args = parser.parse_args()
    results = compile_all(args.only, args.arch)
    text = json.dumps([asdict(r) for r in results]) if args.json else table(results)
    sys.stdout.write(text + "\n")
    return 1 if any(r.problem for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
