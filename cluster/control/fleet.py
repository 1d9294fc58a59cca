"""What the controller knows of one worker, and how it learns more.

A worker whose actor is dead is gone. One that merely does not answer is not: it keeps its last
report, and counts as hung only after the pool's `hung_after_s`. Called by: control.crew.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import Protocol

from cluster.control.clock import Clock
from cluster.control.events import Event, WorkerMoved, WorkerUnanswering
from cluster.control.reconcile import Observed
from cluster.identity import ENDED, Role, WorkerId, WorkerState
from cluster.workers.handle import WorkerHandle
from cluster.workers.nodes import RayNode
from cluster.workers.report import WorkerReport
from cluster.workers.spec import WorkerSpec


class Workers(Protocol):
    """Where workers are made and found. workers.handle on Ray; a fake in tests."""

    async def spawn(self, spec: WorkerSpec) -> WorkerHandle: ...

    async def find(self, cluster: str, worker: WorkerId) -> WorkerHandle | None: ...

    async def find_all(self, cluster: str) -> list[WorkerId]: ...

    async def remove(self, cluster: str, worker: WorkerId) -> None: ...

    async def nodes(self) -> tuple[RayNode, ...]: ...


@dataclass(slots=True)
class Tracked:
    """One worker generation. Written by the controller's own task only."""

    id: WorkerId
    report: WorkerReport
    clock: Clock
    handle: WorkerHandle | None = None
    spawning: asyncio.Task[None] | None = None
    asking: asyncio.Task[WorkerReport] | None = None
    is_draining: bool = False
    is_removing: bool = False
    is_gone: bool = False
    # What it serves as. The report tells what its engine was started for.
    role: Role = Role.MIXED
    epoch: int = 0
    is_changing: bool = False
    lets_go: bool = False
    ready_since_s: float | None = None
    started_at_s: float = field(init=False)
    heard_at_s: float = field(init=False)
    is_silent: bool = False
    # Nodes that it was not to go to, as it was told at its start; None: another controller did.
    avoided: frozenset[str] | None = None

    def __post_init__(self) -> None:
        self.started_at_s = self.heard_at_s = self.clock.now_s()

    @classmethod
    def starting(cls, worker: WorkerId, role: Role, revision: str, clock: Clock) -> Tracked:
        report = WorkerReport(
            id=worker,
            role=role,
            state=WorkerState.STARTING,
            message="",
            node_ip="",
            url="",
            started_at_s=clock.wall_s(),
            revision=revision,
        )
        return cls(worker, report, clock, role=role)

    @classmethod
    def adopted(cls, handle: WorkerHandle, role: Role, clock: Clock) -> Tracked:
        """A worker that another controller started: its first report tells its revision."""
        tracked = cls.starting(handle.id, role, "", clock)
        tracked.handle = handle
        return tracked

    def serve_as(self, role: Role, epoch: int) -> None:
        """A change of role is complete."""
        self.role, self.epoch = role, epoch
        self.is_changing = self.lets_go = False

    def ask(self) -> None:
        """Send one question, unless one is under way."""
        if self.asking is None and self.handle is not None and not self.is_removing:
            self.asking = asyncio.create_task(self.handle.report(), name=f"report {self.id}")

    async def take(self, workers: Workers, cluster: str, hung_after_s: float) -> list[Event]:
        """Take in the answer, if there is one; what is new about the worker."""
        before = self.shown().state
        events: list[Event] = []
        if self.asking is not None and self.asking.done():
            answer, self.asking = self.asking, None
            try:
                report = answer.result()
                # Before its actor answers it is the handle that reports, and knows no revision.
                self.report = replace(report, revision=report.revision or self.report.revision)
                self.heard_at_s = self.clock.now_s()
                self.is_silent = False
            except Exception as error:
                events += await self._unanswered(workers, cluster, str(error), hung_after_s)
        now = self.shown()
        if now.state is WorkerState.READY and self.ready_since_s is None:
            self.ready_since_s = self.clock.now_s()
        if now.state is not before:
            events.append(WorkerMoved(self.id, before, now.state, now.message))
        return events

    async def _unanswered(
        self, workers: Workers, cluster: str, why: str, hung_after_s: float
    ) -> list[Event]:
        handle = await workers.find(cluster, self.id)
        if handle is None:
            # `find` has looked at Ray's own record of the actor: it is dead.
            self.is_gone = True
            self.report = replace(self.report, message=why)
            return []
        silent_s = self.clock.now_s() - self.heard_at_s
        if silent_s > hung_after_s:
            why = f"its actor has not answered for {silent_s:.0f} s"
            self.report = replace(self.report, state=WorkerState.HUNG, message=why)
        if self.is_silent:
            return []
        self.is_silent = True
        return [WorkerUnanswering(self.id, why)]

    def failed(self, why: str) -> None:
        self.report = replace(self.report, state=WorkerState.FAILED, message=why)

    def stopped(self) -> None:
        self.report = replace(self.report, state=WorkerState.STOPPED, message="")
        self.handle = None
        if self.asking is not None:
            # Or a report that was on its way would say that it still drains, for ever.
            self.asking.cancel()
            self.asking = None

    def shown(self) -> WorkerReport:
        """The last report, corrected by what the controller has decided and done since."""
        state = self.report.state
        if self.is_gone and state not in ENDED:
            state = WorkerState.FAILED
        elif self.is_draining and state not in (*ENDED, WorkerState.DRAINING):
            state = WorkerState.DRAINING
        elif self.is_changing and state is WorkerState.READY:
            state = WorkerState.CHANGING
        return replace(
            self.report,
            state=state,
            role=self.role,
            epoch=self.epoch,
            lets_go=self.lets_go or state is WorkerState.HUNG,
        )

    @property
    def is_unplaced(self) -> bool:
        return not self.report.node_ip and self.report.state is WorkerState.STARTING

    def observed(self, now_s: float) -> Observed:
        """As reconcile wants it; what speaks against the worker is for the caller to add."""
        return Observed(
            id=self.id,
            state=WorkerState.DRAINING if self.is_draining and self.is_gone else self.shown().state,
            ready_for_s=now_s - self.ready_since_s if self.ready_since_s is not None else 0.0,
            is_gone=self.is_gone,
            message=self.report.message,
            unplaced_for_s=now_s - self.started_at_s if self.is_unplaced else 0.0,
        )
