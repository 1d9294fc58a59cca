"""The simulated engine as a process: faults, leases, restarts, load, memory."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from contract.engine_contract import text_of
from contract.engine_pair import (
    KEY,
    Engine,
    Pair,
    eventually,
    running_engine,
    sample_of,
    session,
    wait_ready,
)
from contract.kv_flows import Caller, decode_over_kv, ids_of, transfer_params

from cluster.engines.client import EngineClient
from cluster.engines.simulated.faults import CRASH_EXIT_CODE
from cluster.identity import Role
from cluster.models import store
from cluster.topology.schema import IslandSpec, ModelSpec, PoolSpec

pytestmark = pytest.mark.integration

MODEL = ModelSpec(id="simulated", max_model_len_tokens=4096)
QUICK = {"prefill_tokens_per_s": 1e9, "decode_step_s": 0.0, "kv_capacity_tokens": 65_536}


@contextlib.contextmanager
def engine(
    folder: Path,
    role: Role = Role.DECODE,
    connector: str = "nixl",
    lease_s: float = 30.0,
    generation: int = 1,
    timings: dict[str, Any] = QUICK,
    **pool: Any,
) -> Iterator[Engine]:
    """One simulated engine that can be broken over HTTP, not waited for."""
    args = {"fault-endpoint": True, **pool.pop("engine_args", {})}
    spec = PoolSpec(
        name=role.value,
        role=role,
        engine="simulated",
        simulated=timings,
        engine_args=args,
        **pool,
    )
    island = IslandSpec(name="i", pools=["prefill", "decode"], connector=connector, lease_s=lease_s)
    path = store.resolve(MODEL, lambda what, fraction: None).path
    with running_engine(spec, island, MODEL, path, folder, generation) as running:
        yield running


@contextlib.asynccontextmanager
async def ready(*engines: Engine):
    for one in engines:
        await wait_ready(one, "simulated", 60)
    async with session() as opened:
        yield [Caller(one, opened) for one in engines]


def pair_of(prefill: Engine, decode: Engine, connector: str = "nixl") -> Pair:
    return Pair(prefill, decode, connector, "simulated", 16, 4096, 65_536)


async def break_it(caller: Caller, **faults: Any) -> None:
    status, answer = await caller.post("/simulate/fault", faults)
    assert status == 200, answer


def completion(**more: Any) -> dict[str, Any]:
    return {"model": "simulated", "prompt": "hello", "ignore_eos": True, **more}


async def test_engine_does_not_answer_before_it_has_loaded(tmp_path: Path):
    with engine(tmp_path, timings={**QUICK, "load_s": 1.5}) as one:
        began_s = time.monotonic()
        async with session() as opened:
            assert not await EngineClient(one.url, KEY, opened).is_up()
        await wait_ready(one, "simulated", 60)
        assert time.monotonic() - began_s > 1.0


async def test_failed_start_ends_with_its_reason_and_code_1(tmp_path: Path):
    faults = {"start_failure": "out of simulated memory"}
    with engine(tmp_path, engine_args={"faults": faults}) as one:
        assert await asyncio.to_thread(one.process.wait, 60) == 1
        assert one.last_words().strip().endswith("out of simulated memory")


async def test_cache_smaller_than_the_context_is_refused_at_start(tmp_path: Path):
    with engine(tmp_path, timings={**QUICK, "kv_capacity_tokens": 1024}) as one:
        assert await asyncio.to_thread(one.process.wait, 60) == 1
        assert "max_model_len_tokens" in one.last_words()


async def test_crash_comes_before_the_stated_token_and_breaks_the_stream(tmp_path: Path):
    with engine(tmp_path, timings={**QUICK, "decode_step_s": 0.002}) as one:
        async with ready(one) as (caller,), session() as opened:
            await break_it(caller, crash_at_token=6)
            got, broken = b"", None
            async with opened.post(
                f"{one.url}/v1/completions",
                json=completion(max_tokens=50, stream=True),
                headers={"Authorization": f"Bearer {KEY}"},
            ) as answer:
                try:
                    async for line in answer.content:
                        got += line
                except aiohttp.ClientError as error:
                    broken = error
            assert isinstance(broken, aiohttp.ClientPayloadError)
            assert got.count(b"data: {") == 5
            assert b"[DONE]" not in got
            assert await asyncio.to_thread(one.process.wait, 60) == CRASH_EXIT_CODE


async def test_hung_engine_answers_health_and_holds_work_until_it_moves_again(tmp_path: Path):
    with engine(tmp_path) as one:
        async with ready(one) as (caller,):
            await break_it(caller, hang=True)
            asked = asyncio.create_task(caller.post("/v1/completions", completion(max_tokens=3)))
            first = await sample_of(one)
            assert await eventually(lambda: _running(one, 1))
            await asyncio.sleep(0.3)
            now = await sample_of(one)
            assert now.generation_tokens == first.generation_tokens
            assert not asked.done()
            await break_it(caller, hang=False)
            assert (await asked)[0] == 200


async def _running(one: Engine, count: int) -> bool:
    return (await sample_of(one)).running == count


async def test_next_k_requests_fail_and_then_all_is_well(tmp_path: Path):
    with engine(tmp_path) as one:
        async with ready(one) as (caller,):
            await break_it(caller, fail_next=2)
            statuses = [
                (await caller.post("/v1/completions", completion(max_tokens=1)))[0]
                for _ in range(3)
            ]
    assert statuses == [500, 500, 200]


async def test_refused_prefill_leaves_ordinary_requests_alone(tmp_path: Path):
    with engine(tmp_path, Role.PREFILL) as one:
        async with ready(one) as (caller,):
            await break_it(caller, refuse_prefill=True)
            for_a_peer = completion(max_tokens=1, kv_transfer_params={"do_remote_decode": True})
            assert (await caller.post("/v1/completions", for_a_peer))[0] == 503
            assert (await caller.post("/v1/completions", completion(max_tokens=1)))[0] == 200


async def test_slow_factor_slows_every_step(tmp_path: Path):
    with engine(tmp_path, timings={**QUICK, "decode_step_s": 0.002}) as one:
        async with ready(one) as (caller,):
            await break_it(caller, slow_factor=50.0)
            began_s = time.monotonic()
            await caller.post("/v1/completions", completion(max_tokens=5))
            assert time.monotonic() - began_s > 0.4


async def test_faults_can_be_set_only_where_the_topology_allows_it(tmp_path: Path):
    with engine(tmp_path, engine_args={"fault-endpoint": False}) as one:
        async with ready(one) as (caller,):
            assert (await caller.post("/simulate/fault", {"hang": True}))[0] == 404


async def test_unknown_fault_is_refused_and_changes_nothing(tmp_path: Path):
    with engine(tmp_path) as one:
        async with ready(one) as (caller,):
            status, answer = await caller.post("/simulate/fault", {"hang": True, "hng": True})
            assert status == 400
            assert "hng" in answer["error"]["message"]
            assert (await caller.post("/v1/completions", completion(max_tokens=1)))[0] == 200


async def _failed_decode(pair: Pair, decode: Caller, params: dict[str, Any]) -> None:
    """The decode engine says 500 to JSON, an error event to a stream, and reports `failed`."""
    request_id = uuid.uuid4().hex
    body = completion(max_tokens=4, kv_transfer_params=params)
    status, answer = await decode.post("/v1/completions", body, request_id)
    assert status == 500
    assert answer["error"]["code"] == 500
    assert await eventually(lambda: pair.decode.recorded(request_id) == ["failed"])
    events = await decode.events("/v1/completions", body)
    assert events[0]["error"]["code"] == 500


@pytest.mark.parametrize("connector", ["nixl", "mooncake"])
async def test_blocks_of_a_restarted_peer_are_gone(tmp_path: Path, connector: str):
    with engine(tmp_path, Role.DECODE, connector) as decode:
        with engine(tmp_path, Role.PREFILL, connector) as first:
            async with ready(first, decode) as (prefill_caller, _):
                old = pair_of(first, decode, connector)
                params = await transfer_params(old, prefill_caller, "hello")
        async with ready(decode) as (decode_caller,):
            await _failed_decode(old, decode_caller, params)  # nobody there
        with engine(tmp_path, Role.PREFILL, connector, generation=2) as second:
            async with ready(second, decode) as (prefill_caller, decode_caller):
                new = pair_of(second, decode, connector)
                fresh = await transfer_params(new, prefill_caller, "hello")
                stale = {**fresh, "remote_engine_id": params["remote_engine_id"]}
                await _failed_decode(new, decode_caller, stale)
                assert await decode_over_kv(new, decode_caller, "hello", fresh, 4)


@pytest.mark.parametrize("connector", ["nixl", "mooncake"])
async def test_lease_ends_by_itself_and_then_the_pull_fails(tmp_path: Path, connector: str):
    with (
        engine(tmp_path, Role.PREFILL, connector, lease_s=0.3) as prefill,
        engine(tmp_path, Role.DECODE, connector) as decode,
    ):
        async with ready(prefill, decode) as (prefill_caller, decode_caller):
            pair = pair_of(prefill, decode, connector)
            request_id = uuid.uuid4().hex
            params = await transfer_params(pair, prefill_caller, "hello", request_id)
            assert (await sample_of(prefill)).kv_usage > 0
            assert await eventually(lambda: prefill.recorded(request_id) == ["granted", "expired"])
            assert (await sample_of(prefill)).kv_usage == 0
            await _failed_decode(pair, decode_caller, params)


async def test_lease_is_renewed_while_decode_has_no_room(tmp_path: Path):
    with (
        engine(tmp_path, Role.PREFILL, lease_s=0.6) as prefill,
        engine(tmp_path, lease_s=0.6, max_num_seqs=1) as decode,
    ):
        async with ready(prefill, decode) as (prefill_caller, decode_caller):
            pair = pair_of(prefill, decode)
            await break_it(decode_caller, hang=True)
            first = asyncio.create_task(
                decode_caller.post("/v1/completions", completion(max_tokens=1))
            )
            assert await eventually(lambda: _running(decode, 1))
            params = await transfer_params(pair, prefill_caller, "hello")
            second = asyncio.create_task(decode_over_kv(pair, decode_caller, "hello", params, 4))
            await asyncio.sleep(1.5)
            await break_it(decode_caller, hang=False)
            assert await second == await ids_of(pair, prefill_caller, "hello", 4)
            await first


async def test_failing_transfers_fail_the_request_and_not_the_engine(tmp_path: Path):
    with engine(tmp_path, Role.PREFILL) as prefill, engine(tmp_path) as decode:
        async with ready(prefill, decode) as (prefill_caller, decode_caller):
            pair = pair_of(prefill, decode)
            params = await transfer_params(pair, prefill_caller, "hello")
            await break_it(decode_caller, fail_transfers=True)
            await _failed_decode(pair, decode_caller, params)
            await break_it(decode_caller, fail_transfers=False)
            assert await decode_over_kv(pair, decode_caller, "hello", params, 4)


async def test_mooncake_decode_may_ask_before_prefill_has_finished(tmp_path: Path):
    slow = {**QUICK, "prefill_tokens_per_s": 100.0}
    with (
        engine(tmp_path, Role.PREFILL, "mooncake", timings=slow) as prefill,
        engine(tmp_path, Role.DECODE, "mooncake") as decode,
    ):
        async with ready(prefill, decode) as (prefill_caller, decode_caller):
            pair = pair_of(prefill, decode, "mooncake")
            known = await transfer_params(pair, prefill_caller, "x")
            transfer_id = uuid.uuid4().hex
            prompt = text_of(5)
            body = completion(
                prompt=prompt,
                max_tokens=1,
                kv_transfer_params={"do_remote_decode": True, "transfer_id": transfer_id},
            )
            decoding = asyncio.create_task(
                decode_over_kv(
                    pair, decode_caller, prompt, {**known, "transfer_id": transfer_id}, 4
                )
            )
            await asyncio.sleep(0.1)
            assert not decoding.done()
            assert (await prefill_caller.post("/v1/completions", body))[0] == 200
            assert await decoding == await ids_of(pair, decode_caller, prompt, 4)


async def test_rejected_decode_gives_the_blocks_back(tmp_path: Path):
    with engine(tmp_path, Role.PREFILL) as prefill, engine(tmp_path) as decode:
        async with ready(prefill, decode) as (prefill_caller, decode_caller):
            request_id = uuid.uuid4().hex
            pair = pair_of(prefill, decode)
            params = await transfer_params(pair, prefill_caller, "hello", request_id)
            bad = completion(temperature=-1, kv_transfer_params=params)
            assert (await decode_caller.post("/v1/completions", bad))[0] == 400
            assert await eventually(lambda: prefill.recorded(request_id) == ["granted", "taken"])


async def test_wrong_kv_stays_wrong_for_the_next_request_that_hits_it(tmp_path: Path):
    with engine(tmp_path, Role.PREFILL) as prefill, engine(tmp_path) as decode:
        async with ready(prefill, decode) as (prefill_caller, decode_caller):
            pair = pair_of(prefill, decode)
            prompt, other = [5] * 64, [6] * 64
            right = await ids_of(pair, prefill_caller, prompt, 8)
            params = await transfer_params(pair, prefill_caller, other)
            assert await decode_over_kv(pair, decode_caller, prompt, params, 8) != right
            assert await ids_of(pair, decode_caller, prompt, 8) != right


async def test_requests_beyond_the_limit_wait_and_one_that_leaves_makes_room(tmp_path: Path):
    with engine(tmp_path, max_num_seqs=2) as one:
        async with ready(one) as (caller,):
            await break_it(caller, hang=True)
            asked = [
                asyncio.create_task(caller.post("/v1/completions", completion(max_tokens=1)))
                for _ in range(4)
            ]

            async def full() -> bool:
                sample = await sample_of(one)
                return (sample.running, sample.waiting) == (2, 2)

            assert await eventually(full)
            asked[3].cancel()
            assert await eventually(lambda: _waiting(one, 1))
            await break_it(caller, hang=False)
            answers = await asyncio.gather(*asked[:3])
    assert [status for status, _ in answers] == [200, 200, 200]


async def _waiting(one: Engine, count: int) -> bool:
    return (await sample_of(one)).waiting == count


async def test_drafts_are_counted_and_change_no_output(tmp_path: Path):
    timings = {**QUICK, "accepted_per_draft": 2.5}
    with (
        engine(tmp_path, timings=timings, speculative={"num_speculative_tokens": 4}) as drafting,
        engine(tmp_path, Role.PREFILL) as plain,
    ):
        async with ready(drafting, plain) as (quick, slow):
            pair = pair_of(plain, drafting)
            assert await ids_of(pair, quick, "hello", 500) == await ids_of(pair, slow, "hello", 500)
            sample = await sample_of(drafting)
    assert 1 + sample.spec_accepted / sample.spec_drafts == pytest.approx(3.5, abs=0.2)
    assert len(sample.spec_accepted_per_position) == 4
    assert sum(sample.spec_accepted_per_position) == sample.spec_accepted


async def test_hundreds_of_streams_at_once_in_little_memory(tmp_path: Path):
    streams, tokens = 400, 100
    timings = {**QUICK, "decode_step_s": 0.005}
    with engine(tmp_path, timings=timings, max_num_seqs=streams) as one:
        async with ready(one):
            unlimited = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(
                connector=unlimited, headers={"Authorization": f"Bearer {KEY}"}
            ) as opened:

                async def stream(number: int) -> bytes:
                    body = completion(prompt=f"hello {number}", max_tokens=tokens, stream=True)
                    async with opened.post(f"{one.url}/v1/completions", json=body) as answer:
                        return await answer.read()

                answers = await asyncio.gather(*(stream(number) for number in range(streams)))
        assert all(answer.count(b"data: {") == tokens for answer in answers)
        assert all(answer.endswith(b"data: [DONE]\n\n") for answer in answers)
        assert psutil.Process(one.process.pid).memory_info().rss < 80 * 2**20


async def test_terminated_engine_ends_at_once_with_code_0_and_open_streams(tmp_path: Path):
    with engine(tmp_path) as one:
        async with ready(one) as (caller,):
            await break_it(caller, hang=True)
            asked = asyncio.create_task(caller.post("/v1/completions", completion(max_tokens=1)))
            assert await eventually(lambda: _running(one, 1))
            one.process.terminate()
            assert await asyncio.to_thread(one.process.wait, 60) == 0
            with pytest.raises(aiohttp.ClientError):
                await asked


async def test_request_that_is_given_back_says_so_streamed_or_not(tmp_path: Path):
    with engine(tmp_path) as one:
        async with ready(one) as (caller,):
            undisturbed = await caller.generate(completion(max_tokens=12))
            await break_it(caller, recompute_at_token=5)
            whole = (await caller.generate(completion(prompt="hello ", max_tokens=12)))["choices"]
            assert (whole[0]["finish_reason"], whole[0]["stop_reason"]) == ("stop", "recomputed")
            events = await caller.events("/v1/completions", completion(max_tokens=12))
            said = [event["choices"][0] for event in events]
            assert [choice["finish_reason"] for choice in said] == [None] * 4 + ["stop"]
            assert said[-1]["stop_reason"] == "recomputed"
            assert said[-1]["text"] == ""
            text = "".join(choice["text"] for choice in said)
            assert undisturbed["choices"][0]["text"].startswith(text)
            assert len(text) < len(undisturbed["choices"][0]["text"])
            chat = {"model": "simulated", "messages": [{"role": "user", "content": "x"}]}
            told = await caller.events("/v1/chat/completions", {**chat, "max_tokens": 12})
            assert told[-1]["choices"][0]["stop_reason"] == "recomputed"


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_engine_that_meets_its_peers_in_rooms_refuses_who_names_none(
    tmp_path: Path, role: Role
):
    with engine(tmp_path, role, "sglang_nixl") as one:
        async with ready(one) as (caller,):
            nowhere = completion(max_tokens=1, bootstrap_room=None)
            status, answer = await caller.post("/v1/completions", nowhere)
            assert (status, answer["error"]["code"]) == (400, 400)
            assert "bootstrap room" in answer["error"]["message"]


async def test_decode_that_waits_for_a_push_waits_until_it_is_told_not_to(tmp_path: Path):
    with engine(tmp_path, Role.DECODE, "ascend_layerwise", lease_s=0.2) as one:
        async with ready(one) as (caller,):
            await break_it(caller, mute_metaserver=True)
            wanted = {"do_remote_prefill": True, "metaserver": "http://127.0.0.1:1/x"}
            body = completion(max_tokens=2, kv_transfer_params=wanted)
            asked = asyncio.create_task(caller.post("/v1/completions", body))
            assert await eventually(lambda: _running(one, 1))
            await asyncio.sleep(0.5)  # longer than any lease
            assert not asked.done()
            asked.cancel()
            assert await eventually(lambda: _running(one, 0))
            assert (await sample_of(one)).kv_usage == 0
