"""Grammars from JSON schemas: which tokens may come next, and how an answer is closed before its tokens run out.

Knows schemas, the base's vocabulary and llguidance, which is imported when the first schema comes; does not know models, requests or
sampling. The layers below see a grammar as `core.Grammar`.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from uma_engine.errors import InvalidRequest, InvariantViolation, MissingPackage, TooLarge

if TYPE_CHECKING:
    from uma_engine.catalog.tokenizer import Tokenizer

__all__ = ["GrammarCompiler", "JsonGrammar"]

MAX_SCHEMA_BYTES = 64 << 10
MAX_DEPTH = 48  # of a schema's nesting
MAX_CLOSING = 8192  # tokens that the shortest answer may take
MOST_KEPT = 32  # compiled schemas
LEAST_FORCED = 2  # tokens that are worth a step of another kind than the decodes beside it
COMPACT = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
# What closes an answer, best first: ends before beginnings, short values before long ones.
STRUCTURE = '}]",:0123456789-ntfe[{'
LETTERS = "z.?!qabcdefghijklmopqrsuvwxyABCDEFGHIJKLMNOPQRSTUVWXYZ _/.+@"


class GrammarCompiler:
    """Makes grammars over one base's vocabulary. Threads: may be shared."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(token for token in eos_ids if token < vocab_size)
        self._lock = threading.Lock()
        self._library: Any = None
        self._vocabulary: Any = None
        self._closers: tuple[tuple[int, ...], ...] = ()
        self._kept: OrderedDict[str, tuple[Any, list[int]]] = OrderedDict()  # last used last

    def json(self, schema: Mapping[str, Any], max_tokens: int) -> JsonGrammar:
        """A grammar for one answer of at most `max_tokens` tokens: compact JSON that `schema` accepts.

        Errors:  InvalidRequest for a schema that cannot be enforced, with the reason, or whose shortest answer does not fit;
                 TooLarge for one that is beyond its bounds; MissingPackage without llguidance
        """
        source = json.dumps(schema, allow_nan=False)
        if len(source) > MAX_SCHEMA_BYTES:
            raise TooLarge(
                f"`json_schema` has {len(source)} bytes but {MAX_SCHEMA_BYTES} are the most", param="json_schema"
            )
        depth = _depth(schema)
        if depth > MAX_DEPTH:
            raise TooLarge(
                f"`json_schema` is nested {depth} deep but {MAX_DEPTH} is the most",
                hint="name parts in `$defs` and refer to them with `$ref`",
                param="json_schema",
            )
        with self._lock:
            found = self._kept.get(source)
            if found is None:
                found = self._compile(source)
                self._kept[source] = found
                if len(self._kept) > MOST_KEPT:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(source)
            matcher, closing = found[0].deep_copy(), found[1]
        if len(closing) > max_tokens:
            raise InvalidRequest(
                f"the shortest answer that `json_schema` accepts takes {len(closing)} tokens but `max_tokens` is {max_tokens}",
                hint="raise `max_tokens`",
                param="json_schema",
            )
        return JsonGrammar(matcher, closing, max_tokens, self._closers, self._vocab_size, frozenset(self._eos_ids))

    def _compile(self, source: str) -> tuple[Any, list[int]]:
        library = self._load()
        try:
            grammar = library.LLMatcher.grammar_from_json_schema(source, overrides=COMPACT)
            matcher = library.LLMatcher(self._vocabulary, grammar, log_level=0)
        except ValueError as error:
            raise _refused(str(error)) from None
        if matcher.is_error():
            raise _refused(matcher.get_error())
        closing = _closing(matcher, self._closers, self._vocab_size, MAX_CLOSING)
        if closing is None:
            raise InvalidRequest(
                f"`json_schema` accepts no answer that was found within {MAX_CLOSING} tokens",
                hint="does it refer to itself, or ask for more than it allows",
                param="json_schema",
            )
        return matcher, closing

    def _load(self) -> Any:
        """llguidance, with the vocabulary put into its form."""
        if self._library is not None:
            return self._library
        try:
            import llguidance
        except ImportError:
            raise MissingPackage(
                "`json_schema` needs the package `llguidance`", hint="pip install 'uma-engine[words]'"
            ) from None
        tokenizer = self._tokenizer
        self._vocabulary = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, self._vocab_size, self._eos_ids)),
            n_vocab=self._vocab_size,
            eos_token=self._eos_ids,
        )
        single = {tokenizer.bytes_of(t): t for t in range(min(tokenizer.vocab_size, self._vocab_size)) if _known(tokenizer, t)}  # fmt: skip
        structure, letters = (
            tuple(single[c.encode()] for c in chars if c.encode() in single) for chars in (STRUCTURE, LETTERS)
        )
        quote = tuple(t for t in (single.get(b'"'),) if t is not None)
        self._closers = (structure, letters, quote)
        self._library = llguidance
        return llguidance


def _known(tokenizer: Tokenizer, token: int) -> bool:
    return bool(tokenizer.piece_of(token)) and token not in tokenizer.control_ids


class _Vocabulary:
    """The tokenizer as llguidance asks for it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, eos_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = eos_ids[0] if eos_ids else None
        self.special_token_ids = sorted(t for t in tokenizer.control_ids | tokenizer.special_ids if t < size)
        # An id without a piece spells nothing, so nothing can ask for it.
        self.tokens = [
            tokenizer.bytes_of(t) if t < tokenizer.vocab_size and tokenizer.piece_of(t) else b"" for t in range(size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


class JsonGrammar:
    """One answer on its way. See `core.Grammar`.

    At every token a way to end the answer is known that fits into the tokens left: the token that was drawn stands if one is left
    after it, else the next one of the known way takes its place. So the answer is whole when `max_tokens` runs out, at the latest.
    """

    def __init__(
        self,
        matcher: Any,
        closing: Sequence[int],
        max_tokens: int,
        closers: tuple[tuple[int, ...], ...],
        vocab_size: int,
        eos_ids: frozenset[int],
    ) -> None:
        self._matcher = matcher
        self._closing = list(closing)
        self._left = max_tokens
        self._closers = closers
        self._vocab_size = vocab_size
        self._eos_ids = eos_ids
        self.num_forced = 0  # tokens that were not the drawn ones

    def mask(self) -> bytes:
        bits = self._matcher.compute_bitmask()
        self._check()
        return bits

    def accept(self, token_id: int) -> int:
        matcher, closing = self._matcher, self._closing
        self._left -= 1
        if not matcher.consume_token(token_id):
            self._check()
            raise InvariantViolation(f"token {token_id} was drawn but the grammar does not allow it")
        if token_id in self._eos_ids or (closing and token_id == closing[0]):
            self._closing = closing[1:]
            return token_id
        if self._closes(closing):
            fits = len(closing) <= self._left
        else:
            shortest = _closing(matcher, self._closers, self._vocab_size, self._left)
            fits = shortest is not None
            if shortest is not None:
                self._closing = shortest
        if fits:
            return token_id
        if not closing:  # the answer was whole and the token would have begun something that does not end in time
            matcher.rollback(1)
            self._left = 0
            return self._end()
        matcher.rollback(1)
        self.num_forced += 1
        token_id = closing[0]
        self._closing = closing[1:]
        if not matcher.consume_token(token_id):
            raise InvariantViolation(f"token {token_id} ends the answer but the grammar does not allow it")
        return token_id

    def forced(self) -> list[int]:
        matcher = self._matcher
        if matcher.is_error() or matcher.is_stopped():
            return []
        tokens: list[int] = matcher.compute_ff_tokens()
        if not LEAST_FORCED <= len(tokens) <= self._left:
            return []
        taken = matcher.try_consume_tokens(tokens)
        if taken < len(tokens):
            matcher.rollback(taken)
            return []
        left = self._left - len(tokens)
        closing = self._closing[len(tokens) :] if self._closing[: len(tokens)] == tokens else None
        if closing is None or not self._closes(closing):
            closing = _closing(matcher, self._closers, self._vocab_size, left)
        if closing is None or len(closing) > left:
            matcher.rollback(len(tokens))
            return []
        self._closing, self._left = closing, left
        return tokens

    @property
    def finished(self) -> bool:
        return self._matcher.is_stopped() or (self._left <= 0 and self._matcher.is_accepting())

    def _end(self) -> int:
        """The token that says that a whole answer is over."""
        self.num_forced += 1
        if not self._eos_ids:
            raise InvariantViolation("the base has no token that ends a text")
        token = min(self._eos_ids)
        self._matcher.consume_token(token)
        return token

    def _closes(self, closing: Sequence[int]) -> bool:
        """Whether the known way out is one from here as well: so it is inside of a string."""
        matcher = self._matcher
        taken = matcher.try_consume_tokens(list(closing)) if closing else 0
        closes = taken == len(closing) and matcher.is_accepting()
        if taken:
            matcher.rollback(taken)
        return closes

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequest(
                f"`json_schema` cannot be followed any further: {_first_line(self._matcher.get_error())}",
                hint="simplify the schema",
                param="json_schema",
            )


def _closing(matcher: Any, closers: tuple[tuple[int, ...], ...], vocab_size: int, most: int) -> list[int] | None:
    """Tokens, at most `most`, that make a whole answer of what the matcher has; None when none are found. It is left as it was."""
    for quote_first in (False, True):
        path: list[int] = []
        while not matcher.is_accepting() and len(path) < most and not matcher.is_error():
            forced = matcher.compute_ff_tokens()
            step = forced or [_closer(matcher.compute_bitmask(), closers, vocab_size, quote_first)]
            if step[0] < 0 or matcher.try_consume_tokens(step) != len(step):
                break
            path += step
        done = matcher.is_accepting() and len(path) <= most and not matcher.is_error()
        if path:
            matcher.rollback(len(path))
        if done:
            return path
    return None


def _closer(bits: bytes, closers: tuple[tuple[int, ...], ...], vocab_size: int, quote_first: bool) -> int:
    """The token that brings an answer nearest to its end; -1 when there is none."""
    structure, letters, quote = closers

    def may(token: int) -> bool:
        return bool(bits[token >> 3] >> (token & 7) & 1)

    inside_a_string = bool(letters) and may(letters[0])  # a z, with which no other value begins
    ends = letters[1:] + letters[:1]  # first what may end a sentence, where a pattern asks for that
    order = (*quote, *ends, *structure) if inside_a_string else (*(quote if quote_first else ()), *structure, *ends)
    for token in order:
        if may(token):
            return token
    return next((token for token in range(vocab_size) if may(token)), -1)


def _depth(value: Any) -> int:
    """How deep lists and objects are nested, without recursion."""
    deepest, level = 0, [value]
    while level:
        deepest += 1
        inner: list[Any] = []
        for item in level:
            inner += item.values() if isinstance(item, Mapping) else item if isinstance(item, list | tuple) else ()
        level = [item for item in inner if isinstance(item, Mapping | list | tuple)]
    return deepest


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(f"`json_schema` cannot be enforced: {_first_line(why)}", param="json_schema")


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[0][:300]
