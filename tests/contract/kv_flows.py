"""One prompt computed on one engine and decoded on the other, as each connector wants to be asked.

Plain HTTP, on purpose without cluster.kv.dialects: what engines obey is written down twice.
"""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from typing import Any

import aiohttp
from aiohttp import web
from contract.engine_pair import HOST, KEY, Engine, Pair

PULLING = ("nixl", "mooncake", "ascend_mooncake")  # prefill keeps blocks until decode has them
ASK_TO_KEEP = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class Caller:
    """HTTP to one engine, with its key."""

    def __init__(self, engine: Engine, opened: aiohttp.ClientSession) -> None:
        self._engine = engine
        self._opened = opened
        # What an engine wants to hear of a request that no peer takes part in.
        self._alone = engine.probes.one_token

    async def post(
        self, path: str, body: dict[str, Any], request_id: str = "", key: str = KEY
    ) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {key}"}
        if request_id:
            headers["X-Request-Id"] = request_id
        body = {**self._alone, **body}
        async with self._opened.post(self._engine.url + path, json=body, headers=headers) as answer:
            return answer.status, await answer.json(content_type=None)

    async def generate(self, body: dict[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
        status, answer = await self.post(path, {"temperature": 0, **body})
        assert status == 200, answer
        return answer

    async def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """A whole stream; its last line must be [DONE]."""
        body = {"temperature": 0, "stream": True, **self._alone, **body}
        headers = {"Authorization": f"Bearer {KEY}"}
        async with self._opened.post(self._engine.url + path, json=body, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            assert answer.content_type == "text/event-stream"
            lines = (await answer.text()).split("\n\n")
        data = [line.removeprefix("data: ") for line in lines if line]
        assert data[-1] == "[DONE]"
        return [json.loads(one) for one in data[:-1]]


async def ids_of(pair: Pair, caller: Caller, prompt: Any, tokens: int) -> list[int]:
    answer = await caller.generate(
        {
            "model": pair.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "return_token_ids": True,
        }
    )
    return answer["choices"][0]["token_ids"]


async def transfer_params(pair: Pair, prefill: Caller, prompt: Any, request_id: str = "") -> dict:
    """Prefill `prompt` for a peer that pulls; what decode must be told to fetch it."""
    transfer_id = uuid.uuid4().hex
    ask = (
        ASK_TO_KEEP
        if pair.connector != "mooncake"
        else {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
    )
    status, answer = await prefill.post(
        "/v1/completions",
        {
            "model": pair.model,
            "prompt": prompt,
            "max_tokens": 1,
            "temperature": 0,
            "ignore_eos": True,
            "kv_transfer_params": ask,
        },
        request_id,
    )
    assert status == 200, answer
    if pair.connector != "mooncake":
        return answer["kv_transfer_params"]
    assert not answer["kv_transfer_params"]
    bootstrap = pair.prefill.kv["bootstrap_addr"]
    async with aiohttp.ClientSession() as plain, plain.get(f"{bootstrap}/query") as found:
        ranks = await found.json()
    return {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_bootstrap_addr": bootstrap,
        "remote_engine_id": ranks["0"]["engine_id"],
        "transfer_id": transfer_id,
    }


async def decode_over_kv(
    pair: Pair, decode: Caller, prompt: Any, params: dict[str, Any], tokens: int
) -> list[int]:
    return await _decoded(pair, decode, prompt, tokens, {"kv_transfer_params": params}, "")


async def over_kv(
    pair: Pair,
    prefill: Caller,
    decode: Caller,
    prompt: Any,
    tokens: int,
    of: Any = None,
    prefill_id: str = "",
    decode_id: str = "",
) -> list[int]:
    """Decode's ids. `of`: the prompt that prefill computes; the same, unless something is to go
    wrong. Engines that push know a request by one id: there `prefill_id` counts for both."""
    of = prompt if of is None else of
    if pair.connector in PULLING:
        params = await transfer_params(pair, prefill, of, prefill_id)
        fields: dict[str, Any] = {"kv_transfer_params": params}
        return await _decoded(pair, decode, prompt, tokens, fields, decode_id)
    if pair.connector == "ascend_layerwise":
        return await _pushed(
            pair, prefill, decode, prompt, tokens, of, prefill_id or decode_id or uuid.uuid4().hex
        )
    room = {
        "bootstrap_host": HOST,
        "bootstrap_port": pair.prefill.kv["bootstrap_port"],
        "bootstrap_room": random.randrange(2**62),
    }
    decoding = asyncio.create_task(_decoded(pair, decode, prompt, tokens, room, decode_id))
    answer = await _prefilled(pair, prefill, of, tokens, room, prefill_id)
    assert answer["usage"]["completion_tokens"] == 1
    return await decoding


async def _pushed(
    pair: Pair,
    prefill: Caller,
    decode: Caller,
    prompt: Any,
    tokens: int,
    of: Any,
    request_id: str,
) -> list[int]:
    asked: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()

    async def metaserver(request: web.Request) -> web.Response:
        asked.set_result(await request.json())
        return web.json_response({})

    app = web.Application()
    app.router.add_post("/meta", metaserver)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    try:
        url = f"http://{HOST}:{runner.addresses[0][1]}/meta"
        wanted = {"do_remote_prefill": True, "do_remote_decode": False, "metaserver": url}
        fields = {"kv_transfer_params": wanted}
        decoding = asyncio.create_task(_decoded(pair, decode, prompt, tokens, fields, request_id))
        message = await asyncio.wait_for(asked, 20)
        assert message["request_id"] == f"cmpl-{request_id}-0"
        fields = {"kv_transfer_params": message}
        await _prefilled(pair, prefill, of, 1, fields, request_id)
        return await asyncio.wait_for(decoding, 20)
    finally:
        await runner.cleanup()


async def _prefilled(
    pair: Pair, caller: Caller, prompt: Any, tokens: int, fields: dict[str, Any], request_id: str
) -> dict[str, Any]:
    body = {"model": pair.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    status, answer = await caller.post(
        "/v1/completions", {**body, "ignore_eos": True, **fields}, request_id
    )
    assert status == 200, answer
    return answer


async def _decoded(
    pair: Pair, caller: Caller, prompt: Any, tokens: int, fields: dict[str, Any], request_id: str
) -> list[int]:
    more = {"return_token_ids": True, **fields}
    answer = await _prefilled(pair, caller, prompt, tokens, more, request_id)
    return answer["choices"][0]["token_ids"]
