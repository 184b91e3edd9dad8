"""A tokenizer in a process of its own, for a base that is opened beside one that serves.

Knows pipes, frames and how a tokenizer is asked through them; does not know vocabularies. To build the tokenizer of a quarter of a million
pieces keeps the interpreter from everybody else for most of a second; here another interpreter does it, where nobody else
computes, and goes on to encode.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import struct
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from uma_engine.catalog.tokenizer import Tokenizer, not_text
from uma_engine.errors import InvalidRequest, UmaError

__all__ = ["RemoteTokenizer"]

logger = logging.getLogger("uma_engine.catalog")
FRAME = struct.Struct("<BQ")  # whether it is an answer or a failure, and how many bytes follow
ANSWER, FAILURE = 0, 1
T = TypeVar("T")
MAX_FRAME = 1 << 30
PATIENCE_S = 5.0
NICE = 10  # a tenth of a processor that others want: enough to come to an end
ATTRIBUTES = ("vocab_size", "special_ids", "control_ids", "bos_id", "eos_id", "adds_bos", "digest", "drops_first_space")


class _Lost(Exception):
    """The process is not there any more, or failed."""


class RemoteTokenizer(Tokenizer):
    """The tokenizer of the model at `path`, built and asked in another process. It gives the same ids.

    Should the process end, the tokenizer is built here, once, and nothing else changes. `close()` ends the process; so does forgetting the
    object, and the end of this process.

    Errors:  those of `open_model(path).tokenizer`
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._lock = threading.Lock()
        self._bytes = {}
        self._spelled: _Strings | None = None
        self._named: _Strings | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None
        try:
            process = self._begin()
            told = json.loads(_answer(process))
            self._spelled, self._named = _Strings(_answer(process)), _Strings(_answer(process))
        except _Lost as error:
            logger.warning("no other process has the tokenizer of `%s`: %s", self._path, error)
            self.close()
            local = self._local
            told = {name: getattr(local, name) for name in ATTRIBUTES}
        for name in ("special_ids", "control_ids"):
            told[name] = frozenset(told[name])
        self._drops_first_space = told.pop("drops_first_space")
        self.__dict__ |= told

    def _begin(self) -> subprocess.Popen[bytes]:
        """Start the process: it has its answer, or will have. One that gets no processor time in `PATIENCE_S` is replaced by one that
        takes a little. Errors: _Lost"""
        command = [sys.executable, "-m", "uma_engine.catalog.tokenizer_process"]
        for patient in (True, False):
            try:  # a group, so that Ctrl-C is this process's affair; no session: Linux shares processors out by session before priority
                self._process = process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, process_group=0
                )
            except OSError as error:
                raise _Lost(str(error)) from None
            self._end = weakref.finalize(self, _end, process)
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                _write(process.stdin, ANSWER, json.dumps([str(self._path), patient]).encode())
            except OSError as error:
                raise _Lost(str(error)) from None
            answer = select.poll()  # not `select`, which knows no descriptor beyond 1,023
            answer.register(process.stdout, select.POLLIN)
            if not patient or answer.poll(1000 * PATIENCE_S):
                break
            self._end()
        return process

    @cached_property
    def _local(self) -> Tokenizer:
        from uma_engine.catalog.model_files import open_model

        return open_model(self._path).tokenizer

    @property
    def library(self) -> Any:
        """As in `Tokenizer`: built here."""
        return self._local.library

    def encode(self, text: str, special: bool = False) -> list[int]:
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        for text in texts:
            if not isinstance(text, str):
                raise not_text(text)
        if self._process is not None:
            try:
                answer = np.frombuffer(self._asked(json.dumps([special, list(texts)]).encode()), np.int32)
                ends = np.cumsum(answer[: len(texts)])
                return [ids.tolist() for ids in np.split(answer[len(texts) :], ends[:-1])] if texts else []
            except _Lost as error:
                for text in texts:
                    with contextlib.suppress(UnicodeEncodeError):
                        text.encode()
                        continue
                    raise not_text(text) from None
                logger.warning("the tokenizer of `%s` is built here: %s", self._path, error)
                self.close()
        return self._local.encode_batch(texts, special)

    def piece_of(self, token_id: int | None) -> str:
        if self._named is None:
            return self._local.piece_of(token_id)
        piece = None if token_id is None else self._named[token_id]
        return "" if piece is None else piece.decode()

    def _spell(self, token_id: int) -> bytes:
        if self._spelled is None:
            return self._local.bytes_of(token_id)
        spelled = self._spelled[token_id]
        if spelled is None:
            raise InvalidRequest(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")
        return spelled

    @property
    def drops_first_space(self) -> bool:
        return self._drops_first_space

    def close(self) -> None:
        self._process = None
        self._end()

    def _asked(self, question: bytes) -> bytes:
        """The answer to one frame. Errors: _Lost"""
        process = self._process
        if process is None:
            raise _Lost("it was closed")
        assert process.stdin is not None
        with self._lock:
            try:
                _write(process.stdin, ANSWER, question)
            except (OSError, ValueError) as error:  # ValueError: closed meanwhile
                raise _Lost(str(error)) from None
            return _answer(process)


def _answer(process: subprocess.Popen[bytes]) -> bytes:
    """What the process says next. Errors: _Lost"""
    assert process.stdout is not None
    try:
        kind, payload = _read(process.stdout)
    except (OSError, ValueError) as error:
        raise _Lost(str(error)) from None
    if kind != ANSWER:
        raise _Lost(payload.decode(errors="replace"))
    return payload


class _Strings:
    """Byte strings by number, None where there is none: a length each (-1: none), then all of them."""

    def __init__(self, packed: bytes) -> None:
        count = int(np.frombuffer(packed, np.int64, 1)[0])
        lengths = np.frombuffer(packed, np.int32, count, 8)
        self._known = lengths >= 0
        self._ends = np.cumsum(np.maximum(lengths, 0), dtype=np.int64)
        self._data = memoryview(packed)[8 + 4 * count :]

    def __getitem__(self, number: int) -> bytes | None:
        if not 0 <= number < len(self._known) or not self._known[number]:
            return None
        return bytes(self._data[self._ends[number - 1] if number else 0 : self._ends[number]])

    @staticmethod
    def packed(strings: Sequence[bytes | None]) -> bytes:
        lengths = np.array([-1 if s is None else len(s) for s in strings], np.int32)
        return np.int64(len(strings)).tobytes() + lengths.tobytes() + b"".join(s for s in strings if s)


def _write(file: IO[bytes], kind: int, payload: bytes) -> None:
    file.write(FRAME.pack(kind, len(payload)))
    file.write(payload)
    file.flush()


def _read(file: IO[bytes]) -> tuple[int, bytes]:
    """Kind and payload. Errors: OSError where the other side is gone"""
    head = file.read(FRAME.size)
    if len(head) < FRAME.size:
        raise OSError("the other process has ended")
    kind, size = FRAME.unpack(head)
    if size > MAX_FRAME:
        raise OSError(f"a frame of {size} bytes")
    payload = file.read(size)
    if len(payload) < size:
        raise OSError("the other process has ended")
    return kind, payload


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    with contextlib.suppress(
        subprocess.TimeoutExpired
    ):  # without a moment's rest on the machine it dies late; it is reaped then
        process.wait(1.0)


def _built(path: str) -> tuple[Tokenizer, list[bytes]]:
    """The tokenizer, and all that the other side is told of it."""
    from uma_engine.catalog.model_files import open_model

    tokenizer = open_model(path).tokenizer
    told = {name: getattr(tokenizer, name) for name in ATTRIBUTES}
    named = [tokenizer.piece_of(i) for i in range(tokenizer.vocab_size)]
    spelled = [tokenizer.bytes_of(i) if name else None for i, name in enumerate(named)]
    pieces = [name.encode() if name else None for name in named]
    return tokenizer, [json.dumps(told, default=sorted).encode(), _Strings.packed(spelled), _Strings.packed(pieces)]


def _aside(make: Callable[[], T], patient: bool) -> T:
    """What `make` returns, on a thread of low priority: what the process does afterwards has the usual one.

    `patient`: where Linux runs it, the thread computes only while nobody else wants to. Then who wakes up need not even wait until the
    thread's turn is over, but on a machine without a moment's rest it never ends.
    """
    made: Future[T] = Future()

    def run() -> None:
        try:
            with contextlib.suppress(OSError):
                if patient and hasattr(os, "SCHED_IDLE"):
                    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
                else:
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run).start()
    return made.result()


def main() -> int:
    """Serve one tokenizer over standard input and output until the other side is gone."""
    questions = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    try:
        path, patient = json.loads(_read(questions)[1])
        tokenizer, frames = _aside(lambda: _built(path), patient)
        for frame in frames:
            _write(answers, ANSWER, frame)
        del frames
        while True:
            special, texts = json.loads(_read(questions)[1])
            try:
                encoded = tokenizer.encode_batch(texts, special)
            except UmaError as error:
                _write(answers, FAILURE, str(error).encode())
                continue
            found = np.array([len(ids) for ids in encoded] + [i for ids in encoded for i in ids], np.int32)
            _write(answers, ANSWER, found.tobytes())
    except UmaError as error:
        _write(answers, FAILURE, str(error).encode())
        return error.exit_code
    except OSError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
