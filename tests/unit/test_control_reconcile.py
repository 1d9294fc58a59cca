"""cluster.control.reconcile: what it asks for, and what it never asks for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.control.reconcile import (
    Drain,
    Flip,
    Observed,
    PoolWanted,
    Remove,
    Slot,
    Start,
    after_failure,
    pause_s,
    reconcile,
)
from cluster.identity import Role, WorkerId, WorkerState
from cluster.topology.schema import HealthSpec

HEALTH = HealthSpec(restart_backoff_s=1.0, restart_backoff_max_s=8.0)
POOL = PoolWanted("decode", replicas=2, most=4)


def worker(index=0, generation=1, state=WorkerState.READY, **more):
    return Observed(WorkerId("decode", index, generation), state, **more)


def test_an_empty_pool_gets_all_its_workers_at_once():
    actions = reconcile([POOL], [], {}, HEALTH, 0.0)
    assert [a.worker for a in actions] == [WorkerId("decode", 0, 1), WorkerId("decode", 1, 1)]
    assert all(isinstance(a, Start) and a.why == "the pool wants 2" for a in actions)


def test_a_whole_pool_is_left_alone():
    assert reconcile([POOL], [worker(0), worker(1)], {}, HEALTH, 0.0) == ()


def test_a_worker_that_starts_is_waited_for():
    observed = [worker(0, state=WorkerState.LOADING), worker(1, state=WorkerState.STARTING)]
    assert reconcile([POOL], observed, {}, HEALTH, 0.0) == ()


@pytest.mark.parametrize("state", [WorkerState.FAILED, WorkerState.HUNG])
def test_a_failed_worker_is_removed_and_its_slot_pauses(state):
    observed = [worker(0, state=state, message="exit code 1"), worker(1)]
    (action,) = reconcile([POOL], observed, {("decode", 0): Slot(1)}, HEALTH, 100.0)
    assert action == Remove(
        WorkerId("decode", 0, 1), "exit code 1", Slot(1, 1, not_before_s=101.0, why="exit code 1")
    )


def test_a_vanished_worker_counts_as_failed_whatever_its_last_state():
    observed = [worker(0, state=WorkerState.READY, is_gone=True), worker(1)]
    (action,) = reconcile([POOL], observed, {}, HEALTH, 0.0)
    assert isinstance(action, Remove)
    assert action.slot.failures == 1


def test_a_draining_worker_whose_actor_went_has_not_failed():
    observed = [worker(0, state=WorkerState.DRAINING, is_gone=True), worker(1)]
    (action,) = reconcile([POOL], observed, {}, HEALTH, 0.0)
    assert isinstance(action, Remove)
    assert action.slot.failures == 0


def test_a_slot_restarts_only_when_its_pause_is_over_and_with_the_next_generation():
    slots = {
        ("decode", 0): Slot(3, 2, not_before_s=10.0, why="exit code 1"),
        ("decode", 1): Slot(1),
    }
    assert reconcile([POOL], [worker(1)], slots, HEALTH, 9.9) == ()
    (action,) = reconcile([POOL], [worker(1)], slots, HEALTH, 10.0)
    assert isinstance(action, Start)
    assert action.worker == WorkerId("decode", 0, 4)
    assert action.why == "restart after: exit code 1"
    assert action.slot.failures == 2


def test_pauses_double_up_to_the_longest():
    assert [pause_s(n, HEALTH) for n in (1, 2, 3, 4, 5, 5000)] == [1, 2, 4, 8, 8, 8]


def test_a_long_ready_time_forgives_earlier_failures():
    slot = Slot(generation=5, failures=7)
    assert after_failure(slot, 8.1, HEALTH, 0.0, "x").failures == 1
    assert after_failure(slot, 7.9, HEALTH, 0.0, "x").failures == 8


def test_the_highest_index_is_drained_first():
    observed = [worker(i) for i in range(4)]
    actions = reconcile([POOL], observed, {}, HEALTH, 0.0)
    assert actions == (
        Drain(WorkerId("decode", 3, 1), "the pool wants 2"),
        Drain(WorkerId("decode", 2, 1), "the pool wants 2"),
    )


def test_a_worker_that_drains_is_not_drained_again_and_keeps_its_slot():
    observed = [worker(0), worker(1, state=WorkerState.DRAINING)]
    assert reconcile([POOL], observed, {}, HEALTH, 0.0) == ()


def test_a_stopped_worker_is_removed_without_a_pause():
    (action,) = reconcile(
        [POOL], [worker(0, state=WorkerState.STOPPED), worker(1)], {}, HEALTH, 5.0
    )
    assert isinstance(action, Remove)
    assert action.slot.not_before_s == 0.0


def test_a_pool_that_is_not_wanted_any_more_is_drained():
    assert reconcile([], [worker(0)], {}, HEALTH, 0.0) == (
        Drain(WorkerId("decode", 0, 1), "the pool wants 0"),
    )


def test_of_two_generations_in_one_slot_the_older_is_drained():
    observed = [worker(0, 1), worker(0, 2), worker(1)]
    assert reconcile([POOL], observed, {}, HEALTH, 0.0) == (
        Drain(WorkerId("decode", 0, 1), "it was replaced"),
    )


def test_nothing_starts_beyond_max_while_others_drain():
    full = PoolWanted("decode", replicas=2, most=2)
    leaving = [worker(5, state=WorkerState.DRAINING), worker(6, state=WorkerState.DRAINING)]
    assert reconcile([full], leaving, {}, HEALTH, 0.0) == ()
    assert len(reconcile([full], leaving[:1], {}, HEALTH, 0.0)) == 1


pools = st.builds(
    PoolWanted, name=st.just("decode"), replicas=st.integers(0, 6), most=st.integers(0, 8)
)
observations = st.lists(
    st.builds(
        Observed,
        id=st.builds(WorkerId, st.just("decode"), st.integers(0, 9), generation=st.integers(1, 3)),
        state=st.sampled_from(WorkerState),
        ready_for_s=st.floats(0, 20),
        is_gone=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda observed: observed.id,
)
histories = st.dictionaries(
    st.tuples(st.just("decode"), st.integers(0, 9)),
    st.builds(
        Slot,
        generation=st.integers(3, 9),
        failures=st.integers(0, 5),
        not_before_s=st.floats(0, 100),
    ),
    max_size=10,
)


class World:
    """Pools in which every action works at once."""

    def __init__(self, observed, slots):
        self.workers = {w.id: w for w in observed}
        self.slots = dict(slots)

    def do(self, action):
        key = (action.worker.pool, action.worker.index)
        if isinstance(action, Start):
            self.slots[key] = action.slot
            self.workers[action.worker] = Observed(action.worker, WorkerState.READY)
        elif isinstance(action, Drain):
            drained = self.workers[action.worker]
            self.workers[action.worker] = replace(drained, state=WorkerState.STOPPED)
        else:
            self.slots[key] = action.slot
            del self.workers[action.worker]


@given(pools, observations, histories)
def test_a_reconciled_pool_asks_for_nothing_more(pool, observed, slots):
    world = World(observed, slots)
    now_s = 0.0
    for _ in range(30):
        now_s += 50.0
        # A worker that drains on its own ends some time.
        for found in tuple(world.workers.values()):
            if found.state is WorkerState.DRAINING:
                world.workers[found.id] = replace(found, state=WorkerState.STOPPED)
        actions = reconcile([pool], list(world.workers.values()), world.slots, HEALTH, now_s)
        for action in actions:
            world.do(action)
    assert actions == ()
    wanted = min(pool.replicas, pool.most)
    assert sorted(w.index for w in world.workers) == list(range(wanted))


@given(pools, observations, histories, st.floats(0, 200))
def test_there_are_never_more_than_max(pool, observed, slots, now_s):
    actions = reconcile([pool], observed, slots, HEALTH, now_s)
    starts = [a for a in actions if isinstance(a, Start)]
    assert not starts or len(observed) + len(starts) <= pool.most


@given(pools, observations, histories, st.floats(0, 200))
def test_a_failed_slot_is_not_restarted_before_its_pause_is_over(pool, observed, slots, now_s):
    for action in reconcile([pool], observed, slots, HEALTH, now_s):
        if isinstance(action, Start):
            key = (action.worker.pool, action.worker.index)
            assert now_s >= slots.get(key, Slot()).not_before_s
        if isinstance(action, Remove) and action.slot.failures:
            assert action.slot.not_before_s == pytest.approx(
                now_s + pause_s(action.slot.failures, HEALTH)
            ) or action.slot == slots.get((action.worker.pool, action.worker.index))


@given(pools, observations, histories, st.floats(0, 200))
def test_a_slot_never_gets_a_generation_twice_nor_two_workers(pool, observed, slots, now_s):
    starts = [
        a.worker for a in reconcile([pool], observed, slots, HEALTH, now_s) if isinstance(a, Start)
    ]
    taken = {w.slot for w in observed}
    for started in starts:
        key = (started.pool, started.index)
        assert key not in taken
        assert started.generation > slots.get(key, Slot()).generation


@given(pools, observations, histories, st.floats(0, 200))
def test_every_action_says_why(pool, observed, slots, now_s):
    assert all(a.why for a in reconcile([pool], observed, slots, HEALTH, now_s))


def outdated(index=0, generation=1, **more):
    return worker(index, generation, outdated="its engine is to be told something else", **more)


def test_an_outdated_worker_stays_until_the_next_one_has_shown_that_it_stays_ready():
    slots = {("decode", 0): Slot(1), ("decode", 1): Slot(1)}
    (start,) = reconcile([POOL], [outdated(0), outdated(1)], slots, HEALTH, 0.0)
    assert isinstance(start, Start)
    assert start.worker == WorkerId("decode", 0, 2)
    beside = [outdated(0), worker(0, 2, ready_for_s=0.1), outdated(1)]
    assert reconcile([POOL], beside, slots, HEALTH, 0.0) == ()
    beside = [outdated(0), worker(0, 2, ready_for_s=60), outdated(1)]
    (drain,) = reconcile([POOL], beside, slots, HEALTH, 0.0)
    assert drain == Drain(WorkerId("decode", 0, 1), "its engine is to be told something else")
    held = replace(POOL, may_retire=False)
    assert reconcile([held], beside, slots, HEALTH, 0.0) == ()


def test_one_slot_of_a_pool_is_replaced_at_a_time():
    slots = {("decode", 0): Slot(2), ("decode", 1): Slot(1)}
    starting = [outdated(0), worker(0, 2, state=WorkerState.LOADING), outdated(1)]
    assert reconcile([POOL], starting, slots, HEALTH, 0.0) == ()
    leaving = [worker(0, 2), outdated(0, state=WorkerState.DRAINING), outdated(1)]
    assert reconcile([POOL], leaving, slots, HEALTH, 0.0) == ()
    (start,) = reconcile([POOL], [worker(0, 2), outdated(1)], slots, HEALTH, 0.0)
    assert start.worker == WorkerId("decode", 1, 2)


def test_where_there_is_no_room_for_both_the_old_one_makes_it():
    slots = {("decode", 0): Slot(2), ("decode", 1): Slot(1)}
    next_one = worker(0, 2, state=WorkerState.STARTING, unplaced_for_s=11)
    (drain,) = reconcile([POOL], [outdated(0), next_one, worker(1)], slots, HEALTH, 0.0)
    assert drain.worker == WorkerId("decode", 0, 1)
    assert "no room" in drain.why


def test_all_workers_of_a_drained_node_go_where_there_is_no_room_elsewhere():
    slots = {("decode", 0): Slot(2), ("decode", 1): Slot(1)}
    waiting = worker(0, 2, state=WorkerState.STARTING, unplaced_for_s=11)
    (start,) = reconcile([POOL], [waiting, outdated(1, must_go=True)], slots, HEALTH, 0.0)
    assert start.worker == WorkerId("decode", 1, 2)
    second = worker(1, 2, state=WorkerState.STARTING, unplaced_for_s=11)
    seen = [waiting, outdated(1, must_go=True), second]
    (drain,) = reconcile([POOL], seen, slots, HEALTH, 0.0)
    assert drain.worker == WorkerId("decode", 1, 1)
    # One that is to be told something else serves on until the first has its room.
    assert reconcile([POOL], [waiting, outdated(1)], slots, HEALTH, 0.0) == ()
    asked = replace(waiting, unplaced_for_s=1)
    assert reconcile([POOL], [asked, outdated(1, must_go=True)], slots, HEALTH, 0.0) == ()


def test_a_replacement_that_failed_is_tried_again_after_its_pause_while_the_old_one_serves():
    slots = {("decode", 0): Slot(2, 1, not_before_s=10.0, why="exit code 1")}
    observed = [outdated(0), worker(1)]
    assert reconcile([POOL], observed, slots, HEALTH, 9.0) == ()
    (start,) = reconcile([POOL], observed, slots, HEALTH, 10.0)
    assert start.worker == WorkerId("decode", 0, 3)


def test_a_worker_that_is_wanted_again_stays_and_its_replacement_goes():
    observed = [worker(0, 1, ready_for_s=60), outdated(0, 2), worker(1)]
    (drain,) = reconcile([POOL], observed, {}, HEALTH, 0.0)
    assert drain.worker == WorkerId("decode", 0, 2)


def test_a_ready_worker_in_another_role_flips_and_one_that_starts_does_not():
    observed = [
        worker(0, flips_to=Role.PREFILL),
        worker(1, state=WorkerState.LOADING, flips_to=Role.PREFILL),
    ]
    (flip,) = reconcile([POOL], observed, {}, HEALTH, 0.0)
    assert flip == Flip(WorkerId("decode", 0, 1), Role.PREFILL, "it is to serve as prefill")


@given(pools, st.frozensets(st.integers(0, 9), max_size=4))
def test_as_many_slots_are_wanted_as_replicas_and_the_kept_ones_first(pool, kept):
    indices = replace(pool, kept=kept).indices
    count = min(pool.replicas, pool.most)
    assert len(indices) == count
    assert len(kept & indices) == min(len(kept), count)
    assert all(index in indices for index in range(min(indices - kept, default=0)) if index in kept)


@given(
    st.integers(1, 5),
    st.booleans(),
    st.lists(st.booleans(), min_size=5, max_size=5),
    st.integers(0, 3),
)
def test_a_rollout_ends_with_all_workers_new_and_none_missing_meanwhile(
    replicas, surge, olds, starts_take
):
    """Every start takes some rounds and succeeds. With a surge the pool never has fewer that are
    ready than it wants; without, at most one fewer."""
    pool = PoolWanted("decode", replicas, most=replicas, surge=surge)
    workers = {}
    for index in range(replicas):
        made = outdated(index) if olds[index] else worker(index, ready_for_s=99)
        workers[made.id] = made
    slots = {("decode", index): Slot(1) for index in range(replicas)}
    age = dict.fromkeys(workers, 99)
    for round_ in range(200):
        for found in tuple(workers.values()):
            age[found.id] += 1
            if found.state is WorkerState.STOPPED:
                continue
            if found.state is WorkerState.DRAINING:
                workers[found.id] = replace(found, state=WorkerState.STOPPED)
            elif age[found.id] >= starts_take:
                ready_for_s = float(age[found.id] - starts_take)
                workers[found.id] = replace(found, state=WorkerState.READY, ready_for_s=ready_for_s)
        ready = sum(w.state is WorkerState.READY for w in workers.values())
        assert ready >= replicas - (0 if surge else 1)
        assert len(workers) <= replicas + 1
        for action in reconcile([pool], list(workers.values()), slots, HEALTH, float(round_)):
            if isinstance(action, Start):
                slots[action.worker.pool, action.worker.index] = action.slot
                workers[action.worker] = Observed(action.worker, WorkerState.STARTING)
                age[action.worker] = 0
            elif isinstance(action, Drain):
                drained = workers[action.worker]
                workers[action.worker] = replace(drained, state=WorkerState.DRAINING)
            else:
                del workers[action.worker]
    assert sorted(w.id.index for w in workers.values()) == list(range(replicas))
    assert not any(w.outdated for w in workers.values())
