"""Opens ONNX Runtime on a graph: threads, device, and words for what is not installed.

Knows ONNX Runtime's options; does not know what a graph computes.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from uma_engine.errors import CorruptFile, EngineUnavailable, InvalidRequest, MissingPackage, UnknownModel
from uma_kernels.dispatch import num_threads as default_num_threads

__all__ = ["require", "runtime_session"]

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# fp32 stays fp32: by default this provider multiplies with 10 bits of mantissa on recent GPUs.
PROVIDER_OPTIONS: dict[str, dict[str, Any]] = {"cpu": {}, "cuda": {"use_tf32": 0}}


def require(package: str, extra: str, purpose: str) -> Any:
    """The module of an optional package. Errors: MissingPackage, whose hint names the extra"""
    try:
        return import_module(package)
    except ImportError:
        raise MissingPackage(
            f"{purpose} needs `{package}`, which is not installed",
            hint=f"install it: `pip install 'uma-engine[{extra}]'`",
        ) from None


def runtime_session(
    path: Path, *, extra: str, device: str = "cpu", num_threads: int | None = None, spin: bool = True
) -> Any:
    """An `onnxruntime.InferenceSession` on the graph at `path`.

    `num_threads` None: UMA_NUM_THREADS, else the CPUs of this process. `spin`: workers wait busily for the next op, which
    is quickest where nothing else computes in this process.

    Errors:  MissingPackage, naming `extra`; UnknownModel when there is no file; CorruptFile when it is no such graph;
             InvalidRequest for another device; EngineUnavailable when ONNX Runtime was built without it
    """
    if device not in PROVIDERS:
        raise InvalidRequest(f"`device` is `{device}` but must be one of {', '.join(PROVIDERS)}", param="device")
    if num_threads is not None and num_threads < 1:
        raise InvalidRequest(f"`num_threads` is {num_threads} but must be at least 1", param="num_threads")
    if not path.is_file():
        raise UnknownModel(f"there is no file `{path}`", hint="`uma export MODEL --onnx DIR` writes a graph")
    runtime = require("onnxruntime", extra, "running an ONNX graph")
    provider = PROVIDERS[device]
    if provider not in (there := runtime.get_available_providers()):
        raise EngineUnavailable(
            f"`device` is `{device}` but ONNX Runtime has only {', '.join(f'`{name}`' for name in there)}",
            hint="put the build for GPUs in place of the other: `pip uninstall onnxruntime`, `pip install onnxruntime-gpu`",
        )
    options = runtime.SessionOptions()
    options.intra_op_num_threads = num_threads or default_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors, which are raised as well
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    try:
        return runtime.InferenceSession(str(path), options, providers=[(provider, PROVIDER_OPTIONS[device])])
    except Exception as error:  # the library has a class for each of its status codes
        first_line = str(error).strip().partition("\n")[0]
        raise CorruptFile(f"ONNX Runtime cannot open `{path}`: {first_line[:300]}") from None
