"""Sequence numbers of KV events: gaps are replayed, or the worker's entries are dropped."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cluster.identity import WorkerId
from cluster.kv.event_types import BlockRemoved, BlockStored, KVEventBatch, decode
from cluster.kv.events import Follower
from cluster.kv.index import BlockIndex

W = WorkerId("decode", 0, 1)
encode = msgspec.msgpack.encode


def stored(token: int) -> bytes:
    return encode(KVEventBatch(0.0, [BlockStored([token], None, [token], 1)]))


def removed(token: int) -> bytes:
    return encode(KVEventBatch(0.0, [BlockRemoved([token])]))


def test_events_with_fields_of_a_newer_engine_are_read() -> None:
    event = {
        "type": "BlockStored",
        "block_hashes": [b"h" * 32],
        "parent_block_hash": None,
        "token_ids": [1, 2],
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "group_idx": 0,
        "something_new": 1,
    }
    batch = decode(encode([1.0, [event], 0]))
    assert isinstance(batch.events[0], BlockStored)
    assert batch.events[0].token_ids == [1, 2]


def test_batches_in_order_are_applied() -> None:
    index = BlockIndex()
    follower = Follower(index, W)
    assert follower.missing_before(0) == 0
    follower.replayed(0, [(0, stored(1)), (1, stored(2))])
    assert follower.missing_before(2) is None
    follower.live(2, removed(1))
    assert (index.held_tokens(W, [1]), index.held_tokens(W, [2])) == (0, 1)


def test_a_batch_that_the_replay_already_had_is_not_applied_twice() -> None:
    index = BlockIndex()
    follower = Follower(index, W)
    follower.replayed(0, [(0, stored(1)), (1, removed(1))])
    follower.live(0, stored(1))
    assert index.held_tokens(W, [1]) == 0


def test_a_gap_is_closed_by_a_replay() -> None:
    index = BlockIndex()
    follower = Follower(index, W)
    follower.live(0, stored(1))
    assert follower.missing_before(3) == 1
    follower.replayed(1, [(1, stored(2)), (2, removed(1))])
    follower.live(3, stored(3))
    assert [index.held_tokens(W, [token]) for token in (1, 2, 3)] == [0, 1, 1]


def test_a_gap_that_cannot_be_closed_forgets_the_worker() -> None:
    index = BlockIndex()
    follower = Follower(index, W)
    follower.live(0, stored(1))
    assert follower.missing_before(2) == 1
    follower.replayed(1, [])
    follower.live(2, stored(2))
    assert (index.held_tokens(W, [1]), index.held_tokens(W, [2])) == (0, 1)


def test_a_replay_that_starts_too_late_forgets_the_worker() -> None:
    index = BlockIndex()
    follower = Follower(index, W)
    follower.live(0, stored(1))
    follower.replayed(1, [(5, stored(2))])
    assert (index.held_tokens(W, [1]), index.held_tokens(W, [2])) == (0, 1)


def test_an_unreadable_batch_forgets_the_worker() -> None:
    index = BlockIndex()
    follower = Follower(index, W)
    follower.live(0, stored(1))
    follower.live(1, encode([0.0, [{"type": "BlockMoved"}], 0]))
    assert index.held_tokens(W, [1]) == 0
    follower.live(2, stored(2))
    assert index.held_tokens(W, [2]) == 1


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=30),
    st.sets(st.integers(0, 29)),
    st.integers(0, 30),
    st.booleans(),
)
def test_whatever_is_lost_nothing_is_claimed_that_is_not_there(
    history: list[tuple[bool, int]], lost: set[int], kept_batches: int, has_replay: bool
) -> None:
    """`lost` live batches never arrive; the engine replays the last `kept_batches` of the past."""
    index = BlockIndex()
    follower = Follower(index, W)
    said: list[tuple[int, bytes]] = []
    there: set[int] = set()
    for number, (stores, token) in enumerate(history):
        said.append((number, stored(token) if stores else removed(token)))
        (there.add if stores else there.discard)(token)
        if number in lost:
            continue
        missing = follower.missing_before(number)
        if missing is not None:
            kept = said[max(0, len(said) - kept_batches) :] if has_replay else []
            follower.replayed(missing, [one for one in kept if one[0] >= missing])
        follower.live(*said[-1])
        for claimed in range(5):
            assert claimed in there or index.held_tokens(W, [claimed]) == 0
    if history and not lost:
        for claimed in there:
            assert index.held_tokens(W, [claimed]) == 1
