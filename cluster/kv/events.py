"""Keep one BlockIndex current from the KV events of all workers of a snapshot.

Each worker that publishes (`WorkerView.kv["events"]`) is followed by one task: it subscribes, asks
the replay socket (`kv["replay"]`) for what was said before, then applies batch after batch in the
order of their sequence numbers. A number that is missing is asked for again; if it cannot be had,
the worker's entries are dropped: what may have been removed is not claimed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import zmq
import zmq.asyncio

from cluster.identity import ENDED, WorkerId
from cluster.kv.event_types import decode
from cluster.kv.index import BlockIndex
from cluster.snapshot import Snapshot

REPLAY_TIMEOUT_S = 5.0
# Batches that may pile up while a replay is read; one is a few hundred bytes to some kB.
RECEIVE_QUEUE = 100_000
END_OF_REPLAY = -1

log = logging.getLogger(__name__)


class Follower:
    """The sequence of one worker's batches: what to apply, what is missing, what to forget.

    Pure but for `index`. Feed it `live` batches and, when it asks, a replay."""

    def __init__(self, index: BlockIndex, worker: WorkerId) -> None:
        self._index = index
        self._worker = worker
        self._next: int | None = None  # the number to be applied next; None: nothing heard yet

    def missing_before(self, number: int) -> int | None:
        """From which number a replay is needed before `number` may be applied; None: none is.

        Called with 0 it asks for a worker's past."""
        if self._next is None:
            return 0
        return self._next if number > self._next else None

    def replayed(self, asked_from: int, batches: list[tuple[int, bytes]]) -> None:
        """The answer to a replay, empty if none came. Ends with this worker's state consistent."""
        later = [(number, payload) for number, payload in batches if number >= asked_from]
        if self._next is not None and (not later or later[0][0] > self._next):
            log.info("kv events of %s are lost from number=%d", self._worker, self._next)
            self._index.drop(self._worker)
            self._next = None
        for number, payload in later:
            self.live(number, payload)

    def live(self, number: int, payload: bytes) -> None:
        """Apply one batch. What was applied already is skipped; what is not next in order and
        could not be replayed starts afresh."""
        if self._next is not None and number < self._next:
            return
        if self._next is not None and number > self._next:
            self._index.drop(self._worker)
        self._next = number + 1
        try:
            batch = decode(payload)
        except ValueError as error:
            # An event of a kind not known here might have been a removal.
            log.warning("kv events of %s number=%d unreadable: %s", self._worker, number, error)
            self._index.drop(self._worker)
            return
        self._index.apply(self._worker, batch)


class KvEvents:
    """Owns the sockets and the tasks. Lives in one event loop."""

    def __init__(
        self, index: BlockIndex, on_failure: Callable[[WorkerId, Exception], None] | None = None
    ) -> None:
        self._index = index
        self._on_failure = on_failure
        self._context = zmq.asyncio.Context()
        self._tasks: dict[WorkerId, asyncio.Task[None]] = {}

    @property
    def followed(self) -> frozenset[WorkerId]:
        return frozenset(self._tasks)

    def observe(self, snapshot: Snapshot) -> None:
        """Follow the workers of `snapshot`; stop following and forget all others."""
        wanted = {
            worker.id: (str(worker.kv["events"]), str(worker.kv.get("replay", "")))
            for worker in snapshot.workers
            if worker.kv.get("events") and worker.state not in ENDED
        }
        for worker in [followed for followed in self._tasks if followed not in wanted]:
            self._tasks.pop(worker).cancel()
            self._index.drop(worker)
        for worker, (events, replay) in wanted.items():
            if worker not in self._tasks:
                self._tasks[worker] = asyncio.create_task(
                    self._follow(worker, events, replay), name=f"kv events {worker}"
                )

    async def close(self) -> None:
        """May be called twice."""
        tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    async def _follow(self, worker: WorkerId, events: str, replay: str) -> None:
        follower = Follower(self._index, worker)
        subscription = self._context.socket(zmq.SUB)
        try:
            subscription.setsockopt(zmq.LINGER, 0)
            subscription.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE)
            subscription.setsockopt(zmq.SUBSCRIBE, b"")
            subscription.connect(events)
            # What was said before the first live batch; it may be all that is ever said.
            await self._catch_up(follower, 0, replay)
            newest = -1
            while True:
                frames = await subscription.recv_multipart()
                if len(frames) != 3:
                    continue
                number = int.from_bytes(frames[1], "big")
                if number <= newest:
                    # Numbers begin again: another engine took over the address. It will be
                    # followed under its own generation.
                    log.info("kv events of %s began again: it was replaced", worker)
                    return
                newest = number
                await self._catch_up(follower, number, replay)
                follower.live(number, frames[2])
        except (zmq.ZMQError, OSError) as error:
            log.warning("kv events of %s cannot be followed: %s", worker, error)
            if self._on_failure is not None:
                self._on_failure(worker, error)
        finally:
            self._index.drop(worker)
            subscription.close()

    async def _catch_up(self, follower: Follower, number: int, replay: str) -> None:
        asked_from = follower.missing_before(number)
        if asked_from is None:
            return
        batches = await self._replay(replay, asked_from) if replay else []
        follower.replayed(asked_from, batches)

    async def _replay(self, address: str, first: int) -> list[tuple[int, bytes]]:
        """Batches from number `first` on, as far as the engine still has them."""
        batches: list[tuple[int, bytes]] = []
        question = self._context.socket(zmq.DEALER)
        try:
            question.setsockopt(zmq.LINGER, 0)
            question.connect(address)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPLAY_TIMEOUT_S):
                    await question.send_multipart([b"", first.to_bytes(8, "big")])
                    while True:
                        frames = await question.recv_multipart()
                        number = int.from_bytes(frames[-2], "big", signed=True)
                        if number == END_OF_REPLAY:
                            break
                        batches.append((number, frames[-1]))
        finally:
            question.close()
        return batches
