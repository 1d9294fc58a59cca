"""Unlike revisions of a model never share an answer; a worker is used in the role that it has."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import KvMismatch, NoCapacity
from cluster.gateway.route import Conditions, Facts, Route, choose, compile_table
from cluster.identity import Role, WorkerId, WorkerState
from cluster.kv import fingerprint
from cluster.kv.fingerprint import differences
from cluster.snapshot import Fingerprint, Link, Snapshot, WorkerView

FP = Fingerprint("m", "none", "auto", 16, "nixl", "1", "vllm", "1", "0")
LINKS = (Link("p", "d", "nixl", 30.0, "recompute"),)


def worker(pool: str, index: int, role: Role, revision: str = "", **more: object) -> WorkerView:
    return replace(
        WorkerView(
            WorkerId(pool, index, 1),
            role,
            "i",
            WorkerState.READY,
            f"http://{pool}-{index}:1",
            FP,
            1000,
            1,
            model_revision=revision,
        ),
        **more,  # type: ignore[arg-type]
    )


def route_in(
    workers: list[WorkerView], facts: Facts, links: tuple[Link, ...] = LINKS, turn: int = 0
) -> Route:
    table = compile_table(Snapshot(1, "c", "m", tuple(workers), links), differences)
    return choose(table, facts, Conditions(turn=turn))


revisions = st.sampled_from(["", "a", "b"])


@st.composite
def clusters(draw: st.DrawFn) -> list[WorkerView]:
    return [
        worker(pool, index, role, draw(revisions), state=draw(st.sampled_from(WorkerState)))
        for pool, role in (("p", Role.PREFILL), ("d", Role.DECODE), ("x", Role.MIXED))
        for index in range(draw(st.integers(0, 3)))
    ]


@given(clusters(), st.none() | revisions, st.integers(0, 30))
def test_an_answer_stays_with_its_revision_and_so_does_a_pair(
    workers: list[WorkerView], began: str | None, turn: int
) -> None:
    fits = [
        view
        for view in workers
        if view.takes_work
        and view.role is not Role.PREFILL
        and (began is None or view.model_revision == began)
    ]
    facts = Facts(100, 10, revision=began)
    if not fits:
        is_other_there = any(v.takes_work and v.role is not Role.PREFILL for v in workers)
        why = f"the model revision {began!r} that it was begun with" if is_other_there else "ready"
        with pytest.raises(NoCapacity, match=why):
            route_in(workers, facts, turn=turn)
        return
    route = route_in(workers, facts, turn=turn)
    assert route.decode in fits
    if route.prefill is not None:
        assert route.prefill.model_revision == route.decode.model_revision


def test_a_pool_in_the_middle_of_a_rolling_update_is_fed_by_its_like():
    workers = [
        worker("p", 0, Role.PREFILL, "new"),
        *(worker("d", index, Role.DECODE, "old") for index in range(2)),
        worker("d", 2, Role.DECODE, "new"),
    ]
    for turn in range(6):
        route = route_in(workers, Facts(100, 10), turn=turn)
        assert (route.decode.id.index, route.why) == (2, "disaggregated")
    gone = replace(workers[3], state=WorkerState.FAILED)
    assert route_in([*workers[:3], gone], Facts(100, 10)).why == "recompute:kv-mismatch"


def test_the_coordinator_refuses_a_pair_of_unlike_revisions():
    fingerprint.check(worker("p", 0, Role.PREFILL, "a"), worker("d", 0, Role.DECODE, "a"))
    with pytest.raises(KvMismatch, match="model revision is 'a' on prefill and 'b' on decode"):
        fingerprint.check(worker("p", 0, Role.PREFILL, "a"), worker("d", 0, Role.DECODE, "b"))


def test_a_decode_worker_that_changed_its_role_feeds_its_own_pool():
    """`pdcluster role d/1 prefill`: the pool stays, the role is the worker's."""
    links = (*LINKS, Link("d", "d", "nixl", 30.0, "recompute"))
    workers = [
        worker("d", 0, Role.DECODE),
        worker("d", 1, Role.PREFILL, epoch=2),
    ]
    route = route_in(workers, Facts(100, 10), links)
    assert route.prefill is not None
    assert (route.prefill.id.index, route.decode.id.index) == (1, 0)
    assert route.link == links[1]


def test_both_of_a_pools_prefill_and_its_changed_workers_are_used():
    links = (*LINKS, Link("d", "d", "nixl", 30.0, "recompute"))
    workers = [
        worker("p", 0, Role.PREFILL),
        worker("d", 0, Role.DECODE),
        worker("d", 1, Role.PREFILL, epoch=2),
    ]
    by_load = [replace(workers[0], load=replace(workers[0].load, running=5)), *workers[1:]]
    assert route_in(workers, Facts(100, 10), links).prefill == workers[0]
    assert route_in(by_load, Facts(100, 10), links).prefill == workers[2]


def test_a_worker_between_two_roles_takes_nothing():
    links = (*LINKS, Link("d", "d", "nixl", 30.0, "recompute"))
    changing = worker("d", 1, Role.DECODE, state=WorkerState.CHANGING, epoch=1)
    for turn in range(4):
        workers = [worker("p", 0, Role.PREFILL), worker("d", 0, Role.DECODE), changing]
        route = route_in(workers, Facts(100, 10), links, turn)
        assert (route.prefill, route.decode) == (workers[0], workers[1])
