"""Transfers end once, leases never stay open, and prefill's blocks are released at once."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from prometheus_client import CollectorRegistry

from cluster.errors import EngineFailed, KvMismatch, PeerGone
from cluster.identity import Role, WorkerId, WorkerState
from cluster.kv.coordinator import Coordinator, Transfer
from cluster.kv.dialects import Order
from cluster.kv.lease import ENDED, Failure, State
from cluster.observe.kv_metrics import KvMetrics
from cluster.snapshot import Fingerprint, Link, Snapshot, WorkerView

PRINT = Fingerprint("m", "none", "float32", 128, "nixl", "nixl 1", "vllm", "0.32.0", "0")
ANSWER = {
    "choices": [{"finish_reason": "length"}],
    "kv_transfer_params": {
        "remote_engine_id": "e",
        "remote_request_id": "cmpl-x",
        "remote_host": "h",
        "remote_port": 1,
        "remote_block_ids": [[1]],
    },
}
NIXL = Link("prefill", "decode", "nixl", lease_s=30.0, on_prefill_failure="recompute")
MOONCAKE = Link("prefill", "decode", "mooncake", lease_s=10.0, on_prefill_failure="recompute")
LAYERWISE = dataclasses.replace(NIXL, connector="ascend_layerwise")
SGLANG = dataclasses.replace(NIXL, connector="sglang_nixl")


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class FakeReleaser:
    def __init__(self) -> None:
        self.calls: list[tuple[WorkerId, list[str]]] = []
        self.failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def release(self, worker: WorkerId, request_ids: list[str]) -> None:
        await self.gate.wait()
        self.calls.append((worker, request_ids))
        if self.failure is not None:
            raise self.failure

    @property
    def released(self) -> list[str]:
        return [request_id for _, ids in self.calls for request_id in ids]


@dataclasses.dataclass
class Rig:
    coordinator: Coordinator
    clock: FakeClock
    releaser: FakeReleaser
    registry: CollectorRegistry

    def count(self, outcome: str, connector: str = "nixl") -> float:
        labels = {
            "prefill_pool": "prefill",
            "decode_pool": "decode",
            "connector": connector,
            "outcome": outcome,
        }
        return self.registry.get_sample_value("pdcluster_kv_transfers_total", labels) or 0.0

    def failures(self, connector: str = "nixl") -> dict[str, float]:
        """Those there were, by cause."""
        link = {"prefill_pool": "prefill", "decode_pool": "decode", "connector": connector}
        name = "pdcluster_kv_transfer_failures_total"
        found = {
            cause.value: self.registry.get_sample_value(name, {**link, "cause": cause.value})
            for cause in Failure
        }
        return {cause: count for cause, count in found.items() if count}

    def gauge(self) -> float:
        labels = {"prefill_pool": "prefill"}
        return self.registry.get_sample_value("pdcluster_kv_leases_open", labels) or 0.0


def make_rig() -> Rig:
    clock, releaser, registry = FakeClock(), FakeReleaser(), CollectorRegistry()
    coordinator = Coordinator(releaser, KvMetrics(registry), clock)

    async def bootstrap(url: str) -> Any:
        return {"0": {"engine_id": "e"}}

    coordinator._dialects["mooncake"]._ask = bootstrap  # type: ignore[attr-defined]
    return Rig(coordinator, clock, releaser, registry)


@pytest.fixture
def rig() -> Rig:
    return make_rig()


def view(pool: str, index: int = 0, generation: int = 1, **changes: Any) -> WorkerView:
    role = Role.PREFILL if pool == "prefill" else Role.DECODE
    known = WorkerView(
        WorkerId(pool, index, generation),
        role,
        "cpu",
        WorkerState.READY,
        "http://127.0.0.1:1",
        PRINT,
        8192,
        1,
        kv={"bootstrap_addr": "http://127.0.0.1:8998", "bootstrap_port": 8998},
    )
    return dataclasses.replace(known, **changes)


def begin(rig: Rig, request_id: str = "r1", link: Link = NIXL, **prefill: Any) -> Transfer:
    return rig.coordinator.begin(
        request_id, [1, 2, 3], view("prefill", **prefill), view("decode"), link
    )


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_pulled_transfer_releases_nothing(rig: Rig) -> None:
    transfer = begin(rig)
    await transfer.prefill_fields()
    transfer.prefilled(ANSWER)
    assert rig.coordinator.open_leases(transfer.prefill.id) == 1
    assert await transfer.decode_fields() == {"kv_transfer_params": ANSWER["kv_transfer_params"]}
    transfer.finish()
    await settle()
    assert transfer.state is State.PULLED
    assert (rig.coordinator.open_leases(), rig.coordinator.open_transfers, rig.gauge()) == (0, 0, 0)
    assert rig.count("pulled") == 1
    assert not rig.releaser.calls


@pytest.mark.parametrize("far", ["offered", "granted", "pulling"])
async def test_an_abandoned_transfer_is_released_at_once_however_far_it_got(
    rig: Rig, far: str
) -> None:
    transfer = begin(rig)
    if far != "offered":
        transfer.prefilled(ANSWER)
    if far == "pulling":
        await transfer.decode_fields()
    transfer.abandon(Failure.GIVEN_UP)
    await settle()
    assert rig.releaser.calls == [(WorkerId("prefill", 0, 1), ["r1"])]
    assert (rig.count("released"), rig.coordinator.open_leases(), rig.gauge()) == (1, 0, 0)
    assert rig.failures() == {"given-up": 1}


async def test_only_the_first_end_counts(rig: Rig) -> None:
    transfer = begin(rig)
    transfer.prefilled(ANSWER)
    await transfer.decode_fields()
    transfer.finish()
    transfer.abandon(Failure.GIVEN_UP)
    transfer.finish()
    await settle()
    assert (rig.count("pulled"), rig.count("released"), rig.releaser.calls) == (1, 0, [])
    assert rig.failures() == {}


async def test_an_answer_with_nothing_to_pull_is_an_engine_failure(rig: Rig) -> None:
    transfer = begin(rig)
    with pytest.raises(EngineFailed, match="nothing to pull"):
        transfer.prefilled({"choices": []})
    assert transfer.state is State.OFFERED
    transfer.abandon(Failure.GIVEN_UP)
    assert transfer.state is State.RELEASED


async def test_a_lease_that_ran_out_is_not_offered_to_decode(rig: Rig) -> None:
    transfer = begin(rig)
    transfer.prefilled(ANSWER)
    rig.clock.now_s += 30.0
    with pytest.raises(EngineFailed, match="lease of 30 s ran out before decode was asked"):
        await transfer.decode_fields()
    transfer.abandon(Failure.GIVEN_UP)
    await settle()
    assert (rig.count("expired"), rig.coordinator.open_leases(), rig.releaser.calls) == (1, 0, [])
    assert rig.failures() == {"expired": 1}


async def test_heartbeats_keep_a_nixl_lease_while_decode_has_the_request(rig: Rig) -> None:
    transfer = begin(rig)
    transfer.prefilled(ANSWER)
    await transfer.decode_fields()
    rig.clock.now_s += 3600
    assert rig.coordinator.open_leases() == 1
    transfer.finish()
    assert rig.count("pulled") == 1


async def test_a_mooncake_lease_runs_out_also_while_decode_has_the_request(rig: Rig) -> None:
    transfer = begin(rig, link=MOONCAKE)
    transfer.prefilled(ANSWER)
    await transfer.decode_fields()
    rig.clock.now_s += 10
    assert rig.coordinator.open_leases() == 0
    assert rig.count("expired", "mooncake") == 1


async def test_a_replaced_prefill_worker_takes_its_transfers_with_it(rig: Rig) -> None:
    old = begin(rig, "old")
    old.prefilled(ANSWER)
    new = begin(rig, "new", generation=2)
    assert old.state is State.LOST
    with pytest.raises(PeerGone, match="prefill/0 is gone: it was replaced"):
        await old.decode_fields()
    old.abandon(Failure.GIVEN_UP)
    await settle()
    assert rig.releaser.calls == []
    assert rig.failures() == {"lost": 1}
    assert new.state is State.OFFERED


async def test_a_snapshot_that_says_ended_ends_and_one_that_says_nothing_does_not(
    rig: Rig,
) -> None:
    transfer = begin(rig)
    transfer.prefilled(ANSWER)
    rig.coordinator.observe(Snapshot(1, "c", "m"))
    assert transfer.state is State.GRANTED
    failed = view("prefill", state=WorkerState.FAILED)
    rig.coordinator.observe(Snapshot(2, "c", "m", workers=(failed,)))
    assert transfer.state is State.LOST


async def test_every_end_of_a_links_transfers_is_shown_from_nought_before_the_first(
    rig: Rig,
) -> None:
    rig.coordinator.observe(Snapshot(1, "c", "m", links=(NIXL,)))
    pair = {"prefill_pool": NIXL.prefill_pool, "decode_pool": NIXL.decode_pool}
    for outcome in ("pulled", "released", "expired", "lost"):
        labels = pair | {"connector": "nixl", "outcome": outcome}
        assert rig.registry.get_sample_value("pdcluster_kv_transfers_total", labels) == 0
    for cause in Failure:
        labels = pair | {"connector": "nixl", "cause": cause.value}
        assert rig.registry.get_sample_value("pdcluster_kv_transfer_failures_total", labels) == 0
    assert rig.registry.get_sample_value("pdcluster_kv_mismatches_total", pair) == 0


async def test_unlike_engines_are_refused_before_anything_happens(rig: Rig) -> None:
    other = dataclasses.replace(PRINT, kv_dtype="fp8")
    with pytest.raises(KvMismatch, match="KV cache dtype is 'fp8' on prefill and 'float32'"):
        begin(rig, fingerprint=other)
    assert rig.coordinator.open_transfers == 0
    labels = {"prefill_pool": "prefill", "decode_pool": "decode"}
    assert rig.registry.get_sample_value("pdcluster_kv_mismatches_total", labels) == 1


async def test_many_abandoned_at_once_are_released_in_few_calls(rig: Rig) -> None:
    for number in range(1000):
        begin(rig, f"r{number}").abandon(Failure.GIVEN_UP)
    await settle()
    assert sorted(rig.releaser.released) == sorted(f"r{number}" for number in range(1000))
    assert len(rig.releaser.calls) <= 5


async def test_a_release_that_fails_is_counted_and_the_next_one_is_sent(rig: Rig) -> None:
    rig.releaser.failure = OSError("actor is dead")
    begin(rig, "r1").abandon(Failure.GIVEN_UP)
    await settle()
    rig.releaser.failure = None
    begin(rig, "r2").abandon(Failure.GIVEN_UP)
    await settle()
    labels = {"prefill_pool": "prefill"}
    assert rig.registry.get_sample_value("pdcluster_kv_release_failures_total", labels) == 1
    assert rig.releaser.released == ["r1", "r2"]


@pytest.mark.parametrize("failure", [Failure.PULL_FAILED, Failure.HUNG, Failure.REFUSED])
async def test_a_link_and_the_cause_are_told_of_blocks_that_did_not_get_to_decode(
    rig: Rig, failure: Failure
) -> None:
    transfer = begin(rig, link=MOONCAKE)
    transfer.prefilled(ANSWER)
    rig.clock.now_s += 2
    transfer.abandon(failure)
    transfer.abandon(Failure.GIVEN_UP)
    assert rig.failures("mooncake") == {failure.value: 1}
    link = {"prefill_pool": "prefill", "decode_pool": "decode", "connector": "mooncake"}
    assert rig.registry.get_sample_value("pdcluster_kv_lease_seconds_sum", link) == 2


async def test_close_releases_what_is_open_and_waits_for_it(rig: Rig) -> None:
    transfer = begin(rig)
    transfer.prefilled(ANSWER)
    await rig.coordinator.close()
    await rig.coordinator.close()
    assert transfer.state is State.RELEASED
    assert rig.releaser.released == ["r1"]


def test_abandon_without_a_running_loop_does_not_raise() -> None:
    rig = make_rig()
    begin(rig).abandon(Failure.GIVEN_UP)
    assert rig.count("released") == 1


ASKED = {
    "do_remote_decode": True,
    "request_id": "cmpl-r1-0",
    "remote_engine_id": "d",
    "remote_host": "h",
    "remote_port": 1,
}


async def test_prefill_that_pushes_has_no_lease_and_nothing_to_release(rig: Rig) -> None:
    transfer = begin(rig, link=LAYERWISE)
    params = transfer.waiting_fields("http://h/m")["kv_transfer_params"]
    assert (params["metaserver"], params["do_remote_prefill"]) == ("http://h/m", True)
    assert transfer.pushing_fields(ASKED) == {"kv_transfer_params": ASKED}
    assert (transfer.state, rig.coordinator.open_leases()) == (State.PULLING, 0)
    rig.clock.now_s += 3600  # and none that could run out
    assert rig.coordinator.open_transfers == 1
    transfer.abandon(Failure.GIVEN_UP)
    await settle()
    assert (rig.releaser.calls, rig.coordinator.open_transfers) == ([], 0)
    assert rig.count("released", "ascend_layerwise") == 1


async def test_engines_that_meet_in_a_room_end_as_pulled(rig: Rig) -> None:
    first, second = begin(rig, "r1", SGLANG), begin(rig, "r2", SGLANG)
    rooms = {one.shared_fields()["bootstrap_room"] for one in (first, second)}
    assert len(rooms) == 2
    first.finish()
    second.abandon(Failure.GIVEN_UP)
    await settle()
    assert (rig.count("pulled", "sglang_nixl"), rig.count("released", "sglang_nixl")) == (1, 1)
    assert rig.releaser.calls == []


async def test_a_replaced_prefill_worker_is_not_asked_to_push(rig: Rig) -> None:
    transfer = begin(rig, link=LAYERWISE)
    transfer.waiting_fields("http://h/m")
    rig.coordinator.observe(Snapshot(1, "c", "m", workers=(view("prefill", generation=2),)))
    with pytest.raises(PeerGone, match="prefill/0 is gone"):
        transfer.pushing_fields(ASKED)


class AnyOrder(RuleBasedStateMachine):
    """Calls, clocks and generations in any order: every transfer ends once, nothing is kept."""

    transfers = Bundle("transfers")

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.rig = make_rig()
        self.begun: list[Transfer] = []
        self.generation = [1, 1]

    def within_loop(self, call: Callable[[], None]) -> None:
        async def run() -> None:
            call()

        self.loop.run_until_complete(run())

    def teardown(self) -> None:
        self.loop.run_until_complete(self.rig.coordinator.close())
        coordinator = self.rig.coordinator
        assert all(transfer.state in ENDED for transfer in self.begun)
        assert (coordinator.open_leases(), coordinator.open_transfers, self.rig.gauge()) == (0,) * 3
        assert not coordinator._timed
        assert not coordinator._leases
        ended = sum(
            self.rig.count(state.value, connector)
            for state in ENDED
            for connector in ("nixl", "mooncake", "ascend_layerwise", "sglang_nixl")
        )
        assert ended == len(self.begun)
        # Released exactly those that ended released, each at most once.
        assert sorted(self.rig.releaser.released) == sorted(
            transfer.request_id
            for transfer in self.begun
            if transfer.state is State.RELEASED
            and transfer.dialect.keeps_blocks
            and transfer.request_id not in self.dropped_releases
        )
        self.loop.close()

    @property
    def dropped_releases(self) -> set[str]:
        """Releases still waiting when their worker was replaced need not be sent."""
        sent = set(self.rig.releaser.released)
        return {
            transfer.request_id
            for transfer in self.begun
            if transfer.request_id not in sent
            and transfer.prefill.id.generation < self.generation[transfer.prefill.id.index]
        }

    @rule(
        target=transfers,
        index=st.sampled_from([0, 1]),
        link=st.sampled_from(
            [NIXL, MOONCAKE, dataclasses.replace(MOONCAKE, lease_s=3.0), LAYERWISE, SGLANG]
        ),
    )
    def begin(self, index: int, link: Link) -> Transfer:
        prefill = view("prefill", index, self.generation[index])
        transfer = self.rig.coordinator.begin(
            f"r{len(self.begun)}", [1], prefill, view("decode"), link
        )
        self.begun.append(transfer)
        return transfer

    @rule(transfer=transfers)
    def prefill_answers(self, transfer: Transfer) -> None:
        if transfer.order is not Order.PREFILL_FIRST:
            return
        if transfer.state is State.OFFERED or transfer.state in ENDED:
            transfer.prefilled(ANSWER)

    @rule(transfer=transfers)
    def decode_is_asked(self, transfer: Transfer) -> None:
        if transfer.order is not Order.PREFILL_FIRST:
            if transfer.state is State.OFFERED or transfer.state in ENDED:
                self.both_are_asked(transfer)
            return
        if transfer.state is State.OFFERED:
            return
        before = transfer.state
        try:
            self.loop.run_until_complete(transfer.decode_fields())
        except (EngineFailed, PeerGone):
            assert transfer.state in (State.EXPIRED, State.LOST)
        else:
            assert transfer.state is State.PULLING or before in ENDED

    def both_are_asked(self, transfer: Transfer) -> None:
        before = transfer.state
        if transfer.order is Order.TOGETHER:
            transfer.shared_fields()
        else:
            transfer.waiting_fields("http://h/m")
        assert transfer.state is State.PULLING or before in ENDED

    @rule(transfer=consumes(transfers))
    def finish(self, transfer: Transfer) -> None:
        self.within_loop(transfer.finish)
        assert transfer.state in ENDED

    @rule(transfer=consumes(transfers))
    def abandon(self, transfer: Transfer) -> None:
        self.within_loop(lambda: transfer.abandon(Failure.GIVEN_UP))
        assert transfer.state in ENDED

    @rule(seconds=st.sampled_from([1.0, 5.0, 40.0]))
    def time_passes(self, seconds: float) -> None:
        self.rig.clock.now_s += seconds

    @rule(index=st.sampled_from([0, 1]))
    def restart(self, index: int) -> None:
        self.generation[index] += 1
        restarted = view("prefill", index, self.generation[index])
        snapshot = Snapshot(1, "c", "m", workers=(restarted,))
        self.within_loop(lambda: self.rig.coordinator.observe(snapshot))

    @rule()
    def tasks_run(self) -> None:
        self.loop.run_until_complete(settle())

    @invariant()
    def what_is_open_is_counted(self) -> None:
        coordinator = self.rig.coordinator
        leases = coordinator.open_leases()
        by_state = [transfer for transfer in self.begun if transfer.state not in ENDED]
        granted = [one for one in by_state if one.granted_at_s is not None]
        assert (coordinator.open_transfers, leases) == (len(by_state), len(granted))
        assert self.rig.gauge() == len(granted)
        now_s = self.rig.clock.now_s
        for transfer in granted:
            assert transfer.granted_at_s is not None
            runs = transfer.state is State.PULLING and transfer.dialect.has_heartbeats
            assert runs or now_s < transfer.granted_at_s + transfer.lease_s


AnyOrder.TestCase.settings = settings(stateful_step_count=30)
TestAnyOrder = AnyOrder.TestCase
