"""Look at all hosts at once: one conversation each, first facts, then whom they reach.

    Survey ─▶ facts, clock (each host by itself) ─▶ listen (all) ─▶ connect (all) ─▶ Examination

Conversations stay open until all is known, because a host's listener lives in its probe. A host
that fails at any point is named with the reason and the others go on. Called by: cli.doctor.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.errors import ClusterError
from cluster.nodes.doctor.expect import HostPlan, Survey
from cluster.nodes.doctor.facts import Clock, Facts
from cluster.nodes.doctor.session import ProbeFailed, Session, begin
from cluster.nodes.ssh import Unreachable
from cluster.workers.ports import DEFAULT_WINDOW, window_outside

# sshd lets ten in that have not logged in yet (MaxStartups), and a jump host is one sshd for all.
_LOGGING_IN_AT_ONCE = 10


@dataclass(frozen=True, slots=True)
class Reached:
    """One attempt to connect. `why` "": it went well."""

    source: str
    target: str
    port: int
    why: str


@dataclass(frozen=True, slots=True)
class Examination:
    """What was seen. A host is in `facts` or in `failed`, with the reason."""

    facts: Mapping[str, Facts] = field(default_factory=dict)
    clocks: Mapping[str, Clock] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    reached: tuple[Reached, ...] = ()
    # Hosts on which the address in the file could not be bound, and why.
    unbound: Mapping[str, str] = field(default_factory=dict)


Told = Callable[[str, str], None]
Step = Callable[[HostPlan], Awaitable[None]]


async def examine(survey: Survey, host_bound_s: float, tell: Told) -> Examination:
    """Blocks for as long as the slowest host, at most about twice `host_bound_s`.

    `tell(address, news)` is called at every step of every host.
    Raises: ClusterError: ssh is not installed here.
    Cancel: safe; every conversation ends, and with it what runs on the hosts."""
    return await _Round(survey, host_bound_s, tell).run()


class _Round:
    """One examination under way."""

    def __init__(self, survey: Survey, host_bound_s: float, tell: Told) -> None:
        self._survey = survey
        self._bound_s = host_bound_s
        self._tell = tell
        self._sessions: dict[str, Session] = {}
        self._facts: dict[str, Facts] = {}
        self._clocks: dict[str, Clock] = {}
        self._failed: dict[str, str] = {}
        self._listeners: dict[str, dict[str, Any]] = {}
        self._unbound: dict[str, str] = {}
        self._reached: list[Reached] = []
        self._door = asyncio.Semaphore(_LOGGING_IN_AT_ONCE)

    async def run(self) -> Examination:
        plans = {plan.address: plan for plan in self._survey.hosts}
        if any(plan.access for plan in plans.values()) and shutil.which("ssh") is None:
            raise ClusterError("ssh is not installed on this machine; install it")
        try:
            await self._for_each(plans, self._look)
            listening = {target for _, target in self._survey.pairs}
            await self._for_each(self._open(plans, listening), self._listen)
            await self._for_each(self._open(plans, set(plans)), self._connect)
        finally:
            await asyncio.gather(*(session.end() for session in self._sessions.values()))
        return Examination(
            self._facts,
            self._clocks,
            self._failed,
            tuple(sorted(self._reached, key=lambda one: (one.source, one.target))),
            self._unbound,
        )

    def _open(self, plans: Mapping[str, HostPlan], among: set[str]) -> dict[str, HostPlan]:
        return {name: plans[name] for name in plans if name in among and name in self._facts}

    async def _for_each(self, plans: Mapping[str, HostPlan], step: Step) -> None:
        async with asyncio.TaskGroup() as group:
            for address, plan in plans.items():
                group.create_task(self._step(plan, step), name=f"doctor {address}")

    async def _step(self, plan: HostPlan, step: Step) -> None:
        """One step with one host; what goes wrong there is the host's, not the round's."""
        try:
            async with asyncio.timeout(self._bound_s):
                await step(plan)
        except TimeoutError:
            self._fail(plan.address, f"no answer within {self._bound_s:g} s")
        except Unreachable as error:
            self._fail(plan.address, error.why)
        except ProbeFailed as error:
            self._fail(plan.address, str(error))

    def _fail(self, address: str, why: str) -> None:
        self._facts.pop(address, None)
        self._failed[address] = why
        self._tell(address, f"failed: {why}")

    async def _look(self, plan: HostPlan) -> None:
        async with self._door:
            session = self._sessions[plan.address] = await begin(plan)
            await session.greeted()
        self._tell(plan.address, "reached")
        self._clocks[plan.address] = await session.clock()
        self._facts[plan.address] = Facts.of(await session.ask("facts", about=asked_of(plan)))
        self._tell(plan.address, "looked at")

    async def _listen(self, plan: HostPlan) -> None:
        ephemeral = self._facts[plan.address].ephemeral
        window = DEFAULT_WINDOW
        if ephemeral is not None:
            window = window_outside(range(ephemeral[0], ephemeral[1] + 1))
        try:
            found = await self._sessions[plan.address].ask(
                "listen", address=plan.address, low=window.start, high=window.stop
            )
        except ProbeFailed as error:
            self._unbound[plan.address] = str(error)
        else:
            self._listeners[plan.address] = {"address": plan.address, **found}

    async def _connect(self, plan: HostPlan) -> None:
        mine = [target for source, target in self._survey.pairs if source == plan.address]
        targets = [self._listeners[target] for target in mine if target in self._listeners]
        if not targets:
            return
        results = await self._sessions[plan.address].ask("connect", targets=targets)
        self._reached += [
            Reached(plan.address, target["address"], target["port"], results[target["address"]])
            for target in targets
        ]
        self._tell(plan.address, "connected to the others")


def asked_of(plan: HostPlan) -> dict[str, Any]:
    """The question that the probe's `facts` answers."""
    container = plan.container
    return {
        "interpreters": [need.python for need in plan.needs.packages if need.python],
        "commands": plan.commands,
        "libraries": list(plan.needs.libraries),
        "accelerators": plan.needs.accelerators,
        "ports": [asdict(port) for port in plan.ports],
        "models": [asdict(need) for need in plan.models],
        "container": None
        if container is None
        else {"command": container.command, "name": container.name, "image": container.image},
    }
