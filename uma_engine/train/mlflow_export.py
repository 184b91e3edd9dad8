"""A registry's content for MLflow: a run for each adapter, a registered model for each surface, its alias `current` where ours is.

Knows MLflow's client (extra `mlflow`); does not decide anything: the registry stays where promotions are made, MLflow shows them. Exporting
again adds what is new.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from uma_engine.errors import InvalidRequest, MissingPackage
from uma_engine.train.registry import AdapterHistory

__all__ = ["export"]

DIGEST = "uma.adapter"
LONGEST_PARAM = 500
ALIAS = "current"


def export(
    history: AdapterHistory, tracking_uri: str, experiment: str = "uma-engine", say: Callable[[str], object] = print
) -> dict[str, int]:
    """Bring MLflow up to date; how many runs and versions are new, and how many aliases were moved.

    Errors:  MissingPackage without the extra `mlflow`; InvalidRequest with MLflow's own words; CorruptFile for a registry that was
             tampered with
    """
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise MissingPackage(
            f"`{error.name}` is not installed", hint="install it with `pip install 'uma-engine[mlflow]'`"
        ) from None
    try:
        client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        return _exported(client, history, experiment, say)
    except MlflowException as error:
        raise InvalidRequest(f"MLflow at `{tracking_uri}`: {error.message}", param="to") from None


def _exported(client: Any, history: AdapterHistory, experiment: str, say: Callable[[str], object]) -> dict[str, int]:
    found = client.get_experiment_by_name(experiment)
    experiment_id = client.create_experiment(experiment) if found is None else found.experiment_id
    lines = list(history.lines())
    judged: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["event"] == "judged":
            judged.setdefault(line["adapter"], []).append(line)
    counts = {"runs": 0, "versions": 0, "aliases": 0}
    runs: dict[str, str] = {}
    for line in lines:
        if line["event"] != "added":
            continue
        digest = line["adapter"]
        known = client.search_runs([experiment_id], f"tags.`{DIGEST}` = '{digest}'", max_results=1)
        if known:
            runs[digest] = known[0].info.run_id
            continue
        runs[digest] = _run(client, experiment_id, history.directory(digest), digest, judged.get(digest, []))
        counts["runs"] += 1
        say(f"run {runs[digest]}: adapter {digest[:12]}")
    surfaces = {entry["surface"] for entries in judged.values() for entry in entries}
    for surface in sorted(surfaces):
        versions = _versions(client, surface)
        for digest, entries in judged.items():
            if digest in versions or all(e["surface"] != surface for e in entries):
                continue
            source = f"runs:/{runs[digest]}/adapter"
            made = client.create_model_version(surface, source, runs[digest], tags={DIGEST: digest})
            versions[digest] = str(made.version)
            counts["versions"] += 1
        counts["aliases"] += _alias(client, surface, versions, history.aliases().get(surface))
    return counts


def _run(client: Any, experiment: str, directory: Path, digest: str, judged: list[dict[str, Any]]) -> str:
    run = client.create_run(experiment, run_name=digest[:12], tags={DIGEST: digest})
    run_id = str(run.info.run_id)
    for name, value in _flat(_read(directory / "recipe.json")).items():
        client.log_param(run_id, name, str(value)[:LONGEST_PARAM])
    card = _read(directory / "data_card.json")
    for name in ("base", "base_digest", "consent"):
        if name in card:
            client.set_tag(run_id, f"uma.{name}", card[name])
    metrics = directory / "metrics.jsonl"
    if metrics.exists():
        for entry in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()):
            for name in ("loss", "dev"):
                if isinstance(entry.get(name), int | float):
                    client.log_metric(run_id, name, float(entry[name]), step=int(entry["step"]))
    client.log_artifacts(run_id, str(directory), "adapter")
    for number, entry in enumerate(judged):
        client.log_dict(run_id, entry["report"], f"reports/{entry['surface']}-{number}-{entry['decision']}.json")
    client.set_terminated(run_id)
    return run_id


def _versions(client: Any, surface: str) -> dict[str, str]:
    """Versions of a registered model, which is made if need be, by the adapter's digest."""
    if not any(m.name == surface for m in client.search_registered_models(f"name = '{surface}'")):
        client.create_registered_model(surface)
    return {
        v.tags[DIGEST]: str(v.version) for v in client.search_model_versions(f"name = '{surface}'") if DIGEST in v.tags
    }


def _alias(client: Any, surface: str, versions: Mapping[str, str], current: str | None) -> bool:
    """Point the alias to what the surface uses; whether it was moved."""
    now = str(client.get_registered_model(surface).aliases.get(ALIAS, "")) or None
    wanted = None if current is None else versions[current]
    if now == wanted:
        return False
    if wanted is None:
        client.delete_registered_model_alias(surface, ALIAS)
    else:
        client.set_registered_model_alias(surface, ALIAS, wanted)
    return True


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
