"""Text to token ids and back, exactly as the model's own tokenizer does it.

Knows vocabularies, control tokens and how text is kept apart from them; does not know templates, prompts or files'
layouts.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as _Library
from tokenizers.models import BPE

from uma_engine.catalog.gguf import GGUFFile
from uma_engine.catalog.tokenizer_sources import (
    BYTE_PIECE,
    SPACE,
    TokenizerSource,
    source_from_directory,
    source_from_gguf,
)
from uma_engine.errors import CorruptFile, InvalidRequest

__all__ = ["IncrementalDecoder", "Tokenizer", "not_text"]


def _byte_of_char() -> dict[str, int]:
    """The byte behind each character of the byte-level alphabet: printable Latin-1 stands for itself."""
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in itself]
    return {chr(b): b for b in itself} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_of_char()


class Tokenizer:
    """A byte-level or SentencePiece-like BPE tokenizer.

    Semantics:  `encode(text)` never yields the id of a control token: where one is spelled out in the text, its
                letters are encoded like any others. `encode(text, special=True)` recognises control tokens: for
                templates alone. Nothing is added on either side. A byte that the vocabulary cannot spell (ASCII
                control characters in some models) is left out, as the model's own tokenizer leaves it out.
    Attributes: `special_ids` are skipped by `decode`; `control_ids` (these, and markers such as `<tool_call>`) are
                what text cannot produce; `bos_id`, `eos_id` or None; `adds_bos`: whether the model expects its bos
                before every text; `vocab_size`: one more than the largest id
    Threads:    all methods may be called from several threads
    """

    def __init__(self, source: TokenizerSource) -> None:
        self._source = source
        self._pieces = {token_id: piece for piece, token_id in source.vocab.items()}
        self._bytes: dict[int, bytes] = {}
        self.vocab_size = max(self._pieces) + 1
        self.special_ids = frozenset(source.vocab[piece] for piece in source.special)
        self.control_ids = frozenset(source.vocab[piece] for piece in source.control)
        self.bos_id = source.bos_id
        self.eos_id = source.eos_id
        self.adds_bos = source.adds_bos and source.bos_id is not None
        self.digest = source.digest
        # Text has a tokenizer of its own, in whose vocabulary control tokens do not exist.
        hidden = source.control.keys()
        self._text = self._build(
            {piece: token_id for piece, token_id in source.vocab.items() if piece not in hidden},
            [m for m in source.merges if m[0] not in hidden and m[1] not in hidden and m[0] + m[1] not in hidden],
            list(source.in_text.values()),
        )

    @classmethod
    def from_gguf(cls, file: GGUFFile, digest: str | None = None) -> Tokenizer:
        """Rebuilds the tokenizer from a GGUF file's metadata. With the file's `digest` what takes long is kept in the cache.

        Errors:  UnsupportedModel for a kind of tokenizer that is not known; CorruptFile for contradictory metadata
        """
        return cls(source_from_gguf(file.metadata, f"`{file.path}`", digest))

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Reads `tokenizer.json` of a Hugging Face directory, and `tokenizer_config.json` for its bos and eos.

        Errors:  as `from_gguf`
        """
        return cls(source_from_directory(Path(path)))

    def _build(self, vocab: dict[str, int], merges: list[tuple[str, str]], added: list[AddedToken]) -> _Library:
        source = self._source
        try:
            model = BPE(vocab=vocab, merges=merges, **source.model_options)
            library = _Library(model)
            if source.normalizer is not None:
                library.normalizer = source.normalizer
            if source.pre_tokenizer is not None:
                library.pre_tokenizer = source.pre_tokenizer
            library.add_tokens(added)
        except Exception as error:  # the library raises bare Exception
            raise CorruptFile(f"{source.where}: the tokenizer cannot be built: {error}") from None
        return library

    @cached_property
    def library(self) -> _Library:
        """The whole vocabulary as an object of the `tokenizers` library; it recognises control tokens. Don't change it."""
        added = [*self._source.in_text.values(), *self._source.control.values()]
        return self._build(self._source.vocab, self._source.merges, added)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of `text`.

        Errors:  InvalidRequest when it is not a string of Unicode characters (a lone surrogate)
        """
        try:
            if special and self._added is not None:
                return self._encode_special(text)
            library = self.library if special else self._text
            return library.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise not_text(text) from None

    @cached_property
    def _added(self) -> re.Pattern[str] | None:
        """Finds added tokens as the library does, the leftmost and of these the longest; None where it does more than to look for them."""
        control, in_text = self._source.control, self._source.in_text
        if any(t.lstrip or t.rstrip or t.single_word or t.normalized for t in (*control.values(), *in_text.values())):
            return None
        pieces = sorted({*control, *in_text}, key=len, reverse=True)
        if not pieces:
            return re.compile("(?!)")
        first = "".join(sorted({re.escape(piece[0]) for piece in pieces}))  # looked at before thousands of pieces are
        return re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, pieces))})")

    def _encode_special(self, text: str) -> list[int]:
        """What `library` gives, which takes long to build for a large vocabulary."""
        assert self._added is not None
        ids: list[int] = []
        begin = 0
        for found in self._added.finditer(text):
            if found[0] in self._source.control:
                ids += (
                    self._text.encode(text[begin : found.start()], add_special_tokens=False).ids
                    if found.start() > begin
                    else []
                )
                ids.append(self._source.vocab[found[0]])
                begin = found.end()
        return ids + (self._text.encode(text[begin:], add_special_tokens=False).ids if begin < len(text) else [])

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """The ids of every text, the same as `encode` gives, on the library's threads.

        Errors:  as `encode`
        """
        if special and self._added is not None:
            return [self.encode(text, special=True) for text in texts]
        library = self.library if special else self._text
        try:
            return [encoding.ids for encoding in library.encode_batch(list(texts), add_special_tokens=False)]
        except TypeError:
            for text in texts:
                self.encode(text, special)  # names the text at fault
            raise

    def single_token(self, word: str) -> int | None:
        """The id that alone is `encode(word)`, None when it takes several."""
        ids = self.encode(word)
        return ids[0] if len(ids) == 1 else None

    def piece_of(self, token_id: int | None) -> str:
        """A token as the vocabulary writes it, empty for None or an unknown id."""
        return "" if token_id is None else self._pieces.get(token_id, "")

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        Errors:  InvalidRequest for an id that is not in the vocabulary
        """
        decoder = IncrementalDecoder(self, skip_special)
        return "".join([decoder.push(token_id) for token_id in ids]) + decoder.finish()

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text.

        Errors:  InvalidRequest for an id that is not in the vocabulary
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        piece = self._pieces.get(token_id)
        if piece is None:
            raise InvalidRequest(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")
        if piece in self._source.control:
            return piece.encode()
        if self._source.byte_level:
            if piece in self._source.in_text or any(c not in BYTE_OF_CHAR for c in piece):
                return piece.encode()
            return bytes(BYTE_OF_CHAR[c] for c in piece)
        if found := BYTE_PIECE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace(SPACE, " ").encode()

    @property
    def drops_first_space(self) -> bool:
        """Whether the text's first space was put there by `encode`, and goes again in `decode`."""
        return self._source.adds_first_space

    def close(self) -> None:
        """Let go of what is outside of this process, if anything is."""


class IncrementalDecoder:
    """Decodes a stream of ids: the strings returned by `push` and `finish`, joined, are `decode` of all the ids.

    A character whose bytes are spread over several tokens comes with the last of them.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = tokenizer.drops_first_space

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps empty."""
        if token_id in self._skipped:
            return ""
        piece = self._tokenizer.bytes_of(token_id)
        if self._at_start and piece:
            piece, self._at_start = piece.removeprefix(b" "), False
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is left: U+FFFD for a character whose last bytes never came, else nothing."""
        return self._utf8.decode(b"", final=True)


def not_text(text: Any) -> InvalidRequest:
    """What is wrong with a text that cannot be encoded."""
    if not isinstance(text, str):
        return InvalidRequest(f"text must be a string, not `{type(text).__name__}`", param="text")
    at = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
    return InvalidRequest(
        f"the text holds a lone surrogate, `\\u{ord(text[at]):04x}`, at character {at}",
        hint="decode the input as UTF-8, or repair it: `text.encode('utf-8', 'replace').decode()`",
        param="text",
    )
