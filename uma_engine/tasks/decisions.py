"""What an engine does with its decision log: every answer is kept before it is given, and people are forgotten everywhere at once.

Knows answers, the log, and stores that can delete; does not know how any of them do it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from uma_engine.config import EngineConfig
from uma_engine.errors import InvalidRequest
from uma_engine.tasks.plan import Plan
from uma_engine.tasks.results import RankAnswer

if TYPE_CHECKING:
    from uma_engine.decision_log import DecisionLog, Forgotten
    from uma_engine.tasks.base import EngineBase

__all__ = ["ForgetsPeople", "ForgetsTexts", "close_log", "forget", "logged", "open_log"]


@runtime_checkable
class ForgetsPeople(Protocol):
    """A store that knows candidates by id, such as an index."""

    def delete(self, candidate_id: str, /) -> object:
        """Delete one. What it returns counts as how many were there, nothing as one."""
        ...


@runtime_checkable
class ForgetsTexts(Protocol):
    """A store that knows texts, such as an embedder's cache of vectors."""

    def forget(self, texts: Sequence[str], /) -> int:
        """Delete what it holds of these texts; how many that were."""
        ...


def open_log(config: EngineConfig) -> DecisionLog | None:
    """The log of the option `decision_log`. Errors as `DecisionLog`"""
    if config.decision_log is None:
        return None
    from uma_engine.decision_log import DecisionLog

    return DecisionLog(config.decision_log, content=config.decision_log_content)


def close_log(log: DecisionLog | None) -> None:
    if log is not None:
        log.close()


def logged(plan: Plan[RankAnswer], log: DecisionLog | None, tenant: str) -> Plan[RankAnswer]:
    """The plan, its answer's record kept before anybody sees the answer. Errors: EngineUnavailable where it cannot be kept"""
    answer = yield from plan
    if log is None:
        return answer
    return replace(answer, logged=log.append(answer.record, tenant=tenant))


def forget(
    engine: EngineBase,
    candidate_id: str,
    tenant: str | None,
    texts: Sequence[str],
    also: Iterable[ForgetsPeople | ForgetsTexts],
) -> Forgotten:
    """See `Engine.forget`. The log comes last: it knows the texts, which a second try would need."""
    from uma_engine.decision_log import Forgotten

    if not isinstance(candidate_id, str) or not candidate_id:
        raise InvalidRequest(f"`candidate_id` is `{candidate_id!r}` but must be a string", param="candidate_id")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequest("`texts` must be a list of strings", param="texts")
    log = engine.decision_log
    known = list(texts)
    if log is not None:
        known += log.texts_of(candidate_id, tenant=tenant)
    known = list(dict.fromkeys(form for text in known for form in (text, text.strip())))
    stores: dict[str, int] = {}
    for store in also:
        name = type(store).__name__
        if isinstance(store, ForgetsPeople):
            gone = store.delete(candidate_id)
            stores[name] = stores.get(name, 0) + (int(gone) if isinstance(gone, int) else 1)
        elif isinstance(store, ForgetsTexts):
            stores[name] = stores.get(name, 0) + store.forget(known)
        else:
            raise InvalidRequest(f"`also` holds a `{name}`, which has neither `delete` nor `forget`", param="also")
    stores["KV cache"] = engine._stack.forget_cached()
    if log is None:
        return Forgotten(None, "", (), 0, 0, (), stores)
    return replace(log.forget(candidate_id, tenant=tenant, texts=known), stores=stores)
