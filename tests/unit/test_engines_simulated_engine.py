"""A request's life in the simulated engine, without HTTP."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cluster.engines.simulated.config import SimulatedConfig
from cluster.engines.simulated.engine import Engine, RequestFailed
from cluster.engines.simulated.model import Vocabulary
from cluster.engines.simulated.pull import Puller
from cluster.engines.simulated.request import Request
from cluster.models import store
from cluster.topology.schema import ModelSpec


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    path = store.resolve(ModelSpec(id="simulated"), lambda what, fraction: None).path
    return Vocabulary(path)


def engine(vocabulary: Vocabulary, **more: Any) -> Engine:
    config = {
        "port": 1,
        "served_model_name": "m",
        "model_path": "unused",
        "timings": {"decode_step_s": 0, "prefill_tokens_per_s": 1e9, "kv_capacity_tokens": 4096},
        **more,
    }
    return Engine(SimulatedConfig.model_validate(config), vocabulary)


def request(name: str, tokens: int = 40, **more: Any) -> Request:
    return Request(name, [5] * tokens, max_tokens=8, **more)


async def said(one: Engine, asked: Request) -> list[int]:
    return [token async for step in one.generate(asked) for token in step.ids]


async def test_nothing_is_in_use_after_the_last_token(vocabulary: Vocabulary):
    one = engine(vocabulary)
    assert len(await said(one, request("a"))) == 8
    assert one.cache.used_blocks == 0
    assert one.metrics.running == 0


async def test_second_request_finds_the_first_ones_blocks(vocabulary: Vocabulary):
    one = engine(vocabulary)
    await said(one, request("a"))
    again = request("b")
    await said(one, again)
    assert again.cached_tokens == 32
    assert (one.metrics.computed_tokens, one.metrics.held_tokens) == (48, 32)


async def test_closing_a_generation_frees_its_blocks(vocabulary: Vocabulary):
    one = engine(vocabulary)
    steps = one.generate(request("a"))
    await anext(steps)
    assert one.metrics.running == 1
    await steps.aclose()
    assert (one.metrics.running, one.cache.used_blocks) == (0, 0)


async def test_request_cancelled_in_the_moment_of_its_admission_leaves_nothing(
    vocabulary: Vocabulary,
):
    one = engine(vocabulary, max_num_seqs=1)
    first = one.generate(request("a"))
    await anext(first)
    second = asyncio.create_task(said(one, request("b")))
    await asyncio.sleep(0)
    assert one.metrics.waiting == 1
    await first.aclose()  # admits the second, whose task has not run yet
    assert (one.metrics.running, one.metrics.waiting) == (1, 0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert (one.metrics.running, one.cache.used_blocks) == (0, 0)
    assert len(await said(one, request("c"))) == 8


async def test_prompts_wait_for_blocks_in_order_of_arrival(vocabulary: Vocabulary):
    one = engine(vocabulary)
    big = one.generate(Request("big", list(range(3, 203)) * 20, max_tokens=8))
    await anext(big)
    order: list[str] = []

    async def run(name: str, first_id: int, tokens: int) -> None:
        await said(one, Request(name, [first_id] * tokens, max_tokens=2))
        order.append(name)

    waiting = [
        asyncio.create_task(run("large", 6, 2000)),
        asyncio.create_task(run("small", 7, 20)),
    ]
    await asyncio.sleep(0.02)
    assert one.metrics.waiting == 2  # the small one would fit, and does not overtake
    await big.aclose()
    await asyncio.gather(*waiting)
    assert order == ["large", "small"]


async def test_minimum_tokens_hold_off_every_stop(vocabulary: Vocabulary):
    one = engine(vocabulary)
    free = await said(one, request("a"))
    stop = frozenset(free)
    assert len(await said(one, request("b", stop_token_ids=stop))) == 1
    assert len(await said(one, request("c", stop_token_ids=stop, min_tokens=4))) == 5


async def test_spoiled_answer_blocks_spoil_whoever_finds_them(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
):
    one, clean = (engine(vocabulary, kv={"dialect": "nixl", "port": 0}) for _ in range(2))

    async def wrong_blocks(self: Puller, params: Any, skip: int, lack: int) -> list[bytes]:
        return [b"x" * 32] * lack

    monkeypatch.setattr(Puller, "pull", wrong_blocks)
    # The prompt is less than a block: what gets stored is blocks of the answer.
    first = Request("a", [5] * 10, 40, ignore_eos=True, kv_params={"do_remote_prefill": True})
    second = [5] * 10 + await said(one, first)
    found = Request("b", second, max_tokens=8)
    wrong = await said(one, found)
    assert found.cached_tokens > 0
    assert wrong != await said(clean, Request("b", second, max_tokens=8))


async def steps(one: Engine, asked: Request) -> list[Any]:
    return [step async for step in one.generate(asked)]


async def test_a_request_is_given_back_once_and_what_goes_on_from_it_is_not(
    vocabulary: Vocabulary,
):
    undisturbed = await said(engine(vocabulary), request("a"))
    one = engine(vocabulary, faults={"recompute_at_token": 4})
    *before, last = await steps(one, request("a"))
    assert (last.ids, last.finish, last.stop_reason) == ([], "stop", "recomputed")
    told = [token for step in before for token in step.ids]
    assert told == undisturbed[:3]
    rest = Request("b", [5] * 40 + told, max_tokens=5)
    assert told + await said(one, rest) == undisturbed
    assert one.cache.used_blocks == 0


async def test_only_decode_gives_requests_back(vocabulary: Vocabulary):
    kv = {"dialect": "ascend_mooncake", "role": "kv_producer", "port": 0}
    one = engine(vocabulary, kv=kv, faults={"recompute_at_token": 4})
    assert len(await said(one, request("a"))) == 8


def in_room(room: int, host: str = "127.0.0.1") -> dict[str, Any]:
    return {"bootstrap_host": host, "bootstrap_port": 1, "bootstrap_room": room}


def sglang(vocabulary: Vocabulary, role: str, lease_s: float = 5.0) -> Engine:
    kv = {"dialect": "sglang_nixl", "role": role, "port": 0, "lease_s": lease_s}
    return engine(vocabulary, kv=kv)


async def test_prefill_in_a_room_makes_one_token_and_waits_for_its_peer(vocabulary: Vocabulary):
    prefill = sglang(vocabulary, "kv_producer")
    running = asyncio.create_task(steps(prefill, request("a", kv_params=in_room(7))))
    grants = prefill.handover.grants
    grant = await asyncio.wait_for(grants.wait_for("7"), 5)
    assert grant is not None
    assert not running.done()
    grants.take(grant)
    (only,) = await running
    assert (len(only.ids), only.finish) == (1, "length")
    assert prefill.cache.used_blocks == 0


async def test_prefill_in_a_room_keeps_its_blocks_also_if_its_one_token_ends_the_text(
    vocabulary: Vocabulary,
):
    first, *_ = await said(engine(vocabulary), request("free"))
    prefill = sglang(vocabulary, "kv_producer")
    asked = request("a", kv_params=in_room(7), stop_token_ids=frozenset([first]))
    running = asyncio.create_task(steps(prefill, asked))
    grant = await asyncio.wait_for(prefill.handover.grants.wait_for("7"), 5)
    assert grant is not None
    prefill.handover.grants.take(grant)
    (only,) = await running
    assert (only.ids, only.finish) == ([first], "stop")


async def test_prefill_whose_peer_does_not_come_fails(vocabulary: Vocabulary):
    prefill = sglang(vocabulary, "kv_producer", lease_s=0.05)
    with pytest.raises(RequestFailed, match="nobody came to room 7"):
        await steps(prefill, request("a", kv_params=in_room(7)))
    assert prefill.cache.used_blocks == 0


async def test_prefill_that_is_given_up_in_its_room_frees_its_blocks(vocabulary: Vocabulary):
    prefill = sglang(vocabulary, "kv_producer")
    running = asyncio.create_task(steps(prefill, request("a", kv_params=in_room(7))))
    assert await prefill.handover.grants.wait_for("7") is not None
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (len(prefill.handover.grants), prefill.cache.used_blocks) == (0, 0)
    assert prefill.metrics.running == 0


@pytest.mark.parametrize("role", ["kv_producer", "kv_consumer"])
async def test_in_nobodys_room_an_engine_does_all_by_itself(vocabulary: Vocabulary, role: str):
    alone = request("a", kv_params=in_room(0, host="2.2.2.2"))
    assert len(await said(sglang(vocabulary, role), alone)) == 8


async def test_sglangs_series_are_exported_only_if_asked_for(vocabulary: Vocabulary):
    assert "sglang:" not in engine(vocabulary).metrics.render()
    one = engine(vocabulary, sglang_metrics=True)
    await said(one, request("a"))
    text = one.metrics.render()
    assert 'sglang:generation_tokens_total{model_name="m"} 8' in text
    assert "vllm:generation_tokens_total" in text
