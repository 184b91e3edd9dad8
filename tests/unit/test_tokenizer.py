"""Tokenizers rebuilt from a file encode what the original encodes, and text cannot become control tokens."""

from __future__ import annotations

import functools
import json
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from awkward_text import AWKWARD, random_texts
from gguf_files import write_gguf
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from uma_engine.catalog import IncrementalDecoder, Tokenizer, open_model, resolve
from uma_engine.catalog.gguf import GGUFFile
from uma_engine.errors import CorruptFile, InvalidRequest, UnsupportedModel

TEXTS = AWKWARD + random_texts(300)
CONTROL = ["<|start|>", "<|end|>", "<tool_call>"]
SPELL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
# The rules of each family as its own `tokenizer.json` states them, written out a second time.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
FAMILIES = {
    "gpt-2": (None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": (
        None,
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    ),
    "qwen2": (
        normalizers.NFC(),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), SPELL]),
    ),
    "llama-bpe": (None, pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), SPELL])),
}


@functools.cache
def byte_level_original(family: str) -> Library:
    """A byte-level tokenizer trained on the corpus itself, so that its merges are put to use."""
    original = Library(models.BPE(ignore_merges=family == "llama-bpe"))
    normalizer, original.pre_tokenizer = FAMILIES[family]
    if normalizer is not None:
        original.normalizer = normalizer
    original.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    original.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    )
    original.add_special_tokens(CONTROL[:2])
    original.add_tokens([AddedToken(CONTROL[2], normalized=False)])
    return original


def byte_level_gguf(path: Path, family: str) -> Path:
    document = json.loads(byte_level_original(family).to_str())
    vocab, merges = document["model"]["vocab"], document["model"]["merges"]
    added = {entry["content"]: entry["id"] for entry in document["added_tokens"]}

    def fill(writer: gguf.GGUFWriter) -> None:
        pieces = sorted(vocab | added, key=(vocab | added).__getitem__)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(family)
        writer.add_token_list(pieces)
        writer.add_token_types([4 if p == CONTROL[2] else 3 if p in added else 1 for p in pieces])
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
        writer.add_bos_token_id(added[CONTROL[0]])

    return write_gguf(path, fill)


@functools.cache
def sentencepiece_original(adds_first_space: bool) -> Library:
    original = Library(models.BPE(byte_fallback=True, fuse_unk=True))
    prepend = [normalizers.Prepend("▁")] if adds_first_space else []
    original.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    original.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # SentencePiece trains within words
    strip = [decoders.Strip(" ", 1, 0)] if adds_first_space else []
    original.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    specials = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    common = [text for text in TEXTS if text.isascii()]  # the rest is spelled in bytes
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False)
    original.train_from_iterator(common, trainer)
    return original


def sentencepiece_parts(adds_first_space: bool) -> tuple[dict[str, int], list[list[str]]]:
    model = json.loads(sentencepiece_original(adds_first_space).to_str())["model"]
    return model["vocab"], [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]


def sentencepiece_gguf(path: Path, adds_first_space: bool) -> Path:
    vocab, merges = sentencepiece_parts(adds_first_space)
    ranks = {left + right: rank for rank, (left, right) in reversed(list(enumerate(merges)))}

    def fill(writer: gguf.GGUFWriter) -> None:
        pieces = sorted(vocab, key=vocab.__getitem__)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores([-float(ranks.get(p, len(ranks))) for p in pieces])
        writer.add_token_types([2 if i == 0 else 3 if i == 1 else 6 if i < 258 else 1 for i in range(len(pieces))])
        writer.add_add_space_prefix(adds_first_space)
        writer.add_bos_token_id(1)

    return write_gguf(path, fill)


def sentencepiece_reference(adds_first_space: bool) -> Library:
    """All merges that the pieces imply, in the order of the pieces: what a score-driven model does."""
    vocab, merges = sentencepiece_parts(adds_first_space)
    normal = {piece for piece, token_id in vocab.items() if token_id >= 258}
    implied = []
    for piece in dict.fromkeys(left + right for left, right in merges):
        cuts = [c for c in range(1, len(piece)) if piece[:c] in normal and piece[c:] in normal]
        implied += [(piece[:c], piece[c:]) for c in sorted(cuts, key=lambda c: -c)]
    reference = Library(models.BPE(vocab=vocab, merges=implied, byte_fallback=True, fuse_unk=True))
    original = sentencepiece_original(adds_first_space)
    reference.normalizer, reference.decoder = original.normalizer, original.decoder
    return reference


@pytest.mark.parametrize("family", FAMILIES)
def test_a_byte_level_tokenizer_rebuilt_from_gguf_equals_the_original(tmp_path, family):
    rebuilt = Tokenizer.from_gguf(GGUFFile(byte_level_gguf(tmp_path / "t.gguf", family)))
    original = byte_level_original(family)
    for text in [*TEXTS, f"a{CONTROL[0]}b {CONTROL[1]}\n{CONTROL[2]}", CONTROL[0] * 3]:
        expected = original.encode(text, add_special_tokens=False).ids
        assert rebuilt.encode(text, special=True) == expected, text
        assert rebuilt.decode(expected, skip_special=False) == original.decode(expected, skip_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokenizer_json_gives_the_same_ids_as_its_library(tmp_path, family):
    byte_level_original(family).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": {"content": CONTROL[0]}, "eos_token": CONTROL[1]})
    )
    ours, original = Tokenizer.from_directory(tmp_path), byte_level_original(family)
    for text in [*TEXTS, f"a{CONTROL[0]}b"]:
        assert ours.encode(text, special=True) == original.encode(text, add_special_tokens=False).ids, text
    assert (ours.bos_id, ours.eos_id) == (original.token_to_id(CONTROL[0]), original.token_to_id(CONTROL[1]))
    assert not ours.adds_bos


@pytest.mark.parametrize("adds_first_space", [False, True])
def test_a_sentencepiece_tokenizer_rebuilt_from_gguf_equals_the_original(tmp_path, adds_first_space):
    rebuilt = Tokenizer.from_gguf(GGUFFile(sentencepiece_gguf(tmp_path / "t.gguf", adds_first_space)))
    reference = sentencepiece_reference(adds_first_space)
    for text in TEXTS:
        expected = reference.encode(text, add_special_tokens=False).ids
        assert rebuilt.encode(text) == expected, text
        assert rebuilt.decode(expected, skip_special=False) == reference.decode(expected, skip_special_tokens=False)
        if "▁" not in text:
            assert rebuilt.decode(rebuilt.encode(text)) == text
    assert rebuilt.adds_bos


@pytest.mark.parametrize("damage", [None, b"", b"PK\x03\x04 nonsense", "other"])
def test_what_is_kept_of_a_tokenizer_changes_nothing(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("UMA_CACHE", str(tmp_path / "cache"))
    file = GGUFFile(sentencepiece_gguf(tmp_path / "t.gguf", True))
    first = Tokenizer.from_gguf(file, "ab" * 32)
    (kept,) = (tmp_path / "cache" / "tokenizers").iterdir()
    if damage == "other":
        np.savez(kept.open("wb"), merges=np.array([[0, 10**6]]), digest=np.zeros(32, np.uint8))
    elif damage is not None:
        kept.write_bytes(damage)
    again, without = Tokenizer.from_gguf(file, "ab" * 32), Tokenizer.from_gguf(file)
    assert first.digest == again.digest == without.digest
    for text in TEXTS:
        assert first.encode(text) == again.encode(text) == without.encode(text)


def test_a_sentencepiece_tokenizer_json_is_read_too(tmp_path):
    sentencepiece_original(True).save(str(tmp_path / "tokenizer.json"))
    ours, original = Tokenizer.from_directory(tmp_path), sentencepiece_original(True)
    for text in TEXTS:
        if not any(piece in text for piece in ("<0x", "<s>", "<unk>")):
            assert ours.encode(text) == original.encode(text, add_special_tokens=False).ids, text
            assert ours.decode(ours.encode(text)) == text.replace("▁", " ")


@pytest.fixture(params=["gpt-2", "smollm", "qwen2", "llama-bpe", "sentencepiece"])
def tokenizer(request, tmp_path) -> Tokenizer:
    path = tmp_path / "t.gguf"
    written = (
        sentencepiece_gguf(path, False) if request.param == "sentencepiece" else byte_level_gguf(path, request.param)
    )
    return Tokenizer.from_gguf(GGUFFile(written))


def assert_text_is_only_text(tokenizer: Tokenizer) -> None:
    for token_id in tokenizer.control_ids:
        piece = tokenizer.piece_of(token_id)
        for text in (piece, f"a {piece}\n{piece}b", piece * 3, piece[:-1] + piece):
            ids = tokenizer.encode(text)
            assert not tokenizer.control_ids.intersection(ids), piece
            assert tokenizer.decode(ids) == text
        assert token_id in tokenizer.encode(f"a{piece}b", special=True)
        assert tokenizer.encode(piece, special=True) == [token_id]


def test_no_control_token_can_be_written_in_text(tokenizer):
    assert tokenizer.control_ids
    assert_text_is_only_text(tokenizer)


def test_bytes_spelled_as_byte_tokens_are_not_bytes(tmp_path):
    tokenizer = Tokenizer.from_gguf(GGUFFile(sentencepiece_gguf(tmp_path / "t.gguf", False)))
    assert "<0x0A>" not in [tokenizer.piece_of(token_id) for token_id in tokenizer.encode("<0x0A>")]
    assert tokenizer.decode(tokenizer.encode("<0x0A>")) == "<0x0A>"


def test_a_batch_gives_the_ids_of_each_text_alone(tokenizer):
    for special in (False, True):
        assert tokenizer.encode_batch(TEXTS, special) == [tokenizer.encode(text, special) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_a_stream_of_ids_decodes_to_the_same_text_as_the_whole(tokenizer):
    rng = random.Random(3)
    noise = [[rng.randrange(tokenizer.vocab_size) for _ in range(200)] for _ in range(20)]
    for ids in [*tokenizer.encode_batch(TEXTS, special=True), *noise]:
        for skip_special in (True, False):
            stream = IncrementalDecoder(tokenizer, skip_special)
            pieces = [stream.push(token_id) for token_id in ids]
            assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special)


def test_a_character_is_never_streamed_in_halves(tokenizer):
    stream = IncrementalDecoder(tokenizer)
    pieces = [stream.push(token_id) for token_id in tokenizer.encode("😀日本e\u0301")]
    assert all("\ufffd" not in piece for piece in pieces)
    assert stream.finish() == ""
    unfinished = tokenizer.encode("\U0001d7da")[:-1]
    if unfinished:
        assert tokenizer.decode(unfinished).endswith("\ufffd")


def test_special_tokens_are_skipped_and_markers_are_kept(tmp_path):
    tokenizer = Tokenizer.from_gguf(GGUFFile(byte_level_gguf(tmp_path / "t.gguf", "qwen2")))
    ids = tokenizer.encode("a<|end|><tool_call>b", special=True)
    assert tokenizer.decode(ids) == "a<tool_call>b"
    assert tokenizer.decode(ids, skip_special=False) == "a<|end|><tool_call>b"
    assert tokenizer.control_ids - tokenizer.special_ids == set(tokenizer.encode("<tool_call>", special=True))


def test_single_tokens_and_ids_outside_the_vocabulary(tokenizer):
    assert tokenizer.single_token("a") == tokenizer.encode("a")[0] or tokenizer.drops_first_space
    assert tokenizer.single_token("a\x00b") is None
    assert tokenizer.single_token("") is None
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(InvalidRequest, match="not in the vocabulary"):
            tokenizer.decode([bad])


@pytest.mark.parametrize("bad", ["a\ud800b", "\udfff", 7, None, b"x"])
def test_what_is_not_text_is_an_invalid_request(tokenizer, bad):
    with pytest.raises(InvalidRequest):
        tokenizer.encode(bad)
    with pytest.raises(InvalidRequest):
        tokenizer.encode_batch(["fine", bad])


def test_threads_share_a_tokenizer(tokenizer):
    expected = [tokenizer.encode(text, special=True) for text in TEXTS]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: tokenizer.encode(text, special=True), TEXTS)) == expected


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (UnsupportedModel, {"add_tokenizer_model": ("bert",)}),
        (UnsupportedModel, {"add_tokenizer_pre": ("unheard-of",)}),
        (CorruptFile, {"add_token_types": ([1, 1],)}),
        (CorruptFile, {"add_token_list": (["a", "a", "b"],)}),
        (CorruptFile, {"add_token_merges": (["a z"],)}),
        (CorruptFile, {"add_bos_token_id": (99,)}),
    ],
)
def test_contradictory_metadata_is_refused(tmp_path, error, change):
    calls = {
        "add_tokenizer_model": ("gpt2",),
        "add_tokenizer_pre": ("gpt-2",),
        "add_token_list": (["a", "b", "ab"],),
        "add_token_types": ([1, 1, 1],),
        "add_token_merges": (["a b"],),
        "add_bos_token_id": (0,),
    }

    def fill(writer: gguf.GGUFWriter) -> None:
        for method, arguments in (calls | change).items():
            getattr(writer, method)(*arguments)

    with pytest.raises(error):
        Tokenizer.from_gguf(GGUFFile(write_gguf(tmp_path / "t.gguf", fill)))


@pytest.mark.parametrize(
    ("error", "change"),
    [
        (UnsupportedModel, {"model": {"type": "WordPiece", "vocab": {"a": 0}}}),
        (CorruptFile, {"model": {"type": "BPE", "vocab": {}, "merges": []}}),
        (CorruptFile, {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}),
        (CorruptFile, {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}),
        (UnsupportedModel, {"pre_tokenizer": {"type": "Unheard"}}),
        (CorruptFile, {"added_tokens": [{"id": "x", "content": "y"}]}),
    ],
)
def test_a_damaged_tokenizer_json_is_refused(tmp_path, error, change):
    document = json.loads(byte_level_original("gpt-2").to_str()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(error):
        Tokenizer.from_directory(tmp_path)


def test_the_digest_follows_what_decides_the_ids(tmp_path):
    digests = {
        Tokenizer.from_gguf(GGUFFile(byte_level_gguf(tmp_path / f"{name}.gguf", name))).digest for name in FAMILIES
    }
    assert len(digests) == len(FAMILIES)
    again = Tokenizer.from_gguf(GGUFFile(byte_level_gguf(tmp_path / "again.gguf", "gpt-2"))).digest
    assert again in digests


@pytest.mark.weights
def test_the_default_model_gives_the_ids_of_its_own_tokenizer():
    golden = json.loads((Path(__file__).parents[1] / "data" / "tokenizer_golden.json").read_text())
    tokenizer = open_model(resolve(golden["model"])).tokenizer
    for case in golden["cases"]:
        assert tokenizer.encode(case["text"], special=True) == case["ids"], case["text"]
    assert [tokenizer.single_token(word) is not None for word in (" yes", "yes", "no", "yes no")] == [True] * 3 + [
        False
    ]


@pytest.mark.weights
def test_no_control_token_of_the_default_model_can_be_written_in_text():
    tokenizer = open_model(resolve("smollm2-135m")).tokenizer
    assert len(tokenizer.control_ids) == 17
    assert_text_is_only_text(tokenizer)
