"""One step after another: observe workers, reconcile, act, publish.

    every tick   report() of all workers at once ─▶ reconcile (pure) ─▶ spawn, stop, remove, flip
                 ─▶ snapshots.build (pure) ─▶ waiting gateways
    at birth     desired state and generations from the store, workers from Ray: a controller that
                 was killed goes on where it stopped, with the workers it finds

Called by: control.controller, which holds `turn` around each call that changes something.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from cluster.control import exported, history, illness, reconcile, roles, rollout, snapshots
from cluster.control.clock import Clock
from cluster.control.counted import Counted
from cluster.control.crew import Crew
from cluster.control.events import (
    ControllerStarted,
    Event,
    EventLog,
    LinkAllowed,
    LinkRefused,
    WorkerDraining,
    WorkerFoundIll,
    WorkerRemoved,
    WorkerStarted,
)
from cluster.control.fleet import Tracked, Workers
from cluster.control.flip import Way
from cluster.control.gateways import Gateways
from cluster.control.live import Rows
from cluster.control.nodes import Nodes
from cluster.control.progress import Seen
from cluster.control.publisher import Publisher
from cluster.control.recent import Recent
from cluster.control.reconcile import (
    Drain,
    Flip,
    Observed,
    PoolWanted,
    Remove,
    Replace,
    Slot,
    SlotKey,
    Start,
)
from cluster.control.requests import Requests
from cluster.control.state import DesiredState
from cluster.control.store import Store
from cluster.errors import InvalidInput
from cluster.identity import Role, WorkerId, WorkerState
from cluster.observe.controller_metrics import ControllerMetrics
from cluster.topology.schema import ServingSpec
from cluster.workers.report import WorkerReport

# While something starts or goes, people wait for it; a settled cluster is looked at less often
# (measured, two workers, a tick a second: 0.6 % of a core, 0.45 % of it an idle Ray actor's own).
BUSY_TICK_S = 0.5
IDLE_TICK_S = 1.0
# A new worker that fails later than this has not failed because of what its engine was told.
_ROLLOUT_BLAMED_S = 60.0
# An ill worker's place is needed; a stream that it still carries goes on elsewhere after this.
_ILL_GRACE_S = 20.0


class Loop:
    """Owns what is wanted of one cluster and what is known of it."""

    def __init__(
        self,
        cluster: str,
        workers: Workers,
        store: Store,
        clock: Clock,
        wake: Callable[[], None],
    ) -> None:
        self.store = store
        self.clock = clock
        self.desired: DesiredState | None = None
        self.engine_key = ""
        self.events = EventLog(clock.wall_s)
        self.happened = asyncio.Event()
        self.publisher = Publisher(store, clock)
        self.gateways = Gateways(clock)
        self.requests = Requests(clock)
        self.recent = Recent(clock)
        self.rows = Rows()
        self.history = history.History(self.emit, clock.wall_s)
        self.metrics = ControllerMetrics(
            lambda: exported.samples(self.desired, self.crew.reports())
        )
        self._counted = Counted(
            self.metrics, lambda change: self.history.find(change).kind, clock.now_s
        )
        way = Way(self.publish, self.publisher.acknowledged, self.emit, clock)
        self.nodes = Nodes(workers, clock)
        self.crew = Crew(cluster, workers, way, wake)
        self.slots: dict[SlotKey, Slot] = {}
        self.last_words: dict[SlotKey, tuple[str, ...]] = {}
        # Of the rollout that is under way: each failure of a new worker.
        self.rollout_failures: list[str] = []
        self.is_restored = False
        self._cluster = cluster
        self._refused: frozenset[str] = frozenset()

    async def restore(self) -> None:
        """State from the store, workers from Ray; once in a controller's life."""
        if self.is_restored:
            return
        self.desired = await asyncio.to_thread(self.store.desired)
        self.engine_key = await asyncio.to_thread(self.store.engine_key)
        self.slots = await asyncio.to_thread(self.store.slots)
        self.history.restore(await asyncio.to_thread(self.store.changes))
        await self.publisher.restore()
        for worker in await self.crew.find(self._role):
            slot = self.slots.get((worker.pool, worker.index), Slot())
            # The store may be behind by a start that was under way.
            generation = max(slot.generation, worker.generation)
            self.slots[worker.pool, worker.index] = replace(slot, generation=generation)
        if len(self.crew):
            await self.crew.observe(float("inf"))
            for tracked in self.crew.in_order():
                self._assume_role(tracked)
        self.is_restored = True
        version = self.publisher.version
        self.emit(ControllerStarted(self._cluster, len(self.crew), version))

    async def tick(self) -> None:
        hung_after_s = self.desired.serving.health.hung_after_s if self.desired else float("inf")
        await self.crew.observe(hung_after_s)
        await self.nodes.look()
        if self.desired is None:
            return
        desired = await self._follow_rollout(self.desired)
        now_s = self.clock.now_s()
        ill = self._ill(desired.serving, now_s)
        actions = reconcile.reconcile(
            self._wanted(desired),
            [
                self._observed(tracked, desired, now_s, ill.get(tracked.id, ""))
                for tracked in self.crew.in_order()
            ],
            self.slots,
            desired.serving.health,
            now_s,
        )
        if any(isinstance(action, Start) for action in actions):
            # Before the start: a generation is never given twice, not even after a crash.
            for action in actions:
                if isinstance(action, Start):
                    self.slots[action.worker.pool, action.worker.index] = action.slot
            await asyncio.to_thread(self.store.put_slots, dict(self.slots))
        for action in actions:
            self.act(action, desired, now_s)
        self._say_links(desired, self.crew.reports())
        await self.publish()
        self._remember(desired)
        if self.history.has_running():
            seen = self.seen(desired)
            if self.history.follow(seen, self.figures(seen)):
                await asyncio.to_thread(self.store.put_changes, self.history.saved())
        # After the drain of a node that ends by its death has been seen to end.
        await self._forget_nodes(desired)

    async def _forget_nodes(self, desired: DesiredState) -> None:
        gone = self.nodes.forgotten(tuple(desired.drained_nodes))
        for report in self.crew.reports():
            gone -= {report.node_id, *report.node_ids}
        if gone:
            rest = {node: at for node, at in desired.drained_nodes.items() if node not in gone}
            await self.want(desired.model_copy(update={"drained_nodes": rest}))

    def _wanted(self, desired: DesiredState) -> list[PoolWanted]:
        reports = self.crew.reports()
        under_way = desired.rollout
        return [
            PoolWanted(
                pool.name,
                pool.replicas.initial,
                pool.replicas.max,
                kept=roles.lent(desired.roles, pool.name),
                surge=under_way is None or under_way.surge or pool.name not in under_way.pools,
                may_retire=rollout.may_retire(desired, under_way, pool.name, reports),
            )
            for pool in desired.serving.pools
        ]

    def _ill(self, serving: ServingSpec, now_s: float) -> dict[WorkerId, str]:
        islands = {pool: island.name for island in serving.islands for pool in island.pools}
        ready: list[illness.Ready] = []
        for tracked in self.crew.in_order():
            seen = tracked.observed(now_s)
            if seen.state is WorkerState.READY:
                slot = self.slots.get(seen.slot, Slot())
                is_new = seen.ready_for_s <= serving.health.restart_backoff_max_s
                failures = slot.failures if is_new else 0
                island = islands.get(tracked.id.pool, "")
                ready.append(illness.Ready(tracked.id, tracked.role, failures, island))
        return illness.judge(self.gateways.latest(), ready, self.clock.wall_s())

    def _observed(
        self, tracked: Tracked, desired: DesiredState, now_s: float, ill: str
    ) -> Observed:
        report, pool = tracked.report, desired.pool(tracked.id.pool)
        outdated, must_go, flips_to, misplaced = "", False, None, ""
        if tracked.is_unplaced and self._has_other_nodes(tracked, desired):
            misplaced = "other nodes may take it now than when it was asked for"
        if pool is not None:
            wanted = desired.role_of(tracked.id)
            drained = {report.node_id, *report.node_ids} & set(desired.drained_nodes)
            must_go = bool(drained)
            if rollout.is_outdated(desired, report):
                outdated = "its engine is to be told something else"
            elif drained:
                outdated = f"node {report.node_ip} is drained"
            elif tracked.role is not wanted:
                why = roles.why_restart(desired.serving, pool.name)
                if why:
                    outdated = f"it is to serve as {wanted}, which takes a new start"
                else:
                    flips_to = wanted
        return replace(
            tracked.observed(now_s),
            outdated=outdated,
            must_go=must_go,
            flips_to=flips_to,
            ill=ill,
            misplaced=misplaced,
        )

    def _has_other_nodes(self, tracked: Tracked, desired: DesiredState) -> bool:
        """Whether nodes were drained or returned since its placement was asked for."""
        if tracked.avoided is None or tracked.handle is None:
            return False
        living = {node.id for node in self.nodes.living}
        changed = tracked.avoided ^ set(desired.drained_nodes)
        return bool(changed & living if living else changed)

    def act(self, action: reconcile.Action, desired: DesiredState, now_s: float) -> None:
        """Begin one step. What takes time goes on in the background; the worker's entry says so."""
        worker = action.worker
        if isinstance(action, Start):
            self.crew.start(desired.worker_spec(worker, self.engine_key))
            self.emit(WorkerStarted(worker, action.why))
            return
        tracked = self.crew.get(worker)
        if tracked is None or tracked.is_removing:
            return
        if isinstance(action, Drain):
            self.crew.drain(tracked, desired.grace_s)
            self.emit(WorkerDraining(worker, action.why))
        elif isinstance(action, Flip):
            self.crew.flip(tracked, action.role, desired.grace_s)
        elif isinstance(action, Replace):
            self._replace(tracked, action, desired, now_s)
        else:
            self._remove(tracked, action, desired, now_s)

    def _remove(
        self, tracked: Tracked, action: Remove, desired: DesiredState, now_s: float
    ) -> None:
        key = (tracked.id.pool, tracked.id.index)
        self.slots[key] = action.slot
        self.last_words[key] = tracked.report.last_words
        self.crew.remove(tracked)
        has_failed = tracked.observed(now_s).has_failed
        pause_s = max(0.0, action.slot.not_before_s - now_s) if action.slot.failures else None
        self.emit(WorkerRemoved(tracked.id, action.why, pause_s))
        if has_failed:
            self._blame_rollout(tracked, action.why, desired, now_s)

    def _replace(
        self, tracked: Tracked, action: Replace, desired: DesiredState, now_s: float
    ) -> None:
        self.slots[tracked.id.pool, tracked.id.index] = action.slot
        self.crew.drain(tracked, min(desired.grace_s, _ILL_GRACE_S))
        self.emit(WorkerFoundIll(tracked.id, action.why, action.slot.failures))
        self._blame_rollout(tracked, action.why, desired, now_s)

    def _blame_rollout(
        self, tracked: Tracked, why: str, desired: DesiredState, now_s: float
    ) -> None:
        """Note a failure that may be due to what new workers are told."""
        under_way = desired.rollout
        if under_way is None or tracked.id.pool not in under_way.pools:
            return
        is_new = not rollout.is_outdated(desired, tracked.report)
        if is_new and tracked.observed(now_s).ready_for_s < _ROLLOUT_BLAMED_S:
            last = tracked.report.last_words[-1:]
            said = f"; its last words: {last[0]}" if last else ""
            self.rollout_failures.append(f"{tracked.id} failed: {why}{said}")

    async def _follow_rollout(self, desired: DesiredState) -> DesiredState:
        """What is wanted now that a rollout may have ended, or failed."""
        under_way = desired.rollout
        if under_way is None:
            return desired
        if len(self.rollout_failures) > rollout.FAILURES_ALLOWED:
            why = self.rollout_failures[-1]
            self.rollout_failures.clear()
            after = rollout.rolled_back(desired, under_way)
            await self.want(after)
            self.history.rolled_back(under_way.change, why, self.figures(self.seen(after)))
            await asyncio.to_thread(self.store.put_changes, self.history.saved())
            return after
        if rollout.is_over(desired, under_way, self.crew.reports()):
            after = desired.model_copy(update={"rollout": None})
            await self.want(after)
            return after
        return desired

    async def want(self, desired: DesiredState) -> None:
        await asyncio.to_thread(self.store.put_desired, desired)
        self.desired = desired

    async def publish(self) -> int:
        """Publish what is now, if it differs; the version that shows it."""
        if self.desired is not None:
            await self.publisher.publish(self.desired, self.crew.reports())
        return self.publisher.version

    def _remember(self, desired: DesiredState) -> None:
        reports = self.crew.reports()
        if self.recent.take(desired, reports, self.gateways.latest()):
            self.rows.keep(self.recent, reports)

    def _say_links(self, desired: DesiredState, reports: Sequence[WorkerReport]) -> None:
        """An event when a link opens or closes."""
        states = snapshots.links(desired, reports)
        closed = {
            f"{state.link.prefill_pool}->{state.link.decode_pool}": "; ".join(state.mismatches)
            for state in states
            if not state.is_open
        }
        for link in sorted(closed.keys() - self._refused):
            self.emit(LinkRefused(link, closed[link]))
        for link in sorted(self._refused - closed.keys()):
            self.emit(LinkAllowed(link))
        self._refused = frozenset(closed)

    def tick_s(self) -> float:
        wanted = (
            sum(pool.replicas.initial for pool in self.desired.serving.pools) if self.desired else 0
        )
        reports = self.crew.reports()
        is_settled = (
            len(reports) == wanted
            and all(report.state is WorkerState.READY for report in reports)
            and not self.history.has_running()
        )
        return IDLE_TICK_S if is_settled else BUSY_TICK_S

    def exposition(self) -> bytes:
        """The controller's metrics, in the text format that Prometheus scrapes."""
        if self.desired is not None:
            self._counted.know([pool.name for pool in self.desired.serving.pools])
        return self.metrics.exposition()

    # Small things

    def served(self) -> DesiredState:
        """Raises: InvalidInput."""
        if self.desired is None:
            raise InvalidInput(f"cluster {self._cluster} serves nothing yet; `pdcluster up FILE`")
        return self.desired

    def seen(self, desired: DesiredState) -> Seen:
        now_s = self.clock.wall_s()
        return Seen(desired, self.crew.reports(), self.slots, self.last_words, now_s)

    def figures(self, seen: Seen) -> dict[str, float]:
        return history.figures(seen, self.gateways.latest())

    def _role(self, worker: WorkerId) -> Role:
        pool = self.desired.pool(worker.pool) if self.desired is not None else None
        return pool.role if pool is not None else Role.MIXED

    def _assume_role(self, tracked: Tracked) -> None:
        """The role of a worker that a former controller may have changed: engines that do both
        serve as is wanted now, others as they were started."""
        desired = self.desired
        if desired is None or desired.pool(tracked.id.pool) is None:
            return
        wanted = desired.role_of(tracked.id)
        started_as = tracked.report.role
        does_both = not roles.why_restart(desired.serving, tracked.id.pool)
        tracked.serve_as(wanted if does_both else started_as, self.publisher.version)

    def emit(self, event: Event) -> None:
        self.events.emit(event)
        self._counted.take(event)
        self.history.note(event)
        self.happened.set()
        self.happened = asyncio.Event()
