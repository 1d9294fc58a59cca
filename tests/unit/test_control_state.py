"""Desired state, store, events, snapshots: values that survive a controller."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from cluster.control import snapshots
from cluster.control.events import (
    EVENTS_KEPT,
    EventLog,
    Recorded,
    WorkerMoved,
    WorkerRemoved,
    describe,
)
from cluster.control.reconcile import Slot
from cluster.control.snapshots import Change
from cluster.control.state import DesiredState
from cluster.control.store import Store
from cluster.identity import Role, WorkerId, WorkerState
from cluster.snapshot import Fingerprint, Load
from cluster.topology.schema import PoolModelSpec, ReplicasSpec, ServingSpec
from cluster.workers.report import WorkerReport

PRINT = Fingerprint("m", "none", "float32", 16, "nixl", "1", "simulated", "1", "0")


class Entries(dict):
    def put(self, key, value):
        self[key] = value

    def delete(self, key):
        self.pop(key, None)


@pytest.fixture
def desired():
    serving = ServingSpec.model_validate(
        {
            "model": {"id": "org/model", "max_model_len_tokens": 4096},
            "pools": [
                {"name": "p", "role": "prefill", "replicas": 2},
                {"name": "d", "role": "decode"},
                {"name": "s", "role": "mixed", "engine": "simulated"},
            ],
            "islands": [
                {"name": "i", "pools": ["p", "d"], "connector": "mooncake", "lease_s": 7},
                {"name": "j", "pools": ["s"]},
            ],
        }
    )
    return DesiredState(
        cluster="c",
        serving=serving,
        model_path="org/model",
        model_digest="hub:org/model@main",
        max_model_len_tokens=4096,
        kv_bytes_per_token=100,
    )


def report(name, state=WorkerState.READY, **more):
    worker = WorkerId.parse(name)
    role = {"p": Role.PREFILL, "d": Role.DECODE, "s": Role.MIXED}[worker.pool]
    values = {"fingerprint": PRINT, "url": "http://127.0.0.1:20000"} | more
    return WorkerReport(
        id=worker, role=role, state=state, message="", node_ip="", started_at_s=0.0, **values
    )


def test_desired_state_survives_the_store_unchanged(desired):
    store = Store(Entries())
    assert store.desired() is None
    store.put_desired(desired)
    assert store.desired() == desired


def test_slots_survive_the_store_without_their_pauses():
    store = Store(Entries())
    assert store.slots() == {}
    store.put_slots({("d", 1): Slot(4, 2, not_before_s=99.0, why="x")})
    assert store.slots() == {("d", 1): Slot(4, 2)}


def test_forgetting_leaves_no_entry():
    entries = Entries()
    store = Store(entries)
    store.put_engine_key("k")
    store.put_versions_given_out(5)
    store.put_slots({})
    store.forget()
    assert entries == {}


def test_a_worker_is_told_what_its_pool_and_island_say(desired):
    spec = desired.worker_spec(WorkerId("d", 0, 3), "key")
    assert (spec.island.connector, spec.kv_bytes_per_token, spec.engine_key) == (
        "mooncake",
        100,
        "key",
    )
    assert "key" not in repr(spec).replace("engine_key", "")
    # A simulated engine's blocks are as large as its own config says.
    assert desired.worker_spec(WorkerId("s", 0, 1), "key").kv_bytes_per_token == 1024


def test_a_pool_with_files_of_its_own_is_told_of_these(desired):
    pools = [
        pool.model_copy(update={"model": PoolModelSpec(id="org/w8a8", quantization="ascend")})
        if pool.name == "d"
        else pool
        for pool in desired.serving.pools
    ]
    serving = desired.serving.model_copy(update={"pools": pools})
    desired = desired.model_copy(update={"serving": serving})
    own = desired.worker_spec(WorkerId("d", 0, 1), "key")
    assert (own.model_path, own.model.quantization) == ("org/w8a8", "ascend")
    assert own.model.public_name == "model"
    others = desired.worker_spec(WorkerId("p", 0, 1), "key")
    assert (others.model_path, others.model.quantization) == ("org/model", None)
    # Blocks of unlike weights never pass for alike.
    assert own.model_digest != others.model_digest


def test_events_read_as_subject_past_verb_and_fields():
    moved = WorkerMoved(WorkerId("d", 0, 2), WorkerState.READY, WorkerState.HUNG, "no progress")
    assert describe(moved) == "d/0#2 moved was=ready now=hung why='no progress'"
    removed = WorkerRemoved(WorkerId("d", 0, 2), "exit code 1", 2.0)
    assert describe(removed) == "d/0#2 removed cause='exit code 1' restart_in_s=2"


def test_an_event_is_told_in_words_and_in_plain_fields():
    removed = Recorded(7, 5.0, WorkerRemoved(WorkerId("d", 0, 2), "exit code 1", None)).told()
    assert (removed.at_s, removed.kind, removed.subject) == (5.0, "WorkerRemoved", "d/0#2")
    assert removed.text == "d/0#2 removed cause='exit code 1' restart_in_s=None"
    assert removed.fields == {"cause": "exit code 1", "restart_in_s": None}


def test_events_are_kept_up_to_a_bound_and_cross_processes():
    log = EventLog(lambda: 5.0)
    for number in range(EVENTS_KEPT + 10):
        log.emit(WorkerRemoved(WorkerId("d", number, 1), "x", None))
    assert len(log.last(10 * EVENTS_KEPT)) == EVENTS_KEPT
    last = log.last(1)
    assert last[0].event.worker.index == EVENTS_KEPT + 9
    assert pickle.loads(pickle.dumps(last)) == last


def test_a_snapshot_has_all_workers_and_the_islands_link(desired):
    snapshot = snapshots.build(desired, [report("d/0#1"), report("p/1#2"), report("p/0#1")], 7)
    assert (snapshot.version, snapshot.cluster, snapshot.model) == (7, "c", "model")
    assert [str(view.id) for view in snapshot.workers] == ["d/0#1", "p/0#1", "p/1#2"]
    (link,) = snapshot.links
    assert (link.connector, link.lease_s, link.on_prefill_failure) == ("mooncake", 7.0, "recompute")


def test_a_link_is_open_while_nobody_has_a_fingerprint_yet(desired):
    starting = [report("d/0#1", WorkerState.LOADING, fingerprint=None), report("p/0#1")]
    (link,) = snapshots.links(desired, starting)
    assert link.is_open
    assert link.mismatches == ()


def test_a_link_stays_open_for_the_pairs_that_are_alike(desired):
    unlike = replace(PRINT, engine_version="2")
    reports = [report("p/0#1"), report("p/1#1", fingerprint=unlike), report("d/0#1")]
    (link,) = snapshots.links(desired, reports)
    assert link.is_open
    assert link.mismatches == (
        "p/1 cannot feed d/0: engine version is '2' on prefill and '1' on decode",
    )


def test_a_link_without_a_single_like_pair_is_left_out(desired):
    unlike = replace(PRINT, model="another")
    reports = [report("p/0#1", fingerprint=unlike), report("d/0#1")]
    assert snapshots.build(desired, reports, 1).links == ()


def test_only_load_counts_as_a_change_of_load(desired):
    before = snapshots.build(desired, [report("d/0#1")], 1)
    busy = snapshots.build(desired, [report("d/0#1", load=Load(running=3))], 2)
    hung = snapshots.build(desired, [report("d/0#1", WorkerState.HUNG)], 2)
    assert snapshots.changed(None, before) is Change.STRUCTURE
    assert snapshots.changed(before, replace(before, version=2)) is Change.NONE
    assert snapshots.changed(before, busy) is Change.LOAD
    assert snapshots.changed(before, hung) is Change.STRUCTURE
    assert snapshots.changed(before, replace(before, workers=())) is Change.STRUCTURE


def test_a_worker_of_a_pool_that_was_taken_out_has_no_island(desired):
    gone = WorkerReport(
        id=WorkerId("old", 0, 1),
        role=Role.MIXED,
        state=WorkerState.DRAINING,
        message="",
        node_ip="",
        url="",
        started_at_s=0.0,
    )
    assert snapshots.build(desired, [gone], 1).workers[0].island == ""


def with_pools(desired, **changes):
    """`desired` with some keys of some pools changed: `d={"relative_speed": 2}`."""
    pools = [pool.model_copy(update=changes.get(pool.name, {})) for pool in desired.serving.pools]
    return desired.model_copy(
        update={"serving": desired.serving.model_copy(update={"pools": pools})}
    )


def test_speeds_are_relative_to_the_fastest_pool_of_the_same_side(desired):
    unlike = with_pools(desired, d={"relative_speed": 5000.0}, s={"relative_speed": 2500.0})
    snapshot = snapshots.build(unlike, [report("d/0#1"), report("s/0#1"), report("p/0#1")], 1)
    speeds = {view.id.pool: view.relative_speed for view in snapshot.workers}
    assert speeds == {"d": 1.0, "s": 0.5, "p": 1.0}
    plain = snapshots.build(desired, [report("d/0#1")], 1)
    assert plain.workers[0].relative_speed == 1.0


def test_a_snapshot_promises_the_longest_request_of_all_pools_that_answer(desired):
    assert snapshots.build(desired, [], 1).longest_tokens == 4096
    short = with_pools(desired, d={"max_model_len_tokens": 100}, s={"max_model_len_tokens": 50})
    # Nobody is up; prefill's own limit is not one of answers.
    assert snapshots.build(short, [], 1).longest_tokens == 100
    none = ReplicasSpec(initial=0)
    assert snapshots.longest_tokens(with_pools(short, d={"replicas": none})) == 50


def test_another_promise_is_a_change_of_structure(desired):
    before = snapshots.build(desired, [report("d/0#1")], 1)
    promise = replace(before, longest_tokens=1)
    assert snapshots.changed(before, promise) is Change.STRUCTURE
