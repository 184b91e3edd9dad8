"""Exported graphs on ONNX Runtime: every architecture, and adapters, are as near to fp64 as the engine itself must be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers
from parity_checkpoints import CHECKPOINTS, Checkpoint
from parity_helpers import Cache, Chunk, Truth, exact, grouped, run_logits
from parity_helpers import Path as Sequence_

from tests.tiny import make_tiny_adapter, make_tiny_model
from uma_engine import Engine
from uma_engine.catalog import open_model
from uma_engine.cli.main import main
from uma_engine.errors import (
    AdapterError,
    CorruptFile,
    EngineUnavailable,
    InvalidRequest,
    MissingPackage,
    ModelOverflow,
    TooLarge,
    UmaError,
    UnknownModel,
)
from uma_engine.onnx import OnnxScorer, export_onnx
from uma_kernels.testing import assert_ranking, assert_reduction

Make = Callable[[str], Checkpoint]


def logits(scorer: OnnxScorer, prefix: list[int], items: list[list[int]]) -> torch.Tensor:
    """Of the whole vocabulary, [N, V]."""
    return torch.from_numpy(scorer.score(prefix, items, range(scorer.vocab_size)))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_architecture_matches_and_so_does_the_engine(checkpoint: Make, tmp_path: Path, name: str) -> None:
    """Two candidates behind one job in a batch, each alone, and a prompt as a whole."""
    made = checkpoint(name)
    scorer = OnnxScorer(export_onnx(open_model(made.path), tmp_path / "graph"), num_threads=1)
    last = slice(-1, None)
    both = logits(scorer, made.prefix, [made.left, made.right])
    made.left_truth.assert_matches(both[:1], last)
    made.right_truth.assert_matches(both[1:], last)
    made.right_truth.assert_matches(logits(scorer, made.prefix, [made.right]), last)
    made.left_truth.assert_matches(logits(scorer, [], [made.prefix + made.left]), last)
    made.left_truth.assert_matches(logits(scorer, made.prefix + made.left[:-1], [made.left[-1:]]), last)
    model = made.load()
    cache = Cache(model.config)
    made.left_truth.assert_matches(run_logits(model, cache, [Chunk(Sequence_(cache), made.prefix + made.left)]))


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "gemma3"])
def test_a_merged_adapter_matches_peft(checkpoint: Make, tmp_path: Path, name: str) -> None:
    made = checkpoint(name)
    config = peft.LoraConfig(
        r=5, lora_alpha=11, use_rslora=True, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    peft.get_peft_model(made.load_hf(), config).save_pretrained(tmp_path / "adapter")
    models = [
        peft.PeftModel.from_pretrained(hf, tmp_path / "adapter").to(next(hf.parameters()).dtype).eval()
        for hf in (made.load_hf(), made.load_hf_exact())
    ]
    truths = grouped([Truth.of(*models, made.prefix + own) for own in (made.left, made.right)])
    graph = export_onnx(open_model(made.path), tmp_path / "graph", adapter=tmp_path / "adapter")
    both = logits(OnnxScorer(graph, num_threads=1), made.prefix, [made.left, made.right])
    for truth, row in zip(truths, both, strict=True):
        truth.assert_matches(row[None], slice(-1, None))
    with pytest.raises(AssertionError, match="max error"):  # the adapter matters
        made.left_truth.assert_matches(both[:1], slice(-1, None))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with a tokenizer, an adapter, and the graph of both, written by the command."""
    root = tmp_path_factory.mktemp("tiny")
    made = {"model": make_tiny_model(root / "model"), "adapter": make_tiny_adapter(root / "adapter")}
    arguments = ["export", str(made["model"]), "--onnx", str(root / "graph"), "--adapter", str(made["adapter"])]
    assert main([*arguments, "--max-model-len", "700"]) == 0
    return made | {"graph": root / "graph"}


def test_the_engine_and_the_graph_give_one_ranking(tiny: dict[str, Path]) -> None:
    """Thirty candidates of every length, in batches that do not end where they do, against fp64."""
    rng = np.random.default_rng(3)
    files = open_model(tiny["model"])
    vocab, labels = files.config.vocab_size, [files.tokenizer.encode(word)[0] for word in ("yes", "no")]
    prefix = rng.integers(3, vocab, 45).tolist()
    items = [rng.integers(3, vocab, n).tolist() for n in range(1, 31)]
    hf = transformers.AutoModelForCausalLM.from_pretrained(tiny["model"], dtype=torch.float32)
    fp32, fp64 = (
        peft.PeftModel.from_pretrained(base, tiny["adapter"]).to(next(base.parameters()).dtype).eval()
        for base in (hf.eval(), exact(hf))
    )
    truths = [Truth.of(fp32, fp64, prefix + item) for item in items]
    true = torch.stack([truth.exact[-1, labels] for truth in truths])
    own = torch.stack([truth.fp32[-1, labels] for truth in truths])
    scorer = OnnxScorer(tiny["graph"], num_threads=1, max_num_batched_tokens=70)
    found = torch.from_numpy(scorer.score(prefix, items, labels))
    with Engine(tiny["model"], precision="exact", kv_cache_bytes=4 * 2**20) as engine:
        engine.load_adapter("a", tiny["adapter"])
        scores = engine.score(prefix, items, adapter="a")
    assert_reduction(found, own, true)
    assert_reduction(torch.tensor([s.logits for s in scores]), own, true)
    margins = (found[:, 0] - found[:, 1]).double()
    floor = 2 * 2 * (own.double() - true).abs().max().item()  # both logits may be off by REDUCTION's bound
    assert_ranking(margins.tolist(), (true[:, 0] - true[:, 1]).tolist(), max(floor, 2.0**-20))
    ranked = scorer.rank(prefix, items, labels, top_n=7)
    assert [index for index, _ in ranked] == torch.argsort(-margins, stable=True)[:7].tolist()
    assert [value for _, value in ranked] == pytest.approx(
        sorted((s.value for s in scores), reverse=True)[:7], abs=1e-4
    )


def test_the_graph_is_valid_onnx_and_says_what_it_is(tiny: dict[str, Path]) -> None:
    path = tiny["graph"] / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    assert {node.domain for node in onnx.load(path, load_external_data=False).graph.node} == {
        ""
    }  # ONNX's own operators
    metadata = OnnxScorer(tiny["graph"]).metadata
    assert metadata["uma.base_digest"] == open_model(tiny["model"]).digest
    assert len(bytes.fromhex(metadata["uma.adapter_digest"])) == 32
    assert metadata["uma.max_model_len"] == "700"


def test_bad_calls_are_refused_in_words(tiny: dict[str, Path], tmp_path: Path) -> None:
    scorer = OnnxScorer(tiny["graph"], num_threads=1)
    assert scorer.score([3], [], [4]).shape == (0, 1)
    with pytest.raises(InvalidRequest, match="item 1 is empty"):
        scorer.score([3], [[4], []], [5])
    with pytest.raises(InvalidRequest, match="`label_ids` is empty"):
        scorer.score([3], [[4]], [])
    for wrong in (-1, scorer.vocab_size):
        with pytest.raises(InvalidRequest, match=f"item 0 holds the token ids {wrong} to {wrong}"):
            scorer.score([3], [[wrong]], [5])
    with pytest.raises(TooLarge, match="item 0 and the prefix have 701 tokens but the graph takes 700"):
        scorer.score([3] * 700, [[4]], [5])
    with pytest.raises(InvalidRequest, match="`device` is `tpu`"):
        OnnxScorer(tiny["graph"], device="tpu")
    with pytest.raises(UnknownModel, match="there is no file"):
        OnnxScorer(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"not a graph")
    with pytest.raises(CorruptFile, match="cannot open"):
        OnnxScorer(tmp_path)


def test_an_overflow_is_an_error(tmp_path: Path) -> None:
    """An adapter whose weights are finite but whose products are not."""
    model, adapter = make_tiny_model(tmp_path / "model"), make_tiny_adapter(tmp_path / "adapter", scale=1e30)
    scorer = OnnxScorer(export_onnx(open_model(model), tmp_path / "graph", adapter=adapter), num_threads=1)
    with pytest.raises(ModelOverflow, match="the logits of item 0 are not finite"):
        scorer.score([3, 4], [[5, 6]], [7, 8])


def test_a_device_that_the_runtime_lacks_is_named(tiny: dict[str, Path]) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this build has it")
    with pytest.raises(EngineUnavailable, match="`device` is `cuda`") as caught:
        OnnxScorer(tiny["graph"], device="cuda")
    assert "onnxruntime-gpu" in str(caught.value)


def test_an_export_is_all_or_nothing(tiny: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, target = open_model(tiny["model"]), tmp_path / "graph"
    with pytest.raises(AdapterError, match="is not a directory"):
        export_onnx(files, target, adapter=tmp_path / "none")
    with pytest.raises(InvalidRequest, match="`max_model_len` is 9000"):
        export_onnx(files, target, max_model_len=9000)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UmaError, match="cannot be written"):
        export_onnx(files, tmp_path / "file/graph")
    assert main(["export", str(tiny["model"]), "--onnx", str(tiny["graph"])]) == 2
    assert "is not an empty directory" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    files = open_model(tiny["model"])
    call = (
        (lambda: export_onnx(files, tmp_path / "graph")) if package == "onnx" else (lambda: OnnxScorer(tiny["graph"]))
    )
    with pytest.raises(MissingPackage, match=f"needs `{package}`") as caught:
        call()
    assert "pip install 'uma-engine[onnx]'" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_threads_are_those_of_the_environment(tiny: dict[str, Path]) -> None:
    code = (
        "import sys; from uma_engine.onnx import OnnxScorer;"
        "print(OnnxScorer(sys.argv[1])._session.get_session_options().intra_op_num_threads)"
    )
    env = os.environ | {"UMA_NUM_THREADS": "3", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny["graph"])], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "3"
