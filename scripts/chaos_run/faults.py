"""How each kind of fault is done to a running cluster, and what must be so afterwards.

A fault waits until it may hit somebody: at least one usable worker of the same role stays, at
least one gateway replica does. Then it is done, and its end is watched in the background: a
worker that was ended must come back as a new generation, one that was merely slow must not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import aiohttp
import psutil

from chaos_run import log_disk, shape
from chaos_run.home import CommandFailed, Home
from chaos_run.schedule import ENDS_ENGINE, PLANNED, STANDS_STILL, Kind, Planned
from chaos_run.targets import LOOK_EVERY_S, Targets
from chaos_run.traffic import Record
from cluster.control.state import ClusterStatus
from cluster.errors import ClusterError
from cluster.identity import Role, WorkerId, WorkerState
from cluster.workers.health import detection_bound_s
from cluster.workers.report import WorkerReport

# From the worker, through the controller, to a look of ours, on a machine that is at its limit.
_TOLD_WITHIN_S = 3.0
_FAULT_LASTS_S = 2.0
_DISK_FULL_S = 4.0
_DRAIN_GRACE_S = 5


@dataclass
class Done:
    """A fault that was done. Times are monotonic seconds."""

    planned: Planned
    at_s: float
    target: str
    noticed_s: float | None = None  # from the fault until the controller said so
    whole_s: float | None = None  # from the fault until all was as it should be again
    wrong: str = ""  # what was otherwise than promised
    refused: str = ""  # of a change: why it was not carried out


@dataclass
class Faults:
    """`await strike(planned)` one after the other; `await settled()` at the end."""

    in_flight: Callable[[], list[Record]]
    targets: Targets
    done: list[Done] = field(default_factory=list)
    _met_an_end: list[Record] = field(default_factory=list)
    _watching: set[asyncio.Task[None]] = field(default_factory=set)
    _stopped: set[int] = field(default_factory=set)
    _is_changing: bool = False

    @property
    def _home(self) -> Home:
        return self.targets.home

    @property
    def _hung_after_s(self) -> float:
        found: float = self._home.serving["health"]["hung_after_s"]
        return found

    async def strike(self, planned: Planned) -> Done:
        """Do it as soon as it may be. Raises: NotRecovered."""
        kind = planned.kind
        if kind in ENDS_ENGINE:
            # Attempts are bounded, and who meets two engines that die is taken for the cause.
            await self.targets.until(self._last_end_is_over, kind)
        if kind is Kind.KILL_CONTROLLER:
            return await self._kill_controller(planned)
        if kind is Kind.KILL_GATEWAY:
            return await self._kill_gateway(planned)
        if kind in PLANNED:
            return await self._change(planned)
        return await self._hit_worker(planned)

    def _last_end_is_over(self) -> bool:
        """Whether the engines that were ended are known to be, and whoever may have met one of them
        has its answer."""
        ended = [done for done in self.done if done.planned.kind in ENDS_ENGINE]
        are_known = all(done.noticed_s is not None or done.wrong for done in ended)
        return are_known and all(record.ended_s for record in self._met_an_end)

    async def settled(self, replicas: dict[str, int]) -> None:
        """Undo what changes of shape are left, wait for the end of all that was done.

        Raises: NotRecovered."""
        await asyncio.gather(*self._watching)
        self.targets.hurt.clear()
        for pool, count in replicas.items():
            status = await self.targets.status()
            wanted = next(one.desired for one in status.pools if one.name == pool)
            if wanted != count:
                await self._undo("scale", pool, str(count))
        status = await self.targets.status()
        for report in status.workers:
            if report.role.value != report.id.pool and report.state is WorkerState.READY:
                await self._undo("role", report.id.name, report.id.pool)

        async def is_whole() -> bool:
            found = await self.targets.status()
            roles = [report.role.value == report.id.pool for report in found.workers]
            return _is_whole(found) and all(roles)

        await self.targets.until(is_whole, "the whole cluster")

    async def close(self) -> None:
        """Let nothing of a fault outlast the run. May be called twice."""
        for task in self._watching:
            task.cancel()
        await asyncio.gather(*self._watching, return_exceptions=True)
        for pid in list(self._stopped):
            self._go_on(pid)
        log_disk.make_room(self._home)

    # Workers

    async def _hit_worker(self, planned: Planned) -> Done:
        target = await self.targets.one(planned)
        name, kind = str(target.id), planned.kind
        pid = target.engine_pid
        assert pid is not None
        self.targets.hurt.add(name)
        if kind is Kind.DISK_FULL:
            await asyncio.to_thread(log_disk.fill, self._home)
        done = self._begin(planned, name)
        if kind in (Kind.KILL_PREFILL, Kind.KILL_DECODE, Kind.DISK_FULL):
            _kill(pid)
        elif kind is Kind.KILL_ACTOR:
            _kill(await asyncio.to_thread(self._home.owner_of, name))
        elif kind is Kind.KILL_SUPERVISOR:
            _kill(await asyncio.to_thread(self._home.supervisor_of, name))
        elif kind in (Kind.KILL_CHILD, Kind.STOP_CHILD):
            child = next(iter(self._home.children_of(pid)), pid)
            if kind is Kind.KILL_CHILD:
                _kill(child)
            else:
                self._stop(child)
        elif kind is Kind.CRASH:
            await _simulate(target.url, crash_at_token=6)
        elif kind in (Kind.STOP_SHORT, Kind.STOP_LONG):
            self._stop(pid)
        elif kind is Kind.LINK:
            await _simulate(target.url, fail_transfers=True)
        elif kind is Kind.ERRORS:
            await _simulate(target.url, fail_next=2)
        elif kind is Kind.RECOMPUTE:
            await _simulate(target.url, recompute_at_token=5)
        self._watch(self._follow(done, target, pid))
        return done

    def _stop(self, pid: int) -> None:
        self._stopped.add(pid)
        os.kill(pid, signal.SIGSTOP)

    def _go_on(self, pid: int) -> None:
        self._stopped.discard(pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    async def _follow(self, done: Done, target: WorkerReport, pid: int) -> None:
        kind = done.planned.kind
        if kind in ENDS_ENGINE:
            await asyncio.gather(self._comes_back(done, target), self._make_room(kind))
            return
        await asyncio.sleep(self._hung_after_s / 2 if kind is Kind.STOP_SHORT else _FAULT_LASTS_S)
        if kind is Kind.STOP_SHORT:
            self._go_on(pid)
            await asyncio.sleep(self._hung_after_s)
        else:
            await _simulate(target.url, fail_transfers=False, fail_next=0, recompute_at_token=None)
        status = await self.targets.status()
        is_same = any(r.id == target.id and r.state is WorkerState.READY for r in status.workers)
        if not is_same:
            done.wrong = f"{target.id} was to be left alone, and was not"
        done.whole_s = time.monotonic() - done.at_s
        self.targets.hurt.discard(str(target.id))

    async def _comes_back(self, done: Done, target: WorkerReport) -> None:
        """Until a later generation is ready in the same place; or there is no such place."""
        until_s = done.at_s + self.targets.back_within_s
        while True:
            status = await self.targets.status()
            now_s = time.monotonic()
            here = [r for r in status.workers if r.id.name == target.id.name]
            is_seen = all(r.id != target.id or r.state is not WorkerState.READY for r in here)
            if is_seen and done.noticed_s is None:
                done.noticed_s = now_s - done.at_s
                self._met_an_end = self.in_flight()
                self._judge(done)
            pool = next(pool for pool in status.pools if pool.name == target.id.pool)
            is_back = any(
                r.id.generation > target.id.generation and r.state is WorkerState.READY
                for r in here
            )
            if is_back or (is_seen and not here and target.id.index >= pool.desired):
                done.whole_s = now_s - done.at_s
                break
            if now_s > until_s:
                done.wrong = f"{target.id} was not replaced within {self.targets.back_within_s:g} s"
                break
            await asyncio.sleep(LOOK_EVERY_S)
        self.targets.hurt.discard(str(target.id))

    def _judge(self, done: Done) -> None:
        """Whether what stands still was noticed as soon as is promised."""
        bound_s = detection_bound_s(self._hung_after_s) + _TOLD_WITHIN_S
        if done.planned.kind in STANDS_STILL and (done.noticed_s or 0.0) > bound_s:
            done.wrong = f"{done.target} was noticed after {done.noticed_s:.1f} s, not {bound_s:g}"

    # Controller, gateways

    async def _kill_controller(self, planned: Planned) -> Done:
        await self.targets.status()
        (process,) = await asyncio.to_thread(self._home.of_kind, "ControllerActor")
        before = await self.targets.status()
        done = self._begin(planned, "controller")
        process.send_signal(signal.SIGKILL)

        async def is_another() -> bool:
            now = await self.targets.status()
            is_later: bool = now.controller_started_at_s > before.controller_started_at_s
            return is_later

        # Not in the background: what other faults do is read from the controller.
        await self.targets.until(is_another, planned.kind)
        done.whole_s = time.monotonic() - done.at_s
        return done

    async def _kill_gateway(self, planned: Planned) -> Done:
        found: list[psutil.Process] = []

        async def are_there() -> bool:
            found[:] = await asyncio.to_thread(self._listening_gateways)
            return len(found) > 1

        await self.targets.until(are_there, planned.kind)
        process = planned.choose(found)
        done = self._begin(planned, f"gateway pid {process.pid}")
        process.send_signal(signal.SIGKILL)

        async def come_back() -> None:
            await self.targets.until(are_there, planned.kind)
            done.whole_s = time.monotonic() - done.at_s

        self._watch(come_back())
        return done

    def _listening_gateways(self) -> list[psutil.Process]:
        port = self._home.serving["gateway"]["port"]
        found = []
        for process in self._home.of_kind("GatewayReplica"):
            with contextlib.suppress(psutil.Error):
                if any(
                    connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
                    for connection in process.net_connections("tcp")
                ):
                    found.append(process)
        return found

    # Changes that an operator asks for

    async def _change(self, planned: Planned) -> Done:
        kind = planned.kind
        # One at a time: what one changes decides what the next may.
        await self.targets.until(lambda: not self._is_changing, kind)
        words: tuple[str, ...]
        hurt = ""
        if kind is Kind.SCALE:
            words = await self._scale(planned)
        elif kind is Kind.ROLE:
            target = await self._who_may_change_role(planned)
            role = Role.DECODE if target.role is Role.PREFILL else Role.PREFILL
            words, hurt = ("role", target.id.name, role.value), str(target.id)
        else:
            target = await self.targets.one(planned)
            words, hurt = ("drain", target.id.name), str(target.id)
        self.targets.hurt |= {hurt} - {""}
        self._is_changing = True
        done = self._begin(planned, " ".join(words))

        async def follow() -> None:
            try:
                await self._command(*words, "--grace", str(_DRAIN_GRACE_S))
                done.whole_s = time.monotonic() - done.at_s
            except CommandFailed as failed:
                done.refused = str(failed)
            finally:
                self._is_changing = False
                self.targets.hurt.discard(hurt)

        self._watch(follow())
        return done

    async def _scale(self, planned: Planned) -> tuple[str, ...]:
        status = await self.targets.status()
        pool = planned.choose(status.pools)
        count = planned.choose(shape.sizes(status, pool, _usual(self._home, pool.name)))
        if count < pool.desired:
            await self.targets.until(lambda: self._may_shrink(pool.name, count), planned.kind)
        return ("scale", pool.name, str(count))

    async def _may_shrink(self, pool: str, count: int) -> bool:
        """Those with the highest index go. Whether a usable one stays of each of their roles, and
        nothing is being done to them now."""
        hurt = [WorkerId.parse(name) for name in self.targets.hurt]
        if any(worker.pool == pool and worker.index >= count for worker in hurt):
            return False
        status = await self.targets.status()
        usable = await self.targets.usable()
        return shape.leaves_one(status.workers, usable, pool, count)

    async def _who_may_change_role(self, planned: Planned) -> WorkerReport:
        found: list[WorkerReport] = []

        async def is_there() -> bool:
            usable = await self.targets.usable()
            others = [r for r in usable if sum(one.role is r.role for one in usable) > 1]
            found[:] = shape.may_change_role(await self.targets.status(), others)
            return bool(found)

        await self.targets.until(is_there, planned.kind)
        return planned.choose(found)

    async def _undo(self, *words: str) -> None:
        # Whatever stands against it now, the whole cluster is waited for.
        with contextlib.suppress(CommandFailed):
            await self._command(*words)

    async def _command(self, *words: str) -> str:
        return await asyncio.to_thread(self._home.command, *words, "--cluster", self._home.cluster)

    async def _make_room(self, kind: Kind) -> None:
        if kind is Kind.DISK_FULL:
            await asyncio.sleep(_DISK_FULL_S)
            log_disk.make_room(self._home)

    # Waiting

    def _begin(self, planned: Planned, target: str) -> Done:
        done = Done(planned, time.monotonic(), target)
        self.done.append(done)
        return done

    def _watch(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._watching.add(task)


def _is_whole(status: ClusterStatus) -> bool:
    return all(pool.ready == pool.desired == pool.present for pool in status.pools)


def _usual(home: Home, pool: str) -> int:
    found: int = next(p for p in home.serving["pools"] if p["name"] == pool)["replicas"]["initial"]
    return found


def _kill(pid: int | None) -> None:
    """None: it was gone already."""
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


async def _simulate(url: str, **faults: object) -> None:
    """Tell a simulated engine what is broken in it now. One that died meanwhile is told nothing."""
    with contextlib.suppress(aiohttp.ClientError, ClusterError):
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{url}/simulate/fault", json=faults) as response,
        ):
            response.raise_for_status()
