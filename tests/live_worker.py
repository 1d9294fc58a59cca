"""A worker without Ray around a real engine process, and requests that it has in hand."""

from __future__ import annotations

import asyncio
import contextlib
import time

import aiohttp

KEY = {"Authorization": "Bearer worker-test-secret"}


async def reaches(worker, *states, within_s=60.0):
    """The first report in one of these states."""
    deadline_s = time.monotonic() + within_s
    while (report := await worker.report()).state not in states:
        assert time.monotonic() < deadline_s, report
        await asyncio.sleep(0.02)
    return report


def session():
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), headers=KEY)


@contextlib.asynccontextmanager
async def streams(report, count, max_tokens, prompt="1", **more):
    """`count` requests, each with its first token behind it, in hand while the block runs."""
    body = {
        "model": "simulated",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "stream": True,
        "ignore_eos": True,
        **more,
    }
    async with contextlib.AsyncExitStack() as stack:
        opened = await stack.enter_async_context(session())
        answers = []
        for _ in range(count):
            call = opened.post(f"{report.url}/v1/completions", json=body)
            answers.append(await stack.enter_async_context(call))
        for answer in answers:
            assert answer.status == 200
            await answer.content.readline()
        yield answers


async def grant(report, request_id, prompt="a prompt of more than one block of sixteen tokens"):
    """Prefill something for a peer, which then has not pulled it."""
    body = {
        "model": "simulated",
        "prompt": prompt,
        "max_tokens": 1,
        "kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False},
    }
    headers = {"X-Request-Id": request_id}
    async with (
        session() as opened,
        opened.post(f"{report.url}/v1/completions", json=body, headers=headers) as answer,
    ):
        assert answer.status == 200, await answer.text()


async def fault(report, **what):
    """Of an engine with `fault-endpoint`."""
    async with session() as opened, opened.post(f"{report.url}/simulate/fault", json=what) as got:
        assert got.status == 200
