"""A controller that only notes what is asked of it; its changes go on as the test says."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from cluster.control.changes import (
    Apply,
    Change,
    ChangeRole,
    ChangeState,
    DrainNode,
    DrainWorker,
    Plan,
    ReturnNode,
    Scale,
)
from cluster.control.events import DesiredChanged, Recorded
from cluster.control.state import ClusterStatus, FailedSlot, LogWindow, PoolStatus
from cluster.errors import InvalidInput
from cluster.identity import Role, WorkerId, WorkerState
from cluster.topology import loader
from cluster.workers.report import WorkerReport

ROOT = Path(__file__).parents[1]
TOPOLOGY = ROOT / "topologies/local-simulated.yaml"
SERVING = loader.load(TOPOLOGY).serving
STATUS = ClusterStatus(
    cluster="local-simulated",
    model="m",
    version=7,
    controller_started_at_s=120.0,
    pools=(
        PoolStatus("prefill", Role.PREFILL, "simulated", desired=1, present=1, ready=1),
        PoolStatus("decode", Role.DECODE, "simulated", desired=2, present=1, ready=1),
    ),
    workers=(
        WorkerReport(
            id=WorkerId("decode", 0, 2),
            role=Role.DECODE,
            state=WorkerState.READY,
            message="",
            node_ip="127.0.0.1",
            url="http://127.0.0.1:20001",
            started_at_s=150.0,
        ),
    ),
    failed=(FailedSlot("decode/1", 2, 3.0, "exit code 1"),),
    links=(),
    events=(),
)
# One of each kind that there is, told apart by what a path or a body has to carry.
ASKS = [
    Scale("decode", 3, 0.0),
    Scale("decode", 0),
    ChangeRole("decode/0", Role.PREFILL, 2.5, may_restart=True),
    DrainWorker("decode/1", 7.0),
    DrainNode("10.0.0.7"),
    DrainNode("fd00::7"),
    DrainNode("10.0.0.8", 5.0, may_end_service=True),
    ReturnNode("a" * 56),
    Apply(SERVING, 5.0, surge=False),
]


class ChangingCluster:
    """`course`: what a change is one after the other, each time somebody looks at it."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []
        self.planned: list = []
        self.refuses = ""
        self.answers = Plan()
        self.course: list[dict] = []
        self.known: dict[int, Change] = {}
        self.happened = [
            Recorded(seq, 150.0 + seq, DesiredChanged("c", seq)).told() for seq in (1, 2)
        ]
        self.asking = asyncio.Event()
        self.asking.set()
        self.was_asked = asyncio.Event()

    async def status(self):
        return STATUS

    async def read_log(self, worker, offset, limit_bytes, rank=0):
        return LogWindow(b"a line\n", 7, 2)

    async def ask(self, ask, asked_by, why=""):
        self.asked.append((ask, asked_by, why))
        self.was_asked.set()
        await self.asking.wait()
        if self.refuses:
            raise InvalidInput(self.refuses)
        id = len(self.known) + 1
        self.known[id] = Change(id, ask.kind, f"{ask.kind} it", asked_by, 100.0)
        return self.known[id]

    async def plan(self, serving):
        self.planned.append(serving)
        return self.answers

    async def change(self, id):
        if self.course:
            self.known[id] = replace(self.known[id], **self.course.pop(0))
        return self.known[id]

    async def changes(self):
        return tuple(self.known.values())

    async def events(self, after_seq, timeout_s):
        new = [told for told in self.happened if told.seq > after_seq]
        if not new:
            await asyncio.sleep(min(timeout_s, 0.05))
        return tuple(new)


DONE = {"state": ChangeState.DONE, "ended_at_s": 102.5, "waits_for": ""}
