"""Builds the one compiled extension, `uma_kernels._C`; everything else is in pyproject.toml.

The kernel sources in csrc/cpu are compiled once for each instruction set and chosen at run time, so that one wheel runs
on every machine: no -march=native. Without a working compiler the install goes on and the reference back end is used.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
KERNELS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc/cpu").glob("*.cpp"))
COMMON = sorted(str(p.relative_to(ROOT)) for d in ("csrc/common", "csrc/bindings") for p in (ROOT / d).glob("*.cpp"))
HEADERS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
SANITIZE = os.environ.get("UMA_SANITIZE", "")  # e.g. "address,undefined": see `make sanitize`

ISA_FLAGS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = [
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512",
    ]  # fmt: skip
if _most := os.environ.get("UMA_MOST_ISA"):  # the last of them that is built: `make sanitize` builds what can run here
    ISA_FLAGS = dict(list(ISA_FLAGS.items())[: list(ISA_FLAGS).index(_most) + 1])


def announce(message: str) -> None:
    """Say it on standard error and, since pip hides that, on the terminal itself where there is one."""
    print(message, file=sys.stderr)
    if not sys.stderr.isatty():
        with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
            terminal.write(message)


class BuildKernels(build_ext):
    """build_ext with one object per (kernel source, instruction set); a failing compiler is reported, not fatal."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            if os.environ.get("UMA_REQUIRE_EXTENSION"):
                raise
            reason = str(error).splitlines()[0][:200]
            announce(
                "\n*** uma-engine: the compiled kernels were NOT built; the (slow) reference back end will be used.\n"
                f"*** reason: {reason}\n"
                "*** hint: install GCC 12 or newer, or Clang (Debian: apt-get install g++), and install again\n"
            )

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        flags = [
            "-std=c++17",
            "-O3",
            "-g0",
            "-fvisibility=hidden",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-ffp-contract=fast",
            "-Wall",
            "-Wextra",
        ]
        flags += ["-Wno-psabi", "-Wno-unknown-pragmas"]
        link = ["-pthread"]
        if SANITIZE:
            flags += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-g1", "-O1"]
            link += [f"-fsanitize={SANITIZE}"]
        include = [str(ROOT / "csrc/include"), str(ROOT / "csrc"), pybind11.get_include(), *self.include_dirs]
        include += list(self.compiler.include_dirs)
        levels = [("UMA_HAVE_" + isa.upper(), "1") for isa in ISA_FLAGS]
        jobs = [(src, "common", [], levels) for src in COMMON]
        jobs += [
            (src, isa, extra, [("UMA_ISA", isa), (f"UMA_ISA_{isa.upper()}", "1"), *levels])
            for isa, extra in ISA_FLAGS.items()
            for src in KERNELS
        ]

        newest_header = max(Path(header).stat().st_mtime for header in ext.depends)

        def compile_one(job: tuple[str, str, list[str], list[tuple[str, str]]]) -> list[str]:
            source, folder, extra, macros = job
            output_dir = str(Path(self.build_temp) / folder)
            target = Path(self.compiler.object_filenames([source], output_dir=output_dir)[0])
            if target.exists() and target.stat().st_mtime > max(newest_header, Path(source).stat().st_mtime):
                return [str(target)]
            return self.compiler.compile(
                [source],
                output_dir=output_dir,
                macros=macros,
                include_dirs=include,
                extra_postargs=[*flags, *extra],
                depends=ext.depends,
            )

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = [obj for objs in pool.map(compile_one, jobs) for obj in objs]
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=link, target_lang="c++", build_temp=self.build_temp
        )


setup(
    ext_modules=[
        Extension("uma_kernels._C", sources=KERNELS + COMMON, depends=[*HEADERS, "setup.py"], language="c++"),
    ],
    cmdclass={"build_ext": BuildKernels},
)
