"""Looks for a person's words in the bytes of files, in every form in which they may have been written.

Knows bytes; does not know what the files are. It reads everything, free pages and leftovers of journals included: that is the point.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable
from pathlib import Path

__all__ = ["patterns_of", "scan"]

MIN_CHARACTERS = 8  # a shorter string is in any file by chance
PIECE = 48  # characters of a pattern: a fragment of a text counts as well as the whole
CHUNK = 4 * 2**20


def patterns_of(texts: Iterable[str]) -> list[bytes]:
    """Byte strings by which texts would be recognised: pieces of them from beginning to end, as UTF-8, as JSON escapes, as UTF-16 in
    both orders, and as Base64 of whole texts.
    """
    found: dict[bytes, None] = {}
    for text in texts:
        text = text.strip()
        if len(text) < MIN_CHARACTERS:
            continue
        pieces = [text[i : i + PIECE] for i in range(0, len(text), PIECE)]
        if len(pieces[-1]) < MIN_CHARACTERS:
            pieces[-1] = text[-MIN_CHARACTERS:]
        for piece in pieces:
            found[piece.encode("utf-8", "replace")] = None
            found[json.dumps(piece)[1:-1].encode()] = None
            found[json.dumps(piece, ensure_ascii=False)[1:-1].encode("utf-8", "replace")] = None
            found[piece.encode("utf-16-le", "replace")] = None
            found[piece.encode("utf-16-be", "replace")] = None
        whole = base64.b64encode(text.encode("utf-8", "replace")).rstrip(b"=")
        found[whole[: len(whole) // 4 * 4][: 4 * PIECE]] = None
    return [pattern for pattern in found if len(pattern) >= MIN_CHARACTERS]


def scan(files: Iterable[Path], patterns: Collection[bytes]) -> tuple[int, dict[bytes, list[Path]]]:
    """How many bytes were read, and which patterns are in which files. A file that is not there holds nothing."""
    longest = max(map(len, patterns), default=0)
    total, found = 0, dict[bytes, list[Path]]()
    for path in files:
        left = set(patterns)
        tail = b""
        try:
            with path.open("rb") as file:
                while block := file.read(CHUNK):
                    total += len(block)
                    data = tail + block
                    for pattern in [p for p in left if p in data]:
                        found.setdefault(pattern, []).append(path)
                        left.discard(pattern)
                    tail = data[-longest + 1 :] if longest > 1 else b""
        except FileNotFoundError:
            continue
    return total, found
