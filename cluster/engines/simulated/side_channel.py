"""The server half of the side channel: peers take blocks from here, or push them here."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import orjson

from cluster.engines.simulated.config import KvConfig, meets_in_rooms
from cluster.engines.simulated.faults import Faults
from cluster.engines.simulated.frames import read_frame, split, write_frame
from cluster.engines.simulated.grants import Grants
from cluster.engines.simulated.push import Inbox


class SideChannel:
    """Serves `grants` to peers, and takes what they push into `inbox`."""

    def __init__(
        self, config: KvConfig, engine_id: str, grants: Grants, inbox: Inbox, faults: Faults
    ) -> None:
        self._config = config
        self._engine_id = engine_id
        self._grants = grants
        self._inbox = inbox
        self._faults = faults
        self._server: asyncio.Server | None = None
        # A peer may ask for what prefill has not finished yet.
        self._waits = config.dialect == "mooncake" or meets_in_rooms(config.dialect)
        self.port = config.port

    async def start(self) -> None:
        """Raises: OSError if the port is taken."""
        self._server = await asyncio.start_server(self._serve, self._config.host, self._config.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                message = orjson.loads(await read_frame(reader))
                if message["op"] == "push":
                    pushed = await read_frame(reader)
                    refusal, contents = self._take(message, pushed), None
                else:
                    refusal, contents = await self._answer(message)
                write_frame(writer, orjson.dumps({"refused": refusal}))
                if contents is not None:
                    write_frame(writer, b"".join(contents))
                await writer.drain()
        writer.close()

    def _take(self, message: dict[str, Any], pushed: bytes) -> str:
        if message["engine_id"] != self._engine_id:
            return self._not_here(message)
        has_failed = message["failed"] or self._faults.spec.fail_transfers
        if not self._inbox.deliver(message["key"], None if has_failed else split(pushed)):
            return f"nobody waits for {message['key']} here"
        return ""

    async def _answer(self, message: dict[str, Any]) -> tuple[str, list[bytes] | None]:
        # Who meets in rooms knows the address from the bootstrap server, and no engine id.
        if message["engine_id"] not in (self._engine_id, None):
            return self._not_here(message), None
        if self._faults.spec.fail_transfers:
            return "simulated transfer fault", None
        if self._waits and message["op"] == "pull":
            grant = await self._grants.wait_for(message["key"])
        else:
            grant = self._grants.find(message["key"])
        if grant is None:
            return f"no blocks are kept for {message['key']}: lease ran out or never granted", None
        if message["op"] == "done":
            self._grants.take(grant)
            return "", None
        if message["op"] == "renew":
            self._grants.renew(grant)
            return "", None
        wanted = message["block_ids"]
        if wanted is None:
            return "", grant.contents[message["skip"] :]
        by_id = dict(zip((b.id for b in grant.blocks), grant.contents, strict=True))
        if any(number not in by_id for number in wanted):
            return f"some of {len(wanted)} blocks do not belong to {message['key']}", None
        return "", [by_id[number] for number in wanted]

    def _not_here(self, message: dict[str, Any]) -> str:
        return f"engine {message['engine_id']} is not here; this is {self._engine_id}"
