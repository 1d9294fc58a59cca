"""What the gateway benchmark asks, and what answers: engines without a model, load, figures."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil

from cluster.gateway.upstream import Upstream

KEY = "bench-key"
CHUNKS = 65
PROMPT = (
    "Question @@@@@@. The history of the city of Paris begins with the Parisii, Celts who "
    "settled on the banks of the Seine. In two or three sentences, say what became of their town "
    "under the Romans, and why its bridges mattered. Then name the capital of France."
)


@dataclass(frozen=True, slots=True)
class Figures:
    """One target in one round."""

    first_byte_ms: float  # p50, one stream at a time
    json_per_s: float  # short JSON answers, `at_once` at a time
    chunks_per_s: float  # streams of CHUNKS events, `at_once` at a time
    cpu_s_per_1000_json: float  # of the gateway's own processes
    cpu_s_per_1000_streams: float
    rss_mib: float


# Engine


EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m",'
    b'"choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]}\n\n'
)
PARAMS = {
    "do_remote_prefill": True,
    "do_remote_decode": False,
    "remote_block_ids": list(range(8)),
    "remote_engine_id": "engine-0",
    "remote_request_id": "r",
    "remote_host": "127.0.0.1",
    "remote_port": 5600,
    "tp_size": 1,
}


def answer(is_prefill: bool) -> bytes:
    message = {"role": "assistant", "content": "Paris."}
    return json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 90, "completion_tokens": 2, "total_tokens": 92},
            "kv_transfer_params": PARAMS if is_prefill else None,
        }
    ).encode()


PREFILL_ANSWER, DECODE_ANSWER = answer(is_prefill=True), answer(is_prefill=False)


async def instant_engine(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    """ASGI: JSON at once, or CHUNKS events, each in a turn of the loop of its own."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    if b'"stream":true' in body.replace(b'": true', b'":true'):
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(CHUNKS - 1):
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        return
    said = PREFILL_ANSWER if b'"do_remote_decode":true' in body else DECODE_ANSWER
    status = 404 if scope["path"].endswith("/render") else 200
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(said)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": said})


# Load


def body(stream: bool, number: int = 0) -> bytes:
    request = {
        "model": "m",
        "messages": [{"role": "user", "content": PROMPT.replace("@@@@@@", f"{number:06}")}],
        "max_tokens": 64,
        "stream": stream,
    }
    return json.dumps(request).encode()


class Load:
    """Requests to one target, every one with another prompt."""

    numbers = itertools.count()

    def __init__(self, url: str, upstream: Upstream) -> None:
        self._url = url
        self._upstream = upstream
        self._json = body(stream=False).split(b"000000")
        self._stream = body(stream=True).split(b"000000")

    def _next(self, parts: list[bytes]) -> bytes:
        return (b"%06d" % next(self.numbers)).join(parts)

    async def ask(self) -> None:
        async with await self._upstream.request(
            "POST", self._url, "/v1/chat/completions", self._next(self._json)
        ) as response:
            said = await response.read()
        if response.status != 200 or b"Paris" not in said:
            raise RuntimeError(f"{self._url} answered {response.status}: {said[:300]!r}")

    async def stream(self) -> float:
        """Seconds to the first byte of the first event."""
        began = time.perf_counter()
        first_s = 0.0
        events = 0
        async with await self._upstream.request(
            "POST", self._url, "/v1/chat/completions", self._next(self._stream)
        ) as response:
            while piece := await response.next_piece():
                first_s = first_s or time.perf_counter() - began
                events += piece.count(b"data: ")
        if response.status != 200 or events != CHUNKS:
            raise RuntimeError(f"{self._url} answered {response.status} with {events} events")
        return first_s


async def repeat(deed: Callable[[], Awaitable[object]], count: int, at_once: int) -> float:
    """Seconds for `count` deeds, `at_once` at a time."""

    left = iter(range(count))

    async def some() -> None:
        for _ in left:
            await deed()

    began = time.perf_counter()
    await asyncio.gather(*(some() for _ in range(at_once)))
    return time.perf_counter() - began


def cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


Processes = Callable[[], list[psutil.Process]]


async def measure(url: str, find: Processes, requests: int, at_once: int) -> Figures:
    upstream = Upstream(f"Bearer {KEY}")
    load = Load(url, upstream)
    try:
        await repeat(load.ask, 200, at_once)
        processes = find()  # now: HAProxy starts anew when a replica comes or goes
        firsts = sorted([await load.stream() for _ in range(200)])
        before = cpu_s(processes)
        json_s = await repeat(load.ask, requests, at_once)
        between = cpu_s(processes)
        streams = requests // 4
        stream_s = await repeat(load.stream, streams, at_once)
        after = cpu_s(processes)
    finally:
        await upstream.close()
    return Figures(
        first_byte_ms=firsts[len(firsts) // 2] * 1e3,
        json_per_s=requests / json_s,
        chunks_per_s=streams * CHUNKS / stream_s,
        cpu_s_per_1000_json=(between - before) / requests * 1e3,
        cpu_s_per_1000_streams=(after - between) / streams * 1e3,
        rss_mib=sum(process.memory_info().rss for process in processes) / 2**20,
    )


async def compare_clients(url: str, requests: int, at_once: int) -> None:
    """CPU time of one process that only asks, by client. Answers are read whole."""
    payload = body(stream=False)
    own = [psutil.Process()]
    upstream = Upstream()

    async def ask_own() -> None:
        async with await upstream.request("POST", url, "/v1/x", payload) as response:
            await response.read()

    async with aiohttp.ClientSession(
        url, connector=aiohttp.TCPConnector(limit=0), auto_decompress=False
    ) as session:

        async def ask_aiohttp() -> None:
            async with session.post("/v1/x", data=payload) as response:
                await response.read()

        for name, deed in (("own", ask_own), ("aiohttp", ask_aiohttp)) * 3:
            await repeat(deed, at_once * 4, at_once)
            before = cpu_s(own)
            await repeat(deed, requests, at_once)
            print(f"{name:8} {(cpu_s(own) - before) / requests * 1e6:7.1f} us CPU per request")
    await upstream.close()
