"""Prefill pushes, as vLLM-Ascend's layerwise connector does.

decode: `Inbox` asks the metaserver named in the request for blocks, and waits for them by the
request's external id. prefill: `push` brings them there, by its own external id: the two must be
the same, or decode waits for ever, as it does if nobody pushes at all.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import aiohttp
import orjson

from cluster.engines.simulated.faults import Faults
from cluster.engines.simulated.frames import PEER_TIMEOUT_S, TransferFailed, hear, write_frame

ASKS = 3  # connection attempts; whatever is answered counts as heard
# vLLM adds "-" and 8 characters to the id that the HTTP request came with.
RANDOM_END_CHARACTERS = 9


def external_id(request_id: str) -> str:
    return request_id[:-RANDOM_END_CHARACTERS]


class Inbox:
    """Decode's half. `close` ends its HTTP session."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._expected: dict[str, asyncio.Future[list[bytes] | None]] = {}
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def take(self, metaserver: str, message: dict[str, Any], lack: int) -> list[bytes]:
        """Contents of the blocks that `message` asks for.

        Raises: TransferFailed. Waits without end if nobody pushes. Cancel: safe."""
        key = message["request_id"]
        arrived: asyncio.Future[list[bytes] | None] = asyncio.get_running_loop().create_future()
        self._expected[key] = arrived
        asking = asyncio.create_task(self._ask(metaserver, message), name=f"ask for {key}")
        try:
            contents = await arrived
        finally:
            asking.cancel()
            del self._expected[key]
        if contents is None:
            raise TransferFailed("the push failed")
        if len(contents) < lack:
            raise TransferFailed(f"{len(contents)} of the {lack} missing blocks were pushed")
        return contents[:lack]

    def deliver(self, key: str, contents: list[bytes] | None) -> bool:
        """Blocks for `key`; None: they will not come. False: nobody waits for them."""
        arrived = self._expected.get(key)
        if arrived is None or arrived.done():
            return False
        arrived.set_result(contents)
        return True

    async def _ask(self, metaserver: str, message: dict[str, Any]) -> None:
        if self._faults.spec.mute_metaserver:
            return
        if self._session is None:
            self._session = aiohttp.ClientSession()
        for _ in range(ASKS):
            try:
                async with self._session.post(metaserver, json=message):
                    return
            except (aiohttp.ClientError, OSError) as error:
                print(f"metaserver not reached: {error!r}", flush=True)


async def push(params: dict[str, Any], key: str, contents: list[bytes], failed: bool) -> None:
    """Bring `contents` to where `params` say, or word that they will not come.

    Raises: TransferFailed. Cancel: safe."""
    message = {
        "op": "push",
        "engine_id": params["remote_engine_id"],
        "key": key,
        "failed": failed,
    }
    try:
        async with asyncio.timeout(PEER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(
                params["remote_host"], int(params["remote_port"])
            )
            with contextlib.closing(writer):
                write_frame(writer, orjson.dumps(message))
                write_frame(writer, b"".join(contents))
                await hear(reader)
    except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
        raise TransferFailed(f"peer does not answer: {error!r}") from error
