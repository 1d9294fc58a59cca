"""One transfer per request: pair, speak the connector's dialect, keep the lease, record the end.

Called by the gateway, in this order:

    transfer = coordinator.begin(...)              OFFERED
    fields of the two calls, see below             GRANTED, PULLING
    transfer.finish() | transfer.abandon(failure)  PULLED | RELEASED

    prefill first   prefill_fields(); prefilled(answer): GRANTED, prefill keeps the blocks;
                    decode_fields(): PULLING
    decode first    waiting_fields(url): PULLING; pushing_fields(asked)
    together        shared_fields(): PULLING

Bytes never pass here. What prefill pins ends in one of four ways: pulled, released at once through
`Releaser`, expired by the engine's own lease, or lost with the worker (see `lease`). Where prefill
pins nothing once it has answered there is no lease, and nothing to release.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import aiohttp

from cluster.errors import EngineFailed, KvMismatch, PeerGone
from cluster.identity import ENDED as WORKER_ENDED
from cluster.identity import WorkerId
from cluster.kv import fingerprint, lease
from cluster.kv.dialects import (
    QUERY_TIMEOUT_S,
    DecodeFirst,
    Dialect,
    Fields,
    Order,
    PrefillFirst,
    Together,
    make_dialects,
)
from cluster.kv.lease import Cause, Failure, State
from cluster.observe.kv_metrics import KvMetrics
from cluster.snapshot import Link, Snapshot, WorkerView

RELEASE_TIMEOUT_S = 10.0
# Ids per call to a worker: one datagram to its engine must hold them.
RELEASE_BATCH = 256

_OF_ITSELF = {State.EXPIRED: Failure.EXPIRED, State.LOST: Failure.LOST}

log = logging.getLogger(__name__)


class Releaser(Protocol):
    """Tells a worker to let go of blocks that nobody will pull."""

    async def release(self, worker: WorkerId, request_ids: list[str]) -> None: ...


class Transfer:
    """One request's blocks, on their way from one worker to another.

    Exactly one of `finish` and `abandon` ends it; whatever comes later changes nothing."""

    def __init__(
        self,
        coordinator: Coordinator,
        dialect: Dialect,
        request_id: str,
        prompt_tokens: int,
        prefill: WorkerView,
        decode: WorkerView,
        lease_s: float,
    ) -> None:
        self.request_id = request_id
        self.prompt_tokens = prompt_tokens
        self.prefill = prefill
        self.decode = decode
        self.lease_s = lease_s
        self.dialect = dialect
        self.state = State.OFFERED
        self.granted_at_s: float | None = None
        self._coordinator = coordinator
        self._grant: Fields = {}

    def __repr__(self) -> str:
        return (
            f"<Transfer {self.request_id} {self.prefill.id} to {self.decode.id} {self.state} "
            f"prompt_tokens={self.prompt_tokens}>"
        )

    @property
    def order(self) -> Order:
        return self.dialect.order

    # -- prefill first ---------------------------------------------------------------------------

    async def prefill_fields(self) -> Fields:
        """Body fields of the prefill call. Raises: EngineFailed. Cancel: safe."""
        return await self._as_prefill_first().prefill_fields(self.request_id, self.prefill)

    def prefilled(self, answer: Mapping[str, Any]) -> None:
        """The prefill engine's parsed answer. Raises: EngineFailed if nothing can be pulled."""
        self._grant = self._as_prefill_first().grant(self.prefill, answer)
        self._coordinator._move(self, Cause.PREFILLED)

    async def decode_fields(self) -> Fields:
        """Body fields of the decode call.

        Raises: EngineFailed if the lease has run out meanwhile; PeerGone if the prefill worker was
        replaced. Cancel: safe."""
        self._coordinator._expire()
        self._still_there()
        dialect = self._as_prefill_first()
        fields = await dialect.decode_fields(self.request_id, self.prefill, self._grant)
        self._still_there()
        self._coordinator._move(self, Cause.DECODE_ASKED)
        return fields

    # -- decode first ----------------------------------------------------------------------------

    def waiting_fields(self, metaserver: str) -> Fields:
        """Body fields of the decode call, whose engine will post to `metaserver` (a URL)."""
        fields = self._as_decode_first().decode_fields(metaserver)
        self._coordinator._move(self, Cause.DECODE_WAITS)
        return fields

    def pushing_fields(self, asked: Any) -> Fields:
        """Body fields of the prefill call, from the JSON that decode's engine posted.

        Raises: EngineFailed if nothing can be pushed on it; PeerGone if the prefill worker was
        replaced."""
        self._still_there()
        return self._as_decode_first().prefill_fields(self.request_id, self.decode, asked)

    # -- together --------------------------------------------------------------------------------

    def shared_fields(self) -> Fields:
        """Body fields of both calls. Raises: EngineFailed."""
        assert isinstance(self.dialect, Together), f"{self!r} goes {self.order}"
        fields = self.dialect.fields(self.prefill)
        self._coordinator._move(self, Cause.DECODE_WAITS)
        return fields

    # -- the end ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """Decode answered, or its first byte arrived: it has the blocks."""
        self._coordinator._move(self, Cause.FINISHED)

    def abandon(self, failure: Failure) -> None:
        """Nobody will take the blocks: has prefill let go of them now. Never raises.

        Call it after the decode call, if there is one, was closed: an engine that still reads the
        blocks would read what comes after them."""
        self._coordinator._move(self, Cause.ABANDONED, failure)

    def _as_prefill_first(self) -> PrefillFirst:
        assert isinstance(self.dialect, PrefillFirst), f"{self!r} goes {self.order}"
        return self.dialect

    def _as_decode_first(self) -> DecodeFirst:
        assert isinstance(self.dialect, DecodeFirst), f"{self!r} goes {self.order}"
        return self.dialect

    def _still_there(self) -> None:
        if self.state is State.LOST:
            raise PeerGone(self.prefill.id.name, "it was replaced before decode pulled its blocks")
        if self.state is State.EXPIRED:
            raise EngineFailed(
                self.prefill.id.name,
                None,
                f"its lease of {self.lease_s:g} s ran out before decode was asked",
            )


class Coordinator:
    """Lives in one event loop. Memory: the transfers that are open, and no more."""

    def __init__(
        self,
        releaser: Releaser,
        metrics: KvMetrics,
        clock: Callable[[], float],
        session: aiohttp.ClientSession | None = None,
    ) -> None:
        """`clock`: monotonic seconds. `session`: for questions to bootstrap servers; without one
        the coordinator makes its own when it needs it, and closes that."""
        self._releaser = releaser
        self._metrics = metrics
        self._clock = clock
        self._session = session
        self._owns_session = session is None
        self._dialects = make_dialects(self._get_json)
        self._open: dict[int, Transfer] = {}
        # Those whose lease may run out by the clock, per length of lease in the order of grants.
        self._timed: dict[float, OrderedDict[int, Transfer]] = {}
        self._leases: Counter[WorkerId] = Counter()
        self._generations: dict[tuple[str, int], int] = {}
        self._to_release: dict[WorkerId, list[str]] = {}
        self._releasing: dict[WorkerId, asyncio.Task[None]] = {}

    def begin(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        prefill: WorkerView,
        decode: WorkerView,
        link: Link,
    ) -> Transfer:
        """Raises: KvMismatch if the two engines' blocks are unlike. `request_id` must be unique:
        it is part of both engines' ids, and what a release names."""
        try:
            fingerprint.check(prefill, decode)
        except KvMismatch:
            self._metrics.mismatches.labels(prefill.id.pool, decode.id.pool).inc()
            raise
        self._expire()
        self._note_generation(prefill.id)
        transfer = Transfer(
            self,
            self._dialects[link.connector],
            request_id,
            len(prompt_token_ids),
            prefill,
            decode,
            link.lease_s,
        )
        self._open[id(transfer)] = transfer
        return transfer

    def open_leases(self, worker: WorkerId | None = None) -> int:
        """Prompts whose blocks `worker` (or all of them) keeps for transfers of this gateway."""
        self._expire()
        return self._leases.total() if worker is None else self._leases[worker]

    @property
    def open_transfers(self) -> int:
        return len(self._open)

    def observe(self, snapshot: Snapshot) -> None:
        """Give up what was replaced. A worker that is merely missing may come back."""
        for link in snapshot.links:
            self._metrics.know(
                link.prefill_pool, link.decode_pool, link.connector, lease.ENDED, Failure
            )
        for worker in snapshot.workers:
            self._note_generation(worker.id)
            if worker.state in WORKER_ENDED:
                self._gone(worker.id)
        self._expire()

    async def close(self) -> None:
        """Send what releases are under way, then stop. May be called twice."""
        for transfer in list(self._open.values()):
            transfer.abandon(Failure.GIVEN_UP)
        while self._releasing:
            await asyncio.wait(list(self._releasing.values()))
        if self._owns_session and self._session is not None:
            await self._session.close()
            self._session = None

    # -- the one writer of a transfer's state ----------------------------------------------------

    def _move(self, transfer: Transfer, cause: Cause, failure: Failure | None = None) -> None:
        before = transfer.state
        after = lease.step(before, cause)
        if after is before:
            return
        transfer.state = after
        pool = transfer.prefill.id.pool
        link = (pool, transfer.decode.id.pool, transfer.dialect.connector)
        if after is State.GRANTED:
            transfer.granted_at_s = self._clock()
            self._timed.setdefault(transfer.lease_s, OrderedDict())[id(transfer)] = transfer
            self._leases[transfer.prefill.id] += 1
            self._metrics.open.labels(pool).inc()
        if after in lease.ENDED or (after is State.PULLING and transfer.dialect.has_heartbeats):
            self._untime(transfer)
        if after not in lease.ENDED:
            return
        del self._open[id(transfer)]
        if transfer.granted_at_s is not None:
            self._leases[transfer.prefill.id] -= 1
            if not self._leases[transfer.prefill.id]:
                del self._leases[transfer.prefill.id]
            self._metrics.open.labels(pool).dec()
            self._metrics.lease_s.labels(*link).observe(self._clock() - transfer.granted_at_s)
        self._metrics.transfers.labels(*link, after.value).inc()
        failure = _OF_ITSELF.get(after, failure)
        if failure is not None:
            self._metrics.failures.labels(*link, failure.value).inc()
        if after is State.RELEASED:
            log.info("%r given up: %s", transfer, failure or cause.value)
            if transfer.dialect.keeps_blocks:
                self._release_soon(transfer.prefill.id, transfer.request_id)

    def _expire(self) -> None:
        """End the leases that the prefill engines have ended by themselves."""
        now_s = self._clock()
        for lease_s, timed in list(self._timed.items()):
            while timed:
                oldest = next(iter(timed.values()))
                assert oldest.granted_at_s is not None
                if oldest.granted_at_s + lease_s > now_s:
                    break
                self._move(oldest, Cause.LEASE_RAN_OUT)

    def _untime(self, transfer: Transfer) -> None:
        timed = self._timed.get(transfer.lease_s)
        if timed is not None:
            timed.pop(id(transfer), None)
            if not timed:
                del self._timed[transfer.lease_s]

    def _note_generation(self, worker: WorkerId) -> None:
        place = (worker.pool, worker.index)
        known = self._generations.get(place)
        if known is not None and known < worker.generation:
            self._gone(WorkerId(worker.pool, worker.index, known))
        if known is None or known < worker.generation:
            self._generations[place] = worker.generation

    def _gone(self, worker: WorkerId) -> None:
        for dialect in self._dialects.values():
            dialect.forget(worker)
        self._to_release.pop(worker, None)
        for transfer in [held for held in self._open.values() if held.prefill.id == worker]:
            self._move(transfer, Cause.WORKER_REPLACED)

    # -- release, in the background --------------------------------------------------------------

    def _release_soon(self, worker: WorkerId, request_id: str) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return  # the gateway's loop has ended: the lease runs out
        self._to_release.setdefault(worker, []).append(request_id)
        if worker not in self._releasing:
            self._releasing[worker] = loop.create_task(
                self._release(worker), name=f"release {worker}"
            )

    async def _release(self, worker: WorkerId) -> None:
        """Tell `worker`, in as few calls as possible: a thousand clients may leave at once."""
        try:
            while waiting := self._to_release.pop(worker, None):
                for start in range(0, len(waiting), RELEASE_BATCH):
                    await self._release_batch(worker, waiting[start : start + RELEASE_BATCH])
        finally:
            self._releasing.pop(worker, None)

    async def _release_batch(self, worker: WorkerId, request_ids: list[str]) -> None:
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                await self._releaser.release(worker, request_ids)
        except Exception as error:
            self._metrics.release_failures.labels(worker.pool).inc(len(request_ids))
            log.warning(
                "release not delivered worker=%s requests=%d first=%s error=%r; the lease runs out "
                "instead",
                worker,
                len(request_ids),
                request_ids[0],
                error,
            )

    async def _get_json(self, url: str) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession()
        timeout = aiohttp.ClientTimeout(total=QUERY_TIMEOUT_S)
        async with self._session.get(url, timeout=timeout) as response:
            response.raise_for_status()
            return await response.json(content_type=None)
