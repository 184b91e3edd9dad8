"""Triton's interpreter as the tests use it: conversions that round as a GPU does, and none of its setting up at every call.

Knows the interpreter's insides, of the version that pyproject names; does not know kernels. Only for processes that interpret
all kernels: `triton.language` stays as the interpreter needs it once the first kernel has run.
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import torch

__all__ = ["adapt"]


def adapt() -> None:
    """Change the interpreter of this process; once, before the first kernel runs."""
    from triton.runtime import interpreter

    _round_as_a_gpu_does(interpreter)
    _set_up_once(interpreter)


def _round_as_a_gpu_does(interpreter: Any) -> None:
    """It cuts fp32 off where a GPU rounds to the nearest bf16 or e4m3: torch's conversions in its place."""
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8e4nv": torch.float8_e4m3fn}
    unsigned = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source.name not in types or target.name not in types or not values.size:
            return original(values, source, target, rounding)
        raw = torch.frombuffer(bytearray(values.tobytes()), dtype=types[source.name])
        result = raw.to(types[target.name])
        return result.view(unsigned[result.element_size()]).numpy().reshape(values.shape)

    interpreter._convert_float = convert


def _set_up_once(interpreter: Any) -> None:
    """It looks through all of `triton.language` at each launch and at each call of a device function, and restores it after
    launches alone; it wraps a shape's numbers again for every tensor; and numpy warns at each scalar that it takes out of an
    array. All of these take longer than small kernels do."""
    language = interpreter.tl
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    language.tensor.__index__ = lambda self: int(self.handle.data.item())
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()  # nothing left to change or restore

    @functools.cache
    def shape_of(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return language.constexpr(math.prod(shape)), language.core.tuple([language.constexpr(n) for n in shape])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = shape_of(type.shape if type.is_block() else ())

    language.tensor.__init__ = tensor
    of_type = interpreter._get_np_dtype
    by_name = functools.cache(lambda name, dtype: of_type(dtype))

    def np_dtype(dtype: Any) -> Any:
        return by_name(str(dtype), dtype.scalar) if dtype.is_block() and not dtype.scalar.is_ptr() else of_type(dtype)

    interpreter._get_np_dtype = np_dtype
