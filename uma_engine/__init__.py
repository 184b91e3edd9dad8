"""Uma Engine: inference and ranking for talent marketplaces.

The public names, and nothing else. Importing this is quick: torch is imported when an engine is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from uma_engine._version import __version__
from uma_engine.config import EngineConfig
from uma_engine.core import Candidate, FinishReason, SamplingParams, background
from uma_engine.errors import UmaError

if TYPE_CHECKING:
    from uma_engine.ranking.assessment import Assessment
    from uma_engine.ranking.factors import Fact
    from uma_engine.ranking.surface import Read, Surface
    from uma_engine.tasks.api import AsyncEngine, Engine
    from uma_engine.tasks.results import (
        Completion,
        CompletionChunk,
        RankAnswer,
        RankResult,
        Score,
        SurfaceAnswer,
        SurfaceResult,
        Usage,
    )
    from uma_engine.tasks.shortlist import RankEvent

__all__ = [
    "Assessment",
    "AsyncEngine",
    "Candidate",
    "Completion",
    "CompletionChunk",
    "Engine",
    "EngineConfig",
    "Fact",
    "FinishReason",
    "RankAnswer",
    "RankEvent",
    "RankResult",
    "Read",
    "SamplingParams",
    "Score",
    "Surface",
    "SurfaceAnswer",
    "SurfaceResult",
    "UmaError",
    "Usage",
    "__version__",
    "background",
]

_LAZY = {
    "Assessment": "uma_engine.ranking.assessment",
    "RankEvent": "uma_engine.tasks.shortlist",
    "AsyncEngine": "uma_engine.tasks.api",
    "Engine": "uma_engine.tasks.api",
    "Completion": "uma_engine.tasks.results",
    "CompletionChunk": "uma_engine.tasks.results",
    "RankAnswer": "uma_engine.tasks.results",
    "RankResult": "uma_engine.tasks.results",
    "Fact": "uma_engine.ranking.factors",
    "Read": "uma_engine.ranking.surface",
    "Score": "uma_engine.tasks.results",
    "Surface": "uma_engine.ranking.surface",
    "SurfaceAnswer": "uma_engine.tasks.results",
    "SurfaceResult": "uma_engine.tasks.results",
    "Usage": "uma_engine.tasks.results",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module `uma_engine` has no attribute `{name}`")
