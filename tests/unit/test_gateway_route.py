"""Properties of the routing decision, over clusters of all shapes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import NoCapacity
from cluster.gateway.fleet import Fleet
from cluster.gateway.route import Conditions, Facts, choose, compile_table, cost
from cluster.identity import Role, WorkerId, WorkerState
from cluster.kv.fingerprint import differences
from cluster.snapshot import Fingerprint, Link, Load, Snapshot, WorkerView

FP = Fingerprint("m", "none", "auto", 16, "nixl", "1", "vllm", "1", "0")
OTHER = replace(FP, kv_dtype="fp8")


def worker(pool: str, index: int, role: Role, **more) -> WorkerView:
    fields = {
        "state": WorkerState.READY,
        "url": f"http://{pool}-{index}:1",
        "fingerprint": FP,
        "max_model_len_tokens": 1000,
        "kv_bytes_per_token": 1,
        **more,
    }
    return WorkerView(id=WorkerId(pool, index, 1), role=role, island="i", **fields)


def cluster_of(*workers: WorkerView, links: tuple[Link, ...] | None = None) -> Snapshot:
    if links is None:
        links = (Link("p", "d", "nixl", 30.0, "recompute"),)
    return Snapshot(version=1, cluster="c", model="m", workers=workers, links=links)


def route_in(snapshot: Snapshot, facts: Facts | None = None, **conditions):
    facts = facts or Facts(prompt_tokens=100, answer_tokens=10)
    return choose(compile_table(snapshot, differences), facts, Conditions(**conditions))


loads = st.builds(
    Load,
    running=st.integers(0, 50),
    waiting=st.integers(0, 50),
    kv_usage=st.floats(0, 1),
)


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    pools = {"p": Role.PREFILL, "q": Role.PREFILL, "d": Role.DECODE, "e": Role.DECODE}
    workers = [
        worker(
            pool,
            index,
            role,
            state=draw(st.sampled_from(WorkerState)),
            fingerprint=draw(st.sampled_from([FP, OTHER, None])),
            load=draw(loads),
        )
        for pool, role in pools.items()
        for index in range(draw(st.integers(0, 3)))
    ]
    if draw(st.booleans()):
        workers.append(worker("x", 0, Role.MIXED, state=draw(st.sampled_from(WorkerState))))
    links = tuple(
        Link(source, target, "nixl", 30.0, draw(st.sampled_from(["recompute", "fail"])))
        for source in ("p", "q")
        for target in ("d", "e")
        if draw(st.booleans())
    )
    return cluster_of(*workers, links=links)


@given(snapshots(), st.data())
def test_route_is_never_outside_what_is_allowed(snapshot, data):
    ids = [view.id for view in snapshot.workers]
    excluded = frozenset(data.draw(st.sets(st.sampled_from(ids)))) if ids else frozenset()
    turn = data.draw(st.integers(0, 100))
    try:
        route = route_in(snapshot, excluded=excluded, turn=turn)
    except NoCapacity:
        return
    for view in filter(None, (route.decode, route.prefill)):
        assert view.takes_work
        assert view.id not in excluded
    assert route.decode.role is not Role.PREFILL
    if route.prefill is not None:
        assert route.prefill.role is Role.PREFILL
        assert route.prefill.fingerprint == route.decode.fingerprint is not None
        assert route.link in snapshot.links
        assert route.link.prefill_pool == route.prefill.id.pool
        assert route.link.decode_pool == route.decode.id.pool
        assert route.why == "disaggregated"
    elif route.why.startswith("recompute"):
        policies = {
            link.on_prefill_failure
            for link in snapshot.links
            if link.decode_pool == route.decode.id.pool
        }
        assert policies != {"fail"}


@given(loads, loads, st.integers(0, 20), st.integers(0, 20))
def test_cost_grows_with_every_kind_of_load(one, more, sent, more_sent):
    lighter = worker("d", 0, Role.DECODE, load=one)
    heavier = worker(
        "d",
        0,
        Role.DECODE,
        load=Load(one.running + more.running, one.waiting + more.waiting, min(1.0, one.kv_usage)),
    )
    facts = Facts(100)
    less = cost(lighter, facts, Conditions(sent={lighter.id: sent}))
    assert less <= cost(heavier, facts, Conditions(sent={heavier.id: sent + more_sent}))


def test_idle_worker_is_preferred_to_a_busy_one():
    busy = worker("d", 0, Role.DECODE, load=Load(running=3))
    idle = worker("d", 1, Role.DECODE)
    prefill = worker("p", 0, Role.PREFILL)
    for turn in range(4):
        assert route_in(cluster_of(prefill, busy, idle), turn=turn).decode.id.index == 1


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_equal_workers_share_equally(role):
    one_more = 5
    workers = [worker("p", i, Role.PREFILL) for i in range(one_more if role is Role.PREFILL else 1)]
    workers += [worker("d", i, Role.DECODE) for i in range(one_more if role is Role.DECODE else 1)]
    used: Counter[int] = Counter()
    for turn in range(100):
        route = route_in(cluster_of(*workers), turn=turn)
        used[(route.prefill if role is Role.PREFILL else route.decode).id.index] += 1
    assert set(used.values()) == {20}


def test_own_requests_count_before_the_next_snapshot_does():
    views = (worker("p", 0, Role.PREFILL), *(worker("d", i, Role.DECODE) for i in range(3)))
    fleet = Fleet(_Holds({}), 0, lambda: 0.0)
    fleet.update(cluster_of(*views))
    used: Counter[WorkerId] = Counter()
    held = []
    for _ in range(30):
        route, _ = fleet.choose(Facts(100))
        used[route.decode.id] += 1
        busy = fleet.busy(route.decode.id)
        busy.__enter__()
        held.append(busy)
    assert set(used.values()) == {10}


def test_worker_that_holds_the_prompt_is_preferred():
    views = (
        worker("p", 0, Role.PREFILL),
        worker("d", 0, Role.DECODE),
        worker("d", 1, Role.DECODE, load=Load(running=2)),
    )
    held = {views[2].id: 576}
    route = route_in(cluster_of(*views), Facts(900, 10), held_tokens=held)
    assert route.decode.id.index == 1
    assert route.why == "disaggregated"


def test_a_few_held_tokens_are_not_worth_a_queue():
    views = (
        worker("p", 0, Role.PREFILL),
        worker("d", 0, Role.DECODE),
        worker("d", 1, Role.DECODE, load=Load(running=2)),
    )
    for turn in range(2):
        route = route_in(cluster_of(*views), held_tokens={views[2].id: 64}, turn=turn)
        assert route.decode.id.index == 0


def test_decode_prefills_by_itself_what_is_not_worth_fetching():
    views = (worker("p", 0, Role.PREFILL), worker("d", 0, Role.DECODE))
    snapshot = cluster_of(*views)
    decode = views[1].id
    assert route_in(snapshot, local_prefill_below_tokens=101).why == "local-prefill"
    assert route_in(snapshot, local_prefill_below_tokens=100).why == "disaggregated"
    almost = route_in(snapshot, held_tokens={decode: 40}, local_prefill_below_tokens=61)
    assert almost.why == "local-prefill"
    # All full blocks are there: an engine computes the last block's tokens itself, always.
    assert route_in(snapshot, held_tokens={decode: 96}).why == "local-prefill"
    assert route_in(snapshot, held_tokens={decode: 80}).why == "disaggregated"


def test_reason_to_stay_alone_is_named():
    views = (worker("p", 0, Role.PREFILL), worker("d", 0, Role.DECODE))
    route = route_in(cluster_of(*views), Facts(alone="multimodal"))
    assert (route.prefill, route.why) == (None, "alone:multimodal")


def test_mixed_workers_serve_alone():
    route = route_in(cluster_of(worker("x", 0, Role.MIXED), links=()))
    assert (route.prefill, route.why) == (None, "mixed")


def test_mismatch_is_recomputed_with_its_reason_or_refused():
    views = (worker("p", 0, Role.PREFILL, fingerprint=OTHER), worker("d", 0, Role.DECODE))
    assert route_in(cluster_of(*views)).why == "recompute:kv-mismatch"
    strict = (Link("p", "d", "nixl", 30.0, "fail"),)
    with pytest.raises(NoCapacity, match="kv-mismatch"):
        route_in(cluster_of(*views, links=strict))


def test_fed_decode_worker_comes_before_recomputing():
    views = (
        worker("p", 0, Role.PREFILL),
        worker("d", 0, Role.DECODE, load=Load(running=40)),
        worker("e", 0, Role.DECODE),
    )
    links = (Link("p", "d", "nixl", 30.0, "recompute"),)
    assert route_in(cluster_of(*views, links=links)).decode.id.pool == "d"


def test_suspect_is_the_last_resort():
    views = (worker("p", 0, Role.PREFILL), *(worker("d", i, Role.DECODE) for i in range(2)))
    suspects = frozenset({views[1].id})
    assert route_in(cluster_of(*views), suspects=suspects).decode.id.index == 1
    assert route_in(cluster_of(*views[:2]), suspects=suspects).decode.id.index == 0


def test_request_goes_only_where_it_fits():
    views = (
        worker("p", 0, Role.PREFILL),
        worker("d", 0, Role.DECODE, max_model_len_tokens=105),
        worker("d", 1, Role.DECODE, max_model_len_tokens=110, load=Load(running=9)),
    )
    assert route_in(cluster_of(*views), Facts(100, 10)).decode.id.index == 1
    with pytest.raises(NoCapacity, match="length"):
        route_in(cluster_of(*views), Facts(100, 11))


class _Holds:
    def __init__(self, held) -> None:
        self._held = held

    def held_by_all(self, prompt_token_ids):
        return self._held


SGLANG = replace(FP, connector="sglang_nixl")
IN_ROOMS = (Link("p", "d", "sglang_nixl", 30.0, "recompute"),)


def in_rooms(*workers: tuple[str, Role]) -> Snapshot:
    views = (worker(pool, 0, role, fingerprint=SGLANG) for pool, role in workers)
    return cluster_of(*views, links=IN_ROOMS)


@pytest.mark.parametrize(
    ("facts", "conditions"),
    [
        (Facts(prompt_tokens=100), {}),
        (Facts(alone="multimodal"), {}),
        (Facts(prompt_tokens=5), {"local_prefill_below_tokens": 50}),
    ],
)
def test_decode_that_cannot_prefill_is_always_fed(facts: Facts, conditions: dict):
    route = route_in(in_rooms(("p", Role.PREFILL), ("d", Role.DECODE)), facts, **conditions)
    assert (route.why, route.link) == ("disaggregated", IN_ROOMS[0])
    assert route.prefill is not None


def test_decode_that_cannot_prefill_does_not_recompute_whatever_the_policy():
    with pytest.raises(NoCapacity, match=r"pool d \(no-prefill\) and its engines cannot prefill"):
        route_in(in_rooms(("d", Role.DECODE)))


def test_mixed_workers_beside_it_serve_alone():
    assert route_in(in_rooms(("x", Role.MIXED))).why == "mixed"
