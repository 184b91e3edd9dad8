"""GGUF files: exact values, and no trust in what a file says about itself."""

from __future__ import annotations

import hashlib
import pickle
import random
import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import (
    FACTORS,
    HEADS,
    KV_HEADS,
    QUANTS,
    add_byte_level_tokens,
    add_sizes,
    add_tensors,
    interleave,
    llama_tensors,
    random_blocks,
    tiny_llama,
    write_gguf,
)

from uma_engine.catalog import expected_shapes, open_model, resolve
from uma_engine.catalog.gguf import GGUFFile
from uma_engine.errors import CorruptFile, UmaError, UnsupportedModel
from uma_kernels.linear.formats import BlockQuantized


def dense(value: torch.Tensor | BlockQuantized) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else value.dequantize()


@pytest.mark.parametrize("kind", FACTORS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("shape", [(1, 256), (3, 512), (37, 768)], ids=str)
def test_random_blocks_decode_to_the_bits_that_ggml_gives(tmp_path, kind, shape):
    raw = random_blocks(kind, *shape, np.random.default_rng(1))
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", lambda w: w.add_tensor("x", raw, raw_dtype=kind)))
    value = file.read("x")
    assert isinstance(value, BlockQuantized)
    assert value.shape == shape
    assert torch.equal(value.dequantize(), torch.from_numpy(gguf.dequantize(raw, kind)))


def test_a_matrix_larger_than_one_chunk_decodes_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("uma_engine.catalog.gguf_blocks.CHUNK_ELEMENTS", 1000)
    raw = random_blocks(QUANTS.Q4_K, 41, 256, np.random.default_rng(2))
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", lambda w: w.add_tensor("x", raw, raw_dtype=QUANTS.Q4_K)))
    assert torch.equal(dense(file.read("x")), torch.from_numpy(gguf.dequantize(raw, QUANTS.Q4_K)))


@pytest.mark.parametrize("kind", [QUANTS.F32, QUANTS.F16, QUANTS.BF16], ids=lambda kind: kind.name)
def test_dense_tensors_become_fp32_unchanged(tmp_path, kind):
    value = np.random.default_rng(3).standard_normal((5, 7, 3)).astype(np.float32)
    raw = (
        gguf.quantize(value, kind)
        if kind is QUANTS.BF16
        else value.astype(np.float16 if kind is QUANTS.F16 else np.float32)
    )
    expected = gguf.dequantize(raw, kind).reshape(5, 7, 3)
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", lambda w: w.add_tensor("x", raw, raw_dtype=kind)))
    assert torch.equal(dense(file.read("x")), torch.from_numpy(expected))


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_K"), (8, "Q5_1"), (8, "Q6_K")])
def test_a_permutation_of_rows_permutes_the_weight(tmp_path, bits, kind):
    raw = random_blocks(QUANTS[kind], 9, 256, np.random.default_rng(4))
    path = write_gguf(tmp_path / "m.gguf", lambda w: w.add_tensor("x", raw, raw_dtype=QUANTS[kind]))
    value = GGUFFile(path).read("x")
    assert isinstance(value, BlockQuantized)
    assert value.bits == bits
    order = torch.randperm(9)
    assert torch.equal(value.rows(order).dequantize(), value.dequantize()[order])


def test_metadata_of_every_kind_is_read(tmp_path):
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_uint8("a.u8", 200)
        writer.add_int16("a.i16", -300)
        writer.add_uint64("a.u64", 2**63)
        writer.add_float32("a.f32", 0.5)
        writer.add_float64("a.f64", 0.1)
        writer.add_bool("a.yes", True)
        writer.add_string("a.text", "żółć\x00 😀")
        writer.add_array("a.ints", [1, -2, 3])
        writer.add_array("a.words", ["", "x", "ß"])
        writer.add_array("a.flags", [True, False])

    metadata = GGUFFile(write_gguf(tmp_path / "m.gguf", fill)).metadata
    assert metadata["a.u8"] == 200
    assert metadata["a.i16"] == -300
    assert metadata["a.u64"] == 2**63
    assert (metadata["a.f32"], metadata["a.f64"]) == (0.5, 0.1)
    assert metadata["a.yes"] is True
    assert metadata["a.text"] == "żółć\x00 😀"
    assert metadata["a.ints"].tolist() == [1, -2, 3]
    assert list(metadata["a.words"]) == ["", "x", "ß"]
    assert metadata["a.words"][1:] == ["x", "ß"]
    assert metadata["a.words"][-1] == "ß"
    with pytest.raises(IndexError):
        metadata["a.words"][3]


def test_a_string_of_an_array_that_is_not_utf_8_is_refused_when_it_is_read(tmp_path):
    words = struct.pack("<IQ", 8, 2) + string(b"good") + string(b"\xc3\x28")
    (path := tmp_path / "m.gguf").write_bytes(header(keys=1) + key(b"k", 9, words))
    found = GGUFFile(path).metadata["k"]
    assert found[0] == "good"
    for read in (list, lambda strings: strings[1]):
        with pytest.raises(CorruptFile, match=r"`k` holds a string that is not UTF-8"):
            read(found)


def test_metadata_flags_are_read(tmp_path):
    metadata = GGUFFile(
        write_gguf(tmp_path / "m.gguf", lambda writer: writer.add_array("a.flags", [True, False]))
    ).metadata
    assert metadata["a.flags"].tolist() == [True, False]


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def header(tensors: int = 0, keys: int = 0, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def tensor(name: bytes = b"x", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


DATA = b"\0" * 4096
LIES = {
    "empty": b"",
    "magic": header(magic=b"GGML"),
    "version": header(version=9),
    "cut header": header()[:11],
    "many tensors": header(tensors=2**60) + DATA,
    "many keys": header(keys=2**40) + DATA,
    "tensor count beyond the file": header(tensors=200) + tensor() + b"\1" * 100,
    "string beyond the file": header(keys=1) + struct.pack("<Q", 2**62),
    "key not UTF-8": header(keys=1) + key(b"\xff\xfe", 0, b"\1"),
    "value not UTF-8": header(keys=1) + key(b"k", 8, string(b"\xc3\x28")),
    "key twice": header(keys=2) + key(b"k", 0, b"\1") * 2,
    "value type": header(keys=1) + key(b"k", 77, b"\1"),
    "array of strings beyond the file": header(keys=1) + key(b"k", 9, struct.pack("<IQ", 8, 2**40)) + DATA,
    "array of numbers beyond the file": header(keys=1) + key(b"k", 9, struct.pack("<IQ", 12, 2**61)) + DATA,
    "array in array": header(keys=1) + key(b"k", 9, struct.pack("<IQ", 9, 1) * 500) + DATA,
    "alignment": header(keys=1) + key(b"general.alignment", 4, struct.pack("<I", 24)) + DATA,
    "alignment zero": header(keys=1) + key(b"general.alignment", 4, struct.pack("<I", 0)) + DATA,
    "alignment is text": header(keys=1) + key(b"general.alignment", 8, string(b"32")) + DATA,
    "tensor twice": header(tensors=2) + tensor() + tensor(offset=32) + DATA,
    "tensors overlap": header(tensors=2) + tensor(b"a", (16,)) + tensor(b"b", (16,), offset=32) + DATA,
    "no dimensions": header(tensors=1) + tensor(dims=()) + DATA,
    "nine dimensions": header(tensors=1) + tensor(dims=(1,) * 9) + DATA,
    "zero dimension": header(tensors=1) + tensor(dims=(4, 0)) + DATA,
    "dimensions overflow": header(tensors=1) + tensor(dims=(2**33, 2**33, 2**33)) + DATA,
    "rows are no whole blocks": header(tensors=1) + tensor(dims=(33, 2), kind=8) + DATA,
    "offset not aligned": header(tensors=1) + tensor(offset=4) + DATA,
    "offset beyond the file": header(tensors=1) + tensor(offset=2**40) + DATA,
    "offset wraps": header(tensors=1) + tensor(offset=2**64 - 32) + DATA,
    "data cut off": header(tensors=1) + tensor(dims=(4096,)) + DATA,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_file_is_refused_with_a_hint(tmp_path, lie):
    (path := tmp_path / "m.gguf").write_bytes(LIES[lie])
    with pytest.raises(CorruptFile) as caught:
        GGUFFile(path)
    assert "m.gguf" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "content", [header(version=1), header(version=3 << 24), header(tensors=1) + tensor(kind=10) + DATA]
)
def test_what_is_sound_but_not_read_is_unsupported(tmp_path, content):
    (path := tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(UnsupportedModel):
        GGUFFile(path)


def test_a_missing_file_and_a_directory_are_typed_errors(tmp_path):
    for path in (tmp_path / "nothing.gguf", tmp_path):
        with pytest.raises(CorruptFile):
            GGUFFile(path)


@pytest.mark.parametrize("kind", FACTORS, ids=lambda kind: kind.name)
def test_nan_and_infinity_are_refused_wherever_they_hide(tmp_path, kind):
    for at in FACTORS[kind]:
        for bad in (np.nan, np.inf):
            raw = random_blocks(kind, 2, 256, np.random.default_rng(5))
            raw[1, at : at + 2] = np.array([bad], np.float16).view(np.uint8)
            raw[1, at + 4 : at + 20] |= 1  # no scale of a super-block is 0, which would hide infinity behind NaN
            path = write_gguf(tmp_path / "m.gguf", lambda w, raw=raw: w.add_tensor("x", raw, raw_dtype=kind))
            with pytest.raises(CorruptFile, match="NaN or infinity"):
                GGUFFile(path).read("x")


def test_a_dense_tensor_with_nan_is_refused(tmp_path):
    value = np.array([1.0, np.nan], np.float32)
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", lambda w: w.add_tensor("x", value)))
    with pytest.raises(CorruptFile, match="NaN or infinity"):
        file.read("x")


@pytest.mark.parametrize("quantised", ["Q8_0", "Q4_1", "Q5_0"])
def test_rows_of_q_and_k_are_put_back_in_the_order_of_the_checkpoint(tmp_path, quantised):
    weights = tiny_llama(tmp_path / "m.gguf", quantised)
    model = open_model(tmp_path / "m.gguf")
    for name, stored, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS)):
        got = dense(model.tensor(f"model.layers.1.self_attn.{name}.weight"))
        original = weights[f"blk.1.{stored}.weight"]
        expected = gguf.dequantize(gguf.quantize(original, QUANTS[quantised]), QUANTS[quantised])
        assert torch.equal(got, torch.from_numpy(expected))
        assert not np.array_equal(interleave(original, heads), original)


def test_a_tiny_llama_opens_with_every_tensor_under_its_name(tmp_path):
    weights = tiny_llama(tmp_path / "m.gguf")
    model = open_model(tmp_path / "m.gguf")
    assert (model.config.architecture, model.config.num_layers, model.config.head_dim) == ("llama", 2, 16)
    assert model.config.rms_norm_eps == 1e-5
    assert model.config.tie_word_embeddings
    assert model.config.eos_token_ids == (257,)
    assert len(model.names()) == len(weights)
    assert torch.equal(dense(model.tensor("model.norm.weight")), torch.from_numpy(weights["output_norm.weight"]))
    for name in model.names():
        assert torch.isfinite(dense(model.tensor(name))).all()


def test_a_tensor_that_no_layer_uses_is_refused_not_ignored(tmp_path):
    rng = np.random.default_rng(0)

    def fill(writer: gguf.GGUFWriter, extra: dict[str, np.ndarray], dropped: str = "") -> None:
        add_sizes(writer)
        tensors = llama_tensors(add_byte_level_tokens(writer), rng) | extra
        tensors.pop(dropped, None)
        add_tensors(writer, tensors)

    for name in ("blk.0.ffn_gate_exps.weight", "blk.0.attn_q_norm.weight", "blk.7.attn_norm.weight"):
        path = write_gguf(tmp_path / "m.gguf", lambda w, name=name: fill(w, {name: np.ones(64, np.float32)}))
        with pytest.raises(UnsupportedModel, match=r"which (no|a)"):
            open_model(path)
    path = write_gguf(tmp_path / "m.gguf", lambda w: fill(w, {}, "blk.1.ffn_up.weight"))
    with pytest.raises(CorruptFile, match=r"lacks the tensor `model\.layers\.1\.mlp\.up_proj\.weight`"):
        open_model(path)


@pytest.mark.slow
def test_damaged_files_end_in_a_typed_error_or_a_sound_model(tmp_path):
    """2,000 random truncations and byte flips, most of them in the header, of a whole model with its tokenizer."""
    tiny_llama(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    header_bytes = min(info.start for info in GGUFFile(tmp_path / "m.gguf").tensors.values())
    rng = random.Random(7)
    damaged, refused = tmp_path / "damaged.gguf", 0
    tracemalloc.start()
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            at = rng.randrange(header_bytes if rng.random() < 0.9 else len(content))
            content[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        damaged.write_bytes(content)
        try:
            model = open_model(damaged)
            for name, shape in expected_shapes(model.config).items():
                assert tuple(model.tensor(name).shape) == shape
            assert len(model.tokenizer.encode("ab <|end|>")) > 0
        except (CorruptFile, UnsupportedModel):
            refused += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert refused > 500
    assert peak < 40 * len(whole)


@pytest.mark.weights
def test_tensors_of_the_default_model_have_the_bits_that_ggml_gives():
    path = resolve("smollm2-135m")
    file = GGUFFile(path)
    for info in gguf.GGUFReader(path).tensors:
        if info.name.startswith("blk.") and info.name.split(".")[1] not in ("0", "29"):
            continue  # the layers are alike
        expected = torch.from_numpy(gguf.dequantize(np.array(info.data), info.tensor_type))
        assert torch.equal(dense(file.read(info.name)), expected), info.name


def test_the_digest_is_that_of_the_contents(tmp_path, monkeypatch):
    monkeypatch.setenv("UMA_CACHE", str(tmp_path / "cache"))
    path = Path(tmp_path / "m.gguf")
    tiny_llama(path)
    first = open_model(path).digest
    assert first == hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_model(path).digest == first  # this time from the cache
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert open_model(path).digest == hashlib.sha256(content).hexdigest()


def test_errors_survive_being_sent_between_processes(tmp_path):
    with pytest.raises(UmaError) as caught:
        open_model(tmp_path / "none.gguf")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), again.message, again.hint) == (type(caught.value), caught.value.message, caught.value.hint)
