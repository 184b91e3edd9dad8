"""What the adapter loader accepts, and that everything else is refused with a typed error that names the reason."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from uma_engine.adapters import load_adapter, loader
from uma_engine.adapters.patterns import refuse_slow_pattern
from uma_engine.errors import AdapterError
from uma_kernels.lora import LoraRouting, lora
from uma_kernels.testing import assert_reduction

SITES = {
    f"layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in (("self_attn.q_proj", (8, 16)), ("mlp.down_proj", (24, 8)))
}
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "a/base",
    "lora_dropout": 0.05,
    "rank_pattern": {},
    "loftq_config": {},
    "modules_to_save": None,
    "use_dora": False,
}
Write = Callable[..., Path]


def make_tensors(rank: int = 4, prefix: str = "model.", dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    tensors = {}
    for site, (width_in, width_out) in SITES.items():
        name = f"base_model.model.{prefix}{site}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, width_in).to(dtype)
        tensors[f"{name}.lora_B.weight"] = torch.randn(width_out, rank).to(dtype)
    return tensors


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes an adapter directory from changes to CONFIG and from tensors."""

    def write_adapter(changes: Mapping[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
        path = tmp_path / "jobs-de"
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps(CONFIG | dict(changes or {})))
        save_file(make_tensors() if tensors is None else tensors, path / "adapter_model.safetensors")
        return path

    return write_adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["model.", "", "model.language_model.", "language_model.model."])
def test_a_loaded_adapter_adds_its_product(write: Write, prefix: str, dtype: torch.dtype) -> None:
    tensors = make_tensors(prefix=prefix, dtype=dtype)
    adapter = load_adapter(write({}, tensors), SITES, max_rank=8)
    assert adapter.packed.keys() == SITES.keys()
    assert adapter.rank == 4
    assert adapter.base_model == "a/base"
    assert adapter.num_bytes >= sum(4 * 4 * (k + n) for k, n in SITES.values())
    site = "layers.1.mlp.down_proj"
    x, out = torch.randn(3, 24), torch.zeros(3, 8)
    lora(x, out, [adapter.packed[site]], LoraRouting.build(torch.zeros(3, dtype=torch.int32), 1))
    name = f"base_model.model.{prefix}{site}"
    a, b = tensors[f"{name}.lora_A.weight"].float(), tensors[f"{name}.lora_B.weight"].float()
    true = 2.0 * (x.double() @ a.double().T) @ b.double().T
    assert_reduction(out, 2.0 * (x @ a.T) @ b.T, true)


def test_the_digest_is_that_of_the_content(write: Write) -> None:
    tensors = make_tensors()
    plain = load_adapter(write({}, tensors), SITES, 8)
    reordered = dict(reversed(tensors.items()))
    harmless = {"lora_dropout": 0.3, "base_model_name_or_path": "b", "rank_pattern": {"q_proj": 4}, "r": 4}
    same = load_adapter(write(harmless, reordered), SITES, 8)
    assert len(plain.digest) == 32
    assert same.digest == plain.digest
    name = next(iter(tensors))
    nudged = tensors | {name: torch.nextafter(tensors[name], torch.tensor(math.inf))}
    others = [
        load_adapter(write({"lora_alpha": 9}, tensors), SITES, 8),
        load_adapter(write({"use_rslora": True}, tensors), SITES, 8),
        load_adapter(write({"alpha_pattern": {"layers.0.mlp.down_proj": 9}}, tensors), SITES, 8),
        load_adapter(write({}, nudged), SITES, 8),
    ]
    assert len({plain.digest, *(other.digest for other in others)}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "`peft_type` is `IA3`"),
        ({"peft_type": None}, "`peft_type` is `None`"),
        ({"use_dora": True}, "DoRA is not supported"),
        ({"bias": "lora_only"}, "`bias` is `lora_only`"),
        ({"lora_bias": True}, "`lora_bias` is set"),
        ({"fan_in_fan_out": True}, "`fan_in_fan_out` is set"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` is set"),
        ({"trainable_token_indices": [1]}, "`trainable_token_indices` is set"),
        ({"layer_replication": [[0, 2]]}, "`layer_replication` is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` is `pissa_niter_4`"),
        ({"use_some_new_method": True}, "`use_some_new_method` is set"),
        ({"r": 0}, "`r` is `0`"),
        ({"r": True}, "`r` is `True`"),
        ({"r": 4.0}, "`r` is `4.0`"),
        ({"lora_alpha": "8"}, "`lora_alpha` is `'8'`"),
        ({"lora_alpha": math.nan}, "`lora_alpha` is `nan`"),
        ({"rank_pattern": {"q_proj": -1}}, "`rank_pattern` is `-1`"),
        ({"rank_pattern": [4]}, "`rank_pattern` is"),
        ({"alpha_pattern": {"(": 4}}, "`alpha_pattern` holds `(`"),
        ({"alpha_pattern": {"a" * 5000: 4}}, "5000 characters"),
        ({"use_rslora": "yes"}, "`use_rslora` is `'yes'`"),
        ({"target_modules": None}, "`target_modules` is empty"),
        ({"target_modules": "*q"}, "`target_modules` holds `*q`"),
        ({"target_modules": [1]}, "`target_modules` is `[1]`"),
        ({"target_modules": ["c_attn"]}, "matches no layer of the base"),
        ({"target_modules": ["q_proj"]}, "holds weights for `layers.0.mlp.down_proj`"),
        ({"layers_to_transform": [0]}, "holds weights for `layers.1"),
        ({"layers_to_transform": [0, 2]}, "names layer 2 but the base has 2 layers"),
        ({"layers_to_transform": [-1]}, "names layer -1"),
        ({"layers_to_transform": ["0"]}, "`layers_to_transform` is"),
        ({"layers_to_transform": [0, 1], "target_modules": ".*"}, "cannot be combined with a pattern"),
        ({"r": 5}, "`lora_A` of `layers.0.mlp.down_proj` has the shape [4, 24] but base and rank ask for [5, 24]"),
        ({"rank_pattern": {"layers.1.self_attn.q_proj": 3}}, "has the shape [4, 8] but base and rank ask for [3, 8]"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
def test_a_configuration_we_cannot_honour_is_refused(write: Write, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError) as error:
        load_adapter(write(changes), SITES, max_rank=8)
    assert message in error.value.message
    assert "`jobs-de`" in error.value.message


UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj)))"
)
# The slowest of their kinds that are let through, and what people write.
QUICK = [
    UNSLOTH,
    r".*\.layers\.\d+\.self_attn\.(q|v)_proj",
    r"model\.layers\.(0|1|2)\..*",
    r".*(q_proj|k_proj)$",
    r"^(?!.*vision).*(?:q_proj|k_proj).*$",
    r"model\.layers\.(?:[0-9]|1[0-9]|2[0-3])\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    r".*language_model.*layers.*self_attn.*q_proj",
    r".*?.*?.*?[xy]",
    r"(.*)(.*)(.*)x",
    r".*.*.*[a-z.]{60}X",
    r".*.*.*" + "a?" * 3 + "x",
    r".*.*.*" + "(a)" * 40 + "x",
    r"(a{0,7})" * 7 + "x",
    r"(a|a)" * 16 + "x",
    r"(.)*(.)*(.)*x",
    r"(?:(?!vision).)*(?:(?!vision).)*q_proj",
    r"(?:.*a)?(?:.*a)?(?:.*a)?x",
    "|".join(f".*.*.*x{i}" for i in range(8)),
]
LONG_NAMES = [
    "model.language_model.layers.1023.self_attn.q_proj",
    ("model.language_model.layers.10.self_attn.q_proj." * 3)[:100],
    ("text.mlp.q_proj." * 7)[:100],
    "a" * 100,
    "ab" * 50,
]


@pytest.mark.parametrize("pattern", QUICK, ids=lambda pattern: pattern[:40])
def test_a_pattern_that_is_let_through_is_quick(pattern: str) -> None:
    refuse_slow_pattern(pattern, pattern, "`target_modules`")
    compiled = re.compile(pattern)
    for name in LONG_NAMES:
        # The best of three, in processor time: this measures the pattern, not what else the machine does.
        spent = []
        for _ in range(3):
            start = time.thread_time()
            compiled.fullmatch(name)
            spent.append(time.thread_time() - start)
        assert min(spent) < 0.05, name


SLOW = {
    r"(a|a|[a-z._0-9]+)+$x": "a repeat holds alternatives",
    r"([a-z._0-9]+)+x": "a repeat holds another repeat",
    r"(?:(?:[a-z]*)\.?)*x": "a repeat holds another repeat",
    r"(a?){60}x": "a repeat holds another repeat",
    r"(?:(aa|bb|ac))*x": "a repeat holds alternatives",
    r"(?>(?:a|ab)*)*x": "a repeat holds",
    r"(?:a(?=.*x))*x": "a repeat holds another repeat",
    ".*" * 4 + "x": "too many ways",
    ".*?" * 8 + "x": "too many ways",
    "a{0,90}" * 30 + "x": "too many ways",
    "(.*x)?" * 30: "",
    "a?" * 40 + "x": "too many ways",
    "(a|a)" * 40 + "x": "too many ways",
    "(?=.*.*.*.*x)": "too many ways",
    ".*.*.*(" + "|".join("a" * i + "y" for i in range(1, 50)) + ")": "too many ways",
    "(a)?" + "(?(1)b|c)": "it uses `groupref_exists`",
}


@pytest.mark.parametrize(("pattern", "reason"), SLOW.items(), ids=lambda value: value[:40])
def test_a_pattern_that_could_freeze_the_process_is_refused_at_once(write: Write, pattern: str, reason: str) -> None:
    start = time.thread_time()
    with pytest.raises(AdapterError) as error:
        load_adapter(write({"target_modules": pattern}), SITES, max_rank=8)
    assert time.thread_time() - start < 1.0
    assert "could take too long to match" in error.value.message
    assert reason in error.value.message
    assert "list" in error.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("exclude_modules", "([a-z]+)+x"),
        ("rank_pattern", {"([a-z]+)+x": 4}),
        ("alpha_pattern", {"([a-z]+)+x": 4}),
        ("alpha_pattern", {".*?.*?.*?x": 4}),  # a fourth `.*` is put before a key
        ("layers_pattern", ["([a-z]+)+x"]),
        ("layers_pattern", "([a-z]+)+x"),
    ],
    ids=str,
)
def test_every_field_with_patterns_is_guarded(write: Write, field: str, value: Any) -> None:
    with pytest.raises(AdapterError, match="could take too long") as error:
        load_adapter(write({field: value}), SITES, max_rank=8)
    assert f"`{field}`" in error.value.message


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank_pattern", {"(?i)q_proj": 4}), ("layers_pattern", "(?P<layer>layers)"), ("layers_pattern", "(?i)layers")],
    ids=str,
)
def test_a_pattern_that_is_none_where_it_is_matched_is_refused(write: Write, field: str, value: Any) -> None:
    with pytest.raises(AdapterError, match="is not a pattern"):
        load_adapter(write({field: value, "layers_to_transform": [0, 1]}), SITES, max_rank=8)


@pytest.mark.parametrize("target", [UNSLOTH, r".*\.layers\.\d+\.\w+\.(q|down)_proj"], ids=["unsloth", "plain"])
def test_an_adapter_with_a_pattern_of_the_usual_kind_loads(write: Write, target: str) -> None:
    assert load_adapter(write({"target_modules": target}), SITES, max_rank=8).packed.keys() == SITES.keys()


def test_plain_names_load_where_patterns_cannot_be_checked(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "re._parser", None)
    assert load_adapter(write({"rank_pattern": {"q_proj": 4}}), SITES, max_rank=8).rank == 4
    with pytest.raises(AdapterError, match="this Python cannot check"):
        load_adapter(write({"target_modules": ".*(q|down)_proj"}), SITES, max_rank=8)


def test_a_rank_above_the_limit_names_both_and_the_option(write: Write) -> None:
    path = write({"r": 64}, make_tensors(64))
    with pytest.raises(AdapterError) as error:
        load_adapter(path, SITES, max_rank=32)
    assert error.value.message == "`max_lora_rank` is 32 but adapter `jobs-de` has rank 64"
    assert error.value.hint == "start the engine with `max_lora_rank=64`"
    assert load_adapter(path, SITES, max_rank=64).rank == 64
    with pytest.raises(AdapterError, match="has rank 257 but ranks up to 256"):
        load_adapter(write({"r": 257}, make_tensors(257)), SITES, max_rank=512)


def test_files_that_have_not_changed_are_not_hashed_again(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    plain = loader._digest

    def counted(*args: Any) -> bytes:
        hashed.append(1)
        return plain(*args)

    monkeypatch.setattr(loader, "_digest", counted)
    path = write()
    first = load_adapter(path, SITES, 8)
    assert load_adapter(path, SITES, 8).digest == first.digest
    assert len(hashed) == 2, "written a moment ago: they may change within one tick of the clock"
    monkeypatch.setattr(loader._Hashed, "SETTLED_NS", 0)
    assert {load_adapter(path, SITES, 8).digest for _ in range(3)} == {first.digest}
    assert len(hashed) == 3
    times = (path / "adapter_model.safetensors").stat()
    write()  # other values, as many bytes
    os.utime(path / "adapter_model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    second = load_adapter(path, SITES, 8)
    assert second.digest != first.digest
    write({"lora_alpha": 16}, None)
    assert load_adapter(path, SITES, 8).digest not in (first.digest, second.digest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(write: Write, bad: float, dtype: torch.dtype) -> None:
    tensors = make_tensors(dtype=dtype)
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"][3, 1] = bad
    with pytest.raises(AdapterError, match=r"q_proj\.lora_B\.weight` holds NaN or infinity"):
        load_adapter(write({}, tensors), SITES, 8)


def test_fp64_weights_beyond_fp32_are_refused(write: Write) -> None:
    tensors = {name: tensor.double() * 1e300 for name, tensor in make_tensors().items()}
    with pytest.raises(AdapterError, match="NaN or infinity"):
        load_adapter(write({}, tensors), SITES, 8)


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (f"{Q_PROJ}.lora_A.weight", None, "lacks `lora_A` of `layers.0.self_attn.q_proj`"),
        (f"{Q_PROJ}.lora_B.weight", None, "lacks `lora_B` of `layers.0.self_attn.q_proj`"),
        (f"{Q_PROJ}.lora_A.weight", torch.zeros(4, 9), "has the shape [4, 9] but base and rank ask for [4, 8]"),
        (f"{Q_PROJ}.lora_B.weight", torch.zeros(4, 16), "has the shape [4, 16] but base and rank ask for [16, 4]"),
        (f"{Q_PROJ}.lora_A.weight", torch.zeros(4, 8, 1), "has the shape [4, 8, 1]"),
        (f"{Q_PROJ}.lora_A.weight", torch.zeros(4, 8, dtype=torch.int32), "is torch.int32"),
        (f"{Q_PROJ}.lora_magnitude_vector", torch.zeros(16), "which no layer of the base takes"),
        (f"{Q_PROJ}.lora_B.bias", torch.zeros(16), "which no layer of the base takes"),
        (f"{Q_PROJ}.base_layer.weight", torch.zeros(16, 8), "which no layer of the base takes"),
        ("base_model.model.lm_head.lora_A.weight", torch.zeros(4, 8), "holds the tensor `base_model.model.lm_head"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(4, 8), "embed_tokens"),
        (f"{Q_PROJ.replace('.0.', '.7.')}.lora_A.weight", torch.zeros(4, 8), "holds weights for `layers.7"),
        (f"{Q_PROJ.replace('.0.', '.00.')}.lora_A.weight", torch.zeros(4, 8), "which no layer of the base takes"),
        ("base_model.model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(4, 8), "names layers both as"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(
    write: Write, name: str, tensor: torch.Tensor | None, message: str
) -> None:
    tensors = make_tensors()
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    with pytest.raises(AdapterError) as error:
        load_adapter(write({}, tensors), SITES, 8)
    assert message in error.value.message


def test_an_empty_weights_file_is_refused(write: Write) -> None:
    with pytest.raises(AdapterError, match="holds no tensors"):
        load_adapter(write({}, {}), SITES, 8)


def test_missing_files_are_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is not a directory"):
        load_adapter(tmp_path / "nowhere", SITES, 8)
    path = write()
    with pytest.raises(AdapterError, match="is not a directory"):
        load_adapter(path / "adapter_config.json", SITES, 8)
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="a pickle"):
        load_adapter(path, SITES, 8)
    (path / "adapter_model.bin").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors` does not exist"):
        load_adapter(path, SITES, 8)
    (path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json` does not exist"):
        load_adapter(path, SITES, 8)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_and_special_files_are_refused(write: Write, tmp_path: Path, file: str) -> None:
    path = write()
    (path / file).rename(tmp_path / "elsewhere")
    (path / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError) as error:
        load_adapter(path, SITES, 8)
    assert "cp -rL" in str(error.value)
    (path / file).unlink()
    os.mkfifo(path / file)
    with pytest.raises(AdapterError, match="is not a regular file"):
        load_adapter(path, SITES, 8)
    (path / file).unlink()
    (path / file).mkdir()
    with pytest.raises(AdapterError, match="is not a regular file"):
        load_adapter(path, SITES, 8)


def test_a_link_to_the_directory_itself_is_followed(write: Write, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(write())
    assert load_adapter(tmp_path / "current", SITES, 8).rank == 4


def test_files_too_large_are_refused(write: Write) -> None:
    path = write()
    size = (path / "adapter_model.safetensors").stat().st_size
    with pytest.raises(AdapterError, match=f"has {size} bytes but at most {size - 1}"):
        load_adapter(path, SITES, 8, max_bytes=size - 1)
    assert load_adapter(path, SITES, 8, max_bytes=size).rank == 4


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[1]", b'"LORA"', b"[" * 100_000])
def test_a_configuration_that_is_not_a_json_object_is_refused(write: Write, data: bytes) -> None:
    path = write()
    (path / "adapter_config.json").write_bytes(data)
    with pytest.raises(AdapterError, match="adapter_config"):
        load_adapter(path, SITES, 8)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_weights_never_raise_anything_else(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Truncated anywhere, or with one byte changed: either it still fits, or it is an AdapterError."""
    path = tmp_path_factory.mktemp("damaged")
    (path / "adapter_config.json").write_text(json.dumps(CONFIG))
    weights = path / "adapter_model.safetensors"
    save_file(make_tensors(), weights)
    raw = bytearray(weights.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        weights.write_bytes(raw[:at])
        with pytest.raises(AdapterError):
            load_adapter(path, SITES, 8)
    else:
        raw[at] ^= data.draw(st.integers(1, 255))
        weights.write_bytes(raw)
        with contextlib.suppress(AdapterError):
            load_adapter(path, SITES, 8)
