"""What every engine promises, simulated or real. Imported by the test modules that start them.

Each of those defines a fixture `pair` (engine_pair.Pair) and imports `*` from here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import uuid
from typing import Any

import msgpack
import pytest
import zmq
import zmq.asyncio
from contract.engine_pair import KEY, Pair, eventually, moved, sample_of, session
from contract.kv_flows import PULLING, Caller, ids_of, over_kv, transfer_params

from cluster.engines.client import EngineClient
from cluster.errors import EngineFailed
from cluster.identity import Role
from cluster.topology.schema import IslandSpec, PoolSpec

WORDS = ("river", "mountain", "library", "garden", "letter", "market", "harbour", "engine")


def text_of(words: int) -> str:
    """A prompt whose very first block nobody has sent before."""
    unique = uuid.uuid4()
    rng = random.Random(unique.int)
    return f"{unique.hex} " + " ".join(rng.choice(WORDS) for _ in range(words))


async def test_ready_engine_generates_and_says_why_not_for_an_unknown_model(pair: Pair):
    async with session() as opened:
        client = EngineClient(pair.decode.url, KEY, opened, pair.decode.probes)
        assert await client.is_up()
        await client.generate_one(pair.model)
        with pytest.raises(EngineFailed) as caught:
            await client.generate_one("nobody")
        assert caught.value.status == 404
        assert await client.version()


async def test_every_metric_name_of_the_adapter_is_exported(pair: Pair):
    names = pair.decode.adapter.metrics
    async with session() as opened, opened.get(f"{pair.decode.url}/metrics") as answer:
        exported = {line.split("{")[0].split(" ")[0] for line in (await answer.text()).split("\n")}
    wanted = {getattr(names, field) for field in names.__dataclass_fields__} - {""}
    assert wanted <= exported


async def test_v1_demands_the_key_and_health_and_metrics_do_not(pair: Pair):
    async with session() as opened:
        body = {"model": pair.model, "prompt": "1", "max_tokens": 1}
        caller = Caller(pair.prefill, opened)
        assert (await caller.post("/v1/completions", body, key="wrong"))[0] == 401
        async with opened.get(f"{pair.prefill.url}/v1/models") as answer:
            assert answer.status == 401
        for path in ("/health", "/metrics", "/version"):
            async with opened.get(pair.prefill.url + path) as answer:
                assert answer.status == 200, path


async def test_model_list_names_the_model_and_its_longest_context(pair: Pair):
    async with session() as opened:
        headers = {"Authorization": f"Bearer {KEY}"}
        async with opened.get(f"{pair.prefill.url}/v1/models", headers=headers) as answer:
            card = (await answer.json())["data"][0]
    assert card["id"] == pair.model
    assert card["max_model_len"] == pair.max_model_len_tokens


async def test_stream_and_json_give_the_same_completion(pair: Pair):
    async with session() as opened:
        caller = Caller(pair.decode, opened)
        body = {
            "model": pair.model,
            "prompt": text_of(20),
            "max_tokens": 12,
            "return_token_ids": True,
        }
        whole = (await caller.generate(body))["choices"][0]
        events = await caller.events("/v1/completions", body)
    choices = [event["choices"][0] for event in events]
    assert [i for c in choices for i in c["token_ids"]] == whole["token_ids"]
    assert "".join(c["text"] for c in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    assert choices[0]["prompt_token_ids"] == whole["prompt_token_ids"]


async def test_stream_and_json_give_the_same_chat_answer(pair: Pair):
    async with session() as opened:
        caller = Caller(pair.decode, opened)
        body = {
            "model": pair.model,
            "messages": [{"role": "user", "content": text_of(20)}],
            "max_tokens": 12,
        }
        whole = (await caller.generate(body, "/v1/chat/completions"))["choices"][0]
        events = await caller.events("/v1/chat/completions", body)
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content") or "" for delta in deltas) == whole["message"]["content"]
    assert events[-1]["choices"][0]["finish_reason"] == whole["finish_reason"]


async def test_usage_counts_prompt_and_output_tokens(pair: Pair):
    async with session() as opened:
        caller = Caller(pair.decode, opened)
        body = {
            "model": pair.model,
            "prompt": text_of(15),
            "max_tokens": 7,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        answer = await caller.generate(body)
        usage, choice = answer["usage"], answer["choices"][0]
        assert usage["prompt_tokens"] == len(choice["prompt_token_ids"])
        assert usage["completion_tokens"] == len(choice["token_ids"]) == 7
        assert usage["total_tokens"] == usage["prompt_tokens"] + 7
        options = {"include_usage": True}
        events = await caller.events("/v1/completions", {**body, "stream_options": options})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["prompt_tokens"] == usage["prompt_tokens"]
    assert events[-1]["usage"]["completion_tokens"] == 7


async def test_token_ids_as_prompt_give_the_same_answer_as_their_text(pair: Pair):
    async with session() as opened:
        caller = Caller(pair.decode, opened)
        text = text_of(10)
        status, tokenized = await caller.post("/tokenize", {"model": pair.model, "prompt": text})
        assert status == 200
        assert tokenized["count"] == len(tokenized["tokens"])
        assert await ids_of(pair, caller, text, 6) == await ids_of(
            pair, caller, tokenized["tokens"], 6
        )
        status, back = await caller.post(
            "/detokenize", {"model": pair.model, "tokens": tokenized["tokens"]}
        )
        assert status == 200
        assert back["prompt"].endswith(text)


async def test_rendered_chat_ids_can_be_handed_over_instead_of_messages(pair: Pair):
    if pair.connector.startswith("sglang"):
        pytest.skip("SGLang's chat endpoint takes no token ids")
    async with session() as opened:
        caller = Caller(pair.decode, opened)
        messages = [{"role": "user", "content": text_of(10)}]
        body = {"model": pair.model, "messages": messages, "max_tokens": 4}
        status, rendered = await caller.post("/v1/chat/completions/render", body)
        assert status == 200
        given = {"prompt_token_ids": rendered["token_ids"]}
        other = [{"role": "user", "content": "ignored"}]
        plain = await caller.generate(body, "/v1/chat/completions")
        handed = await caller.generate(
            {**body, "messages": other, "kv_transfer_params": given, "return_token_ids": True},
            "/v1/chat/completions",
        )
    assert handed["prompt_token_ids"] == rendered["token_ids"]
    assert handed["choices"][0]["message"] == plain["choices"][0]["message"]
    assert handed["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


async def test_prompt_plus_what_was_sent_gives_the_rest(pair: Pair):
    async with session() as opened:
        prefill, decode = Caller(pair.prefill, opened), Caller(pair.decode, opened)
        _, tokenized = await decode.post("/tokenize", {"model": pair.model, "prompt": text_of(30)})
        prompt = tokenized["tokens"]
        whole = await ids_of(pair, decode, prompt, 16)
        rest = await ids_of(pair, prefill, prompt + whole[:6], 10)
    assert whole[6:] == rest


async def test_finish_reason_says_why_the_text_ended(pair: Pair):
    async with session() as opened:
        caller = Caller(pair.decode, opened)
        body = {
            "model": pair.model,
            "prompt": text_of(20),
            "max_tokens": 12,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        full = (await caller.generate(body))["choices"][0]
        assert (full["finish_reason"], full["stop_reason"]) == ("length", None)
        token = full["token_ids"][5]
        at = full["token_ids"].index(token)
        cut = (await caller.generate({**body, "stop_token_ids": [token]}))["choices"][0]
        assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", token)
        assert cut["token_ids"] == full["token_ids"][: at + 1]
        stop = full["text"][3:6]
        cut = (await caller.generate({**body, "stop": [stop]}))["choices"][0]
        assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
        assert cut["text"] == full["text"][: full["text"].index(stop)]
        streamed = await caller.events("/v1/completions", {**body, "stop": [stop]})
    assert "".join(event["choices"][0]["text"] for event in streamed) == cut["text"]
    assert streamed[-1]["choices"][0]["stop_reason"] == stop


async def test_bad_requests_are_refused_in_openai_shape(pair: Pair):
    async with session() as opened:
        caller = Caller(pair.decode, opened)
        too_long = {"model": pair.model, "prompt": [5] * (pair.max_model_len_tokens + 1)}
        negative = {"model": pair.model, "prompt": "1", "temperature": -1}
        nothing = {"model": pair.model, "prompt": "1", "max_tokens": 0}
        for body in (too_long, negative, nothing):
            status, answer = await caller.post("/v1/completions", body)
            assert status == 400, answer
            assert answer["error"]["code"] == 400
            assert answer["error"]["message"]


async def test_disconnect_ends_the_request_at_once(pair: Pair):
    async with session() as opened:
        body = {
            "model": pair.model,
            "prompt": text_of(20),
            "max_tokens": pair.max_model_len_tokens - 300,
            "stream": True,
            "ignore_eos": True,
            **pair.decode.probes.one_token,
        }
        headers = {"Authorization": f"Bearer {KEY}"}
        url = f"{pair.decode.url}/v1/completions"
        async with opened.post(url, json=body, headers=headers) as answer:
            await answer.content.readany()

            async def runs() -> bool:
                return (await sample_of(pair.decode)).running == 1

            assert await eventually(runs)
            answer.close()

        async def idle() -> bool:
            return (await sample_of(pair.decode)).running == 0

        assert await eventually(idle, within_s=5)


async def test_decode_takes_the_prompt_over_kv_and_answers_like_one_engine(pair: Pair):
    async with session() as opened:
        prefill, decode = Caller(pair.prefill, opened), Caller(pair.decode, opened)
        _, tokenized = await decode.post("/tokenize", {"model": pair.model, "prompt": text_of(100)})
        prompt = tokenized["tokens"]
        request_id = uuid.uuid4().hex
        before = await sample_of(pair.decode)
        ours = await over_kv(pair, prefill, decode, prompt, 12, prefill_id=request_id)
        gained = moved(before, await sample_of(pair.decode))
        alone = await ids_of(pair, prefill, prompt, 12)
    assert ours == alone
    # The last prompt token may be computed again: its output is needed.
    assert len(prompt) - 1 <= gained["external_tokens"] <= len(prompt)
    assert gained["prompt_tokens"] == len(prompt)
    assert gained["generation_tokens"] == 12
    # Who pushes keeps nothing for anybody.
    kept = [] if pair.connector == "ascend_layerwise" else ["granted", "taken"]
    assert await eventually(lambda: pair.prefill.recorded(request_id) == kept)


async def test_an_engine_whose_role_is_free_serves_the_other_role_as_it_runs(pair: Pair):
    pool = PoolSpec(name="p", role=Role.DECODE, engine=pair.decode.adapter.name)
    island = IslandSpec(name="i", pools=["p"], connector=pair.connector)
    if pair.decode.adapter.why_fixed_role(pool, island):
        pytest.skip(f"not over {pair.connector}")
    turned = dataclasses.replace(pair, prefill=pair.decode, decode=pair.prefill)
    async with session() as opened:
        prefill, decode = Caller(turned.prefill, opened), Caller(turned.decode, opened)
        prompt = text_of(120)
        alone = await ids_of(pair, prefill, prompt, 12)
        before = await sample_of(turned.decode)
        request_id = uuid.uuid4().hex
        ours = await over_kv(turned, prefill, decode, prompt, 12, prefill_id=request_id)
        assert ours == alone
        assert await eventually(lambda: turned.prefill.recorded(request_id) == ["granted", "taken"])
        assert (await sample_of(turned.decode)).external_tokens > before.external_tokens
        # And back again, with what each of them holds by now.
        back = await over_kv(pair, decode, prefill, text_of(60), 12)
        assert len(back) == 12


async def test_decode_records_what_it_pulled(pair: Pair):
    async with session() as opened:
        prefill, decode = Caller(pair.prefill, opened), Caller(pair.decode, opened)
        _, tokenized = await decode.post("/tokenize", {"model": pair.model, "prompt": text_of(100)})
        prompt, request_id = tokenized["tokens"], uuid.uuid4().hex
        await over_kv(pair, prefill, decode, prompt, 2, decode_id=request_id)
        assert await eventually(lambda: pair.decode.recorded(request_id) == ["pulled"])
    record = next(r for r in pair.decode.records if request_id in r.request_id)
    assert record.side == "decode"
    assert record.prompt_tokens == len(prompt)
    assert record.tokens_held + record.tokens_pulled == len(prompt)
    assert record.blocks_pulled == -(-record.tokens_pulled // pair.block_size_tokens)
    assert record.bytes_pulled > 0


async def test_prefill_answer_carries_what_decode_needs_to_pull(pair: Pair):
    if pair.connector not in ("nixl", "ascend_mooncake"):
        pytest.skip(f"{pair.connector}'s prefill answer carries nothing")
    async with session() as opened:
        request_id = uuid.uuid4().hex
        caller = Caller(pair.prefill, opened)
        status, tokenized = await caller.post(
            "/tokenize", {"model": pair.model, "prompt": text_of(60)}
        )
        assert status == 200
        params = await transfer_params(pair, caller, tokenized["tokens"], request_id)
        try:
            assert params["do_remote_prefill"] is True
            assert params["do_remote_decode"] is False
            assert request_id in params["remote_request_id"]
            assert params["remote_engine_id"]
            assert params["remote_host"] == "127.0.0.1"
            assert isinstance(params["remote_port"], int)
            blocks = -(-tokenized["count"] // pair.block_size_tokens)
            assert len(params["remote_block_ids"][0]) == blocks
            if pair.connector == "nixl":
                assert params["remote_num_tokens"] == tokenized["count"]
                assert params["tp_size"] == 1
            else:
                assert params["num_prompt_blocks"] == blocks
                assert params["remote_ptp_size"] == 1
        finally:
            pair.prefill.release(request_id)


async def test_release_frees_blocks_that_nobody_will_pull(pair: Pair):
    if pair.connector not in PULLING:
        pytest.skip(f"{pair.connector}'s prefill keeps no blocks once it has answered")
    async with session() as opened:
        prefill = Caller(pair.prefill, opened)
        request_id = uuid.uuid4().hex
        await transfer_params(pair, prefill, text_of(60), request_id)
        assert await eventually(lambda: pair.prefill.recorded(request_id) == ["granted"])
        pair.prefill.release(request_id)
        assert await eventually(
            lambda: pair.prefill.recorded(request_id) == ["granted", "released"]
        )

        async def empty() -> bool:
            return (await sample_of(pair.prefill)).kv_usage == 0.0

        assert await eventually(empty)


async def test_second_turn_moves_only_the_new_blocks(pair: Pair):
    size = pair.block_size_tokens
    async with session() as opened:
        prefill, decode = Caller(pair.prefill, opened), Caller(pair.decode, opened)
        _, tokenized = await decode.post(
            "/tokenize", {"model": pair.model, "prompt": text_of(size * 3)}
        )
        first = tokenized["tokens"][: size * 3 + 5]
        said = await over_kv(pair, prefill, decode, first, size)
        second = first + said + first[: size + 3]
        before = await sample_of(pair.decode)
        ours = await over_kv(pair, prefill, decode, second, 8)
        gained = moved(before, await sample_of(pair.decode))
        assert ours == await ids_of(pair, prefill, second, 8)
    # Decode holds the whole blocks of its first turn; the token it said last has no KV yet.
    held = (len(first) + len(said) - 1) // size * size
    assert len(second) - held - 1 <= gained["external_tokens"] <= len(second) - held


async def test_wrong_kv_is_noticed(pair: Pair):
    """A small model may go on in the same words behind one other prompt, hardly behind three."""
    async with session() as opened:
        prefill, decode = Caller(pair.prefill, opened), Caller(pair.decode, opened)
        same = 0
        for _ in range(3):
            _, tokenized = await decode.post(
                "/tokenize", {"model": pair.model, "prompt": text_of(120)}
            )
            prompt = tokenized["tokens"][:100]
            wrong = await over_kv(pair, prefill, decode, prompt, 12, of=prompt[::-1])
            same += wrong == await ids_of(pair, prefill, prompt, 12)
    assert same < 3


async def test_kv_events_tell_of_stored_and_removed_blocks(pair: Pair):
    context = zmq.asyncio.Context()
    subscriber = context.socket(zmq.SUB)
    subscriber.connect(str(pair.decode.kv["events"]))
    subscriber.setsockopt(zmq.SUBSCRIBE, b"")
    stored: set[Any] = set()
    removed: set[Any] = set()
    tokens_stored: list[int] = []
    numbers: list[int] = []

    async def listen() -> None:
        while True:
            _, number, payload = await subscriber.recv_multipart()
            numbers.append(int.from_bytes(number, "big"))
            for event in msgpack.unpackb(payload, strict_map_key=False)[1]:
                if event["type"] == "BlockStored":
                    assert event["block_size"] == pair.block_size_tokens
                    stored.update(event["block_hashes"])
                    tokens_stored.extend(event["token_ids"])
                elif event["type"] == "BlockRemoved":
                    removed.update(event["block_hashes"])

    listening = asyncio.create_task(listen())
    try:
        await asyncio.sleep(0.5)  # a ZeroMQ subscription takes a moment to arrive
        async with session() as opened:
            caller = Caller(pair.decode, opened)
            _, tokenized = await caller.post(
                "/tokenize", {"model": pair.model, "prompt": text_of(100)}
            )
            prompt = tokenized["tokens"]
            await ids_of(pair, caller, prompt, 1)
            size = pair.block_size_tokens
            whole = prompt[: len(prompt) // size * size]
            assert await eventually(lambda: tokens_stored[: len(whole)] == whole)
            # More distinct tokens than fit: something must go.
            longest = pair.max_model_len_tokens - 2
            for _ in range(pair.capacity_tokens // longest + 2):
                rng = random.Random(uuid.uuid4().int)
                await ids_of(pair, caller, [rng.randrange(3, 250) for _ in range(longest)], 1)
            assert await eventually(lambda: bool(removed))
        assert removed <= stored | removed
        assert removed & stored
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        replayed = await replay(context, str(pair.decode.kv["replay"]), numbers[0])
        assert replayed[: len(numbers)] == numbers
    finally:
        listening.cancel()
        context.destroy(linger=0)


async def replay(context: zmq.asyncio.Context, endpoint: str, first: int) -> list[int]:
    """Sequence numbers that the replay socket gives from `first` on."""
    asking = context.socket(zmq.DEALER)
    asking.connect(endpoint)
    await asking.send_multipart((b"", first.to_bytes(8, "big")))
    numbers = []
    while True:
        frames = await asyncio.wait_for(asking.recv_multipart(), 20)
        number = int.from_bytes(frames[-2], "big", signed=True)
        if number < 0:
            return numbers
        numbers.append(number)
