"""Chat templates: as transformers renders them, in a sandbox, and cut exactly at their fields."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import gguf
import pytest
from gguf_files import add_byte_level_tokens, write_gguf

from uma_engine.catalog import ChatTemplate, FieldPiece, TextPiece, Tokenizer, open_model, resolve, split_template
from uma_engine.catalog.gguf import GGUFFile
from uma_engine.errors import CorruptFile, InvalidRequest, UmaError, UnsupportedModel

CHATML = (
    "{% for message in messages %}"
    "{{ '<|user|>' + message['role'] + '\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
# The control flow of the larger published templates: macros, namespaces, loop controls, filters, tool lists.
ELABORATE = """
{%- macro show(value, depth=0) -%}
    {%- if value is mapping -%}{{ value | tojson(indent=2) }}{%- else -%}{{ value | string }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last=-1, names=[]) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' and not loop.first -%}{{ raise_exception('system must come first') }}{%- endif -%}
    {%- if message.role == 'skip' -%}{%- continue -%}{%- endif -%}
    {%- set ns.last = loop.index0 -%}
    {{- bos_token ~ '[' ~ message.role | upper ~ ']' ~ message['content'] | trim ~ eos_token ~ '\n' -}}
{%- endfor -%}
{%- if tools is not none -%}{%- for tool in tools -%}{{ show(tool) }}{%- endfor -%}{%- endif -%}
{%- for i in range(3) -%}{{ i * 2 }}{{ loop.last }}{%- endfor %}
{{ messages[::-1][0].content.split('\n')[-1] }}{{ ns.last }}{{ messages | length }}
{%- if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif -%}
"""
MESSAGES = [
    {"role": "system", "content": 'You <b>rank</b> & "judge".'},
    {"role": "skip", "content": "unseen"},
    {"role": "user", "content": "Job:\n  {{ 7 * 7 }} {% raw %}\nz"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    def fill(writer: gguf.GGUFWriter) -> None:
        add_byte_level_tokens(writer)
        writer.add_bos_token_id(258)

    path: Path = tmp_path_factory.mktemp("t") / "t.gguf"
    return Tokenizer.from_gguf(GGUFFile(write_gguf(path, fill)))


@pytest.mark.parametrize("source", [CHATML, ELABORATE])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_a_template_renders_as_transformers_renders_it(tokenizer, source, add_generation_prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    if source is ELABORATE:
        source = source.replace("strftime_now is defined", "false")  # theirs has a clock
    tools = [{"name": "é<x>", "args": {"b": [1, None]}}]
    expected, _ = render_jinja_template(
        [MESSAGES], tools=tools, chat_template=source, add_generation_prompt=add_generation_prompt,
        bos_token="<|user|>", eos_token="<|end|>",
    )  # fmt: skip
    assert ChatTemplate(source, tokenizer).render(MESSAGES, add_generation_prompt, tools=tools) == expected[0]


def test_a_template_has_no_clock(tokenizer):
    template = ChatTemplate("{{ strftime_now is defined }}", tokenizer)
    assert template.render(MESSAGES) == "False"


def test_the_templates_own_refusal_is_an_invalid_request(tokenizer):
    with pytest.raises(InvalidRequest, match="system must come first"):
        ChatTemplate(ELABORATE, tokenizer).render(MESSAGES[::-1])


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{{ unclosed", "x" * (65 << 10), "{{ a | no_such_filter }}", "{% include %}"],
    ids=range(5),
)
def test_what_is_no_template_is_refused_when_it_is_loaded(tokenizer, source):
    with pytest.raises(CorruptFile):
        ChatTemplate(source, tokenizer)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ range(10**9) | list }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:>999999999}'['format'](1) }}",
        "{{ ('{:>999999999}' | attr('format'))(1) }}",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
        "{% for a in range(90000) %}{{ messages[0].content * 9 }}{% endfor %}",
        "{% for a in range(90000) %}" + "0123456789" * 100 + "{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ messages[0].nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ messages['x'] + 1 }}",
        "{{ messages | tojson(indent='x') }}",
        "{{ lipsum(n=100000) }}",
    ],
)
def test_what_leaves_the_sandbox_or_its_bounds_is_a_typed_error(tokenizer, source):
    tracemalloc.start()
    try:
        with pytest.raises(UmaError):
            ChatTemplate(source, tokenizer).render(MESSAGES)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_a_model_without_a_template_gets_plain_paragraphs(tokenizer):
    template = ChatTemplate(None, tokenizer)
    assert template.is_fallback
    assert template.render([{"role": "user", "content": "Hello"}]) == "User: Hello\n\nAssistant:"


def test_the_digest_is_that_of_the_source(tokenizer):
    digests = [ChatTemplate(source, tokenizer).digest for source in (CHATML, ELABORATE, None, CHATML)]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]


FIELDS = {"job": "\ue000job\ue001", "candidate": "\ue000candidate\ue001"}


def ask(content: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Judge."}, {"role": "user", "content": content}]


def test_a_template_is_cut_exactly_at_its_fields(tokenizer):
    content = f"Job: {FIELDS['job']}\nCandidate: {FIELDS['candidate']}"
    pieces = split_template(tokenizer, ChatTemplate(CHATML, tokenizer), ask(content), FIELDS)
    texts = ["<|user|>system\nJudge.<|end|>\n<|user|>user\nJob: ", "\nCandidate: ", "<|end|>\n<|user|>assistant\n"]
    encoded = [TextPiece(text, tuple(tokenizer.encode(text, special=True))) for text in texts]
    assert pieces == [encoded[0], FieldPiece("job"), encoded[1], FieldPiece("candidate"), encoded[2]]
    assert "<|user|>" in [tokenizer.piece_of(token_id) for token_id in encoded[0].token_ids]


def test_fields_may_touch_and_come_in_any_order(tokenizer):
    template = ChatTemplate("{{ messages[1].content }}", tokenizer)
    pieces = split_template(tokenizer, template, ask(FIELDS["candidate"] + FIELDS["job"]), FIELDS)
    assert pieces == [FieldPiece("candidate"), FieldPiece("job")]


@pytest.mark.parametrize(
    ("template", "content", "error"),
    [
        (CHATML, "only {job}", InvalidRequest),
        (CHATML, "{job} {job} {candidate}", InvalidRequest),
        ("nothing", "{job} {candidate}", UnsupportedModel),
        ("{{ messages[1].content }}{{ messages[1].content }}", "{job} {candidate}", UnsupportedModel),
        ("{{ messages[1].content | upper }}", "{job} {candidate}", UnsupportedModel),
        ("{{ messages[1].content | trim }}", "{job} {candidate} ", UnsupportedModel),
        ("{{ messages[1].content[:5] }}", "{job} {candidate}", UnsupportedModel),
        ("{{ messages[1].content | replace('\n', ' ') }}", "{job}\n{candidate}", UnsupportedModel),
        ("{{ messages[1].content | tojson }}", '{job} " {candidate}', UnsupportedModel),
    ],
)
def test_a_template_that_drops_repeats_or_alters_a_field_is_refused(tokenizer, template, content, error):
    filled = content.replace("{job}", FIELDS["job"]).replace("{candidate}", FIELDS["candidate"])
    with pytest.raises(error):
        split_template(tokenizer, ChatTemplate(template, tokenizer), ask(filled), FIELDS)


@pytest.mark.weights
def test_the_default_models_template_opens_and_closes_turns():
    model = open_model(resolve("smollm2-135m"))
    template = ChatTemplate(model.chat_template, model.tokenizer)
    pieces = split_template(model.tokenizer, template, ask(f"{FIELDS['job']}\n{FIELDS['candidate']}"), FIELDS)
    assert isinstance(pieces[0], TextPiece)
    assert pieces[0].text == "<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\n"
    assert model.tokenizer.piece_of(pieces[0].token_ids[0]) == "<|im_start|>"
    assert pieces[-1] == TextPiece("<|im_end|>\n<|im_start|>assistant\n", (2, 198, 1, 520, 9531, 198))
