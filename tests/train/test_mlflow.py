"""A registry in MLflow: what is there is shown once, the alias follows ours, and nothing of it changes the registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny_adapter
from tests.train.test_gates import report_of
from uma_engine.cli.main import main
from uma_engine.train.gates import report_digest
from uma_engine.train.registry import AdapterHistory

mlflow = pytest.importorskip("mlflow")


def report(ours: str, theirs: str | None, by: float) -> dict[str, Any]:
    data = report_of([by] * 50, adapter_files=ours, against_files=theirs)
    return data | {"digest": report_digest(data)}


def test_a_registry_is_shown_and_shown_again(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    registry = AdapterHistory(tmp_path / "registry")
    digests = []
    for seed, name in enumerate(("alpha", "beta"), start=1):
        folder = make_tiny_adapter(tmp_path / name, seed=seed)
        (folder / "recipe.json").write_text(json.dumps({"name": name, "lora": {"rank": 4}}))
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5, "dev": 0.5}\n{"step": 2, "loss": 1.5}\n')
        digests.append(registry.add(folder))
    alpha, beta = digests
    registry.promote("match", alpha, report(alpha, None, 0.1))
    head = registry.head
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the smallest place that needs no database
    uri = (tmp_path / "mlruns").as_uri()
    told = ["mlflow", "--registry", str(tmp_path / "registry"), "--to", uri]
    assert main(told) == 0
    assert "2 runs, 1 versions, 1 aliases" in capsys.readouterr().out
    assert main(told) == 0
    assert "0 runs, 0 versions, 0 aliases" in capsys.readouterr().out
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    version = client.get_model_version_by_alias("match", "current")
    assert version.tags["uma.adapter"] == alpha
    run = client.get_run(version.run_id)
    assert run.data.params["lora.rank"] == "4"
    assert [m.value for m in client.get_metric_history(version.run_id, "loss")] == [2.5, 1.5]
    names = {f.path for f in client.list_artifacts(version.run_id, "adapter")}
    assert "adapter/adapter_model.safetensors" in names
    registry.promote("match", beta, report(beta, alpha, 0.1))
    assert main(told) == 0
    assert client.get_model_version_by_alias("match", "current").tags["uma.adapter"] == beta
    registry.rollback("match")
    registry.rollback("match")
    assert main(told) == 0
    assert "current" not in client.get_registered_model("match").aliases
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    assert main(["mlflow", "--registry", str(tmp_path / "registry"), "--to", "nonsense://x"]) == 2
    assert "MLflow" in capsys.readouterr().err
    assert head in {line["after"] for line in registry.lines()}, "the registry's own log is untouched"
