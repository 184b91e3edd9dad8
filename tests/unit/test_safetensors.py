"""Hugging Face directories: configurations old and new, shards, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from uma_engine.catalog import open_model
from uma_engine.catalog.hf_config import config_from_hf
from uma_engine.config import RopeScaling
from uma_engine.errors import CorruptFile, UnknownModel, UnsupportedModel

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama_biases": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE | {"rope_theta": 5e5}),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=16),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2_window": transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=3),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8, query_pre_attn_scalar=24),
}


def save(directory: Path, name: str, **options: Any) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: their starting values would hide mistakes
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(directory, **options)
    return model.state_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_of_every_architecture_is_read(tmp_path, name):
    state = save(tmp_path, name)
    model = open_model(tmp_path)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert set(model.names()) == state.keys() - tied
    for tensor in model.names():
        expected = state[tensor]
        if name == "gemma3" and tensor.endswith("norm.weight"):
            expected = expected + 1.0  # norms come as the factor they multiply by
        assert torch.equal(model.tensor(tensor), expected), tensor


def test_configurations_as_transformers_writes_them_now(tmp_path):
    found = {}
    for name, config in CONFIGS.items():
        config.save_pretrained(tmp_path / name)
        found[name] = config_from_hf(json.loads((tmp_path / name / "config.json").read_text()), {}, name)
    assert found["llama"].tie_word_embeddings
    assert not found["qwen2"].tie_word_embeddings
    assert found["llama3"].rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    assert found["llama3"].rope_theta == 5e5
    assert found["llama_biases"].attention_output_bias
    assert found["llama_biases"].mlp_bias
    assert found["mistral"].window_of(3) == 16
    assert found["qwen2"].attention_bias
    assert not found["qwen2"].attention_output_bias
    assert found["qwen2"].window_of(0) is None
    assert [found["qwen2_window"].window_of(i) for i in range(7)] == [None] * 3 + [9] * 4
    assert found["qwen3"].head_dim == 16
    gemma = found["gemma3"]
    assert [gemma.window_of(i) for i in range(7)] == [8] * 5 + [None, 8]
    assert (gemma.rope_theta, gemma.rope_local_theta, gemma.scale) == (1e6, 1e4, 24**-0.5)
    assert (gemma.bos_token_id, gemma.eos_token_ids) == (2, (1,))


def test_configurations_in_their_older_spelling():
    old = SIZES | {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE, "torch_dtype": "bfloat16"}
    assert config_from_hf(old, {}, "old").rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    assert config_from_hf(old, {}, "old").rope_theta == 5e5
    linear = SIZES | {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}}
    assert config_from_hf(linear, {}, "old").rope_scaling == RopeScaling("linear", 4.0)
    gemma = SIZES | {"model_type": "gemma3_text", "sliding_window_pattern": 3, "rope_local_base_freq": 5e3}
    found = config_from_hf(gemma | {"head_dim": 16, "sliding_window": 512}, {}, "old")
    assert found.layer_types == ("sliding", "sliding", "full") * 2 + ("sliding",)
    assert (found.rope_theta, found.rope_local_theta, found.tie_word_embeddings) == (1e6, 5e3, True)
    qwen = SIZES | {"model_type": "qwen2", "sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 3}
    assert config_from_hf(qwen, {"eos_token_id": [5, 6]}, "old").eos_token_ids == (5, 6)
    assert config_from_hf(qwen, {}, "old").sliding_window is None


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mamba"},
        {"model_type": None},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"hidden_act": "relu"},
        {"quantization_config": {"quant_method": "gptq"}},
        {"partial_rotary_factor": 0.5},
    ],
    ids=str,
)
def test_what_would_change_the_answers_is_unsupported(change):
    with pytest.raises(UnsupportedModel):
        config_from_hf(SIZES | {"model_type": "llama"} | change, {}, "config")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": None},
        {"hidden_size": "32"},
        {"hidden_size": -1},
        {"vocab_size": 2**70},
        {"num_hidden_layers": True},
        {"num_hidden_layers": 10**6},
        {"num_attention_heads": 5},
        {"rms_norm_eps": float("nan")},
        {"rope_parameters": [1]},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"eos_token_id": ["x"]},
        {"tie_word_embeddings": "yes"},
    ],
    ids=str,
)
def test_values_of_the_wrong_kind_are_refused(change):
    with pytest.raises(CorruptFile):
        config_from_hf(SIZES | {"model_type": "llama"} | change, {}, "config")


@pytest.fixture
def sharded(tmp_path) -> Path:
    save(tmp_path, "llama", max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def edit_index(directory: Path, name: str, shard: Any) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][name] = shard
    path.write_text(json.dumps(index))


def test_shards_are_read_as_one_model(tmp_path):
    state = save(tmp_path, "llama", max_shard_size="20KB")
    model = open_model(tmp_path)
    for name in model.names():
        assert torch.equal(model.tensor(name), state[name])


@pytest.mark.parametrize(
    "shard", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "a\\b.safetensors", "none.safetensors", 7, ""]
)
def test_an_index_that_points_elsewhere_is_refused(sharded, shard):
    (sharded.parent / "other.safetensors").write_bytes(b"")
    edit_index(sharded, "model.norm.weight", shard)
    with pytest.raises(CorruptFile):
        open_model(sharded)


def test_an_index_that_disagrees_with_the_shards_is_refused(sharded):
    first = sorted(sharded.glob("*.safetensors"))[0].name
    edit_index(sharded, "model.norm.weight", first)
    with pytest.raises(CorruptFile, match=r"promises tensor `model.norm.weight`"):
        open_model(sharded)


def test_a_missing_shard_is_named(sharded):
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CorruptFile, match=gone.name):
        open_model(sharded)


@pytest.mark.parametrize("damage", ["truncated", "header length", "header text", "empty", "offsets"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    save(tmp_path, "llama")
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.unlink()  # the writer's own mapping must not see the change
    path.write_bytes(
        {
            "truncated": content[:-100],
            "header length": b"\xff" * 8 + content[8:],
            "header text": content[:8] + b"\x00" * 50 + content[58:],
            "empty": b"",
            "offsets": content.replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1),
        }[damage]
    )
    with pytest.raises(CorruptFile) as caught:
        open_model(tmp_path)
    assert caught.value.hint


def rewrite(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    path.unlink()
    save_file(tensors, path)


def test_weights_that_contradict_the_configuration_are_refused(tmp_path):
    save(tmp_path, "qwen3")
    original = (tmp_path / "model.safetensors").read_bytes()
    cases: list[tuple[type[Exception], str, dict[str, torch.Tensor | None]]] = [
        (CorruptFile, "lacks", {"model.layers.3.mlp.up_proj.weight": None}),
        (CorruptFile, "shape", {"model.norm.weight": torch.ones(31)}),
        (UnsupportedModel, "does not use", {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        (UnsupportedModel, "I32", {"model.norm.weight": torch.ones(32, dtype=torch.int32)}),
    ]
    for error, words, changes in cases:
        (tmp_path / "model.safetensors").unlink()
        (tmp_path / "model.safetensors").write_bytes(original)
        rewrite(tmp_path, **changes)
        with pytest.raises(error, match=words):
            open_model(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(tmp_path, bad):
    save(tmp_path, "llama")
    value = torch.ones(32)
    value[17] = bad
    rewrite(tmp_path, **{"model.norm.weight": value})
    with pytest.raises(CorruptFile, match="NaN or infinity"):
        open_model(tmp_path).tensor("model.norm.weight")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_become_fp32_unchanged(tmp_path, dtype):
    save(tmp_path, "llama")
    value = torch.randn(32).to(dtype)
    rewrite(tmp_path, **{"model.norm.weight": value})
    read = open_model(tmp_path).tensor("model.norm.weight")
    assert read.dtype is torch.float32
    assert torch.equal(read, value.float())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl"])
def test_pickles_are_refused_unread(tmp_path, name):
    CONFIGS["llama"].save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"never read")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UnsupportedModel, match="pickle") as caught:
            open_model(path)
        assert "safe_serialization" in caught.value.hint


def test_other_paths_are_typed_errors(tmp_path):
    with pytest.raises(UnknownModel):
        open_model(tmp_path / "nothing")
    with pytest.raises(UnknownModel) as caught:
        open_model(tmp_path)
    assert caught.value.message == f"`{tmp_path}` is not a model directory: it has no `config.json`"
    assert "safetensors" in caught.value.hint
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(UnknownModel) as caught:
        open_model(tmp_path)
    assert caught.value.hint == f"point to the file: `{tmp_path / 'x.gguf'}`"
    (tmp_path / "x.gguf").unlink()
    save(tmp_path, "llama")
    with pytest.raises(UnsupportedModel, match="weights alone"):
        open_model(tmp_path / "model.safetensors")
    for content in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CorruptFile):
            open_model(tmp_path)


def test_the_digest_changes_with_any_file_that_shapes_an_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("UMA_CACHE", str(tmp_path / "cache"))
    directory = tmp_path / "model"
    save(directory, "llama")
    seen = {open_model(directory).digest}
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    seen.add(open_model(directory).digest)
    (directory / "README.md").write_text("no part of the model")
    seen.add(open_model(directory).digest)
    assert len(seen) == 2
