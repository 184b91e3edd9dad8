"""Every error a caller can meet, with its HTTP status and a hint.

Knows the words of failure; does not know who raises them, prints them or serves them.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "AdapterError",
    "CorruptFile",
    "DeadlineExceeded",
    "DeviceOutOfMemory",
    "DownloadError",
    "EngineUnavailable",
    "InvalidRequest",
    "InvariantViolation",
    "MissingPackage",
    "ModelOverflow",
    "Overloaded",
    "RequestCancelled",
    "SurfaceError",
    "TooLarge",
    "UmaError",
    "UnknownAdapter",
    "UnknownModel",
    "UnsupportedModel",
]


class UmaError(Exception):
    """Base of all errors meant for a caller.

    `message` states both values that disagree, literals in backticks, no full stop; `hint` says what to do about it.
    """

    status = 500
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    def __reduce__(self):  # keyword-only fields survive pickling between processes
        return _rebuild, (type(self), self.message, self.hint, self.param)


def _rebuild(
    cls: type[UmaError], message: str, hint: str | None, param: str | None, extra: dict[str, Any] | None = None
) -> UmaError:
    return cls(message, hint=hint, param=param, **(extra or {}))


class InvalidRequest(UmaError):
    """The call itself is wrong: an argument out of range, an empty query, a NaN fact."""

    status = 400
    exit_code = 2


class AdapterError(InvalidRequest):
    """An adapter that cannot be loaded: unsupported kind, wrong shape, non-finite weights, missing file."""


class CorruptFile(InvalidRequest):
    """A weight or tokenizer file that is truncated, damaged or lies about its own sizes."""


class SurfaceError(InvalidRequest):
    """A surface (the declaration of factors, weights and ties) or a calibration that is not what it must be."""


class UnsupportedModel(InvalidRequest):
    """A model whose architecture, tensor type or format this engine does not read."""


class UnknownModel(UmaError):
    """No such catalog name, path or hub id."""

    status = 404
    exit_code = 2


class UnknownAdapter(UmaError):
    """No adapter is loaded under that name."""

    status = 404
    exit_code = 2


class TooLarge(UmaError):
    """More tokens, bytes or candidates than the engine was configured to take."""

    status = 413
    exit_code = 2


class Overloaded(UmaError):
    """The queue is full; the request was not accepted. `retry_after` is in seconds."""

    status = 429
    exit_code = 75

    def __init__(
        self, message: str, *, hint: str | None = None, param: str | None = None, retry_after: float = 1.0
    ) -> None:
        super().__init__(message, hint=hint, param=param)
        self.retry_after = retry_after

    def __reduce__(self):
        return _rebuild, (type(self), self.message, self.hint, self.param, {"retry_after": self.retry_after})


class RequestCancelled(UmaError):
    """The caller gave the request up before it finished."""

    status = 499


class EngineUnavailable(UmaError):
    """The engine is closed, closing, or its step loop died."""

    status = 503


class MissingPackage(EngineUnavailable):
    """An optional package that this call needs is not installed; the hint names the extra that brings it."""


class DownloadError(EngineUnavailable):
    """No source of a catalog file could be fetched, or what came does not match its digest."""


class DeadlineExceeded(UmaError):
    """The request's deadline passed before it finished; what it held is freed."""

    status = 504


class DeviceOutOfMemory(UmaError):
    """A step needed more memory than the device had left: its requests end, the engine goes on."""

    status = 503
    exit_code = 75


class ModelOverflow(UmaError):
    """The model's own arithmetic overflowed for this request: an adapter or base whose weights are too large."""

    status = 500


class InvariantViolation(UmaError):
    """A fault of the engine's own bookkeeping, never of the caller."""

    status = 500
