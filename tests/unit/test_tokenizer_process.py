"""A tokenizer in another process gives what it gives here, and its end changes nothing but where it is asked."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from awkward_text import AWKWARD, random_texts

from tests.tiny import make_tiny_model
from uma_engine import Engine
from uma_engine.catalog import Tokenizer, open_model, resolve, tokenizer_process
from uma_engine.catalog.tokenizer_process import ATTRIBUTES, RemoteTokenizer
from uma_engine.errors import CorruptFile, InvalidRequest

TEXTS = [*AWKWARD, *random_texts(100), ""]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def local(model: Path) -> Tokenizer:
    return open_model(model).tokenizer


@pytest.fixture
def remote(model: Path) -> Iterator[RemoteTokenizer]:
    tokenizer = RemoteTokenizer(model)
    yield tokenizer
    tokenizer.close()


def pid_of(tokenizer: RemoteTokenizer) -> int:
    assert tokenizer._process is not None
    return tokenizer._process.pid


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def same(remote: RemoteTokenizer, local: Tokenizer, texts: list[str]) -> None:
    for name in ATTRIBUTES:
        assert getattr(remote, name) == getattr(local, name), name
    control = [local.piece_of(i) for i in sorted(local.control_ids)]
    texts = [*texts, *control, "a" + "b".join(control)]
    for special in (False, True):
        assert remote.encode_batch(texts, special) == local.encode_batch(texts, special)
        assert [remote.encode(t, special) for t in texts[:20]] == [local.encode(t, special) for t in texts[:20]]
    ids = range(-2, local.vocab_size + 2)
    assert [remote.piece_of(i) for i in ids] == [local.piece_of(i) for i in ids]
    assert remote.piece_of(None) == ""
    for i in ids:
        if local.piece_of(i):
            assert remote.bytes_of(i) == local.bytes_of(i)
        else:
            with pytest.raises(InvalidRequest):
                remote.bytes_of(i)
    for text in texts:
        found = local.encode(text, special=True)
        assert remote.decode(found) == local.decode(found)


def test_it_gives_what_the_tokenizer_gives(remote: RemoteTokenizer, local: Tokenizer) -> None:
    same(remote, local, TEXTS)
    assert remote._process is not None, "all of it was asked there"
    assert remote.encode_batch([]) == []
    assert remote.library.encode("a b").ids == local.library.encode("a b").ids


@pytest.mark.weights
def test_so_does_that_of_the_default_model() -> None:
    path = resolve("smollm2-135m")
    remote = RemoteTokenizer(path)
    same(remote, open_model(path).tokenizer, TEXTS)
    remote.close()


@pytest.mark.parametrize("bad", ["a\ud800b", 7, None, b"x"])
def test_what_is_not_text_is_refused_and_the_process_stays(
    remote: RemoteTokenizer, local: Tokenizer, bad: object
) -> None:
    before = pid_of(remote)
    for call in (lambda: remote.encode(bad), lambda: remote.encode_batch(["fine", bad])):  # type: ignore[arg-type,list-item]
        with pytest.raises(InvalidRequest):
            call()
    assert remote.encode("fine") == local.encode("fine")
    assert pid_of(remote) == before


def test_threads_share_it(remote: RemoteTokenizer, local: Tokenizer) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(remote.encode, TEXTS * 3))
    assert found == [local.encode(text) for text in TEXTS] * 3


def test_after_its_process_was_killed_it_is_built_here(remote: RemoteTokenizer, local: Tokenizer) -> None:
    os.kill(pid_of(remote), signal.SIGKILL)
    same(remote, local, TEXTS)
    assert remote._process is None


def test_one_that_waits_for_others_too_long_is_replaced(
    model: Path, local: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    popen = tokenizer_process.subprocess.Popen

    def started(*args: Any, **options: Any) -> Any:
        process = popen(*args, **options)
        begun.append(process.pid)
        return process

    monkeypatch.setattr(tokenizer_process.subprocess, "Popen", started)
    monkeypatch.setattr(tokenizer_process, "PATIENCE_S", 0.0)
    remote = RemoteTokenizer(model)
    assert len(begun) == 2
    assert pid_of(remote) == begun[1]
    same(remote, local, TEXTS[:20])
    remote.close()
    assert not any(map(is_there, begun))


def test_without_another_process_it_is_built_here(
    model: Path, local: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_process.sys, "executable", str(model / "nothing"))
    remote = RemoteTokenizer(model)
    assert remote._process is None
    same(remote, local, TEXTS[:20])
    remote.close()


def test_what_cannot_be_opened_is_refused_as_here(tmp_path: Path) -> None:
    (path := tmp_path / "m.gguf").write_bytes(b"GGUF nonsense")
    with pytest.raises(CorruptFile):
        RemoteTokenizer(path)


def test_it_ends_with_the_process_that_asks_it_however_that_ends(model: Path) -> None:
    script = (
        "import os, sys; from uma_engine.catalog.tokenizer_process import RemoteTokenizer;"
        "t = RemoteTokenizer(sys.argv[1]); print(t._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(model)], stdout=subprocess.PIPE, timeout=120, check=False)
    pid = int(done.stdout)
    end = time.monotonic() + 10
    while is_there(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not is_there(pid)


def test_ctrl_c_and_low_priorities_reach_it_as_they_should(remote: RemoteTokenizer) -> None:
    assert os.getpgid(pid_of(remote)) != os.getpgid(0), "a terminal's Ctrl-C is for the group in front"
    assert os.getsid(pid_of(remote)) == os.getsid(0)


def test_closing_or_forgetting_ends_the_process(model: Path) -> None:
    first, second = RemoteTokenizer(model), RemoteTokenizer(model)
    pids = pid_of(first), pid_of(second)
    first.close()
    first.close()
    del second
    gc.collect()
    end = time.monotonic() + 10
    while any(map(is_there, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_there, pids))


def test_an_engine_says_the_same_with_it_and_ends_it(model: Path) -> None:
    job, people = "rust and sql", ["rust", "nurse", "sql sql"]
    with Engine(model) as engine:
        plain = engine.rank(job, people)
    engine = Engine(model, tokenizer_process=True)
    tokenizer = engine._stack.tokenizer
    assert isinstance(tokenizer, RemoteTokenizer)
    pid = pid_of(tokenizer)
    answer = engine.rank(job, people)
    assert [r.score for r in answer.all_results] == [r.score for r in plain.all_results]
    assert answer.stack == plain.stack
    engine.close()
    assert not is_there(pid)
