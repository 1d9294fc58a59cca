"""The block index never claims what is not there, and equals a naive model of the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.identity import WorkerId
from cluster.kv.event_types import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch
from cluster.kv.index import BlockIndex, prefix_keys

A, B = WorkerId("decode", 0, 1), WorkerId("decode", 1, 1)
SIZE = 2


def batch(*events: BlockStored | BlockRemoved | AllBlocksCleared) -> KVEventBatch:
    return KVEventBatch(ts=0.0, events=list(events))


def chain(ids: list[int], size: int = SIZE) -> list[int]:
    """Stand-in for an engine's own hashes: one per full block, equal for equal prefixes."""
    return [hash(("engine", *ids[:end])) for end in range(size, len(ids) + 1, size)]


def stored(ids: list[int], first_block: int = 0, size: int = SIZE, **more: object) -> BlockStored:
    hashes = chain(ids, size)
    return BlockStored(
        block_hashes=list(hashes[first_block:]),
        parent_block_hash=hashes[first_block - 1] if first_block else None,
        token_ids=ids[first_block * size : len(hashes) * size],
        block_size=size,
        **more,  # type: ignore[arg-type]
    )


def test_the_longest_prefix_of_full_blocks_is_held() -> None:
    index = BlockIndex()
    index.apply(A, batch(stored([1, 2, 3, 4])))
    index.apply(B, batch(stored([1, 2])))
    prompt = [1, 2, 3, 4, 5]
    assert (index.held_tokens(A, prompt), index.held_tokens(B, prompt)) == (4, 2)
    assert index.held_tokens(A, [1, 2, 9, 4]) == 2
    assert index.held_tokens(A, [9, 2, 3, 4]) == 0


def test_blocks_that_continue_a_known_parent_are_chained_to_it() -> None:
    index = BlockIndex()
    index.apply(A, batch(stored([1, 2])))
    index.apply(A, batch(stored([1, 2, 3, 4], first_block=1)))
    assert index.held_tokens(A, [1, 2, 3, 4]) == 4


def test_blocks_with_an_unknown_parent_are_not_claimed() -> None:
    index = BlockIndex()
    index.apply(A, batch(stored([1, 2, 3, 4], first_block=1)))
    assert index.held_tokens(A, [1, 2, 3, 4]) == 0
    assert index.held_tokens(A, [3, 4]) == 0


def test_a_removed_block_ends_the_prefix() -> None:
    index = BlockIndex()
    index.apply(A, batch(stored([1, 2, 3, 4, 5, 6])))
    index.apply(A, batch(BlockRemoved(block_hashes=[chain([1, 2, 3, 4])[1]])))
    assert index.held_tokens(A, [1, 2, 3, 4, 5, 6]) == 2


def test_a_cleared_cache_holds_nothing() -> None:
    index = BlockIndex()
    index.apply(A, batch(stored([1, 2])))
    index.apply(A, batch(AllBlocksCleared()))
    assert index.held_tokens(A, [1, 2]) == 0
    assert index.blocks(A) == 0


def test_a_dropped_worker_is_forgotten_and_the_others_are_not() -> None:
    index = BlockIndex()
    index.apply(A, batch(stored([1, 2])))
    index.apply(B, batch(stored([1, 2])))
    index.drop(A)
    index.drop(A)
    assert (index.held_tokens(A, [1, 2]), index.held_tokens(B, [1, 2])) == (0, 2)


def test_a_new_generation_starts_with_nothing() -> None:
    index = BlockIndex()
    index.apply(A, batch(stored([1, 2])))
    assert index.held_tokens(WorkerId("decode", 0, 2), [1, 2]) == 0


@pytest.mark.parametrize(
    "more",
    [
        {"medium": "CPU"},
        {"medium": "STORAGE"},
        {"lora_name": "l"},
        {"lora_id": 3},
        {"extra_keys": [["salt"]]},
        {"kv_cache_spec_kind": "sliding_window"},
    ],
)
def test_blocks_that_token_ids_alone_do_not_reach_are_not_counted(more: dict[str, object]) -> None:
    index = BlockIndex()
    index.apply(A, batch(stored([1, 2], **more)))
    assert index.held_tokens(A, [1, 2]) == 0


def test_a_removal_from_another_medium_does_not_touch_the_accelerators_blocks() -> None:
    index = BlockIndex()
    index.apply(A, batch(stored([1, 2], medium="GPU")))
    index.apply(A, batch(BlockRemoved(block_hashes=chain([1, 2]), medium="CPU")))
    assert index.held_tokens(A, [1, 2]) == 2


def test_memory_is_bounded_and_the_bound_only_lowers_claims() -> None:
    index = BlockIndex(max_blocks_per_worker=3)
    prompt = list(range(20))
    index.apply(A, batch(stored(prompt)))
    assert index.blocks(A) == 3
    assert index.held_tokens(A, prompt) == 3 * SIZE


def test_workers_with_unlike_block_sizes_are_told_apart() -> None:
    index = BlockIndex()
    prompt = list(range(12))
    index.apply(A, batch(stored(prompt, size=2)))
    index.apply(B, batch(stored(prompt, size=5)))
    assert index.held_by_all(prompt) == {A: 12, B: 10}


@given(
    st.lists(st.integers(0, 2), max_size=24),
    st.lists(st.tuples(st.integers(1, 7), st.lists(st.integers(0, 2), max_size=24)), max_size=5),
)
def test_each_worker_is_judged_by_its_own_block_size(
    prompt: list[int], caches: list[tuple[int, list[int]]]
) -> None:
    index = BlockIndex()
    expected = {}
    for number, (size, ids) in enumerate(caches):
        worker = WorkerId("decode", number, 1)
        index.apply(worker, batch(stored(ids[: len(ids) // size * size], size=size)))
        alike = 0
        while alike < min(len(ids), len(prompt)) and ids[alike] == prompt[alike]:
            alike += 1
        expected[worker] = alike // size * size
    assert index.held_by_all(prompt) == {w: tokens for w, tokens in expected.items() if tokens}


@pytest.mark.parametrize("ids", [[-1, 2], [1 << 40, 2], [1.5, 2], ["x", "y"], []])
def test_ids_that_no_vocabulary_has_are_held_by_nobody(ids: list[int]) -> None:
    assert prefix_keys(ids, 1) == []


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_keys_are_equal_exactly_as_far_as_the_tokens_are(one: list[int], two: list[int]) -> None:
    for block, (mine, theirs) in enumerate(
        zip(prefix_keys(one, SIZE), prefix_keys(two, SIZE), strict=False), start=1
    ):
        assert (mine == theirs) == (one[: block * SIZE] == two[: block * SIZE])


@dataclass
class NaiveCache:
    """What an engine holds: whole prefixes, as tuples of tokens."""

    prefixes: set[tuple[int, ...]] = field(default_factory=set)

    def held(self, prompt: list[int]) -> int:
        end = 0
        while tuple(prompt[: end + SIZE]) in self.prefixes and end + SIZE <= len(prompt):
            end += SIZE
        return end


PROMPTS = st.lists(st.integers(0, 2), max_size=10)
WHO = st.sampled_from([A, B])
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("store"), WHO, PROMPTS),
        st.tuples(st.just("remove"), WHO, PROMPTS),
        st.tuples(st.just("clear"), WHO, PROMPTS),
        st.tuples(st.just("drop"), WHO, PROMPTS),
        st.tuples(st.just("orphan"), WHO, PROMPTS),
    ),
    max_size=30,
)


@given(ACTIONS, PROMPTS)
def test_it_equals_a_naive_model_and_never_claims_more(
    actions: list[tuple[str, WorkerId, list[int]]], prompt: list[int]
) -> None:
    index = BlockIndex()
    caches = {A: NaiveCache(), B: NaiveCache()}
    for action, worker, ids in actions:
        cache = caches[worker]
        full = len(ids) // SIZE
        if action == "store" and full:
            index.apply(worker, batch(stored(ids)))
            cache.prefixes.update(tuple(ids[: n * SIZE]) for n in range(1, full + 1))
        elif action == "remove" and full:
            index.apply(worker, batch(BlockRemoved(block_hashes=chain(ids)[-1:])))
            cache.prefixes.discard(tuple(ids[: full * SIZE]))
        elif action == "clear":
            index.apply(worker, batch(AllBlocksCleared()))
            cache.prefixes.clear()
        elif action == "drop":
            index.drop(worker)
            cache.prefixes.clear()
        elif action == "orphan" and full > 1 and tuple(ids[:SIZE]) not in cache.prefixes:
            # Continues a parent that the worker does not hold.
            hashes = chain(ids)
            index.apply(
                worker,
                batch(BlockStored(hashes[1:2], hashes[0], ids[SIZE : 2 * SIZE], SIZE)),
            )
    for worker, cache in caches.items():
        assert index.held_tokens(worker, prompt) == cache.held(prompt)
        assert index.blocks(worker) == len(cache.prefixes)
    for worker in caches:
        index.drop(worker)
    assert not index._holders
