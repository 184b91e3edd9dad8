"""Finds a wheel in the user's own package index, and fetches files over HTTP so that a cut connection can go on.

Knows the simple index in JSON and HTML, ranges, retries and certificates; does not know models or what a wheel holds.
"""

from __future__ import annotations

import base64
import contextlib
import email.message
import errno
import functools
import hashlib
import html.parser
import http.client
import json
import os
import re
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from uma_engine.errors import DownloadError

__all__ = ["Progress", "fetch", "find_wheel", "full_disk_as_error", "index_url"]

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being fetched
ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.5"
MAX_INDEX_BYTES = 64 << 20
CHUNK_BYTES = 1 << 18
TIMEOUT_S = 60.0
RETRIES = 5  # in a row without a new byte
RETRY_WAIT_S = 0.5  # doubled each time
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
CUT = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


@functools.cache
def _pip_setting(name: str) -> str | None:
    """A value of pip's configuration files, None when unset or when there is no pip."""
    command = [sys.executable, "-m", "pip", "config", "get", f"global.{name}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def index_url() -> str:
    """The package index that pip would use: `PIP_INDEX_URL`, pip's configuration, or pip's own default.

    Errors:  DownloadError when none of them says
    """
    configured = os.environ.get("PIP_INDEX_URL") or _pip_setting("index-url")
    if configured:
        return configured.rstrip("/")
    try:
        from pip._internal.models.index import PyPI
    except ImportError:
        raise DownloadError("no package index is configured and pip is not there", hint="set `PIP_INDEX_URL`") from None
    return str(PyPI.simple_url).rstrip("/")


@functools.cache
def _opener(certificates: str | None) -> urllib.request.OpenerDirector:
    context = ssl.create_default_context(cafile=certificates)
    return urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))


def _open(url: str, headers: dict[str, str]) -> Any:
    """Opens http and https alone; a user name and password in the URL become a header and stay out of messages."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise DownloadError(f"`{_shown(url)}` is not an http address")
    host = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(urllib.parse.urlunsplit(parts._replace(netloc=host, fragment="")))
    for name, value in headers.items():
        request.add_header(name, value)
    if parts.username is not None:
        user, password = urllib.parse.unquote(parts.username), urllib.parse.unquote(parts.password or "")
        token = base64.b64encode(f"{user}:{password}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    certificates = os.environ.get("PIP_CERT") or _pip_setting("cert") or os.environ.get("SSL_CERT_FILE")
    return _opener(certificates).open(request, timeout=TIMEOUT_S)


def _shown(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


class _Links(html.parser.HTMLParser):
    """The links of an index page: file name -> address."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        href = dict(attrs).get("href")
        if tag == "a" and href:
            name = urllib.parse.unquote(urllib.parse.urlsplit(href).path.rpartition("/")[2])
            self.found.setdefault(name, href)


def find_wheel(package: str, filename: str) -> str:
    """The address of a package's file in the user's index.

    Errors:  DownloadError when the index cannot be reached or does not have the file
    """
    index = index_url()
    page = f"{index}/{re.sub(r'[-_.]+', '-', package).lower()}/"
    for attempt in _attempts():
        try:
            with _open(page, {"Accept": ACCEPT}) as response:
                content, headers, base = response.read(MAX_INDEX_BYTES), response.headers, response.geturl()
            break
        except CUT as error:
            if attempt == RETRIES or _is_final(error):
                raise DownloadError(f"`{package}` cannot be found in `{_shown(page)}`: {_reason(error)}") from None
    links = _links(content, headers)
    if filename not in links:
        raise DownloadError(f"`{_shown(page)}` does not list `{filename}`")
    address = urllib.parse.urljoin(base, links[filename])
    return _with_login(address, index)


def _links(content: bytes, headers: email.message.Message) -> dict[str, str]:
    if "json" in headers.get_content_type():
        try:
            return {entry["filename"]: entry["url"] for entry in json.loads(content)["files"]}
        except (ValueError, KeyError, TypeError) as error:
            raise DownloadError(f"the package index sent JSON that is not an index page: {error}") from None
    parser = _Links()
    parser.feed(content.decode("utf-8", "replace"))
    return parser.found


def _with_login(address: str, index: str) -> str:
    """The index's user name and password also hold for files on the same host, and for no other."""
    ours, theirs = urllib.parse.urlsplit(index), urllib.parse.urlsplit(address)
    login, at, host = ours.netloc.rpartition("@")
    same = at and host == theirs.netloc and ours.scheme == theirs.scheme
    return urllib.parse.urlunsplit(theirs._replace(netloc=f"{login}@{host}")) if same else address


def _attempts() -> Iterator[int]:
    for attempt in range(RETRIES + 1):
        if attempt:
            time.sleep(RETRY_WAIT_S * 2 ** (attempt - 1))
        yield attempt


def _is_final(error: BaseException) -> bool:
    """Whether asking again is pointless: the server understood and said no, or is not who it claims to be."""
    if isinstance(error, urllib.error.HTTPError):
        return 400 <= error.code < 500 and error.code not in (408, 416, 425, 429)
    return isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError)


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answers {error.code}"
    return str(getattr(error, "reason", "") or error or type(error).__name__)


@contextlib.contextmanager
def full_disk_as_error(*scratch: Path) -> Iterator[None]:
    """Turns a full disk into a DownloadError, after removing the scratch files that filled it."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        for path in scratch:
            path.unlink(missing_ok=True)
        raise DownloadError(
            f"the disk of `{scratch[0].parent}` is full: {error.strerror}",
            hint="free some space, or put the cache elsewhere with `UMA_CACHE`",
        ) from None


def fetch(url: str, part: Path, size: int, sha256: str, on_bytes: Callable[[int], None]) -> None:
    """Fetches a file of known size and digest into `part`, going on where an earlier attempt stopped.

    `on_bytes` is told how many bytes are there, now and then. When the digest does not match, `part` is removed.
    Errors:  DownloadError when the server fails for good, sends something else, or the disk is full
    """
    attempt = 0
    while (have := part.stat().st_size if part.exists() else 0) < size:
        try:
            with full_disk_as_error(part):
                _fetch_rest(url, part, have, size, on_bytes)
        except CUT as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 416:
                part.unlink(missing_ok=True)  # what we have is not a beginning of what is there
            if _is_final(error):
                raise DownloadError(f"`{_shown(url)}` cannot be fetched: {_reason(error)}") from None
            cause = _reason(error)
        else:
            cause = "the connection was closed early"
        now = part.stat().st_size if part.exists() else 0
        attempt = 0 if now > have else attempt + 1
        if attempt > RETRIES:
            raise DownloadError(
                f"`{_shown(url)}` stopped at {now} of {size} bytes: {cause}", hint="try again: it resumes"
            )
        if now < size:
            time.sleep(RETRY_WAIT_S * 2**attempt)
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if have > size or found != sha256:
        part.unlink()
        raise DownloadError(
            f"`{_shown(url)}` has the sha256 `{found}` but `{sha256}` was expected",
            hint="the source was changed: report it",
        )


def _fetch_rest(url: str, part: Path, have: int, size: int, on_bytes: Callable[[int], None]) -> None:
    headers = {"Range": f"bytes={have}-"} if have else {}
    with _open(url, headers) as response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if not resumed:
            have = 0
        with part.open("ab" if resumed else "wb") as file:
            _copy(response, file, have, size, on_bytes)


def _copy(response: IO[bytes], file: IO[bytes], have: int, size: int, on_bytes: Callable[[int], None]) -> None:
    on_bytes(have)
    # One byte beyond the expected size shows a file that is too long, without fetching all of it.
    while have <= size and (chunk := response.read(min(CHUNK_BYTES, size - have + 1))):
        file.write(chunk)
        have += len(chunk)
        on_bytes(min(have, size))
