"""A cluster to look at, without engines: made-up load on a real Loop's memory of it, and changes
that go on as time passes. Everything that the control API asks of a controller.

    WatchedCluster()                            two islands, four pools, twelve workers
    .pass_time(60)                              points of a minute
"""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from cluster.control import live
from cluster.control.autoscale.view import Scaling
from cluster.control.changes import Change, ChangeRole, ChangeState, DrainWorker, Scale, Step
from cluster.control.events import ChangeAsked, ChangeEnded, EventLog, WorkerMoved
from cluster.control.overview import cluster_status
from cluster.control.past import Past
from cluster.control.recent import Recent
from cluster.control.rollout import with_replicas
from cluster.control.state import DesiredState
from cluster.errors import InvalidInput
from cluster.identity import Role, WorkerId, WorkerState
from cluster.snapshot import Load
from cluster.topology.schema import ServingSpec
from cluster.traffic import GatewayReport, PairTraffic, SpreadCounter
from cluster.workers.report import WorkerReport

POOLS = (
    ("prefill-h200", Role.PREFILL, "h200", 2),
    ("decode-h200", Role.DECODE, "h200", 3),
    ("prefill-atlas", Role.PREFILL, "atlas", 3),
    ("decode-atlas", Role.DECODE, "atlas", 4),
)
START_S = 6.0


class Clock:
    def __init__(self, wall_s: float = 1_790_000_000.0) -> None:
        self.time_s = 1000.0
        self._wall_s = wall_s

    def now_s(self) -> float:
        return self.time_s

    def wall_s(self) -> float:
        return self._wall_s + self.time_s - 1000.0


class WatchedCluster:
    """`rng`: where the load's ups and downs come from."""

    def __init__(
        self,
        pools: tuple[tuple[str, Role, str, int], ...] = POOLS,
        rng: Random | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.clock = clock or Clock()
        self.rng = rng or Random(7)
        islands: dict[str, list[str]] = {}
        for name, _, island, _ in pools:
            islands.setdefault(island, []).append(name)
        self.wanted = DesiredState(
            cluster="rack-1",
            serving=ServingSpec.model_validate(
                {
                    "model": {"id": "simulated", "served_name": "glm-5.2"},
                    "pools": [
                        {
                            "name": name,
                            "role": role,
                            "engine": "simulated",
                            "replicas": count,
                            "speculative": {"method": "ngram", "num_speculative_tokens": 4},
                        }
                        for name, role, _, count in pools
                    ],
                    "islands": [{"name": name, "pools": own} for name, own in islands.items()],
                }
            ),
            model_path="/m",
            model_digest="d",
            max_model_len_tokens=1024,
            kv_bytes_per_token=64,
        )
        self.recent = Recent(self.clock)
        self.rows = live.Rows()
        self.log = EventLog(self.clock.wall_s)
        self.asked: list[object] = []
        self.refuses = ""
        self.remembered = Past("", "http://127.0.0.1:9090 does not answer: refused", 60.0, 5.0)
        self.rate = 1.0
        self._changes: dict[int, tuple[Change, float]] = {}
        self._reports: dict[WorkerId, WorkerReport] = {}
        self._spreads: dict[tuple[str, str], tuple[SpreadCounter, SpreadCounter]] = {}
        self._pairs: dict[tuple[str, str], PairTraffic] = {}
        self._recoveries = 0
        self._place(self.clock.wall_s() - 3600.0, WorkerState.READY)

    def pass_time(self, seconds: float, step_s: float = 1.0) -> None:
        for _ in range(round(seconds / step_s)):
            self.clock.time_s += step_s
            self._age()
            self._work(step_s)
            reports = self.reports()
            if self.recent.take(self.wanted, reports, self.gateways_now()):
                self.rows.keep(self.recent, reports)

    def reports(self) -> list[WorkerReport]:
        return [self._reports[worker] for worker in sorted(self._reports)]

    def gateways_now(self) -> tuple[GatewayReport, ...]:
        running = sum(r.load.running for r in self._reports.values())
        pairs = tuple(
            replace(
                total, ttft_s=self._spreads[key][0].spread(), tpot_s=self._spreads[key][1].spread()
            )
            for key, total in self._pairs.items()
        )
        now_s = self.clock.wall_s()
        return (
            GatewayReport(
                "g1", now_s, 1, running, 3, refused=2, recoveries=self._recoveries, pairs=pairs
            ),
        )

    # As a controller

    async def status(self):
        recorded = self.log.last(100)
        return cluster_status(
            "rack-1", self.wanted, 7, self.clock.wall_s() - 5000.0, self.reports(), (), recorded, ()
        )

    async def live(self, since, events_after):
        events = tuple(one.told() for one in self.log.after(events_after)[-100:])
        return live.answer(
            replace(await self.status(), events=events),
            self.wanted,
            self.recent,
            self.rows,
            since,
            await self.changes(),
            self.clock.wall_s(),
        )

    async def past(self, span_s):
        return replace(self.remembered, span_s=span_s)

    async def scaling(self):
        return Scaling(mode="manual", dry_run=False, interval_s=15.0)

    async def ask(self, ask, asked_by, why=""):
        if self.refuses:
            raise InvalidInput(self.refuses)
        self.asked.append(ask)
        number = len(self._changes) + 1
        what = str(ask)
        if isinstance(ask, Scale):
            was = self.wanted.serving.pool(ask.pool).replicas.initial
            what = f"scale {ask.pool} from {was} to {ask.replicas}"
            serving = with_replicas(self.wanted.serving, {ask.pool: ask.replicas})
            self.wanted = self.wanted.model_copy(update={"serving": serving})
            self._place(self.clock.wall_s(), WorkerState.LOADING)
        elif isinstance(ask, ChangeRole):
            what = f"have {ask.worker} {'prefill' if ask.role is Role.PREFILL else 'decode'}"
            roles = {**self.wanted.roles, ask.worker: ask.role}
            self.wanted = self.wanted.model_copy(update={"roles": roles})
            for worker, report in self._reports.items():
                if worker.name == ask.worker:
                    self._reports[worker] = replace(report, state=WorkerState.CHANGING)
        elif isinstance(ask, DrainWorker):
            what = f"drain {ask.worker}"
            for worker, report in self._reports.items():
                if worker.name == ask.worker:
                    self._reports[worker] = replace(report, state=WorkerState.DRAINING)
        change = Change(
            number, ask.kind, what, asked_by, self.clock.wall_s(), waits_for="1 worker: loading"
        )
        self._changes[number] = (change, self.clock.time_s)
        self.log.emit(ChangeAsked(what, number, asked_by, why))
        return change

    async def change(self, id):
        return self._changes[id][0]

    async def changes(self):
        return tuple(change for change, _ in self._changes.values())

    async def events(self, after_seq, timeout_s):
        return tuple(one.told() for one in self.log.after(after_seq))

    # What goes on

    def _place(self, since_s: float, state: WorkerState) -> None:
        wanted = {
            (pool.name, index)
            for pool in self.wanted.serving.pools
            for index in range(pool.replicas.initial)
        }
        for worker in [w for w in self._reports if (w.pool, w.index) not in wanted]:
            del self._reports[worker]
        for pool, index in sorted(wanted - {(w.pool, w.index) for w in self._reports}):
            worker = WorkerId(pool, index, 1)
            self._reports[worker] = WorkerReport(
                id=worker,
                role=self.wanted.role_of(worker),
                state=state,
                message="" if state is WorkerState.READY else "loading weights, 4 of 9 files",
                node_ip=f"192.0.2.{10 + len(self._reports) % 6}",
                url="http://127.0.0.1:1",
                started_at_s=since_s,
                node_id=f"node-{len(self._reports) % 6}",
            )

    def _age(self) -> None:
        for number, (change, begun_s) in self._changes.items():
            if change.state is ChangeState.RUNNING and self.clock.time_s - begun_s >= START_S:
                ended_s = self.clock.wall_s()
                self._changes[number] = (
                    replace(
                        change,
                        state=ChangeState.DONE,
                        ended_at_s=ended_s,
                        waits_for="",
                        steps=(Step(ended_s, "all are ready"),),
                    ),
                    begun_s,
                )
                self.log.emit(ChangeEnded(change.what, number, "done", START_S, ""))
        for worker, report in list(self._reports.items()):
            is_on_its_way = report.state in (WorkerState.LOADING, WorkerState.CHANGING)
            begun_s = max((at_s for _, at_s in self._changes.values()), default=0.0)
            if is_on_its_way and self.clock.time_s - begun_s >= START_S:
                self._reports[worker] = replace(
                    report, state=WorkerState.READY, message="", role=self.wanted.role_of(worker)
                )
                self.log.emit(WorkerMoved(worker, report.state, WorkerState.READY, ""))

    def _work(self, step_s: float) -> None:
        now_s = self.clock.time_s
        wave = self.rate * (1.0 + 0.45 * math.sin(now_s / 70) + 0.1 * self.rng.random())
        for worker, report in list(self._reports.items()):
            if report.state is not WorkerState.READY:
                continue
            is_prefill = report.role is Role.PREFILL
            running = round(wave * (2 if is_prefill else 11) * self.rng.uniform(0.7, 1.2))
            tokens = round(wave * step_s * (5200 if is_prefill else 640) * self.rng.uniform(0.8, 1))
            was = report.counters
            pulled = 0 if is_prefill else round(wave * 1500 * step_s * self.rng.uniform(0.6, 1))
            drafts = 0 if is_prefill else tokens // 3
            counters = replace(
                was,
                prompt_tokens=was.prompt_tokens + (tokens if is_prefill else 0),
                generation_tokens=was.generation_tokens + (0 if is_prefill else tokens),
                spec_drafts=was.spec_drafts + drafts,
                spec_accepted=was.spec_accepted + round(drafts * self.rng.uniform(1.6, 2.1)),
                transfers=was.transfers + (0 if is_prefill else round(3 * wave * step_s)),
                bytes_pulled=was.bytes_pulled + pulled * 54_000,
                tokens_held=was.tokens_held + round(pulled * 1.7),
                tokens_pulled=was.tokens_pulled + pulled,
            )
            used = 0.3 + 0.05 * (worker.index + 1) * self.rng.uniform(0.8, 1.2)
            load = Load(running, round(wave) if is_prefill else 0, min(0.97, wave * used))
            self._reports[worker] = replace(report, load=load, counters=counters)
        self._serve(wave, step_s)

    def _serve(self, wave: float, step_s: float) -> None:
        for prefill, decode in self.wanted.serving.pairs():
            key = (prefill, decode)
            slow = 1.6 if "atlas" in prefill else 1.0
            ttft, tpot = self._spreads.setdefault(key, (SpreadCounter(), SpreadCounter()))
            count = round(7 * wave * step_s)
            for _ in range(count):
                ttft.add(slow * 0.35 * wave * self.rng.lognormvariate(0, 0.45))
                tpot.add(slow * 0.021 * (0.7 + 0.3 * wave) * self.rng.lognormvariate(0, 0.15))
            was = self._pairs.get(key, PairTraffic(*key))
            self._pairs[key] = replace(
                was,
                arrived=was.arrived + count,
                finished=was.finished + count,
                prompt_tokens=was.prompt_tokens + 900 * count,
                held_tokens=was.held_tokens + 500 * count,
                answer_tokens=was.answer_tokens + 200 * count,
            )
