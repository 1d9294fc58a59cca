"""The two connectors' parameters, and what is said when an engine answers wrongly."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.errors import EngineFailed
from cluster.identity import Role, WorkerId, WorkerState
from cluster.kv.dialects import MooncakeDialect, NixlDialect
from cluster.snapshot import WorkerView

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


async def test_nixl_hands_prefills_answer_to_decode_unchanged() -> None:
    nixl = NixlDialect()
    asked = await nixl.prefill_params("r", worker())
    assert asked["do_remote_decode"] is True
    assert asked["do_remote_prefill"] is False
    grant = nixl.grant(worker(), {"kv_transfer_params": GRANT})
    assert await nixl.decode_params("r", worker(), grant) == GRANT


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
    prefill = await mooncake.prefill_params("t1", worker())
    assert prefill == {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": "t1"}
    assert await mooncake.decode_params("t1", worker(), mooncake.grant(worker(), LENGTH)) == {
        "do_remote_decode": False,
        "do_remote_prefill": True,
        "remote_bootstrap_addr": "http://127.0.0.1:8998",
        "remote_engine_id": "e1",
        "transfer_id": "t1",
    }


async def test_mooncake_asks_a_generation_once_however_many_wait() -> None:
    bootstrap = Bootstrap(engine("e1"), engine("e2"))
    mooncake = MooncakeDialect(bootstrap)
    await asyncio.gather(*(mooncake.prefill_params(f"t{i}", worker()) for i in range(20)))
    assert bootstrap.asked == ["http://127.0.0.1:8998/query"]
    later = await mooncake.decode_params("t", worker(generation=2), {})
    assert later["remote_engine_id"] == "e2"


async def test_mooncake_asks_again_after_a_failure_and_after_forgetting() -> None:
    bootstrap = Bootstrap(OSError("refused"), engine("e1"), engine("e2"))
    mooncake = MooncakeDialect(bootstrap)
    with pytest.raises(EngineFailed, match="does not answer: refused"):
        await mooncake.prefill_params("t", worker())
    assert (await mooncake.decode_params("t", worker(), {}))["remote_engine_id"] == "e1"
    mooncake.forget(worker().id)
    assert (await mooncake.decode_params("t", worker(), {}))["remote_engine_id"] == "e2"


async def test_one_caller_that_leaves_does_not_take_the_answer_from_the_others() -> None:
    mooncake = MooncakeDialect(Bootstrap(engine("e1")))
    first = asyncio.create_task(mooncake.prefill_params("t1", worker()))
    second = asyncio.create_task(mooncake.prefill_params("t2", worker()))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second)["transfer_id"] == "t2"
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
        await MooncakeDialect(Bootstrap(answer)).prefill_params("t", worker())


async def test_a_worker_without_bootstrap_address_is_named() -> None:
    with pytest.raises(EngineFailed, match="bootstrap_addr is not known"):
        await MooncakeDialect(Bootstrap(engine("e"))).prefill_params("t", worker(bootstrap_addr=""))


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
