"""Routing over unlike islands behind one endpoint: by load, by what is held, by what fits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import EngineFailed, NoCapacity
from cluster.gateway import recovery
from cluster.gateway.fleet import Fleet
from cluster.gateway.recovery import Cause, Ended, Stage, Tries
from cluster.gateway.route import Conditions, Facts, Route, choose, compile_table
from cluster.identity import Role, WorkerId, WorkerState
from cluster.kv.fingerprint import differences
from cluster.snapshot import Fingerprint, Link, Load, Snapshot, WorkerView

CONNECTORS = {"h200": "nixl", "atlas": "mooncake", "spare": "ascend_mooncake"}
BLOCKS = {"h200": 16, "atlas": 128, "spare": 64}


def workers_of(
    island: str, prefills: int = 1, decodes: int = 1, **more: object
) -> list[WorkerView]:
    """All replicas of an island; `more` goes into each view."""
    print_ = Fingerprint(
        "m", "none", "auto", BLOCKS[island], CONNECTORS[island], "1", "simulated", "1", "0"
    )
    return [
        replace(
            WorkerView(
                id=WorkerId(f"{role}-{island}", index, 1),
                role=role,
                island=island,
                state=WorkerState.READY,
                url=f"http://{role}-{island}-{index}",
                fingerprint=print_,
                max_model_len_tokens=1000,
                kv_bytes_per_token=1,
            ),
            **more,  # type: ignore[arg-type]
        )
        for role, count in ((Role.PREFILL, prefills), (Role.DECODE, decodes))
        for index in range(count)
    ]


def cluster_of(*islands: list[WorkerView], policy: str = "recompute", **more: int) -> Snapshot:
    workers = tuple(worker for island in islands for worker in island)
    names = sorted({worker.island for worker in workers})
    links = tuple(
        Link(f"prefill-{name}", f"decode-{name}", CONNECTORS[name], 30.0, policy) for name in names
    )
    return Snapshot(1, "c", "m", workers, links, **more)


def route_in(snapshot: Snapshot, facts: Facts | None = None, **conditions: object) -> Route:
    table = compile_table(snapshot, differences)
    return choose(table, facts or Facts(100, 10), Conditions(**conditions))  # type: ignore[arg-type]


class Holds:
    def held_by_all(self, prompt_token_ids: object) -> dict[WorkerId, int]:
        return {}


def shares(snapshot: Snapshot, requests: int, facts: Facts | None = None) -> Counter[str]:
    """How many of `requests` that all stay each island gets."""
    fleet = Fleet(Holds(), 0, lambda: 0.0)
    fleet.update(snapshot)
    used: Counter[str] = Counter()
    for _ in range(requests):
        route, _ = fleet.choose(facts or Facts(100, 10))
        used[route.decode.island] += 1
        fleet.busy(route.decode.id).__enter__()
    return used


loads = st.builds(
    Load,
    running=st.integers(0, 30),
    waiting=st.integers(0, 30),
    kv_usage=st.floats(0, 1),
)


@st.composite
def islands(draw: st.DrawFn) -> Snapshot:
    parts = []
    for name in CONNECTORS:
        limit = draw(st.integers(1, 300))
        speed = draw(st.floats(0.1, 1.0))
        parts.append(
            [
                replace(
                    worker,
                    load=draw(loads),
                    state=draw(st.sampled_from([WorkerState.READY, WorkerState.LOADING])),
                    max_model_len_tokens=limit,
                    relative_speed=speed,
                )
                for worker in workers_of(name, draw(st.integers(0, 2)), draw(st.integers(0, 2)))
            ]
        )
    return cluster_of(*parts, policy=draw(st.sampled_from(["recompute", "fail"])))


@given(islands(), st.integers(0, 300), st.integers(0, 50), st.data())
def test_a_pair_is_of_one_island_and_takes_the_request(
    snapshot: Snapshot, prompt: int, answer: int, data: st.DataObject
) -> None:
    ids = [view.id for view in snapshot.workers]
    some = st.sets(st.sampled_from(ids)) if ids else st.just(set())
    excluded, suspects = frozenset(data.draw(some)), frozenset(data.draw(some))
    held = {worker: data.draw(st.integers(0, 300)) for worker in ids}
    try:
        route = route_in(
            snapshot,
            Facts(prompt, answer),
            excluded=excluded,
            suspects=suspects,
            held_tokens=held,
            turn=data.draw(st.integers(0, 20)),
        )
    except NoCapacity:
        return
    assert route.decode.takes_work
    assert route.decode.id not in excluded
    assert prompt + max(1, answer) <= route.decode.max_model_len_tokens
    if route.prefill is not None:
        assert route.link is not None
        assert route.prefill.island == route.decode.island
        assert CONNECTORS[route.decode.island] == route.link.connector
        assert prompt + 1 <= route.prefill.max_model_len_tokens
        assert route.prefill.id not in excluded


@given(islands(), st.integers(1, 300), st.integers(0, 50))
def test_a_request_that_fits_somewhere_is_routed(
    snapshot: Snapshot, prompt: int, answer: int
) -> None:
    ready = [view for view in snapshot.workers if view.takes_work]
    policy = {link.on_prefill_failure for link in snapshot.links}
    can_prefill = {view.island for view in ready if view.role is Role.PREFILL}
    fits = any(
        view.role is Role.DECODE
        and view.max_model_len_tokens >= prompt + max(1, answer)
        and (policy == {"recompute"} or view.island in can_prefill)
        for view in ready
    )
    try:
        route_in(snapshot, Facts(prompt, answer))
    except NoCapacity:
        assert not fits
    else:
        assert fits


def test_equal_islands_take_turns_and_so_do_their_workers() -> None:
    snapshot = cluster_of(workers_of("h200", decodes=2), workers_of("atlas", decodes=2))
    used = Counter(route_in(snapshot, turn=turn).decode.id for turn in range(100))
    assert set(used.values()) == {25}


def test_load_spills_to_the_other_island() -> None:
    busy = workers_of("h200", load=Load(running=5))
    for turn in range(4):
        route = route_in(cluster_of(busy, workers_of("atlas")), turn=turn)
        assert route.decode.island == "atlas"
        assert route.why == "disaggregated"


@given(st.lists(st.sampled_from([0.25, 0.5, 1.0]), min_size=2, max_size=3))
def test_load_is_shared_in_proportion_to_relative_speed(speeds: list[float]) -> None:
    names = list(CONNECTORS)[: len(speeds)]
    snapshot = cluster_of(
        *(workers_of(n, relative_speed=s) for n, s in zip(names, speeds, strict=True))
    )
    used = shares(snapshot, 140)
    for name, speed in zip(names, speeds, strict=True):
        assert used[name] == pytest.approx(140 * speed / sum(speeds), abs=3)


def test_an_idle_slow_island_comes_after_an_idle_fast_one() -> None:
    fast, slow = workers_of("h200"), workers_of("atlas", relative_speed=0.5)
    for turn in range(4):
        assert route_in(cluster_of(slow, fast), turn=turn).decode.island == "h200"


def test_a_mixed_island_gets_no_more_than_its_share() -> None:
    alone = replace(workers_of("spare", prefills=0)[0], role=Role.MIXED)
    snapshot = cluster_of(workers_of("h200"), [alone])
    assert shares(snapshot, 100) == {"h200": 50, "spare": 50}
    # Idle, it costs as much as a pair: it does the work of both.
    used = Counter(route_in(snapshot, turn=turn).decode.island for turn in range(10))
    assert used == {"h200": 5, "spare": 5}


def test_a_worker_whose_pool_was_moved_to_another_island_pairs_with_nobody() -> None:
    prefill, decode = workers_of("h200")
    moved = replace(prefill, island="elsewhere")
    snapshot = Snapshot(1, "c", "m", (moved, decode), cluster_of([prefill, decode]).links)
    assert route_in(snapshot).why == "recompute:no-prefill"


def test_a_conversation_stays_where_its_prefix_is_until_load_says_otherwise() -> None:
    def island_at(running: int) -> str:
        home = workers_of("h200", load=Load(running=running))
        held = {view.id: 896 for view in home}
        snapshot = cluster_of(home, workers_of("atlas"))
        return route_in(snapshot, Facts(950, 10), held_tokens=held, turn=1).decode.island

    stays = [island_at(running) == "h200" for running in range(20)]
    assert stays[0]
    assert stays[2]
    assert not stays[19]
    assert stays == sorted(stays, reverse=True)


def test_what_is_too_long_for_one_island_goes_to_the_other_however_loaded() -> None:
    short = workers_of("h200", max_model_len_tokens=100)
    long = workers_of("atlas", load=Load(running=50, waiting=50))
    assert route_in(cluster_of(short, long), Facts(100, 1)).decode.island == "atlas"
    assert route_in(cluster_of(short, long), Facts(90, 10)).decode.island == "h200"


def test_an_answer_of_no_stated_length_goes_where_there_is_room_for_one() -> None:
    short, long = workers_of("h200", max_model_len_tokens=120), workers_of("atlas")
    snapshot = cluster_of(short, long)
    for turn in range(4):
        assert route_in(snapshot, Facts(100), turn=turn).decode.island == "atlas"
    assert {route_in(snapshot, Facts(100, 5), turn=t).decode.island for t in range(4)} == {
        "h200",
        "atlas",
    }
    # Room is worth a detour, not any detour.
    full = cluster_of(short, workers_of("atlas", load=Load(running=60)))
    assert route_in(full, Facts(100)).decode.island == "h200"


def test_a_prompt_of_unknown_length_goes_where_the_longest_fits() -> None:
    short = workers_of("h200", max_model_len_tokens=100)
    busy = workers_of("atlas", load=Load(running=50))
    for turn in range(4):
        route = route_in(cluster_of(short, busy), Facts(alone="multimodal"), turn=turn)
        assert route.decode.island == "atlas"


def test_too_long_for_all_is_told_from_too_long_for_those_that_are_up() -> None:
    short = workers_of("h200", max_model_len_tokens=100)
    table = compile_table(cluster_of(short, longest_tokens=1000), differences)
    assert table.longest_tokens == 1000
    assert table.longest_ready_tokens == 100
    with pytest.raises(NoCapacity, match="length"):
        choose(table, Facts(500, 1), Conditions())


def test_everything_moves_when_one_island_is_gone() -> None:
    gone = [replace(view, state=WorkerState.FAILED) for view in workers_of("h200", 2, 3)]
    snapshot = cluster_of(gone, workers_of("atlas"))
    assert shares(snapshot, 20) == {"atlas": 20}
    assert shares(cluster_of(workers_of("atlas")), 20) == {"atlas": 20}


def test_an_island_that_lost_its_prefill_lets_the_other_prefill_again() -> None:
    lame = workers_of("h200", prefills=0)
    busy = workers_of("atlas", load=Load(running=20))
    route = route_in(cluster_of(lame, busy))
    assert (route.decode.island, route.why) == ("atlas", "disaggregated")


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 30))
def test_no_request_is_lost_with_a_whole_island(prefills: int, decodes: int, turn: int) -> None:
    """The snapshot still shows it: each try meets a dead worker, until one is made elsewhere."""
    snapshot = cluster_of(
        workers_of("h200", prefills, decodes), workers_of("atlas", load=Load(running=9))
    )
    table = compile_table(snapshot, differences)
    tries = Tries(2)
    while True:
        conditions = Conditions(
            excluded=tries.excluded,
            turn=turn,
            failure=tries.why,
            may_prefill_elsewhere=tries.may_prefill_elsewhere,
        )
        route = choose(table, Facts(100, 10), conditions)
        if route.decode.island == "atlas":
            assert route.why == "disaggregated"
            return
        stage = Stage.DECODE if turn % 2 else Stage.PREFILL
        failed = route.decode if stage is Stage.DECODE else route.prefill
        assert failed is not None
        error = EngineFailed(failed.id.name, None, "refused")
        tries = recovery.after(tries, route, Ended(Cause.FAILED, stage, error))
        assert tries.may_go_on


def test_one_failed_worker_does_not_empty_its_island() -> None:
    """Another request than the one that failed: only the suspect itself is avoided."""
    home = workers_of("h200", decodes=3)
    snapshot = cluster_of(home, workers_of("atlas", load=Load(running=9)))
    route = route_in(snapshot, suspects=frozenset({home[1].id}))
    assert route.decode.island == "h200"
    assert route.decode.id != home[1].id


def test_decode_computes_what_no_prefill_takes_and_says_why() -> None:
    prefill, decode = workers_of("h200")
    short = replace(prefill, max_model_len_tokens=50)
    assert route_in(cluster_of([short, decode])).why == "recompute:too-long-for-prefill"
    with pytest.raises(NoCapacity, match="too-long-for-prefill"):
        route_in(cluster_of([short, decode], policy="fail"))


def test_what_a_worker_holds_counts_in_its_own_blocks() -> None:
    prefill, decode = workers_of("atlas")
    held = {decode.id: 128}
    # 128-token blocks: all but the last block is there, which the engine computes anyhow.
    assert route_in(cluster_of([prefill, decode]), Facts(200, 1), held_tokens=held).why == (
        "local-prefill"
    )
    small = workers_of("h200")
    held = {small[1].id: 128}
    assert route_in(cluster_of(small), Facts(200, 1), held_tokens=held).why == "disaggregated"
