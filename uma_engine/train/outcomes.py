"""What happened after a ranking: events become judged jobs, without what somebody may have planted.

Knows events, grades and who reported them; does not know models. An event is a line of JSON:

    {"id": "e1", "time": 1700000000.0, "client": "acme", "job": "j7", "candidate": "c3", "kind": "hired"}

Events may come late, twice and in any order. A candidate's grade in a job is that of the furthest thing that happened to them there; a
dispute takes it back. What a client reports is left out where it looks planted: see `planted`.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from uma_engine.errors import InvalidRequest
from uma_engine.train.groups import Group, Judged, numbered_lines

__all__ = ["GRADES", "Event", "judged_jobs", "planted", "read_events"]

GRADES = {"viewed": 0, "invited": 1, "replied": 2, "hired": 3, "disputed": 0}
MOST_SHARE = 0.1  # of all jobs with an outcome that one client may decide
FAVOUR = 4.0  # standard deviations above what chance gives a candidate from one client
LEAST_JOBS = 5  # of a client, before what they do can be told from chance


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened."""

    id: str
    time: float
    client: str
    job: str
    candidate: str
    kind: str


def read_events(path: str | Path) -> list[Event]:
    """Events of a JSONL file: each once, in the order in which they happened. Errors: InvalidRequest naming the line"""
    found: dict[str, Event] = {}
    for number, line in numbered_lines(path, "events"):
        try:
            data = json.loads(line)
            event = Event(**{name: data[name] for name in Event.__slots__})
            good = (
                event.kind in GRADES
                and isinstance(event.time, int | float)
                and math.isfinite(event.time)
                and all(isinstance(v, str) and v for v in (event.id, event.client, event.job, event.candidate))
            )
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise InvalidRequest(
                f"`{path}`, line {number} is no event", hint=f"`kind` is one of {', '.join(GRADES)}", param="events"
            )
        known = found.get(event.id)
        if known is not None and known != event:
            raise InvalidRequest(
                f"`{path}`, line {number}: event `{event.id}` was there before and differs", param="events"
            )
        found[event.id] = event
    return sorted(found.values(), key=lambda e: (e.time, e.id))


def judged_jobs(
    events: Iterable[Event], shown: Mapping[str, tuple[str, Mapping[str, str]]], leave_out: Iterable[str] = ()
) -> list[Group]:
    """Jobs with grades. `shown`: of each job its text and the texts of who was ranked, by id; `leave_out`: clients. Jobs in which nobody
    got further than being seen teach nothing and are left out."""
    without = set(leave_out)
    happened: dict[str, dict[str, int]] = defaultdict(dict)
    disputed: set[tuple[str, str]] = set()
    for event in events:
        if event.client in without or event.job not in shown or event.candidate not in shown[event.job][1]:
            continue
        grades = happened[event.job]
        if event.kind == "disputed":
            disputed.add((event.job, event.candidate))
        grades[event.candidate] = max(grades.get(event.candidate, 0), GRADES[event.kind])
    groups = []
    for job in sorted(happened):
        text, people = shown[job]
        grades = {c: 0 if (job, c) in disputed else g for c, g in happened[job].items()}
        if any(grades.values()) and len(people) > 1:
            judged = tuple(Judged(c, people[c], grades.get(c, 0)) for c in people)
            groups.append(Group(job, text, judged))
    return groups


def planted(events: Sequence[Event], expected: Mapping[tuple[str, str], float] | None = None) -> dict[str, str]:
    """Clients whose events are left out, each with the reason.

    A client is left out who decides more than `MOST_SHARE` of all jobs with an outcome; who hires the same candidate more often than chance
    could by `FAVOUR` standard deviations; or whose hires lie as far below those of the other clients on `expected`, by (job, candidate) the
    place from 0 (last) to 1 (first) that the current ranking gave.
    """
    hires = [e for e in events if e.kind == "hired"]
    jobs_of: dict[str, set[str]] = defaultdict(set)
    for e in hires:
        jobs_of[e.client].add(e.job)
    total = len({e.job for e in hires})
    found: dict[str, str] = {}
    for client, jobs in sorted(jobs_of.items()):
        if len(jobs) < LEAST_JOBS:
            continue
        if len(jobs_of) > 1 / MOST_SHARE and len(jobs) > MOST_SHARE * total:
            found[client] = f"decides {len(jobs)} of {total} jobs"
            continue
        count = Counter(e.candidate for e in hires if e.client == client)
        name, most = count.most_common(1)[0]
        others = [e for e in hires if e.client != client]
        share = max(1.0, sum(e.candidate == name for e in others)) / max(1, len(others))
        chance, n = min(0.5, share), sum(count.values())
        if most >= LEAST_JOBS and most > n * chance + FAVOUR * math.sqrt(n * chance * (1 - chance)):
            found[client] = f"hired `{name}` {most} of {n} times"
    if expected:
        places: dict[str, list[float]] = defaultdict(list)
        for e in hires:
            if (e.job, e.candidate) in expected:
                places[e.client].append(expected[e.job, e.candidate])
        everybody = [p for values in places.values() for p in values]
        if len(everybody) > LEAST_JOBS:
            mean = sum(everybody) / len(everybody)
            spread = math.sqrt(sum((p - mean) ** 2 for p in everybody) / len(everybody)) or 1e-9
            for client, values in sorted(places.items()):
                z = (sum(values) / len(values) - mean) / (spread / math.sqrt(len(values)))
                if len(values) >= LEAST_JOBS and z < -FAVOUR and client not in found:
                    found[client] = f"hires whom the ranking puts last, {-z:.1f} standard deviations from the others"
    return found
