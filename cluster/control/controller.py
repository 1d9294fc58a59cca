"""The controller: observe workers, reconcile, act, publish. One per cluster.

    every tick   report() of all workers at once ─▶ reconcile (pure) ─▶ spawn, stop, remove
                 ─▶ snapshots.build (pure) ─▶ waiting gateways
    at birth     desired state and generations from the store, workers from Ray: a controller that
                 was killed goes on where it stopped, with the workers it finds

It is never on the path of a request: while it is gone, gateways keep their last snapshot.
Everything outside is passed in (workers, store, clock), so that tests need no Ray.
Called by: control.actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any

from cluster.control import reconcile, snapshots
from cluster.control.clock import Clock
from cluster.control.events import (
    ControllerStarted,
    DesiredChanged,
    Event,
    EventLog,
    LinkAllowed,
    LinkRefused,
    ShutdownAsked,
    WorkerDraining,
    WorkerNotStarted,
    WorkerRemoved,
    WorkerStarted,
)
from cluster.control.fleet import Tracked, Workers
from cluster.control.overview import cluster_status, failed_slots
from cluster.control.reconcile import Drain, PoolWanted, Slot, SlotKey, Start
from cluster.control.state import ClusterStatus, DesiredState, LogWindow
from cluster.control.store import Store
from cluster.errors import ClusterError, PeerGone
from cluster.identity import Role, WorkerId, WorkerState
from cluster.snapshot import Snapshot
from cluster.transfers import TransferRecord
from cluster.workers.report import WorkerReport

log = logging.getLogger(__name__)

# While something starts or goes, people wait for it; a settled cluster is looked at less often
# (measured, two workers, a tick a second: 0.6 % of a core, 0.45 % of it an idle Ray actor's own).
BUSY_TICK_S = 0.5
IDLE_TICK_S = 1.0
# Load alone is not worth waking every gateway at once.
LOAD_PERIOD_S = 1.0
# A worker that answers later is seen at the next tick.
REPORT_WAIT_S = 1.0
# Asked of a worker that is not wanted any more; more than the longest answer would be for ever.
DRAIN_GRACE_S = 300.0
EVENTS_SHOWN = 100
# Versions are given out in runs, so that a busy second costs no write to the store.
_VERSIONS_PER_RUN = 1_000


class Controller:
    """Owns the desired state of one cluster and what is known of its workers.

    Nothing but answers happens without `run`, or somebody who calls `step`."""

    def __init__(self, cluster: str, workers: Workers, store: Store, clock: Clock) -> None:
        self._cluster = cluster
        self._workers = workers
        self._store = store
        self._clock = clock
        self._events = EventLog(clock.wall_s)
        self._started_at_s = clock.wall_s()
        self._desired: DesiredState | None = None
        self._engine_key = ""
        self._slots: dict[SlotKey, Slot] = {}
        self._last_words: dict[SlotKey, tuple[str, ...]] = {}
        self._tracked: dict[WorkerId, Tracked] = {}
        self._refused: frozenset[str] = frozenset()
        self._snapshot: Snapshot | None = None
        self._snapshot_at_s = 0.0
        self._version = 0
        self._versions_until = 0
        self._published = asyncio.Condition()
        self._wake = asyncio.Event()
        self._is_restored = False
        self._is_over = False
        # Held by whatever changes the state: a step, `apply`, the beginning of `shutdown`.
        self._turn = asyncio.Lock()
        self._deeds: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Take steps until `shutdown` or cancelled."""
        while not self._is_over:
            try:
                await self.step()
            except Exception:
                # One bad step (Ray's head restarting, say) must not end all later ones.
                log.exception("%s step failed", self._cluster)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._tick_s()):
                    await self._wake.wait()
            self._wake.clear()

    async def step(self) -> None:
        """Observe, reconcile, begin what is to be done, publish. The first one adopts what runs."""
        async with self._turn:
            await self._restore()
            await self._tick()

    async def desired(self) -> DesiredState | None:
        """The state to reach; None before the first `apply`."""
        await self._restored()
        return self._desired

    async def apply(self, desired: DesiredState) -> None:
        """Make `desired` the state to reach, durably. Returns before it is reached.

        Raises: ValueError: it is another cluster's."""
        if desired.cluster != self._cluster:
            raise ValueError(f"this is the controller of {self._cluster}, not {desired.cluster}")
        async with self._turn:
            # Or an older state, read meanwhile, would take the place of this one.
            await self._restore()
            self._engine_key = await asyncio.to_thread(self._store.engine_key)
            if desired == self._desired:
                return
            await asyncio.to_thread(self._store.put_desired, desired)
            self._desired = desired
        replicas = sum(pool.replicas.initial for pool in desired.serving.pools)
        self._emit(DesiredChanged(self._cluster, replicas))
        self._wake.set()

    async def status(self) -> ClusterStatus:
        """All that is known now. Asks no worker."""
        await self._restored()
        reports = self._reports()
        failed = failed_slots(self._slots, reports, self._last_words, self._clock.now_s())
        return cluster_status(
            self._cluster,
            self._desired,
            self._version,
            self._started_at_s,
            reports,
            failed,
            self._events.last(EVENTS_SHOWN),
        )

    async def next_snapshot(self, after_version: int, timeout_s: float) -> Snapshot:
        """The newest snapshot, as soon as it is newer than `after_version`; the current one after
        `timeout_s` seconds. Waits longer only for the first there is."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._published:
                await self._published.wait_for(lambda: self._version > after_version)
        async with self._published:
            await self._published.wait_for(lambda: self._snapshot is not None)
        assert self._snapshot is not None
        return self._snapshot

    async def transfers(self, request_id: str) -> list[TransferRecord]:
        """Records of all workers whose request id contains `request_id`, by time."""
        await self._restored()
        found = await asyncio.gather(
            *(tracked.handle.transfers(0) for tracked in self._in_order() if tracked.handle),
            return_exceptions=True,
        )
        records = [
            record
            for answer in found
            if not isinstance(answer, BaseException)
            for _, record in answer
            if request_id in record.request_id
        ]
        return sorted(records, key=lambda record: record.at_s)

    async def read_log(
        self, worker: str, offset: int, limit_bytes: int, rank: int = 0
    ) -> LogWindow:
        """Bytes of the log of the worker's (POOL/INDEX) present engine, as WorkerHandle.read_log.

        Raises: PeerGone: there is no such worker now, or it does not answer; InvalidInput: it has
        no such rank."""
        await self._restored()
        wanted = WorkerId.parse(worker)
        for tracked in reversed(self._in_order()):
            if tracked.id.name == wanted.name and tracked.handle is not None:
                data, after = await tracked.handle.read_log(offset, limit_bytes, rank)
                return LogWindow(data, after, tracked.id.generation)
        raise PeerGone(worker, "no such worker runs now")

    async def shutdown(self, grace_s: float) -> None:
        """Stop every worker (requests in hand get up to `grace_s`), remove it, forget the state.

        Returns when nothing is left. A later controller of this cluster starts empty."""
        self._emit(ShutdownAsked(self._cluster, grace_s))
        self._is_over = True
        self._wake.set()
        async with self._turn:
            await self._restore()
            self._desired = None
            # First: a controller that is restarted in the middle must not start workers again.
            await asyncio.to_thread(self._store.forget)
        spawns = [tracked.spawning for tracked in self._in_order() if tracked.spawning is not None]
        await asyncio.gather(*spawns, return_exceptions=True)
        left = {*self._tracked, *await self._workers.find_all(self._cluster)}
        await asyncio.gather(*(self._end(worker, grace_s) for worker in sorted(left)))
        await asyncio.gather(*self._deeds, return_exceptions=True)
        self._tracked.clear()

    async def _restored(self) -> None:
        """What is told before the first step must not be that there is nothing."""
        if not self._is_restored and not self._is_over:
            async with self._turn:
                await self._restore()

    async def _restore(self) -> None:
        """State from the store, workers from Ray; once in a controller's life."""
        if self._is_restored:
            return
        self._desired = await asyncio.to_thread(self._store.desired)
        self._engine_key = await asyncio.to_thread(self._store.engine_key)
        self._slots = await asyncio.to_thread(self._store.slots)
        self._version = self._versions_until = await asyncio.to_thread(
            self._store.versions_given_out
        )
        found = await self._workers.find_all(self._cluster)
        handles = await asyncio.gather(
            *(self._workers.find(self._cluster, worker) for worker in found)
        )
        for worker, handle in zip(found, handles, strict=True):
            slot = self._slots.get((worker.pool, worker.index), Slot())
            # The store may be behind by a start that was under way.
            generation = max(slot.generation, worker.generation)
            self._slots[worker.pool, worker.index] = replace(slot, generation=generation)
            if handle is not None:
                self._tracked[worker] = Tracked.adopted(handle, self._role(worker), self._clock)
        if self._tracked:
            await self._observe()
        self._is_restored = True
        self._emit(ControllerStarted(self._cluster, len(self._tracked), self._version))

    async def _tick(self) -> None:
        await self._observe()
        desired = self._desired
        if desired is None or self._is_over:
            return
        now_s = self._clock.now_s()
        actions = reconcile.reconcile(
            [
                PoolWanted(pool.name, pool.replicas.initial, pool.replicas.max)
                for pool in desired.serving.pools
            ],
            [tracked.observed(now_s) for tracked in self._in_order()],
            self._slots,
            desired.serving.health,
            now_s,
        )
        if any(isinstance(action, Start) for action in actions):
            # Before the start: a generation is never given twice, not even after a crash.
            for action in actions:
                if isinstance(action, Start):
                    self._slots[action.worker.pool, action.worker.index] = action.slot
            await asyncio.to_thread(self._store.put_slots, dict(self._slots))
        for action in actions:
            self._act(action, desired, now_s)
        await self._publish(desired)

    async def _observe(self) -> None:
        """Ask every worker for its report; one that is late keeps its last one for now."""
        for tracked in self._tracked.values():
            tracked.ask()
        asked = [t.asking for t in self._tracked.values() if t.asking is not None]
        if asked:
            await asyncio.wait(asked, timeout=REPORT_WAIT_S)
        hung_after_s = self._desired.serving.health.hung_after_s if self._desired else float("inf")
        for tracked in self._in_order():
            for event in await tracked.take(self._workers, self._cluster, hung_after_s):
                self._emit(event)

    def _act(self, action: reconcile.Action, desired: DesiredState, now_s: float) -> None:
        """Begin one step. What takes time goes on in the background; the worker's entry says so."""
        worker = action.worker
        if isinstance(action, Start):
            tracked = Tracked.starting(worker, desired.serving.pool(worker.pool).role, self._clock)
            self._tracked[worker] = tracked
            tracked.spawning = self._do(self._spawn(tracked, desired), f"spawn {worker}")
            self._emit(WorkerStarted(worker, action.why))
        elif isinstance(action, Drain):
            tracked = self._tracked[worker]
            tracked.is_draining = True
            self._do(self._drain(tracked), f"drain {worker}")
            self._emit(WorkerDraining(worker, action.why))
        else:
            tracked = self._tracked[worker]
            if tracked.is_removing:
                return
            tracked.is_removing = True
            key = (worker.pool, worker.index)
            self._slots[key] = action.slot
            self._last_words[key] = tracked.report.last_words
            self._do(self._remove(worker), f"remove {worker}")
            pause_s = max(0.0, action.slot.not_before_s - now_s) if action.slot.failures else None
            self._emit(WorkerRemoved(worker, action.why, pause_s))

    async def _spawn(self, tracked: Tracked, desired: DesiredState) -> None:
        try:
            tracked.handle = await self._workers.spawn(
                desired.worker_spec(tracked.id, self._engine_key)
            )
        except Exception as error:
            tracked.failed(f"{type(error).__name__}: {error}")
            self._emit(WorkerNotStarted(tracked.id, str(error)))

    async def _drain(self, tracked: Tracked) -> None:
        if tracked.handle is not None:
            with contextlib.suppress(ClusterError):
                await tracked.handle.stop(DRAIN_GRACE_S)
        tracked.stopped()

    async def _remove(self, worker: WorkerId) -> None:
        try:
            await self._workers.remove(self._cluster, worker)
        finally:
            self._tracked.pop(worker, None)
            self._wake.set()

    async def _end(self, worker: WorkerId, grace_s: float) -> None:
        tracked = self._tracked.get(worker)
        handle = tracked.handle if tracked is not None else None
        if handle is not None:
            with contextlib.suppress(ClusterError):
                await handle.stop(grace_s)
        await self._workers.remove(self._cluster, worker)

    async def _publish(self, desired: DesiredState) -> None:
        reports = self._reports()
        self._say_links(desired, reports)
        new = snapshots.build(desired, reports, self._version + 1)
        now_s = self._clock.now_s()
        change = snapshots.changed(self._snapshot, new)
        if change is snapshots.Change.NONE:
            return
        if change is snapshots.Change.LOAD and now_s - self._snapshot_at_s < LOAD_PERIOD_S:
            return
        if new.version > self._versions_until:
            self._versions_until = new.version + _VERSIONS_PER_RUN
            await asyncio.to_thread(self._store.put_versions_given_out, self._versions_until)
        async with self._published:
            self._snapshot, self._version, self._snapshot_at_s = new, new.version, now_s
            self._published.notify_all()

    def _say_links(self, desired: DesiredState, reports: Sequence[WorkerReport]) -> None:
        """An event when a link opens or closes."""
        states = snapshots.links(desired, reports)
        closed = {
            f"{state.link.prefill_pool}->{state.link.decode_pool}": "; ".join(state.mismatches)
            for state in states
            if not state.is_open
        }
        for link in sorted(closed.keys() - self._refused):
            self._emit(LinkRefused(link, closed[link]))
        for link in sorted(self._refused - closed.keys()):
            self._emit(LinkAllowed(link))
        self._refused = frozenset(closed)

    def _tick_s(self) -> float:
        wanted = (
            sum(pool.replicas.initial for pool in self._desired.serving.pools)
            if self._desired
            else 0
        )
        reports = self._reports()
        is_settled = len(reports) == wanted and all(
            report.state is WorkerState.READY for report in reports
        )
        return IDLE_TICK_S if is_settled else BUSY_TICK_S

    def _reports(self) -> list[WorkerReport]:
        return [tracked.shown() for tracked in self._in_order()]

    def _in_order(self) -> list[Tracked]:
        return [self._tracked[worker] for worker in sorted(self._tracked)]

    def _role(self, worker: WorkerId) -> Role:
        pool = self._desired.pool(worker.pool) if self._desired is not None else None
        return pool.role if pool is not None else Role.MIXED

    def _emit(self, event: Event) -> None:
        self._events.emit(event)

    def _do(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        deed = asyncio.create_task(work, name=name)
        self._deeds.add(deed)
        deed.add_done_callback(self._done)
        return deed

    def _done(self, deed: asyncio.Task[None]) -> None:
        self._deeds.discard(deed)
        if not deed.cancelled() and deed.exception() is not None:
            log.error("%s failed", deed.get_name(), exc_info=deed.exception())
