"""Where a tokenizer's parts come from: GGUF metadata, or a `tokenizer.json`.

Knows both descriptions and the splitting rules of the model families; does not encode anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as _Library

from uma_engine.catalog.cache import cache_dir
from uma_engine.catalog.fields import Fields
from uma_engine.catalog.gguf import Strings
from uma_engine.catalog.safetensors_reader import read_json
from uma_engine.errors import CorruptFile, UnsupportedModel

__all__ = ["BYTE_PIECE", "SPACE", "TokenizerSource", "source_from_directory", "source_from_gguf"]

SPACE = "▁"  # how SentencePiece writes a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of token in a GGUF file
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + TAIL
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
GPT2_SPLITS = frozenset({"gpt-2", "gpt2", "default"})
DIGIT_SPLITS = frozenset({"smollm", "starcoder", "refact", "command-r"})
QWEN_SPLITS = frozenset({"qwen2", "deepseek-r1-qwen"})
LLAMA3_SPLITS = frozenset({"llama-bpe", "llama3", "llama-v3"})
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
# Markup that SentencePiece models treat as one symbol of the text, unlike markers with an underscore or brackets.
MARKUP = re.compile(r"</?[a-z]+[1-6]?>")


@dataclass(slots=True)
class TokenizerSource:
    """Everything a Tokenizer is built from.

    `control` holds the added tokens that text may not produce, `special` those of them that `decode` skips, `in_text`
    the added tokens that are text (runs of white space, markup). All are in `vocab` too.
    """

    where: str  # for error messages
    byte_level: bool  # else SentencePiece-like
    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    control: dict[str, AddedToken]
    special: frozenset[str]
    in_text: dict[str, AddedToken]
    normalizer: Any
    pre_tokenizer: Any
    digest: str
    adds_first_space: bool = False
    bos_id: int | None = None
    eos_id: int | None = None
    adds_bos: bool = False
    model_options: dict[str, Any] = field(default_factory=dict)


def _is_text(piece: str, byte_level: bool) -> bool:
    """Whether an added token that is not marked special is ordinary text."""
    return not piece.strip(f" \t\r\n{SPACE}") or (not byte_level and MARKUP.fullmatch(piece) is not None)


def source_from_gguf(metadata: Mapping[str, Any], where: str, file_digest: str | None = None) -> TokenizerSource:
    """`file_digest`: of the file that the metadata are from; what takes long to work out is kept in the cache under it.

    Errors:  UnsupportedModel for unknown kinds and splitting rules; CorruptFile for contradictory lists
    """
    fields = Fields(metadata, where, "tokenizer.ggml.")
    kind = fields.text("model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModel(f"{where}: the tokenizer `{kind}` is not supported", hint="supported are gpt2 and llama")
    byte_level = kind == "gpt2"
    pieces, kinds = fields.get("tokens"), fields.get("token_type")
    if not isinstance(pieces, Strings) or not isinstance(kinds, np.ndarray) or not 0 < len(pieces) == len(kinds):
        raise CorruptFile(f"{where}: `tokenizer.ggml.tokens` and `token_type` are not lists of one length")
    pieces = list(pieces)
    types = kinds.tolist()
    if not byte_level:  # the converter writes user-defined runs of spaces as spaces, the vocabulary as ▁
        pieces = [p.replace(" ", SPACE) if t == USER_DEFINED else p for p, t in zip(pieces, types, strict=True)]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    if len(vocab) != len(pieces):
        raise CorruptFile(f"{where}: `tokenizer.ggml.tokens` lists {len(pieces) - len(vocab)} pieces twice")
    special = frozenset(pieces[i] for i, t in enumerate(types) if t in (CONTROL, UNKNOWN))
    defined = [pieces[i] for i, t in enumerate(types) if t == USER_DEFINED]
    in_text = {p: AddedToken(p, normalized=False) for p in defined if _is_text(p, byte_level)}
    control = [*special, *(p for p in defined if p not in in_text)]
    kept = None if file_digest is None else _read_kept(file_digest, pieces)
    if byte_level:
        merges = _listed_merges(fields, vocab)
        normalizer, pre_tokenizer, options = _byte_level_rules(fields)
        adds_first_space = False
    else:
        merges = _merges_from_scores(fields, pieces, types) if kept is None else kept.merges
        adds_first_space = fields.flag("add_space_prefix", True)
        prepend = [normalizers.Prepend(SPACE)] if adds_first_space else []
        normalizer, pre_tokenizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)]), None
        options = {"byte_fallback": True, "fuse_unk": True}
        _require_all_bytes(vocab, where)
        # White space that the normalizer rewrites is reached by merges; only the rest is looked for in the raw text.
        in_text = {p: token for p, token in in_text.items() if SPACE not in p}
    bos, eos = fields.token_ids("bos_token_id"), fields.token_ids("eos_token_id")
    for token_id in bos + eos:
        if token_id >= len(pieces):
            raise CorruptFile(f"{where}: the token id {token_id} is beyond the vocabulary of {len(pieces)}")
    if kept is None:
        described = [kind, fields.get("pre", ""), adds_first_space, pieces, types, merges]
        kept = _Kept(hashlib.sha256(json.dumps(described).encode()).hexdigest(), [] if byte_level else merges)
        if file_digest is not None:
            _keep(file_digest, kept, vocab)
    return TokenizerSource(
        where=where,
        byte_level=byte_level,
        vocab=vocab,
        merges=merges,
        control={p: AddedToken(p, normalized=False, special=True) for p in sorted(control, key=vocab.__getitem__)},
        special=special,
        in_text=in_text,
        normalizer=normalizer,
        pre_tokenizer=pre_tokenizer,
        digest=kept.digest,
        adds_first_space=adds_first_space,
        bos_id=bos[0] if bos else None,
        eos_id=eos[0] if eos else None,
        adds_bos=fields.flag("add_bos_token", not byte_level),
        model_options=options,
    )


@dataclass(slots=True)
class _Kept:
    """What is worked out once for a file: the tokenizer's digest, and merges where the file has none."""

    digest: str
    merges: list[tuple[str, str]]


def _kept_path(file_digest: str) -> Path:
    return cache_dir() / "tokenizers" / f"{file_digest[:32]}.1.npz"  # 1: of this form


def _read_kept(file_digest: str, pieces: list[str]) -> _Kept | None:
    try:
        with np.load(_kept_path(file_digest), allow_pickle=False) as file:
            pairs, digest = file["merges"], bytes(file["digest"]).hex()
        if (
            len(digest) == 64
            and pairs.shape[1:] == (2,)
            and (not pairs.size or 0 <= pairs.min() <= pairs.max() < len(pieces))
        ):
            return _Kept(digest, [(pieces[left], pieces[right]) for left, right in pairs.tolist()])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not kept yet, or damaged: it is worked out again
    return None


def _keep(file_digest: str, kept: _Kept, vocab: Mapping[str, int]) -> None:
    path = _kept_path(file_digest)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    pairs = np.array([(vocab[left], vocab[right]) for left, right in kept.merges], dtype=np.int32).reshape(-1, 2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            np.savez(file, merges=pairs, digest=np.frombuffer(bytes.fromhex(kept.digest), np.uint8))
        scratch.replace(path)
    except OSError:  # a cache that cannot be written only costs time
        scratch.unlink(missing_ok=True)


def _byte_level_rules(fields: Fields) -> tuple[Any, Any, dict[str, Any]]:
    """(normalizer, pre-tokenizer, model options) of the family that `tokenizer.ggml.pre` names."""
    name = fields.text("pre", "default")
    if name in GPT2_SPLITS:
        return None, pre_tokenizers.ByteLevel(add_prefix_space=False), {}
    if name in DIGIT_SPLITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return None, pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]), {}
    if name in QWEN_SPLITS or name in LLAMA3_SPLITS:
        pattern = QWEN2 if name in QWEN_SPLITS else LLAMA3
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        normalizer = normalizers.NFC() if name in QWEN_SPLITS else None
        return normalizer, pre_tokenizers.Sequence([split, spell]), {"ignore_merges": name in LLAMA3_SPLITS}
    known = sorted(GPT2_SPLITS | DIGIT_SPLITS | QWEN_SPLITS | LLAMA3_SPLITS)
    raise UnsupportedModel(
        f"{fields.where}: text is split by the rule `{name}`, which is not known",
        hint=f"known are {', '.join(known)}; a Hugging Face directory brings its own rules in `tokenizer.json`",
    )


def _listed_merges(fields: Fields, vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    lines = fields.get("merges")
    if not isinstance(lines, Strings):
        raise CorruptFile(f"{fields.where}: `tokenizer.ggml.merges` is not a list of strings")
    merges = []
    for line in lines:
        left, _, right = line.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise CorruptFile(f"{fields.where}: the merge `{line}` uses pieces that the vocabulary lacks")
        merges.append((left, right))
    return merges


def _merges_from_scores(fields: Fields, pieces: list[str], types: list[int]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE model implies: two pieces join if their union is one, best score first."""
    scores = fields.get("scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(pieces) or not np.isfinite(scores).all():
        raise CorruptFile(f"{fields.where}: `tokenizer.ggml.scores` is not a list of {len(pieces)} finite numbers")
    ids = {p: i for i, (p, t) in enumerate(zip(pieces, types, strict=True)) if t in (NORMAL, USER_DEFINED)}
    best = float(scores.max(initial=0.0))
    ranked = []
    for piece, token_id in ids.items():
        # SentencePiece joins user-defined pieces before anything else; the file gives them a stand-in score.
        score = best if types[token_id] == USER_DEFINED else float(scores[token_id])
        parts = []
        for cut in range(1, len(piece)):
            left = ids.get(piece[:cut])
            if left is not None and (right := ids.get(piece[cut:])) is not None:
                parts.append((left, right, cut))
        parts.sort()
        ranked += [(score, cut, len(piece) - cut, piece) for _, _, cut in parts]
    ranked.sort(key=lambda entry: entry[:3], reverse=True)  # stable: equal ones keep the order of the vocabulary
    return [(piece[:cut], piece[cut:]) for _, cut, _, piece in ranked]


def _require_all_bytes(vocab: Mapping[str, int], where: str) -> None:
    if missing := [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in vocab]:
        raise UnsupportedModel(f"{where}: the vocabulary lacks `{missing[0]}`: some text could not be encoded")


def source_from_directory(directory: Path) -> TokenizerSource:
    """Errors:  UnsupportedModel when there is no `tokenizer.json` or it is not BPE; CorruptFile when it is damaged"""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedModel(
            f"`{directory}` has no `tokenizer.json`",
            hint="save the tokenizer again with its fast class in transformers",
        )
    document = read_json(path)
    where = f"`{path}`"
    model = Fields(document, where).inside("model")
    _refuse_other_models(model)
    vocab, merges = _document_vocab(model)
    decoder = json.dumps(document.get("decoder"))
    byte_level = '"ByteLevel"' in decoder
    if not byte_level:
        _require_all_bytes(vocab, where)
    control: dict[str, AddedToken] = {}
    in_text: dict[str, AddedToken] = {}
    special: set[str] = set()
    for entry in Fields(document, where).get("added_tokens", []):
        token, token_id, is_special = _added_token(entry, where)
        if vocab.setdefault(token.content, token_id) != token_id:
            raise CorruptFile(f"{where}: the added token `{token.content}` has two ids")
        if not byte_level and BYTE_PIECE.fullmatch(token.content):
            continue  # needed to spell rare characters; the model alone may reach it
        if is_special:
            special.add(token.content)
        (in_text if not is_special and _is_text(token.content, byte_level) else control)[token.content] = token
    rules = _rules(document, where)
    config = read_json(config_path) if (config_path := directory / "tokenizer_config.json").is_file() else {}
    bos_id = _named_token(config, "bos_token", vocab)
    # Where the configuration is silent, the post-processor says whether the bos comes first.
    post_processor = json.dumps(document.get("post_processor"), ensure_ascii=False)
    adds_bos = bos_id is not None and json.dumps(_piece(config.get("bos_token")), ensure_ascii=False) in post_processor
    options = {key: bool(model.get(key, False)) for key in ("ignore_merges", "byte_fallback", "fuse_unk")}
    return TokenizerSource(
        where=where,
        byte_level=byte_level,
        vocab=vocab,
        merges=merges,
        control=control,
        special=frozenset(special),
        in_text=in_text,
        normalizer=rules.normalizer,
        pre_tokenizer=rules.pre_tokenizer,
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        adds_first_space='"Strip"' in decoder or _metaspace_prepends(document.get("decoder")),
        bos_id=bos_id,
        eos_id=_named_token(config, "eos_token", vocab),
        adds_bos=Fields(config, where).flag("add_bos_token", adds_bos),
        model_options=options,
    )


def _refuse_other_models(model: Fields) -> None:
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedModel(f"{model.where}: the tokenizer is {model.get('type')}", hint="only BPE is supported")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if value := model.get(key, None):
            raise UnsupportedModel(f"{model.where}: `{key}` is `{value}`, which is not supported")


def _document_vocab(model: Fields) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocab, lines = model.get("vocab"), model.get("merges")
    if not isinstance(vocab, dict) or not vocab or not isinstance(lines, list):
        raise CorruptFile(f"{model.where}: `vocab` or `merges` is missing or empty")
    if any(type(token_id) is not int or token_id < 0 for token_id in vocab.values()):
        raise CorruptFile(f"{model.where}: `vocab` holds something else than token ids")
    merges = []
    for line in lines:  # "a b", or ["a", "b"] in files from 2024-11 on
        parts = tuple(line.split(" ")) if isinstance(line, str) else tuple(line) if isinstance(line, list) else ()
        if len(parts) != 2 or parts[0] not in vocab or parts[1] not in vocab or parts[0] + parts[1] not in vocab:
            raise CorruptFile(f"{model.where}: the merge `{line}` uses pieces that the vocabulary lacks")
        merges.append(parts)
    return vocab, merges


def _added_token(entry: Any, where: str) -> tuple[AddedToken, int, bool]:
    if not isinstance(entry, dict):
        raise CorruptFile(f"{where}: `added_tokens` holds a {type(entry).__name__}")
    fields = Fields(entry, f"{where}, `added_tokens`")
    (token_id,) = fields.token_ids("id", (fields.get("id"),))
    flags = {key: fields.flag(key, False) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return AddedToken(fields.text("content"), **flags), token_id, flags["special"]


def _rules(document: Mapping[str, Any], where: str) -> _Library:
    """The document's normalizer and pre-tokenizer, read by the library around an empty model."""
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    kept = {key: document.get(key) for key in ("normalizer", "pre_tokenizer")}
    try:
        return _Library.from_str(json.dumps({"version": "1.0", "added_tokens": [], "model": empty, **kept}))
    except Exception as error:  # the library raises bare Exception
        raise UnsupportedModel(f"{where}: its rules cannot be read: {error}") from None


def _metaspace_prepends(decoder: Any) -> bool:
    return isinstance(decoder, dict) and decoder.get("type") == "Metaspace" and decoder.get("prepend_scheme") != "never"


def _piece(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _named_token(config: Mapping[str, Any], key: str, vocab: Mapping[str, int]) -> int | None:
    content = _piece(config.get(key))
    return vocab.get(content) if isinstance(content, str) else None
