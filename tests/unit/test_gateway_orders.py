"""The three orders of prefill and decode, with engines that are functions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from cluster.errors import EngineFailed, NoCapacity
from cluster.gateway.fleet import Fleet
from cluster.gateway.metaserver import Metaserver
from cluster.gateway.orders import KINDS, Passage
from cluster.identity import Role, WorkerId, WorkerState
from cluster.kv.coordinator import Coordinator
from cluster.kv.dialects import Fields, Order
from cluster.kv.lease import Failure
from cluster.observe.kv_metrics import KvMetrics
from cluster.snapshot import Fingerprint, Link, WorkerView

CONNECTORS = {
    Order.PREFILL_FIRST: "nixl",
    Order.DECODE_FIRST: "ascend_layerwise",
    Order.TOGETHER: "sglang_nixl",
}
GRANTED = {
    "kv_transfer_params": {
        "remote_engine_id": "e",
        "remote_request_id": "cmpl-r",
        "remote_host": "h",
        "remote_port": 1,
        "remote_block_ids": [[1]],
    },
}
ASKED = {
    "do_remote_decode": True,
    "request_id": "cmpl-r-0",
    "remote_engine_id": "d",
    "remote_host": "h",
    "remote_port": 1,
}


class NoHeld:
    def held_by_all(self, prompt_token_ids: Any) -> Mapping[WorkerId, int]:
        return {}


class NoRelease:
    async def release(self, worker: WorkerId, request_ids: list[str]) -> None: ...


class FakeMetaserver(Metaserver):
    """Listens nowhere; whoever has the URL may tell it something."""

    async def start(self) -> None: ...

    def tell(self, url: str, message: Any) -> None:
        self._waiting[url.rpartition("/")[2]].set_result(message)


class Rig:
    """One transfer in `order`, and a log of what happened to its two calls."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.happened: list[str] = []
        self.fleet = Fleet(NoHeld(), 0, lambda: 0.0)
        self.coordinator = Coordinator(NoRelease(), KvMetrics(CollectorRegistry()), lambda: 0.0)
        self.metaserver = FakeMetaserver("127.0.0.1")
        connector = CONNECTORS[order]
        self.transfer = self.coordinator.begin(
            "r",
            [1, 2],
            view("prefill", connector),
            view("decode", connector),
            Link("prefill", "decode", connector, 30.0, "recompute"),
        )

    def passage(
        self,
        prefill: Callable[[], Awaitable[None]] | None = None,
        decode: Callable[[], Awaitable[None]] | None = None,
        budget_s: float = 10.0,
        asks: bool = True,
    ) -> Passage[str]:
        async def call_prefill(order: Order, fields: Fields) -> Mapping[str, Any]:
            await self._log("prefill", prefill)
            return GRANTED

        async def call_decode(fields: Fields) -> str:
            if self.order is Order.DECODE_FIRST and asks:
                self.metaserver.tell(fields["kv_transfer_params"]["metaserver"], ASKED)
            await self._log("decode", decode)
            return "begun"

        return KINDS[self.order](
            self.transfer, self.fleet, self.metaserver, budget_s, call_prefill, call_decode
        )

    async def _log(self, name: str, work: Callable[[], Awaitable[None]] | None) -> None:
        self.happened.append(f"{name} called")
        try:
            await (work or _at_once)()
        except asyncio.CancelledError:
            self.happened.append(f"{name} ended")
            raise
        self.happened.append(f"{name} done")

    async def close(self, passage: Passage[str]) -> None:
        closed = "answer closed"
        await passage.close(lambda: self.happened.append(closed), Failure.GIVEN_UP)
        await asyncio.sleep(0)  # what is to happen when a call is over, happens

    @property
    def is_idle(self) -> bool:
        nothing = (self.coordinator.open_transfers, self.metaserver.waiting)
        in_flight = self.fleet.in_flight(self.transfer.prefill.id)
        mine = [task for task in asyncio.all_tasks() if task.get_name().endswith(" r")]
        return nothing == (0, 0) and in_flight == 0 and not mine


def view(pool: str, connector: str) -> WorkerView:
    return WorkerView(
        WorkerId(pool, 0, 1),
        Role(pool),
        "i",
        WorkerState.READY,
        "http://127.0.0.1:1",
        Fingerprint("m", "none", "auto", 16, connector, "1", "simulated", "1", "0"),
        8192,
        1,
        kv={"bootstrap_port": 8998},
    )


async def _at_once() -> None:
    await asyncio.sleep(0)


async def _for_ever() -> None:
    await asyncio.Event().wait()


def _fails(worker: str, status: int | None = 500) -> Callable[[], Awaitable[None]]:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise EngineFailed(worker, status, "broke")

    return fail


AT_ONCE = [Order.DECODE_FIRST, Order.TOGETHER]


@pytest.fixture(params=list(Order))
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param)


async def test_a_passage_that_succeeds_leaves_nothing(rig: Rig) -> None:
    passage = rig.passage()
    assert await passage.begin() == "begun"
    await rig.close(passage)
    assert rig.is_idle
    assert rig.transfer.state == "pulled"


async def test_decode_is_called_only_after_prefill_where_prefill_goes_first() -> None:
    rig = Rig(Order.PREFILL_FIRST)
    await rig.passage().begin()
    assert rig.happened == ["prefill called", "prefill done", "decode called", "decode done"]


async def test_prefill_is_called_only_when_decode_has_asked_where_decode_goes_first() -> None:
    rig = Rig(Order.DECODE_FIRST)
    done = asyncio.Event()
    beginning = asyncio.create_task(rig.passage(decode=done.wait, asks=False).begin())
    await asyncio.sleep(0.01)
    assert rig.happened == ["decode called"]
    (token,) = rig.metaserver._waiting
    rig.metaserver.tell(f"/{token}", ASKED)
    await asyncio.sleep(0.01)
    assert rig.happened == ["decode called", "prefill called", "prefill done"]
    done.set()
    assert await beginning == "begun"


async def test_prefill_counts_as_busy_before_decode_has_asked_for_it() -> None:
    rig = Rig(Order.DECODE_FIRST)
    passage = rig.passage(decode=_for_ever, asks=False)
    beginning = asyncio.create_task(passage.begin())
    await asyncio.sleep(0.01)
    assert rig.fleet.in_flight(rig.transfer.prefill.id) == 1
    beginning.cancel()
    await asyncio.wait((beginning,))
    await rig.close(passage)
    assert rig.is_idle


@pytest.mark.parametrize("order", AT_ONCE)
async def test_prefill_that_fails_first_ends_decode_and_is_to_blame(order: Order) -> None:
    rig = Rig(order)
    passage = rig.passage(prefill=_fails("prefill/0", 503), decode=_for_ever)
    with pytest.raises(EngineFailed, match="prefill/0 answered 503"):
        await passage.begin()
    assert "decode ended" in rig.happened
    await rig.close(passage)
    assert rig.is_idle
    assert rig.transfer.state == "released"


async def test_decode_that_fails_first_ends_prefill_and_is_to_blame(rig: Rig) -> None:
    passage = rig.passage(
        prefill=None if rig.order is Order.PREFILL_FIRST else _for_ever, decode=_fails("decode/0")
    )
    with pytest.raises(EngineFailed, match="decode/0 answered 500"):
        await passage.begin()
    if rig.order is not Order.PREFILL_FIRST:
        assert "prefill ended" in rig.happened
    await rig.close(passage)
    assert rig.is_idle


@pytest.mark.parametrize("order", AT_ONCE)
async def test_prefill_that_fails_once_decode_has_begun_is_nobodys_concern(order: Order) -> None:
    rig = Rig(order)
    fails_late = asyncio.Event()

    async def fail_late() -> None:
        await fails_late.wait()
        raise EngineFailed("prefill/0", None, "broke")

    passage = rig.passage(prefill=fail_late)
    assert await passage.begin() == "begun"
    fails_late.set()
    await asyncio.sleep(0.01)
    await rig.close(passage)
    assert rig.transfer.state == "pulled"
    assert rig.is_idle


@pytest.mark.parametrize("order", AT_ONCE)
async def test_prefill_that_outlives_the_answer_is_ended_before_decode_is_closed(
    order: Order,
) -> None:
    rig = Rig(order)
    passage = rig.passage(prefill=_for_ever)
    await passage.begin()
    await rig.close(passage)
    assert rig.happened[-2:] == ["prefill ended", "answer closed"]
    assert rig.is_idle


async def test_who_leaves_ends_both_calls_the_writer_first(rig: Rig) -> None:
    passage = rig.passage(prefill=_for_ever, decode=_for_ever)
    beginning = asyncio.create_task(passage.begin())
    await asyncio.sleep(0.01)
    beginning.cancel()
    with pytest.raises(asyncio.CancelledError):
        await beginning
    await rig.close(passage)
    assert rig.is_idle
    ended = [what for what in rig.happened if what.endswith("ended")]
    if rig.order is Order.PREFILL_FIRST:
        assert ended == ["prefill ended"]
    else:
        assert ended == ["prefill ended", "decode ended"]


async def test_prefill_that_takes_too_long_is_to_blame(rig: Rig) -> None:
    passage = rig.passage(prefill=_for_ever, decode=_for_ever, budget_s=0.05)
    with pytest.raises(EngineFailed, match="prefill/0 broke off: prefill took longer than") as late:
        await passage.begin()
    assert late.value.status is None
    await rig.close(passage)
    assert rig.is_idle


async def test_decode_that_never_asks_is_to_blame_and_the_secret_path_is_not_told() -> None:
    rig = Rig(Order.DECODE_FIRST)
    passage = rig.passage(decode=_for_ever, budget_s=0.05, asks=False)
    with pytest.raises(EngineFailed, match=r"decode/0 .*did not call the metaserver") as mute:
        await passage.begin()
    assert "/v1/" not in str(mute.value)
    await rig.close(passage)
    assert rig.is_idle


async def test_a_metaserver_that_cannot_listen_is_a_503() -> None:
    rig = Rig(Order.DECODE_FIRST)
    rig.metaserver = Metaserver("192.0.2.1")  # type: ignore[assignment]  # nobody's address
    passage = rig.passage()
    with pytest.raises(NoCapacity, match=r"cannot listen on 192\.0\.2\.1"):
        await passage.begin()
    await rig.close(passage)
    assert rig.is_idle
