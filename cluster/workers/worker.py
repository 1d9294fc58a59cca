"""One worker: one engine on one node, from its start to its last process.

    start ─▶ _live: _begin (ports, command, supervisor) ─▶ _become_ready ─▶ _watch
    stop  ─▶ _end: drain ─▶ supervisor ends the tree ─▶ STOPPED

A plain async class without Ray; `workers.handle` makes an actor of it. The state moves only in
`workers.lifecycle`, health is judged in `workers.health`, processes are the supervisor's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import shutil
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp

from cluster.engines.base import EngineAdapter, Launch, LaunchContext
from cluster.engines.client import EngineClient, EngineSample
from cluster.engines.registry import adapter as engine_adapter
from cluster.errors import ClusterError, EngineFailed, PeerGone
from cluster.identity import WorkerState
from cluster.settings import ClusterPaths
from cluster.snapshot import Fingerprint
from cluster.transfers import TransferRecord
from cluster.workers import facts, health, logs, secret_files
from cluster.workers.environment import engine_environment, link_package
from cluster.workers.gang import Gang, MeetingPlace
from cluster.workers.ledger import Ledger, TransferSocket, check_socket_path, send_release
from cluster.workers.lifecycle import Cause, Lifecycle
from cluster.workers.ports import PortLease, reserve
from cluster.workers.preparation import host_of, launch_context
from cluster.workers.process import EngineProcess
from cluster.workers.report import WorkerReport
from cluster.workers.spec import WorkerSpec

log = logging.getLogger(__name__)

SAMPLE_PERIOD_S = 1.0
# An engine without work is looked at less often: its /metrics page is half of what it costs idle.
_REST_AFTER_SAMPLES = 10
_REST_PERIOD_S = 5.0
# Between SIGTERM and SIGKILL when a worker is stopped; its requests have ended before that.
TERM_GRACE_S = 2.0
_START_POLL_S = 0.2
_DRAIN_POLL_S = 0.2
_SAMPLE_BOUND_S = 5.0
_PROBE_BOUND_S = 10.0
# An engine's first token may take as long as it likes: the start as a whole is bounded.
_HTTP_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
# Reading /proc for the memory of a tree costs some milliseconds.
_RSS_EVERY_SAMPLES = 5


@dataclass(frozen=True, slots=True)
class _Running:
    """What exists from the moment the engine was started until it is ended."""

    adapter: EngineAdapter
    context: LaunchContext
    launch: Launch
    process: EngineProcess
    client: EngineClient


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
    ) -> None:
        paths = ClusterPaths(spec.cluster)
        self._spec = spec
        self._node_ip = node_ip
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
        self._sample: EngineSample | None = None
        self._rss_bytes = 0
        self._last_words: tuple[str, ...] = ()
        self._resources = contextlib.AsyncExitStack()
        self._living: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._drain_until_s = float("inf")

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
        spec, sample, running = self._spec, self._sample, self._running
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
            await self._fail(f"the engine {verb}: {await running.process.exited}")
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
        self._running = _Running(adapter, context, launch, process, client)
        self._resources.push_async_callback(process.stop, TERM_GRACE_S)
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
        while why_not := await self._probe(running, None):
            self._lifecycle.note(why_not)
            await asyncio.sleep(_START_POLL_S)
        self._sample = await running.client.sample(running.adapter.metrics)
        self._fingerprint = facts.fingerprint(
            self._spec,
            running.adapter,
            running.context,
            running.launch,
            self._sample,
            await running.client.version(),
        )
        self._move(Cause.GENERATED)

    async def _watch(self, running: _Running) -> None:
        """Sample until cancelled, and see whether the engine makes progress."""
        if self._spec.node_rank > 0:
            await running.process.exited
            return
        progress = health.Progress(None, time.monotonic())
        unchanged = 0
        for turn in range(sys.maxsize):
            before = self._sample
            verdict = self._judge(progress, await self._ask(running))
            has_work = self._sample is None or self._sample.running + self._sample.waiting > 0
            unchanged = 0 if has_work or self._sample != before else unchanged + 1
            is_hung = self._lifecycle.state is WorkerState.HUNG
            if is_hung or isinstance(verdict, health.Hung):
                why = verdict.why if isinstance(verdict, health.Hung) else self._lifecycle.message
                verdict = await self._confirm(running, progress, why)
            progress = verdict.progress
            self._follow(verdict)
            if turn % _RSS_EVERY_SAMPLES == 0:
                self._rss_bytes = await asyncio.to_thread(running.process.rss_bytes)
            is_resting = unchanged >= _REST_AFTER_SAMPLES
            await asyncio.sleep(_REST_PERIOD_S if is_resting else SAMPLE_PERIOD_S)

    async def _confirm(
        self, running: _Running, progress: health.Progress, why: str
    ) -> health.Verdict:
        bound_s = min(_PROBE_BOUND_S, self._spec.health.hung_after_s)
        if not await self._probe(running, bound_s):
            return health.Healthy(health.progressed(progress, time.monotonic()))
        sample = await self._ask(running)
        return health.after_failed_probe(progress, sample, time.monotonic(), why)

    def _judge(self, progress: health.Progress, sample: EngineSample | None) -> health.Verdict:
        load = facts.load(self._sample)
        in_flight = load.running + load.waiting
        hung_after_s = self._spec.health.hung_after_s
        return health.judge(progress, sample, in_flight, time.monotonic(), hung_after_s)

    def _follow(self, verdict: health.Verdict) -> None:
        state = self._lifecycle.state
        if isinstance(verdict, health.Hung) and state is WorkerState.READY:
            self._move(Cause.STUCK, verdict.why)
        elif isinstance(verdict, health.Healthy) and state is WorkerState.HUNG:
            self._move(Cause.MOVED)

    async def _ask(self, running: _Running) -> EngineSample | None:
        """The engine's metrics, or None if they do not answer in time."""
        try:
            async with asyncio.timeout(min(_SAMPLE_BOUND_S, self._spec.health.hung_after_s)):
                self._sample = await running.client.sample(running.adapter.metrics)
        except (EngineFailed, TimeoutError):
            return None
        return self._sample

    async def _probe(self, running: _Running, bound_s: float | None) -> str:
        """Ask for a real generation of one token. "" if it came, else why it did not."""
        try:
            async with asyncio.timeout(bound_s):
                await running.client.generate_one(self._spec.model.public_name)
        except EngineFailed as error:
            return str(error)
        except TimeoutError:
            return f"a generation of one token took more than {bound_s} s"
        return ""

    async def _fail(self, why: str) -> None:
        last_words = await asyncio.to_thread(logs.last_words, self._log_path)
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
            self._move(Cause.GONE)

    async def _drain(self, running: _Running) -> None:
        """Wait until nothing is in hand and no peer still pulls blocks, or the grace is over."""
        leases_until_s = time.monotonic() + self._spec.island.lease_s
        while not running.process.exited.done() and time.monotonic() < self._drain_until_s:
            sample = await self._ask(running)
            if sample is not None and sample.running + sample.waiting == 0:
                is_pulled = self._ledger.leases_open(time.time()) == 0
                if is_pulled or time.monotonic() >= leases_until_s:
                    return
            await asyncio.sleep(_DRAIN_POLL_S)

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
