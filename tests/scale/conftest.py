"""Two bases, two adapters, and what one engine answers with each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.scale.running import ADAPTERS, ADMIN, QUERIES, RANK, TEXTS, Truth
from tests.tiny import make_tiny_adapter, make_tiny_model
from uma_engine import Engine


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cluster")
    for seed, name in enumerate(("one", "two")):
        make_tiny_model(root / name, seed=seed)
    for seed, name in enumerate(ADAPTERS[1:], start=1):
        make_tiny_adapter(root / "adapters" / name, seed=seed, rank=4)
    (root / "keys").write_text(f"shop rank {RANK}\noperator admin {ADMIN}\n")
    return root


@pytest.fixture(scope="session")
def truth(home: Path) -> Truth:
    found: Truth = {}
    for base in ("one", "two"):
        with Engine(home / base) as engine:
            for name in ADAPTERS[1:]:
                engine.load_adapter(name, home / "adapters" / name)
            for name in ADAPTERS:
                for query in QUERIES:
                    answer = engine.rank(query, TEXTS, adapter=name or None)
                    found[answer.stack.base_digest, name, query] = [[r.id, r.score] for r in answer.results]
    assert len({json.dumps(v) for v in found.values()}) == len(found)
    return found
