"""Texts to vectors with a sentence encoder on ONNX Runtime: all-MiniLM-L6-v2 unless told otherwise.

Knows tokens, pooling and the cache of vectors; does not know what the texts are. A vector's bits depend on its text alone:
every text runs by itself, unpadded and on one thread, and threads share out whole texts. A batch would be no quicker from about
60 tokens on (LOG.md), and neither filling nor company can touch a result.
"""

from __future__ import annotations

import hashlib
import itertools
import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from uma_engine.catalog import cache_dir, resolve
from uma_engine.catalog.cache import file_digest
from uma_engine.catalog.package_index import Progress as FetchProgress
from uma_engine.errors import CorruptFile, InvalidRequest, UnknownModel
from uma_engine.onnx.session import require, runtime_session
from uma_engine.retrieval.vector_cache import Entry, VectorCache
from uma_kernels.dispatch import num_threads as default_num_threads

__all__ = ["DEFAULT_EMBEDDER", "Embedder", "Embeddings"]

DEFAULT_EMBEDDER = "minilm-l6"
POOLING = "mean of the tokens, L2 norm 1"
MAX_TOKENS = 512  # positions of the encoders of this family
CHUNK = 512  # texts between two writes to the cache: what an interruption loses at most

Progress = Callable[[int, int], None]  # texts done, texts in all


@dataclass(frozen=True, slots=True)
class Embeddings:
    """One row a text, in input order: vectors [N, D] fp32 of length 1; `truncated_tokens` [N] were beyond `max_tokens`."""

    vectors: np.ndarray
    truncated_tokens: np.ndarray


class Embedder:
    """A sentence encoder, ready to run. `digest` names what makes a vector: graph, tokenizer, length, pooling.

    `model` is a catalog name, or an `.onnx` file with `tokenizer.json` beside it. `num_threads` None: UMA_NUM_THREADS, else
    the CPUs of this process. `cache`: keep vectors in the cache directory, under digests of their texts. Vectors computed by
    another version of ONNX Runtime or on another kind of CPU, whose last bits may differ, are not taken from there.

    Errors:  MissingPackage, naming the extra; UnknownModel, DownloadError as `catalog.resolve`; CorruptFile
    """

    def __init__(
        self,
        model: str | Path = DEFAULT_EMBEDDER,
        *,
        num_threads: int | None = None,
        max_tokens: int = 256,
        cache: bool = True,
        progress: FetchProgress | None = None,
    ) -> None:
        if not 3 <= max_tokens <= MAX_TOKENS:
            raise InvalidRequest(f"`max_tokens` is {max_tokens} but must be from 3 to {MAX_TOKENS}", param="max_tokens")
        if num_threads is not None and num_threads < 1:
            raise InvalidRequest(f"`num_threads` is {num_threads} but must be at least 1", param="num_threads")
        runtime = require("onnxruntime", "retrieval", "computing embeddings")
        path = resolve(model, progress=progress)
        path = path / "model.onnx" if path.is_dir() else path
        tokenizer = _tokenizer_beside(path)
        self.num_threads = num_threads or default_num_threads()
        self.max_tokens = max_tokens
        self._session = runtime_session(path, extra="retrieval", num_threads=1)
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._output = self._session.get_outputs()[0].name
        shape = self._session.get_outputs()[0].shape
        if "input_ids" not in self._inputs or len(shape) != 3 or not isinstance(shape[2], int):
            raise CorruptFile(f"`{path}` is not a graph that gives a vector for each token of `input_ids`")
        self.dim: int = shape[2]
        self._tokenizer = _load_tokenizer(tokenizer)
        parts = (file_digest(path), file_digest(tokenizer), str(max_tokens), POOLING)
        self.digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        self._cache: VectorCache | None = None
        if cache:
            made_by = hashlib.sha256("\n".join((self.digest, runtime.__version__, _cpu())).encode()).hexdigest()
            self._cache = VectorCache(cache_dir() / "embeddings" / f"{made_by[:32]}.sqlite", self.dim)

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Embeddings:
        """The vectors of `texts`; a text that occurs twice is computed once. `progress` is called as texts are done.

        Errors:  InvalidRequest for what is not text
        """
        digests = _digests(texts)
        places: dict[bytes, list[int]] = {}
        for index, digest in enumerate(digests):
            places.setdefault(digest, []).append(index)
        vectors = np.empty((len(texts), self.dim), np.float32)
        truncated = np.zeros(len(texts), np.int64)
        done = 0
        unique = iter(places)
        while chunk := list(itertools.islice(unique, CHUNK)):
            known = {} if self._cache is None else self._cache.get(chunk)
            missing = [digest for digest in chunk if digest not in known]
            computed = self._compute([texts[places[digest][0]] for digest in missing])
            fresh: dict[bytes, Entry] = {}
            for digest, entry in itertools.chain(known.items(), zip(missing, computed, strict=True)):
                if digest not in known:
                    fresh[digest] = entry
                vectors[places[digest]], truncated[places[digest]] = entry
                done += len(places[digest])
                if progress is not None:
                    progress(done, len(texts))
            if self._cache is not None:
                self._cache.put(fresh)
        return Embeddings(vectors, truncated)

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Tokens of all texts together, as far as they are read."""
        return sum(min(self.max_tokens, len(self._tokenizer.encode(text).ids)) for text in texts)

    def forget(self, texts: Sequence[str]) -> int:
        """Delete what the cache holds of these texts; how many vectors that were."""
        return 0 if self._cache is None else self._cache.forget(_digests(texts))

    def close(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def __enter__(self) -> Embedder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _compute(self, texts: Sequence[str]) -> Any:
        """An iterator over the texts' entries."""
        if len(texts) < 2 or self.num_threads == 1:
            yield from map(self._embed_one, texts)
            return
        with ThreadPoolExecutor(min(self.num_threads, len(texts))) as pool:
            yield from pool.map(self._embed_one, texts)

    def _embed_one(self, text: str) -> Entry:
        ids = self._tokenizer.encode(text).ids
        lost = max(0, len(ids) - self.max_tokens)
        if lost:
            ids = [*ids[: self.max_tokens - 1], ids[-1]]  # the last one closes every text
        row = np.array([ids], np.int64)
        feed = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
        (hidden,) = self._session.run([self._output], {k: v for k, v in feed.items() if k in self._inputs})
        pooled = hidden[0].mean(axis=0, dtype=np.float64)
        return (pooled / max(float(np.sqrt(pooled @ pooled)), 1e-12)).astype(np.float32), lost


def _digests(texts: Sequence[str]) -> list[bytes]:
    if isinstance(texts, str):
        raise InvalidRequest("`texts` is one string but must be a list of them", param="texts")
    digests = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidRequest(f"text {index} is `{type(text).__name__}` but must be a string", param="texts")
        try:
            digests.append(hashlib.sha256(text.encode()).digest())
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"text {index} holds a lone surrogate at character {error.start}",
                hint="decode the input as UTF-8, or repair it: `text.encode('utf-8', 'replace').decode()`",
                param="texts",
            ) from None
    return digests


def _tokenizer_beside(path: Path) -> Path:
    for name in (f"{path.stem}.tokenizer.json", "tokenizer.json"):
        if (found := path.with_name(name)).is_file():
            return found
    raise UnknownModel(f"there is no `tokenizer.json` beside `{path}`", hint="put the encoder's tokenizer there")


def _load_tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CorruptFile(f"`{path}` cannot be read: {error}") from None
    tokenizer.no_truncation()  # ours is counted
    tokenizer.no_padding()
    return tokenizer


def _cpu() -> str:
    """What decides which instructions a library picks on this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )
