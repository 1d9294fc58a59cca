"""How many requests are served at once, and how many may wait.

Bounded on purpose: a queue that only grows turns overload into time-outs for everybody. What does
not fit is told so at once, with a guess of when to come back.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Mapping
from types import TracebackType

from cluster.gateway import errors
from cluster.topology.schema import LimitsSpec

_SMOOTHING = 0.1
_LONGEST_HINT_S = 60.0


class Admission:
    """A gate with `max_concurrent_requests` places and `max_queued_requests` seats before it."""

    def __init__(
        self, limits: LimitsSpec, note_wait_s: Callable[[float], None] = lambda _: None
    ) -> None:
        """`note_wait_s`: told of each place that is taken, how long it was waited for."""
        self._limits = limits
        self._note_wait_s = note_wait_s
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._running = 0
        self._refused: Counter[str] = Counter(full=0, waited=0)
        self._mean_s = 1.0

    @property
    def running(self) -> int:
        return self._running

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def refused(self) -> int:
        """Requests that found no room, since the beginning."""
        return self._refused.total()

    @property
    def refused_by_reason(self) -> Mapping[str, int]:
        """full: the queue was. waited: its turn did not come in time."""
        return self._refused

    def place(self) -> Place:
        return Place(self)

    def retry_after_s(self) -> float:
        """When a place should be free for one more: queue length over the rate of departures."""
        per_s = self._limits.max_concurrent_requests / max(self._mean_s, 1e-3)
        return min(max(1.0, (self.queued + 1) / per_s), _LONGEST_HINT_S)

    async def _enter(self) -> None:
        if self._running < self._limits.max_concurrent_requests:
            self._running += 1
            return
        if self.queued >= self._limits.max_queued_requests:
            self._refused["full"] += 1
            raise errors.overloaded(
                f"{self._running} requests are being served and {self.queued} are waiting; "
                "this endpoint takes no more now.",
                self.retry_after_s(),
            )
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(self._limits.queue_timeout_s):
                await waiter
        except BaseException as error:
            has_place = waiter.done() and not waiter.cancelled()
            if not has_place:
                self._waiting.remove(waiter)
            elif not isinstance(error, TimeoutError):
                self._hand_on()
            else:
                return  # the place came in the very turn in which the time ran out: take it
            if isinstance(error, TimeoutError):
                self._refused["waited"] += 1
                raise errors.overloaded(
                    f"The request waited {self._limits.queue_timeout_s:g} s for its turn.",
                    self.retry_after_s(),
                ) from None
            raise

    def _leave(self, took_s: float) -> None:
        self._mean_s += _SMOOTHING * (took_s - self._mean_s)
        self._hand_on()

    def _hand_on(self) -> None:
        """Give the place to the first in the queue, or free it."""
        if self._waiting:
            self._waiting.popleft().set_result(None)
        else:
            self._running -= 1


class Place:
    """`async with admission.place():` Raises: ApiError 429. Cancel: safe, the place goes on."""

    __slots__ = ("_admission", "_since_s")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def __aenter__(self) -> None:
        clock = asyncio.get_running_loop().time
        asked_s = clock()
        await self._admission._enter()
        self._since_s = clock()
        self._admission._note_wait_s(self._since_s - asked_s)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._admission._leave(asyncio.get_running_loop().time() - self._since_s)
