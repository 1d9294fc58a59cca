"""One worker: one engine on one node, from its start to its last process.

    start ─▶ _live: _begin (ports, command, supervisor) ─▶ _become_ready ─▶ _watch
    stop  ─▶ _end: drain ─▶ supervisor ends the tree ─▶ STOPPED

A plain async class without Ray; `workers.handle` makes an actor of it. The state moves only in
`workers.lifecycle`, `workers.watch` follows the running engine, processes are the supervisor's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import shutil
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp

from cluster.engines.base import EngineAdapter, Launch, LaunchContext
from cluster.engines.client import EngineClient, EngineSample
from cluster.engines.registry import adapter as engine_adapter
from cluster.errors import ClusterError, PeerGone
from cluster.identity import WorkerState
from cluster.settings import ClusterPaths
from cluster.snapshot import Fingerprint
from cluster.transfers import TransferRecord
from cluster.workers import facts, health, logs, memory, secret_files
from cluster.workers.drain import InHand, until_empty
from cluster.workers.environment import engine_environment, link_package
from cluster.workers.gang import Gang, MeetingPlace
from cluster.workers.ledger import Ledger, TransferSocket, check_socket_path, send_release
from cluster.workers.lifecycle import Cause, Lifecycle
from cluster.workers.ports import PortLease, reserve
from cluster.workers.preparation import host_of, launch_context
from cluster.workers.process import EngineProcess
from cluster.workers.report import WorkerReport
from cluster.workers.spec import WorkerSpec
from cluster.workers.watch import EngineWatch

log = logging.getLogger(__name__)

# Between SIGTERM and SIGKILL when a worker is stopped; its requests have ended before that.
TERM_GRACE_S = 2.0
_START_POLL_S = 0.2
# An engine's first token may take as long as it likes: the start as a whole is bounded.
_HTTP_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
# Reading /proc for the memory of a tree costs some milliseconds.
_MEMORY_EVERY_LOOKS = 5


@dataclass(frozen=True, slots=True)
class _Running:
    """What exists from the moment the engine was started until it is ended."""

    adapter: EngineAdapter
    context: LaunchContext
    launch: Launch
    process: EngineProcess
    client: EngineClient
    watch: EngineWatch


class EngineWorker:
    """Owns one engine's process tree, its ports and its log. All times are seconds.

    `gang`: the other ranks of a replica that spans nodes. Ranks above 0 have no HTTP port: they
    are ready when they run, and end when rank 0 says so or they are told to."""

    def __init__(
        self,
        spec: WorkerSpec,
        node_ip: str,
        rng: random.Random | None = None,
        gang: Gang | None = None,
        node_id: str = "",
    ) -> None:
        paths = ClusterPaths(spec.cluster)
        self._spec = spec
        self._node_ip = node_ip
        self._node_id = node_id
        self._gang = gang
        self._rng = rng or random.Random()
        self._log_path = paths.worker_log(spec.id, spec.node_rank)
        self._runtime_dir = paths.runtime / "w" / secrets.token_hex(4)
        self._lifecycle = Lifecycle(f"{spec.id}:{spec.node_rank}", time.monotonic())
        self._ledger = Ledger(spec.island.lease_s)
        self._lease: PortLease | None = None
        self._has_met = asyncio.Event()  # the ports are reserved, or never will be
        self._started_at_s = time.time()
        self._running: _Running | None = None
        self._fingerprint: Fingerprint | None = None
        self._rss_bytes = 0
        # Before the start, then at the last two looks: one may fall between the end of a process
        # for lack of memory and that of its engine.
        self._kills: deque[memory.Kills] = deque(maxlen=2)
        self._last_words: tuple[str, ...] = ()
        self._resources = contextlib.AsyncExitStack()
        self._living: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._drain_until_s = float("inf")
        self._cut_off = ""  # what was in hand when the grace of a stop was over

    async def start(self) -> None:
        """Begin in the background; `report` tells how it goes. Further calls do nothing."""
        if self._living is None and self._ending is None:
            self._living = asyncio.create_task(self._live(), name=f"live {self._spec.id}")

    async def meeting_place(self) -> MeetingPlace:
        """Where the other ranks' engines find this one, once its ports are reserved.

        Raises: PeerGone: it ended before. Cancel: safe."""
        await self._has_met.wait()
        if self._lease is None:
            raise PeerGone(str(self._spec.id), f"rank 0 did not start: {self._lifecycle.message}")
        return MeetingPlace(host_of(self._spec, self._node_ip), self._lease.ports)

    async def report(self) -> WorkerReport:
        """How the worker is, from what is known; asks the engine nothing."""
        spec, running = self._spec, self._running
        sample = running.watch.sample if running is not None else None
        return WorkerReport(
            id=spec.id,
            role=spec.role,
            state=self._lifecycle.state,
            message=self._lifecycle.message,
            node_ip=self._node_ip,
            url=facts.url(running.context) if running is not None else "",
            started_at_s=self._started_at_s,
            stage_s=self._lifecycle.stage_s(time.monotonic()),
            fingerprint=self._fingerprint,
            max_model_len_tokens=spec.max_model_len_tokens,
            kv_bytes_per_token=spec.kv_bytes_per_token,
            kv=running.adapter.kv_address(running.context) if running is not None else {},
            load=facts.load(sample),
            counters=facts.counters(sample, self._ledger, time.time()),
            rss_bytes=self._rss_bytes,
            engine_pid=running.process.pid if running is not None else None,
            last_words=self._last_words,
            revision=spec.revision,
            node_id=self._node_id,
            node_ids=(self._node_id,) if self._node_id else (),
            metrics_path=running.adapter.probes(running.context).metrics if running else "",
            log_lines_lost=running.process.lost_lines.count if running is not None else 0,
        )

    async def read_log(self, offset: int, limit_bytes: int) -> tuple[bytes, int]:
        """Bytes of the engine's log from `offset` (negative: from the end), and where to go on."""
        return await asyncio.to_thread(logs.read_window, self._log_path, offset, limit_bytes)

    async def transfers(self, after_seq: int) -> list[tuple[int, TransferRecord]]:
        """Transfer records numbered above `after_seq`, at most the last few thousand."""
        return self._ledger.after(after_seq)

    async def release(self, request_ids: list[str]) -> None:
        """Ask the engine to free blocks it keeps for requests whose id contains one of these.

        Says nothing of the outcome: a record with outcome `released` follows, or the lease runs
        out."""
        if not send_release(self._runtime_dir / "release", request_ids):
            log.warning("%s release not heard requests=%d", self._spec.id, len(request_ids))

    async def quiesce(self, grace_s: float) -> bool:
        """Wait until nothing is in hand and no peer still pulls blocks, for up to `grace_s`, as
        before a change of role. Whether it is so; False at once if the worker is not READY.

        The caller sees to it that no new work comes. The worker stays READY, nothing is stopped.
        Cancel: safe."""
        running = self._running
        if running is None or self._lifecycle.state is not WorkerState.READY:
            return False
        until_s = time.monotonic() + grace_s
        in_hand = await self._until_empty(running, lambda: until_s, lambda _: None)
        return in_hand.is_nothing and self._lifecycle.state is WorkerState.READY

    async def stop(self, grace_s: float) -> None:
        """Let requests in hand end for up to `grace_s`, then end the engine. Returns when nothing
        of it is left. Further calls wait for the same end, and may shorten the grace.

        Cancel: safe; the stop goes on."""
        self._drain_until_s = min(self._drain_until_s, time.monotonic() + grace_s)
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(), name=f"end {self._spec.id}")
        await asyncio.shield(self._ending)

    async def _live(self) -> None:
        try:
            async with asyncio.timeout(self._spec.pool.start_timeout_s):
                running = await self._begin()
                is_ready = await self._unless_exited(self._become_ready(running))
            if is_ready:
                await self._unless_exited(self._watch(running))
            verb = "ended" if is_ready else f"ended while {self._lifecycle.state}"
            how = await running.process.exited
            await self._fail(f"the engine {verb}: {how}", how.was_killed)
        except TimeoutError:
            await self._fail(self._too_slow())
        except (ClusterError, OSError) as error:
            await self._fail(str(error))
        except Exception as error:
            # A mistake of ours must not look like a worker that is still starting.
            log.exception("%s worker broke", self._spec.id)
            await self._fail(f"{type(error).__name__}: {error}")

    async def _begin(self) -> _Running:
        spec = self._spec
        adapter = engine_adapter(spec.pool.engine)
        needs = adapter.ports(spec.pool, spec.island)
        self._lease = reserve(needs, host_of(spec, self._node_ip), self._rng)
        self._resources.callback(self._lease.close)
        self._has_met.set()
        check_socket_path(self._runtime_dir / "transfers")
        self._runtime_dir.mkdir(mode=0o700, parents=True)
        self._resources.callback(shutil.rmtree, self._runtime_dir, ignore_errors=True)
        context = await launch_context(
            spec, self._node_ip, self._lease.ports, self._runtime_dir, self._gang
        )
        launch = adapter.launch(context)
        secret_files.write(self._runtime_dir, launch.secret_files)
        listener = TransferSocket(self._runtime_dir / "transfers", self._ledger)
        listener.open()
        self._resources.callback(listener.close)
        session = await self._resources.enter_async_context(
            aiohttp.ClientSession(timeout=_HTTP_TIMEOUT)
        )
        process = EngineProcess(
            launch.argv,
            engine_environment(
                os.environ,
                launch,
                spec.owner,
                self._runtime_dir / "transfers",
                self._runtime_dir / "release",
                link_package(self._runtime_dir),
            ),
            spec.owner,
            self._log_path,
            self._runtime_dir,
        )
        probes = adapter.probes(context)
        client = EngineClient(facts.url(context), spec.engine_key, session, probes)
        name, hung_after_s = spec.model.public_name, spec.health.hung_after_s
        watch = EngineWatch(client, adapter.metrics, name, hung_after_s)
        self._running = _Running(adapter, context, launch, process, client, watch)
        self._resources.push_async_callback(process.stop, TERM_GRACE_S)
        self._kills.append(memory.kills_so_far())
        await process.start()
        return self._running

    async def _unless_exited(self, work: Coroutine[Any, Any, None]) -> bool:
        """Do `work`, but only for as long as the engine lives. Whether it was done."""
        assert self._running is not None
        exited = self._running.process.exited
        task = asyncio.create_task(work, name=f"follow {self._spec.id}")
        try:
            watched: set[asyncio.Future[Any]] = {task, exited}
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            if exited.done():
                return False
            await task
            return True
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _become_ready(self, running: _Running) -> None:
        if self._spec.node_rank > 0:
            await running.process.runs.wait()
            self._move(Cause.RUNS)
            return
        while not await running.client.is_up():
            if self._lifecycle.state is WorkerState.STARTING and self._has_spoken():
                self._move(Cause.SPOKE)
            await asyncio.sleep(_START_POLL_S)
        self._move(Cause.LISTENS)
        while why_not := await running.watch.probe(None):
            self._lifecycle.note(why_not)
            await asyncio.sleep(_START_POLL_S)
        running.watch.sample = sample = await running.client.sample(running.adapter.metrics)
        self._fingerprint = facts.fingerprint(
            self._spec,
            running.adapter,
            running.context,
            running.launch,
            sample,
            await running.client.version(),
        )
        self._move(Cause.GENERATED)

    async def _watch(self, running: _Running) -> None:
        """Follow what each look shows until cancelled. Raises: EngineFailed: it says it is dead."""
        while self._spec.node_rank > 0:
            await self._measure(running)
            await asyncio.sleep(health.REST_PERIOD_S)
        looks = 0
        async with contextlib.aclosing(running.watch.verdicts()) as verdicts:
            async for verdict in verdicts:
                self._follow(verdict)
                if looks % _MEMORY_EVERY_LOOKS == 0:
                    await self._measure(running)
                looks += 1

    async def _measure(self, running: _Running) -> None:
        self._rss_bytes = await asyncio.to_thread(running.process.rss_bytes)
        self._kills.append(await asyncio.to_thread(memory.kills_so_far))

    def _follow(self, verdict: health.Verdict) -> None:
        state = self._lifecycle.state
        if isinstance(verdict, health.Hung) and state is WorkerState.READY:
            self._move(Cause.STUCK, verdict.why)
        elif isinstance(verdict, health.Healthy) and state is WorkerState.HUNG:
            self._move(Cause.MOVED)

    async def _fail(self, why: str, was_killed: bool = False) -> None:
        last_words = await asyncio.to_thread(logs.last_words, self._log_path)
        if self._running is not None:
            kills = await asyncio.to_thread(memory.kills_so_far)
            short = memory.shortage(was_killed, self._kills[0], kills, last_words)
            why = f"{why}; {short}" if short else why
            lost = self._running.process.lost_lines
            last_words += (f"pdcluster: {lost}",) if lost.count else ()
        if self._lifecycle.state is not WorkerState.DRAINING:
            self._last_words = last_words
            self._move(Cause.BROKE, why)
        self._has_met.set()
        await self._close()

    async def _close(self) -> None:
        """End the engine if it runs, then give back ports, sockets and folder."""
        if self._closing is None:
            self._closing = asyncio.create_task(
                self._resources.aclose(), name=f"close {self._spec.id}"
            )
        await asyncio.shield(self._closing)

    async def _end(self) -> None:
        if not self._lifecycle.has_ended:
            was_ready = self._lifecycle.state is WorkerState.READY
            self._move(Cause.STOP_ASKED)
            if was_ready and self._running is not None and self._spec.node_rank == 0:
                await self._drain(self._running)
        self._has_met.set()
        if self._gang is not None and self._spec.node_rank == 0:
            # Here and not by whoever asked: who may be gone when the last request ends.
            self._gang.end_others()
        if self._living is not None:
            self._living.cancel()
            await asyncio.wait({self._living})
        await self._close()
        if not self._lifecycle.has_ended:
            self._move(Cause.GONE, self._cut_off)

    async def _drain(self, running: _Running) -> None:
        """Wait until nothing is in hand or the grace is over; the report says how far it is."""

        def note(in_hand: InHand) -> None:
            left_s = self._drain_until_s - time.monotonic()
            self._lifecycle.note(f"{in_hand}; {max(0.0, left_s):.0f} s left")

        if time.monotonic() < self._drain_until_s:
            in_hand = await self._until_empty(running, lambda: self._drain_until_s, note)
            exited = running.process.exited
            if exited.done():
                self._cut_off = f"the engine ended by itself: {exited.result()}"
            elif not in_hand.is_nothing:
                self._cut_off = f"{in_hand} when its time was over"
            self._lifecycle.note(self._cut_off or "its engine is being ended")

    async def _until_empty(
        self, running: _Running, until_s: Callable[[], float], note: Callable[[InHand], None]
    ) -> InHand:
        exited = running.process.exited

        async def ask() -> EngineSample | None:
            return None if exited.done() else await running.watch.ask()

        def left_s() -> float:
            return 0.0 if exited.done() else until_s() - time.monotonic()

        return await until_empty(ask, self._ledger, self._spec.island.lease_s, left_s, note)

    def _move(self, cause: Cause, message: str = "") -> None:
        self._lifecycle.move(cause, time.monotonic(), message)

    def _has_spoken(self) -> bool:
        try:
            return self._log_path.stat().st_size > 0
        except FileNotFoundError:
            return False

    def _too_slow(self) -> str:
        limit_s = self._spec.pool.start_timeout_s
        last = f" ({self._lifecycle.message})" if self._lifecycle.message else ""
        return (
            f"not ready after {limit_s:g} s, still {self._lifecycle.state}{last}; "
            f"raise start_timeout_s of pool {self._spec.pool.name} if the log shows it at work"
        )
