"""Renders a model's own chat template, in a sandbox and within bounds, and cuts it at its fields.

Knows jinja and its limits; does not know what is asked of the model or how many tokens fit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

from uma_engine.catalog.tokenizer import Tokenizer
from uma_engine.errors import CorruptFile, InvalidRequest, UnsupportedModel

__all__ = ["ChatTemplate", "FieldPiece", "TextPiece", "split_template"]

MAX_TEMPLATE_BYTES = 64 << 10
MAX_OUTPUT_CHARS = 16 << 20
MAX_STEPS = 200_000  # loop rounds of one rendering
# For a model that brings none: plain words, since its vocabulary may have no control tokens for turns.
FALLBACK = (
    "{% if adds_bos %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# They make very long strings out of short ones, and chat templates have no use for them.
AMPLIFIERS = frozenset({"center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"})
AMPLIFYING_FILTERS = ("attr", "center", "filesizeformat", "format", "indent", "pprint", "urlize", "wordwrap", "xmlattr")


class _Refused(Exception):
    """The template called `raise_exception`."""


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox for one rendering, which also counts the rounds of all loops."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        for name in AMPLIFYING_FILTERS:
            del self.filters[name]
        self.filters |= {"tojson": _to_json, "metered": self._metered}
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.steps = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "metered", [], [], None, None)
        return tree

    def _metered(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise SecurityError(f"more than {MAX_STEPS} loop rounds")
            yield value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" or not numbers:  # repetition and %-formatting make long strings
            raise SecurityError(f"`{operator}` is not available here")
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        _refuse_amplifier(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _refuse_amplifier(obj, argument)
        return super().getitem(obj, argument)


def _refuse_amplifier(obj: Any, name: Any) -> None:
    if isinstance(obj, str) and isinstance(name, str) and name in AMPLIFIERS:
        raise SecurityError(f"`{name}` is not available here")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: without the HTML escapes of jinja's own."""
    indent = None if indent is None else min(int(indent), 16)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise _Refused(str(message))


class ChatTemplate:
    """A chat template bound to a tokenizer's special pieces.

    Semantics:  `source` is the model's jinja template, None for a plain one of `Role: content` paragraphs
                (`is_fallback`). `strftime_now` is left undefined, so that a prompt does not depend on the day.
    Errors:     CorruptFile when the template is longer than 64 KiB or is not jinja
    """

    def __init__(self, source: str | None, tokenizer: Tokenizer) -> None:
        self.is_fallback = source is None
        self.source = FALLBACK if source is None else source
        encoded = self.source.encode("utf-8", "surrogatepass")
        if len(encoded) > MAX_TEMPLATE_BYTES:
            raise CorruptFile(f"the chat template has {len(encoded)} bytes but at most {MAX_TEMPLATE_BYTES} are read")
        self.digest = hashlib.sha256(encoded).hexdigest()
        self._variables = {
            "bos_token": tokenizer.piece_of(tokenizer.bos_id),
            "eos_token": tokenizer.piece_of(tokenizer.eos_id),
            "adds_bos": tokenizer.adds_bos,
        }
        try:
            _Sandbox().from_string(self.source)
        except (TemplateError, RecursionError, ValueError, SyntaxError) as error:
            raise CorruptFile(f"the chat template is not valid jinja: {error}") from None

    def render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text for `messages` (each with `role` and `content`).

        Errors:  InvalidRequest with the template's own words when it refuses the messages; UnsupportedModel when it
                 fails, asks for something outside the sandbox, or exceeds its bounds
        """
        values = {**self._variables, "tools": None, "documents": None, **variables}
        pieces, length = [], 0
        try:
            template = _Sandbox().from_string(self.source)
            for piece in template.generate(
                messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt, **values
            ):
                length += len(piece)
                if length > MAX_OUTPUT_CHARS:
                    raise SecurityError(f"more than {MAX_OUTPUT_CHARS} characters of output")
                pieces.append(piece)
        except _Refused as refusal:
            raise InvalidRequest(
                f"the model's chat template refuses the messages: {refusal}", param="messages"
            ) from None
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise UnsupportedModel(f"the model's chat template cannot be rendered: {error}") from None
        except (RecursionError, MemoryError, OverflowError):
            raise UnsupportedModel("the model's chat template exceeds its bounds") from None
        return "".join(pieces)


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text of the template itself, encoded with its control tokens recognised."""

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FieldPiece:
    """The place of a field's text."""

    name: str


def split_template(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, str]],
    fields: Mapping[str, str],
    add_generation_prompt: bool = True,
) -> list[TextPiece | FieldPiece]:
    """Renders `messages` once and cuts the text at the fields, so that no field's text ever passes through jinja.

    Semantics:  `fields` maps a name to the placeholder that stands for it in the messages; a field may be used once.
                The pieces come in the order of the prompt; empty text is left out.
    Errors:     InvalidRequest unless every placeholder is in the messages exactly once; UnsupportedModel when the
                template drops, repeats or alters a message that holds one; otherwise as `render`
    """
    contents = [m["content"] for m in messages]
    for name, placeholder in fields.items():
        uses = sum(content.count(placeholder) for content in contents) if placeholder else 0
        if uses != 1:
            raise InvalidRequest(
                f"the placeholder of `{name}` is in the messages {uses} times, not once", param="fields"
            )
    text = template.render(messages, add_generation_prompt)
    for content in contents:
        if any(placeholder in content for placeholder in fields.values()) and text.count(content) != 1:
            raise UnsupportedModel(
                f"the model's chat template alters, drops or repeats a message: `{content[:60]}` is in its text "
                f"{text.count(content)} times",
                hint="messages with fields must not begin or end with white space",
            )
    starts: list[tuple[int, str]] = []
    for name, placeholder in fields.items():
        if (uses := text.count(placeholder)) != 1:
            raise UnsupportedModel(f"the model's chat template holds the field `{name}` {uses} times, not once")
        starts.append((text.index(placeholder), name))
    pieces: list[TextPiece | FieldPiece] = []
    position = 0
    for start, name in sorted(starts):
        if start < position:
            raise InvalidRequest(f"the placeholder of `{name}` overlaps another", param="fields")
        _append_text(pieces, tokenizer, text[position:start])
        pieces.append(FieldPiece(name))
        position = start + len(fields[name])
    _append_text(pieces, tokenizer, text[position:])
    return pieces


def _append_text(pieces: list[TextPiece | FieldPiece], tokenizer: Tokenizer, text: str) -> None:
    if text:
        pieces.append(TextPiece(text, tuple(tokenizer.encode(text, special=True))))
