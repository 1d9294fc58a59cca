"""KV events over real sockets: past, present, gaps, and workers that come and go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import msgspec
import pytest
import zmq

from cluster.identity import Role, WorkerId, WorkerState
from cluster.kv.event_types import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
from cluster.kv.events import KvEvents
from cluster.kv.index import BlockIndex
from cluster.snapshot import Snapshot, WorkerView

pytestmark = pytest.mark.integration

Event = BlockStored | BlockRemoved | AllBlocksCleared
END = (-1).to_bytes(8, "big", signed=True)


class Engine:
    """Publishes and replays as vLLM does."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._live = self._context.socket(zmq.PUB)
        self._replays = self._context.socket(zmq.ROUTER)
        self.events = f"tcp://127.0.0.1:{self._live.bind_to_random_port('tcp://127.0.0.1')}"
        self.replay = f"tcp://127.0.0.1:{self._replays.bind_to_random_port('tcp://127.0.0.1')}"
        self._said: list[tuple[int, bytes]] = []
        self._number = 0
        self.keeps = 1000
        self.replays = 0
        self._stop = threading.Event()
        self._server = threading.Thread(target=self._serve, name="replay", daemon=True)
        self._server.start()

    def say(self, *events: Event, lose: bool = False) -> None:
        payload = msgspec.msgpack.encode(KVEventBatch(0.0, list(events), 0))
        number = self._number
        self._number += 1
        self._said = [*self._said, (number, payload)][-self.keeps :]
        if not lose:
            self._live.send_multipart([b"", number.to_bytes(8, "big"), payload])

    def _serve(self) -> None:
        while not self._stop.is_set():
            if not self._replays.poll(20):
                continue
            client, _, first = self._replays.recv_multipart()
            self.replays += 1
            for number, payload in self._said:
                if number >= int.from_bytes(first, "big"):
                    frames = [client, b"", b"", number.to_bytes(8, "big"), payload]
                    self._replays.send_multipart(frames)
            self._replays.send_multipart([client, b"", b"", END, b""])

    def stop(self) -> None:
        self._stop.set()
        self._server.join()
        self._context.destroy(linger=0)


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.stop()


@pytest.fixture
async def following() -> AsyncIterator[tuple[BlockIndex, KvEvents]]:
    index = BlockIndex()
    events = KvEvents(index)
    yield index, events
    await events.close()
    await events.close()


W = WorkerId("decode", 0, 1)


def snapshot(engine: Engine, worker: WorkerId = W, *, replay: bool = True) -> Snapshot:
    kv = {"events": engine.events} | ({"replay": engine.replay} if replay else {})
    view = WorkerView(worker, Role.DECODE, "i", WorkerState.READY, "http://h", None, 100, 1, kv=kv)
    return Snapshot(1, "c", "m", workers=(view,))


def stored(token: int) -> BlockStored:
    return BlockStored([token], None, [token], 1)


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not what():  # noqa: ASYNC110 what a background task does to the index has no event
            await asyncio.sleep(0.01)


async def test_what_was_stored_before_anybody_listened_is_learnt(engine, following) -> None:
    index, events = following
    engine.say(stored(1), stored(2))
    engine.say(BlockRemoved([1]))
    events.observe(snapshot(engine))
    await until(lambda: index.held_tokens(W, [2]) == 1)
    assert index.held_tokens(W, [1]) == 0


async def test_live_events_are_followed(engine, following) -> None:
    index, events = following
    engine.say(stored(1))
    events.observe(snapshot(engine))
    await until(lambda: index.held_tokens(W, [1]) == 1)
    engine.say(stored(2))
    await until(lambda: index.held_tokens(W, [2]) == 1)
    engine.say(AllBlocksCleared())
    await until(lambda: index.blocks(W) == 0)


async def test_a_lost_batch_is_fetched_again(engine, following) -> None:
    index, events = following
    engine.say(stored(1))
    events.observe(snapshot(engine))
    await until(lambda: index.held_tokens(W, [1]) == 1)
    engine.say(BlockRemoved([1]), lose=True)
    engine.say(stored(2))
    await until(lambda: index.held_tokens(W, [2]) == 1)
    assert index.held_tokens(W, [1]) == 0
    assert engine.replays >= 2


@pytest.mark.parametrize("replay", [False, True])
async def test_a_batch_that_is_lost_for_good_costs_what_was_known(
    engine, following, replay: bool
) -> None:
    index, events = following
    engine.keeps = 1
    events.observe(snapshot(engine, replay=replay))

    async def say_until_heard(token: int) -> None:
        # Without a replay nothing is known until the subscription stands.
        while index.held_tokens(W, [token]) != 1:
            engine.say(stored(token))
            await asyncio.sleep(0.02)

    async with asyncio.timeout(60):
        await say_until_heard(1)
    engine.say(BlockRemoved([1]), lose=True)
    engine.say(stored(2))
    await until(lambda: index.held_tokens(W, [2]) == 1)
    assert index.held_tokens(W, [1]) == 0


async def test_a_worker_that_left_the_snapshot_is_forgotten(engine, following) -> None:
    index, events = following
    engine.say(stored(1))
    events.observe(snapshot(engine))
    await until(lambda: index.held_tokens(W, [1]) == 1)
    events.observe(Snapshot(2, "c", "m"))
    assert index.held_tokens(W, [1]) == 0
    assert events.followed == frozenset()


async def test_a_new_generation_at_the_same_address_starts_with_its_own_past(
    engine, following
) -> None:
    index, events = following
    engine.say(stored(1))
    events.observe(snapshot(engine))
    await until(lambda: index.held_tokens(W, [1]) == 1)
    engine._said, engine._number = [], 0
    engine.say(stored(2))
    again = WorkerId("decode", 0, 2)
    events.observe(snapshot(engine, again))
    await until(lambda: index.held_tokens(again, [2]) == 1)
    assert (index.held_tokens(W, [1]), index.held_tokens(again, [1])) == (0, 0)


async def test_numbers_that_begin_again_end_the_old_generation(engine, following) -> None:
    index, events = following
    events.observe(snapshot(engine))
    async with asyncio.timeout(60):
        while index.held_tokens(W, [1]) != 1 or engine._number < 3:
            engine.say(stored(1))
            await asyncio.sleep(0.02)
    engine._said, engine._number = [], 0
    engine.say(stored(2))
    await until(lambda: index.held_tokens(W, [1]) == 0)
    assert index.held_tokens(W, [2]) == 0
