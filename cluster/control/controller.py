"""The controller: what is asked of a cluster and told of it. One per cluster.

    asked   operations.apply_ask (pure) ─▶ the desired state, kept before it is followed
            ─▶ history follows the change until it ends
    told    status, events, changes; snapshots to gateways that wait for one
    run     one step of control.loop after another

It is never on the path of a request: while it is gone, gateways keep their last snapshot.
Everything outside is passed in (workers, store, clock), so that tests need no Ray.
Called by: control.actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace

from cluster.control import discovery, live, operations, past, roles, rollout
from cluster.control.changes import Apply, Ask, Change, DrainNode, DrainWorker, Plan
from cluster.control.clock import Clock
from cluster.control.events import DesiredChanged, Event, PoolsRollingOut, ShutdownAsked, Told
from cluster.control.fleet import Tracked, Workers
from cluster.control.live import Live
from cluster.control.loop import Loop
from cluster.control.overview import cluster_status, failed_slots
from cluster.control.reconcile import Drain
from cluster.control.requests import Explained
from cluster.control.state import ClusterStatus, DesiredState, LogWindow
from cluster.control.store import Store
from cluster.errors import PeerGone
from cluster.identity import WorkerId, WorkerState
from cluster.snapshot import Snapshot
from cluster.topology.schema import ServingSpec
from cluster.traffic import GatewayReport
from cluster.transfers import TransferRecord

log = logging.getLogger(__name__)

EVENTS_SHOWN = 100
TRANSFERS_WITHIN_S = 5.0


class Controller:
    """Owns the desired state of one cluster and what is known of its workers.

    Nothing but answers happens without `run`, or somebody who calls `step`."""

    def __init__(self, cluster: str, workers: Workers, store: Store, clock: Clock) -> None:
        self._cluster = cluster
        self._started_at_s = clock.wall_s()
        self._wake = asyncio.Event()
        self._loop = Loop(cluster, workers, store, clock, self._wake.set)
        self._is_over = False
        # Held by whatever changes the state: a step, `apply`, `ask`, the beginning of `shutdown`.
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Take steps until `shutdown` or cancelled."""
        while not self._is_over:
            try:
                await self.step()
            except Exception:
                # One bad step (Ray's head restarting, say) must not end all later ones.
                log.exception("%s step failed", self._cluster)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._loop.tick_s()):
                    await self._wake.wait()
            self._wake.clear()

    async def step(self) -> None:
        """Observe, reconcile, begin what is to be done, publish. The first one adopts what runs."""
        async with self._turn:
            await self._loop.restore()
            await self._loop.tick()

    # What is asked

    async def desired(self) -> DesiredState | None:
        """The state to reach; None before the first `apply`."""
        await self._restored()
        return self._loop.desired

    async def apply(self, desired: DesiredState) -> None:
        """Make `desired` the state to reach, durably, but for what was asked of the running
        cluster since (roles, drained nodes) and the replicas of pools that follow their load.
        Returns before it is reached.

        Raises: ValueError: it is another cluster's."""
        if desired.cluster != self._cluster:
            raise ValueError(f"this is the controller of {self._cluster}, not {desired.cluster}")
        async with self._turn:
            # Or an older state, read meanwhile, would take the place of this one.
            await self._loop.restore()
            self._loop.engine_key = await asyncio.to_thread(self._loop.store.engine_key)
            if self._loop.desired is not None:
                kept = roles.without_stale(self._loop.desired.roles, desired.serving)
                drained = self._loop.desired.drained_nodes
                serving = rollout.target(self._loop.desired, desired.serving).serving
                desired = desired.model_copy(
                    update={"serving": serving, "roles": kept, "drained_nodes": drained}
                )
            if desired == self._loop.desired:
                return
            await self._loop.want(desired)
        replicas = sum(pool.replicas.initial for pool in desired.serving.pools)
        self._loop.emit(DesiredChanged(self._cluster, replicas))
        self._wake.set()

    async def ask(self, ask: Ask, asked_by: str, why: str = "") -> Change:
        """Grant what is asked of the running cluster, durably. Returns before it is reached.

        Raises: InvalidInput: it cannot be; nothing has changed."""
        async with self._turn:
            await self._loop.restore()
            before = self._loop.served()
            reports = self._loop.crew.reports()
            if isinstance(ask, DrainNode) and not ask.may_end_service:
                await self._loop.nodes.look(at_once=True)
                node = operations.node_of(ask.node, before, reports)
                operations.check_drain(before, node, reports, self._loop.nodes.living)
            after = operations.apply_ask(before, ask, reports, self._loop.history.next_id())
            target = ""
            if isinstance(ask, DrainWorker):
                target = str(operations.worker_of(ask.worker, reports).id)
            elif isinstance(ask, DrainNode):
                target = operations.node_of(ask.node, before, reports)
            if isinstance(ask, Apply):
                self._loop.history.replace_applies()
            seen = self._loop.seen(before)
            change = self._loop.history.begin(
                ask,
                operations.describe(before, ask),
                asked_by,
                why,
                operations.pools_of(before, ask, reports),
                target,
                seen,
                self._loop.figures(seen),
            )
            if after != before:
                await self._loop.want(after)
            if after.rollout is not None and after.rollout.change == change.id:
                self._loop.rollout_failures.clear()
                self._loop.emit(PoolsRollingOut(", ".join(after.rollout.pools), change.id))
            if isinstance(ask, DrainWorker):
                tracked = self._loop.crew.get(WorkerId.parse(target))
                if tracked is not None and tracked.shown().state is not WorkerState.DRAINING:
                    self._loop.act(Drain(tracked.id, f"{asked_by} asked for it"), after, 0.0)
            await asyncio.to_thread(self._loop.store.put_changes, self._loop.history.saved())
        self._wake.set()
        return change

    async def plan(self, serving: ServingSpec) -> Plan:
        """What an Apply of `serving` would do."""
        await self._restored()
        return rollout.plan(self._loop.served(), serving)

    async def change(self, id: int) -> Change:
        """Raises: KeyError."""
        await self._restored()
        return self._loop.history.find(id)

    async def changes(self) -> tuple[Change, ...]:
        """Newest last."""
        await self._restored()
        return self._loop.history.all()

    # What is told

    def emit(self, event: Event) -> None:
        """Have something told with the events, and kept in the log."""
        self._loop.emit(event)

    async def status(self) -> ClusterStatus:
        """All that is known now. Asks no worker."""
        await self._restored()
        reports = self._loop.crew.reports()
        failed = failed_slots(
            self._loop.slots, reports, self._loop.last_words, self._loop.clock.now_s()
        )
        return cluster_status(
            self._cluster,
            self._loop.desired,
            self._loop.publisher.version,
            self._started_at_s,
            reports,
            failed,
            self._loop.events.last(EVENTS_SHOWN),
            self._loop.nodes.silent(self._loop.crew.in_order()),
        )

    async def live(self, since: int, events_after: int) -> Live:
        """What is new after the point numbered `since` (0: all that is kept), and the newest events
        numbered above `events_after`."""
        events = self._loop.events.after(events_after)[-EVENTS_SHOWN:]
        told = tuple(recorded.told() for recorded in events)
        return live.answer(
            replace(await self.status(), events=told),
            self._loop.desired,
            self._loop.recent,
            self._loop.rows,
            since,
            self._loop.history.all(),
            self._loop.clock.wall_s(),
        )

    async def past(self, span_s: float) -> past.Past:
        """The last `span_s` seconds as Prometheus knows them; as past.look."""
        await self._restored()
        desired = self._loop.desired
        spec = desired.serving.observability.prometheus if desired is not None else None
        return await past.look(self._cluster, spec, span_s, self._loop.clock.wall_s())

    async def events(self, after_seq: int, timeout_s: float) -> tuple[Told, ...]:
        """Events numbered above `after_seq`, oldest first; waits up to `timeout_s` for one."""
        happened = self._loop.happened
        found = self._loop.events.after(after_seq)
        if not found and timeout_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await happened.wait()
            found = self._loop.events.after(after_seq)
        return tuple(recorded.told() for recorded in found)

    async def next_snapshot(
        self, after_version: int, timeout_s: float, gateway: str = ""
    ) -> Snapshot:
        """The newest snapshot, as soon as it is newer than `after_version`; the current one after
        `timeout_s` seconds. Waits longer only for the first there is. `gateway`: who asks; it has
        taken in `after_version`."""
        return await self._loop.publisher.next(after_version, timeout_s, gateway)

    async def gateway_report(self, report: GatewayReport) -> int:
        """Take in what a gateway replica says of itself, about once a second. Returns the number of
        the newest of its records that is known here."""
        for event in self._loop.gateways.take(report):
            self._loop.emit(event)
        return self._loop.requests.take(report)

    async def gateways(self) -> tuple[GatewayReport, ...]:
        """The latest reports of replicas that have been heard of in the last seconds."""
        return self._loop.gateways.latest()

    async def metrics(self) -> bytes:
        """The controller's own, in the text format that Prometheus scrapes."""
        await self._restored()
        return self._loop.exposition()

    async def targets(self, asked_at: str) -> tuple[discovery.TargetGroup, ...]:
        """As discovery.target_groups."""
        await self._restored()
        return discovery.target_groups(
            self._cluster,
            self._loop.desired,
            self._loop.crew.reports(),
            self._loop.gateways.latest(),
            asked_at,
        )

    async def transfers(self, request_id: str) -> list[TransferRecord]:
        """Records of all workers whose request id contains `request_id`, by time."""
        await self._restored()
        return await self._transfers(request_id, self._loop.crew.in_order())

    async def explain(self, request_id: str) -> Explained:
        """What became of a request that has ended. Waits a moment for one that has just ended.

        Raises: UnknownRequest; ValueError: its gateway is of another version."""
        await self._restored()
        record, alike = await self._loop.requests.find(request_id)
        names = {worker for one in record.attempts for worker in (one.prefill, one.decode)}
        workers = [tracked for tracked in self._loop.crew.in_order() if str(tracked.id) in names]
        transfers: list[TransferRecord] = []
        with contextlib.suppress(TimeoutError):
            # One that hangs must not keep back what is known of the request without it.
            async with asyncio.timeout(TRANSFERS_WITHIN_S):
                transfers = await self._transfers(record.engine_id, workers)
        return Explained(record, tuple(transfers), alike)

    async def _transfers(self, request_id: str, workers: Sequence[Tracked]) -> list[TransferRecord]:
        found = await asyncio.gather(
            *(tracked.handle.transfers(0) for tracked in workers if tracked.handle),
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
        for tracked in reversed(self._loop.crew.in_order()):
            if tracked.id.name == wanted.name and tracked.handle is not None:
                data, after = await tracked.handle.read_log(offset, limit_bytes, rank)
                return LogWindow(data, after, tracked.id.generation)
        raise PeerGone(worker, "no such worker runs now")

    async def shutdown(self, grace_s: float) -> None:
        """Stop every worker (requests in hand get up to `grace_s`), remove it, forget the state.

        Returns when nothing is left. A later controller of this cluster starts empty."""
        self._loop.emit(ShutdownAsked(self._cluster, grace_s))
        self._is_over = True
        self._wake.set()
        async with self._turn:
            await self._loop.restore()
            self._loop.desired = None
            # First: a controller that is restarted in the middle must not start workers again.
            await asyncio.to_thread(self._loop.store.forget)
        await self._loop.crew.end_all(grace_s)

    async def _restored(self) -> None:
        """What is told before the first step must not be that there is nothing."""
        if not self._loop.is_restored and not self._is_over:
            async with self._turn:
                await self._loop.restore()
