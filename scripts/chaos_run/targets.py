"""Whom a fault may hit, and what is waited for until then.

Status is asked of the controller; a controller that is away is waited for.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from chaos_run.home import Home
from chaos_run.schedule import Kind, Planned
from cluster.control.state import ClusterStatus
from cluster.identity import Role, WorkerState
from cluster.workers.report import WorkerReport

LOOK_EVERY_S = 0.25
# For what is waited for besides a new engine.
_MORE_S = 30.0
# A gateway learns of a worker with the snapshot after the one that made it ready.
_KNOWN_AFTER_S = 1.0
_OF_ROLE = {
    Kind.KILL_PREFILL: Role.PREFILL,
    Kind.KILL_DECODE: Role.DECODE,
    Kind.CRASH: Role.DECODE,
    Kind.RECOMPUTE: Role.DECODE,
}


class NotRecovered(Exception):
    """The cluster did not come back to where another fault may hit it."""


@dataclass
class Targets:
    """`hurt`: workers (POOL/INDEX#GENERATION) to which something is being done.

    Everything here raises NotRecovered if what is waited for does not come."""

    home: Home
    back_within_s: float  # until a new engine must be ready
    hurt: set[str] = field(default_factory=set)
    _ready_since_s: dict[str, float] = field(default_factory=dict)

    async def status(self) -> ClusterStatus:
        async with self.bound("the controller"):
            while True:
                status = await asyncio.to_thread(self.home.status)
                if status is not None:
                    break
                await asyncio.sleep(LOOK_EVERY_S)
        now_s = time.monotonic()
        ready = {str(r.id) for r in status.workers if r.state is WorkerState.READY}
        self._ready_since_s = {name: self._ready_since_s.get(name, now_s) for name in ready}
        return status

    async def usable(self) -> list[WorkerReport]:
        """Workers that take requests, as gateways know by now."""
        status = await self.status()
        now_s = time.monotonic()
        return [
            report
            for report in status.workers
            if str(report.id) not in self.hurt
            and now_s - self._ready_since_s.get(str(report.id), now_s) >= _KNOWN_AFTER_S
        ]

    async def one(self, planned: Planned) -> WorkerReport:
        """Whom the fault hits, once there is one whose loss leaves another of its role."""
        role = _OF_ROLE.get(planned.kind)
        found: list[WorkerReport] = []

        async def is_there() -> bool:
            usable = await self.usable()
            found[:] = [
                report
                for report in usable
                if role in (None, report.role) and sum(r.role is report.role for r in usable) > 1
            ]
            return bool(found)

        await self.until(is_there, planned.kind)
        return planned.choose(found)

    async def until(
        self, is_so: Callable[[], bool] | Callable[[], Awaitable[bool]], what: str
    ) -> None:
        async with self.bound(what):
            while True:
                answer = is_so()
                if answer if isinstance(answer, bool) else await answer:
                    return
                await asyncio.sleep(LOOK_EVERY_S)

    @contextlib.asynccontextmanager
    async def bound(self, what: str) -> AsyncIterator[None]:
        within_s = self.back_within_s + _MORE_S
        try:
            async with asyncio.timeout(within_s):
                yield
        except TimeoutError as error:
            raise NotRecovered(f"{what}: not possible within {within_s:g} s") from error
