"""Each connector's fields, and what is said when an engine answers wrongly."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any, get_args

import pytest

from cluster.errors import EngineFailed
from cluster.identity import Role, WorkerId, WorkerState
from cluster.kv.dialects import (
    ORDERS,
    AscendLayerwiseDialect,
    AscendMooncakeDialect,
    MooncakeDialect,
    NixlDialect,
    Order,
    SglangDialect,
    decode_can_prefill,
    make_dialects,
)
from cluster.kv.dialects.sglang import ROOMS
from cluster.snapshot import WorkerView
from cluster.topology.schema import ConnectorName

GRANT = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": [[1, 2]],
    "remote_engine_id": "e",
    "remote_request_id": "cmpl-r-0-abcdef01",
    "remote_host": "127.0.0.1",
    "remote_port": 5601,
    "tp_size": 1,
}
LENGTH = {"choices": [{"finish_reason": "length"}]}


def worker(generation: int = 1, **kv: str) -> WorkerView:
    kv.setdefault("bootstrap_addr", "http://127.0.0.1:8998/")
    return WorkerView(
        WorkerId("prefill", 0, generation),
        Role.PREFILL,
        "cpu",
        WorkerState.READY,
        "http://127.0.0.1:1",
        None,
        8192,
        1,
        kv=kv,
    )


class Bootstrap:
    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def __call__(self, url: str) -> Any:
        self.asked.append(url)
        await asyncio.sleep(0)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def engine(engine_id: str) -> dict[str, Any]:
    return {"0": {"engine_id": engine_id, "worker_addr": {"0": {"0": "tcp://127.0.0.1:1"}}}}


async def engine_id_told(mooncake: MooncakeDialect, prefill: WorkerView) -> str:
    fields = await mooncake.decode_fields("t", prefill, {})
    told: str = fields["kv_transfer_params"]["remote_engine_id"]
    return told


async def test_nixl_hands_prefills_answer_to_decode_unchanged() -> None:
    nixl = NixlDialect()
    asked = (await nixl.prefill_fields("r", worker()))["kv_transfer_params"]
    assert asked["do_remote_decode"] is True
    assert asked["do_remote_prefill"] is False
    grant = nixl.grant(worker(), {"kv_transfer_params": GRANT})
    assert await nixl.decode_fields("r", worker(), grant) == {"kv_transfer_params": GRANT}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({}, "no kv_transfer_params"),
        ({"kv_transfer_params": None}, "no kv_transfer_params"),
        ({"kv_transfer_params": "x"}, "no kv_transfer_params"),
        ({"kv_transfer_params": {**GRANT, "remote_host": None}}, "lack remote_host"),
        ({"kv_transfer_params": {**GRANT, "remote_block_ids": []}}, "no blocks to pull"),
        ({"kv_transfer_params": {**GRANT, "remote_block_ids": [[]]}}, "no blocks to pull"),
        ({"kv_transfer_params": {**GRANT, "remote_block_ids": 7}}, "no blocks to pull"),
    ],
)
def test_nixl_refuses_an_answer_with_nothing_to_pull(answer: dict[str, Any], says: str) -> None:
    with pytest.raises(EngineFailed, match=f"prefill/0 .*{says}"):
        NixlDialect().grant(worker(), answer)


async def test_mooncake_tells_decode_where_prefills_bootstrap_is_and_who_prefill_is() -> None:
    mooncake = MooncakeDialect(Bootstrap(engine("e1")))
    assert await mooncake.prefill_fields("t1", worker()) == {
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "transfer_id": "t1",
        }
    }
    assert await mooncake.decode_fields("t1", worker(), mooncake.grant(worker(), LENGTH)) == {
        "kv_transfer_params": {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "remote_bootstrap_addr": "http://127.0.0.1:8998",
            "remote_engine_id": "e1",
            "transfer_id": "t1",
        }
    }


async def test_mooncake_asks_a_generation_once_however_many_wait() -> None:
    bootstrap = Bootstrap(engine("e1"), engine("e2"))
    mooncake = MooncakeDialect(bootstrap)
    await asyncio.gather(*(mooncake.prefill_fields(f"t{i}", worker()) for i in range(20)))
    assert bootstrap.asked == ["http://127.0.0.1:8998/query"]
    assert await engine_id_told(mooncake, worker(generation=2)) == "e2"


async def test_mooncake_asks_again_after_a_failure_and_after_forgetting() -> None:
    bootstrap = Bootstrap(OSError("refused"), engine("e1"), engine("e2"))
    mooncake = MooncakeDialect(bootstrap)
    with pytest.raises(EngineFailed, match="does not answer: refused"):
        await mooncake.prefill_fields("t", worker())
    assert await engine_id_told(mooncake, worker()) == "e1"
    mooncake.forget(worker().id)
    assert await engine_id_told(mooncake, worker()) == "e2"


async def test_one_caller_that_leaves_does_not_take_the_answer_from_the_others() -> None:
    mooncake = MooncakeDialect(Bootstrap(engine("e1")))
    first = asyncio.create_task(mooncake.prefill_fields("t1", worker()))
    second = asyncio.create_task(mooncake.prefill_fields("t2", worker()))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second)["kv_transfer_params"]["transfer_id"] == "t2"
    with pytest.raises(asyncio.CancelledError):
        await first


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({}, "no engine has registered"),
        ([], "no engine has registered"),
        ({"0": {}}, "without an engine_id"),
        ({"0": 3}, "without an engine_id"),
        ({**engine("a"), "1": {"engine_id": "b"}}, "2 data-parallel engines share"),
        (TimeoutError(), "does not answer: TimeoutError"),
        (ValueError("line 1"), "answered no JSON: line 1"),
    ],
)
async def test_a_wrong_bootstrap_answer_becomes_a_sentence(answer: Any, says: str) -> None:
    with pytest.raises(EngineFailed, match=f"prefill/0 .*{says}"):
        await MooncakeDialect(Bootstrap(answer)).prefill_fields("t", worker())


async def test_a_worker_without_bootstrap_address_is_named() -> None:
    with pytest.raises(EngineFailed, match="bootstrap_addr is not known"):
        await MooncakeDialect(Bootstrap(engine("e"))).prefill_fields("t", worker(bootstrap_addr=""))


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"choices": [{"finish_reason": "stop"}]}, "finish_reason 'stop'.*kept no blocks"),
        ({"choices": []}, "no choices"),
        ({"error": {}}, "no choices"),
    ],
)
def test_mooncake_refuses_a_prefill_that_kept_no_blocks(answer: dict[str, Any], says: str) -> None:
    with pytest.raises(EngineFailed, match=says):
        MooncakeDialect(Bootstrap({})).grant(worker(), answer)


def test_every_connector_of_the_schema_has_a_dialect_and_an_order() -> None:
    dialects = make_dialects(Bootstrap({}))
    assert set(dialects) == set(ORDERS) == set(get_args(ConnectorName))
    for name, dialect in dialects.items():
        assert (dialect.connector, dialect.order) == (name, ORDERS[name])
    assert {name for name in ORDERS if not decode_can_prefill(name)} == {
        "sglang_mooncake",
        "sglang_nixl",
        "sglang_ascend",
    }


async def test_ascend_mooncake_asks_and_hands_over_as_its_proxy_example_does() -> None:
    ascend = AscendMooncakeDialect()
    assert await ascend.prefill_fields("r", worker()) == {
        "kv_transfer_params": {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "remote_engine_id": None,
            "remote_block_ids": None,
            "remote_host": None,
            "remote_port": None,
        }
    }
    told = {**GRANT, "remote_ptp_size": 4, "last_token_id": 7}
    grant = ascend.grant(worker(), {"kv_transfer_params": told})
    assert await ascend.decode_fields("r", worker(), grant) == {"kv_transfer_params": told}
    with pytest.raises(EngineFailed, match="with the ascend_mooncake connector"):
        ascend.grant(worker(), {"choices": []})


ASKED = {
    "token_ids": [],
    "request_id": "chatcmpl-r7.0",
    "do_remote_prefill": False,
    "do_remote_decode": True,
    "remote_block_ids": [[3, 4]],
    "remote_engine_id": "d",
    "remote_host": "10.0.0.2",
    "remote_port": 36200,
    "remote_cached_tokens": 0,
}


def test_layerwise_sends_decode_to_the_metaserver_and_prefill_what_decode_said() -> None:
    layerwise = AscendLayerwiseDialect()
    assert layerwise.order is Order.DECODE_FIRST
    assert layerwise.decode_fields("http://h:1/v1/metaserver/x") == {
        "kv_transfer_params": {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "metaserver": "http://h:1/v1/metaserver/x",
        }
    }
    assert layerwise.prefill_fields("r7.0", worker(), ASKED) == {"kv_transfer_params": ASKED}


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ([], "does not ask for do_remote_decode"),
        ({**ASKED, "do_remote_decode": False}, "does not ask for do_remote_decode"),
        ({**ASKED, "remote_port": None}, "lacks remote_port"),
        ({**ASKED, "request_id": "chatcmpl-other"}, "about request 'chatcmpl-other', not 'r7.0'"),
    ],
)
def test_layerwise_refuses_what_nothing_can_be_pushed_on(asked: Any, says: str) -> None:
    decode = dataclasses.replace(worker(), id=WorkerId("decode", 1, 1))
    with pytest.raises(EngineFailed, match=f"decode/1 .*{says}"):
        AscendLayerwiseDialect().prefill_fields("r7.0", decode, asked)


def test_sglang_names_prefills_bootstrap_server_and_a_new_room_each_time() -> None:
    rooms = iter((5, 6))
    sglang = SglangDialect("sglang_nixl", lambda below: next(rooms))
    prefill = dataclasses.replace(
        worker(), url="http://10.0.0.1:30000", kv={"bootstrap_port": 8998}
    )
    assert sglang.fields(prefill) == {
        "bootstrap_host": "10.0.0.1",
        "bootstrap_port": 8998,
        "bootstrap_room": 5,
    }
    assert sglang.fields(prefill)["bootstrap_room"] == 6
    over_ipv6 = dataclasses.replace(prefill, url="http://[fd00::1]:30000")
    assert SglangDialect("sglang_nixl").fields(over_ipv6)["bootstrap_host"] == "[fd00::1]"


def test_sglang_rooms_leave_space_for_those_numbered_on() -> None:
    highest = SglangDialect("sglang_nixl", lambda below: below - 1).fields(
        dataclasses.replace(worker(), kv={"bootstrap_port": 1})
    )
    assert highest["bootstrap_room"] + 128 * 16 < 2**63
    assert ROOMS > 2**62


def test_sglang_without_a_bootstrap_port_is_named() -> None:
    with pytest.raises(EngineFailed, match="bootstrap_port is not known"):
        SglangDialect("sglang_nixl").fields(worker())
