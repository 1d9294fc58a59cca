"""The simulated block cache: hits, eviction, pins, events."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cluster.engines.simulated.kv import Block, BlockCache
from cluster.engines.simulated.model import block_keys

SIZE = 4


class Watched:
    """A cache and what it announced."""

    def __init__(self, capacity_blocks: int) -> None:
        self.here: set[bytes] = set()
        self.cache = BlockCache(capacity_blocks, SIZE, self._stored, self._removed)

    def _stored(self, keys: Sequence[bytes], parent: bytes | None, ids: Sequence[int]) -> None:
        assert not self.here & set(keys)
        assert len(ids) == len(keys) * SIZE
        assert parent is None or parent in self.here
        self.here |= set(keys)

    def _removed(self, keys: Sequence[bytes]) -> None:
        assert set(keys) <= self.here
        self.here -= set(keys)

    def compute(self, ids: list[int]) -> tuple[list[Block], int]:
        keys = block_keys(ids, SIZE)
        blocks, held = self.cache.take(keys, len(ids))
        self.cache.store(blocks, keys, held, keys, ids)
        return blocks, held


def test_second_request_holds_the_common_blocks():
    watched = Watched(16)
    blocks, held = watched.compute(list(range(10)))
    assert held == 0
    watched.cache.release(blocks)
    _, held = watched.compute([*range(8), 99, 98])
    assert held == 2


def test_a_wholly_cached_prompt_still_computes_its_last_block():
    watched = Watched(16)
    watched.cache.release(watched.compute(list(range(8)))[0])
    assert watched.compute(list(range(8)))[1] == 1


def test_least_recently_used_blocks_go_first_and_tails_before_heads():
    watched = Watched(4)
    first, second = list(range(8)), list(range(100, 108))
    for ids in (first, second):
        watched.cache.release(watched.compute(ids)[0])
    watched.cache.release(watched.compute([200, 201])[0])
    keys = block_keys(first, SIZE)
    assert keys[0] in watched.here
    assert keys[1] not in watched.here
    assert set(block_keys(second, SIZE)) <= watched.here


def test_blocks_in_use_are_never_evicted():
    watched = Watched(4)
    used, _ = watched.compute(list(range(16)))
    assert not watched.cache.fits(block_keys([50], SIZE), 1)
    assert watched.cache.usage == 1.0
    watched.cache.release(used)
    assert watched.cache.fits(block_keys([50], SIZE), 1)
    assert watched.cache.usage == 0.0


def test_a_prompt_that_shares_used_blocks_needs_room_for_the_rest_only():
    watched = Watched(4)
    watched.compute(list(range(12)))
    longer = [*list(range(12)), 77]
    assert watched.cache.fits(block_keys(longer, SIZE), len(longer))
    other = [9] * 8
    assert not watched.cache.fits(block_keys(other, SIZE), len(other))


class CacheLife(RuleBasedStateMachine):
    """Any order of requests: what was announced is what can be found, and nothing leaks."""

    def __init__(self) -> None:
        super().__init__()
        self.watched = Watched(6)
        self.running: list[list[Block]] = []

    @rule(ids=st.lists(st.integers(0, 1), min_size=1, max_size=16))
    def start(self, ids: list[int]) -> None:
        if self.watched.cache.fits(block_keys(ids, SIZE), len(ids)):
            self.running.append(self.watched.compute(ids)[0])

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.running) - 1))
        self.watched.cache.release(self.running.pop(at))

    @invariant()
    def counts_what_is_used(self) -> None:
        used = {id(block) for blocks in self.running for block in blocks}
        assert self.watched.cache.used_blocks == len(used) <= 6

    @invariant()
    def no_two_used_blocks_share_an_id(self) -> None:
        blocks = {id(b): b.id for blocks in self.running for b in blocks}
        assert len(set(blocks.values())) == len(blocks)

    def teardown(self) -> None:
        for blocks in self.running:
            self.watched.cache.release(blocks)
        assert self.watched.cache.used_blocks == 0


TestCacheLife = CacheLife.TestCase
TestCacheLife.settings = settings(stateful_step_count=30)


def test_growth_may_pass_the_capacity():
    watched = Watched(1)
    blocks, _ = watched.compute([1, 2, 3])
    watched.cache.grow(blocks)
    assert watched.cache.used_blocks == 2
    assert watched.cache.usage == pytest.approx(1.0)
