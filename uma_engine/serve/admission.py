"""Who goes next: fair shares between tenants, and what is refused at the door.

Knows tenants, costs in tokens and how fast work drains; does not know requests or engines. The shares are those of the virtual token
counter (Sheng et al. 2024, arXiv 2401.00588): of the tenants who wait, the one who has been served the least goes next; one who comes back
after a pause is lifted to the least of the others, so that silence earns nothing. Between two tenants who both wait all the time, what was
served differs by at most twice the largest cost, and by what estimates were wrong for requests that run.

Two classes: interactive requests go before those of batches, whose work never fills more than `BATCH_SHARE` of what may be inside, so that
who comes next finds room; a batch request that has waited `AGEING_S` counts as interactive, so none waits for ever.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from uma_engine.errors import DeadlineExceeded, Overloaded

__all__ = ["Admission", "Ticket"]

LONGEST_RETRY_S = 600.0
HALF_LIFE_S = 10.0  # of what is known about the rate
AGEING_S = 15.0
BATCH_SHARE = 0.5
Queues = dict[str, deque["Ticket"]]  # of tenants who wait


@dataclass(eq=False)
class Ticket:
    """One request inside, or waiting to be. `used` counts what it has really cost; `release` may be called again."""

    tenant: str
    cost: float  # tokens: an estimate until the request ends
    admission: Admission
    batch: bool
    since: float  # when it came
    granted: asyncio.Future[None] | None = None
    waited: float = 0.0  # seconds
    actual: float | None = None
    inside: bool = False

    def used(self, tokens: int) -> None:
        self.actual = (self.actual or 0.0) + tokens

    def release(self) -> None:
        if self.inside:
            self.inside = False
            self.admission._left(self)


class Admission:
    """A door to an engine. All methods belong to one event loop."""

    def __init__(self, capacity: float, max_waiting: int, clock: Callable[[], float] = time.monotonic) -> None:
        """capacity: tokens that may be inside together; one request always may. max_waiting: requests of one tenant"""
        self.capacity, self.max_waiting = capacity, max_waiting
        self._clock = clock
        self._lanes: tuple[Queues, Queues] = ({}, {})  # interactive, batch
        self._served: dict[str, float] = {}  # virtual tokens of each tenant
        self._floor = 0.0  # virtual tokens of who went last: whoever comes when nobody waits begins there
        self._inside = 0
        self._inside_cost = 0.0
        self._drained, self._busy = 0.0, 0.0  # estimated tokens, and seconds, both fading
        self._busy_since: float | None = None
        self.refused = 0

    # ---- what metrics show ----

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for lane in self._lanes for queue in lane.values())

    @property
    def num_inside(self) -> int:
        return self._inside

    @property
    def lag(self) -> float:
        """Virtual tokens between the most and the least served of those with interactive requests that wait."""
        found = [self._served[tenant] for tenant in self._lanes[False]]
        return max(found) - min(found) if found else 0.0

    def rate(self) -> float | None:
        """Tokens that drain in a second while there is work; None before the first request has ended."""
        busy = self._busy + (0.0 if self._busy_since is None else self._clock() - self._busy_since)
        return self._drained / busy if self._drained > 0 and busy > 0 else None

    # ---- the door ----

    async def enter(self, tenant: str, cost: float, timeout: float, batch: bool = False) -> Ticket:
        """Wait for a place, `timeout` seconds at most.

        Errors:  Overloaded at once, with the seconds after which it is worth another try: too many of this tenant wait, or what is
                 ahead of it would take longer than `timeout`; DeadlineExceeded
        """
        ticket = Ticket(tenant, max(1.0, cost), self, batch, self._clock())
        lane = self._lanes[batch]
        queue = lane.get(tenant)
        ahead = self._seconds(tenant, batch)
        waiting = sum(len(queues.get(tenant, ())) for queues in self._lanes)
        if waiting >= self.max_waiting:
            self.refused += 1
            raise Overloaded(
                f"{waiting} requests of this key wait, and {self.max_waiting} may",
                hint="try again after the seconds of `Retry-After`",
                retry_after=ahead if ahead is not None else 1.0,
            )
        if ahead is not None and ahead > timeout and (self._inside or queue):
            self.refused += 1
            raise Overloaded(
                f"what is ahead takes about {ahead:.0f} s, which is more than the {timeout:g} s that this request has",
                hint="try again after the seconds of `Retry-After`",
                retry_after=min(LONGEST_RETRY_S, ahead - timeout),
            )
        if queue is None:
            queue = lane[tenant] = deque()
            if not any(tenant in queues for queues in self._lanes if queues is not lane):
                others = {t for queues in self._lanes for t in queues} - {tenant}
                least = min((self._served[t] for t in others), default=self._floor)
                self._served[tenant] = max(self._served.get(tenant, 0.0), least)
        queue.append(ticket)
        self._pump()
        if not ticket.inside:
            ticket.granted = asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout(timeout):
                    await ticket.granted
            except TimeoutError:
                self._give_up(ticket)
                raise DeadlineExceeded(
                    f"no place was free within {timeout:g} s", hint="raise `deadline`, or ask later"
                ) from None
            except BaseException:
                self._give_up(ticket)
                raise
        ticket.waited = self._clock() - ticket.since
        return ticket

    def _seconds(self, tenant: str, batch: bool) -> float | None:
        """How long what is ahead of a new request of this tenant takes; None while the rate is not known."""
        rate = self.rate()
        if rate is None:
            return None
        lanes = self._lanes if batch else self._lanes[:1]
        own = sum(t.cost for lane in lanes for t in lane.get(tenant, ()))
        others = sum(
            min(own or 1.0, sum(t.cost for t in queue)) for lane in lanes for t, queue in lane.items() if t != tenant
        )
        return min(LONGEST_RETRY_S, (self._inside_cost + own + others) / rate)

    def _pump(self) -> None:
        """Let in who may go. Who is next and does not fit is waited for: a large request is never passed over for ever."""
        while (ticket := self._next()) is not None:
            share = BATCH_SHARE if ticket.batch and not self._aged(ticket) else 1.0
            if self._inside and self._inside_cost + ticket.cost > share * self.capacity:
                return
            tenant = ticket.tenant
            self._drop(ticket)
            self._floor = max(self._floor, self._served[tenant])
            self._served[tenant] += ticket.cost
            if not self._inside:
                self._busy_since = self._clock()
            self._inside += 1
            self._inside_cost += ticket.cost
            ticket.inside = True
            if ticket.granted is not None and not ticket.granted.done():
                ticket.granted.set_result(None)

    def _next(self) -> Ticket | None:
        """Of the least served tenant: an interactive request or a batch's that has aged, else a batch's."""
        heads = [queue[0] for lane in self._lanes for queue in lane.values()]
        urgent = [t for t in heads if not t.batch or self._aged(t)]
        return min(urgent or heads, key=lambda t: (self._served[t.tenant], t.tenant, t.since), default=None)

    def _aged(self, ticket: Ticket) -> bool:
        return self._clock() - ticket.since >= AGEING_S

    def _drop(self, ticket: Ticket) -> None:
        lane = self._lanes[ticket.batch]
        queue = lane[ticket.tenant]
        queue.remove(ticket)
        if not queue:
            del lane[ticket.tenant]

    def _give_up(self, ticket: Ticket) -> None:
        if ticket.inside:
            ticket.actual = 0.0
            ticket.release()
        elif ticket in self._lanes[ticket.batch].get(ticket.tenant, ()):
            self._drop(ticket)
            self._pump()

    def _left(self, ticket: Ticket) -> None:
        self._inside -= 1
        self._inside_cost = self._inside_cost - ticket.cost if self._inside else 0.0
        cost = ticket.cost if ticket.actual is None else ticket.actual
        self._served[ticket.tenant] += cost - ticket.cost
        now = self._clock()
        if self._busy_since is not None:
            spent = now - self._busy_since
            fade = 0.5 ** (spent / HALF_LIFE_S)
            # By estimates, as what is ahead is: a cached prompt costs nothing and would make the rate look low.
            self._drained, self._busy = self._drained * fade + ticket.cost, self._busy * fade + spent
            self._busy_since = now if self._inside else None
        self._pump()
