"""The side channel between two simulated engines, and what both dialects say over it.

prefill: `Grants` keeps a finished request's blocks under a lease until a peer took them, the
lease ran out, or the coordinator had them released; `SideChannel` serves them over TCP.
decode: `Puller` fetches what it lacks and tells prefill that it is done.

nixl: prefill's answer names engine, request, host, port and block ids.
mooncake: the router names a transfer id; decode asks prefill's bootstrap server (HTTP /query)
for the engine's address, and may ask before prefill has finished.

A peer that is gone, was restarted (another engine id) or let the lease run out fails the pull. A
real NIXL pull after the lease may read blocks that hold something else by then; here it fails.

Frames: 4-byte big-endian length, then JSON; a granted pull is followed by a frame of contents,
32 bytes per block.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from cluster.engines.simulated.config import KvConfig
from cluster.engines.simulated.faults import Faults
from cluster.engines.simulated.kv import Block
from cluster.transfers import Outcome, TransferRecord, TransferReporter

CONTENT_BYTES = 32
PEER_TIMEOUT_S = 5.0
RENEWALS_PER_LEASE = 6  # vLLM's NIXL connector


class TransferFailed(Exception):
    """The blocks did not come. `str()` says why."""


@dataclass(slots=True)
class Grant:
    """Blocks of one finished prefill, kept for a peer."""

    request_id: str
    transfer_id: str
    blocks: list[Block]
    contents: list[bytes]
    prompt_tokens: int
    lease: asyncio.TimerHandle


class Grants:
    """Prefill's open grants. `free` gives blocks back to the cache."""

    def __init__(
        self,
        lease_s: float,
        reporter: TransferReporter,
        free: Callable[[list[Block]], None],
        on_expired: Callable[[], None],
    ) -> None:
        self._lease_s = lease_s
        self._reporter = reporter
        self._free = free
        self._on_expired = on_expired
        self._open: dict[str, Grant] = {}
        self._awaited: dict[str, list[asyncio.Future[None]]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def grant(
        self,
        request_id: str,
        transfer_id: str,
        blocks: list[Block],
        contents: list[bytes],
        prompt_tokens: int,
    ) -> None:
        """The grant owns `blocks` from now on. `transfer_id`: "" in the nixl dialect."""
        loop = asyncio.get_running_loop()
        lease = loop.call_later(self._lease_s, self._end, request_id, "expired")
        self._open[request_id] = Grant(
            request_id, transfer_id, blocks, contents, prompt_tokens, lease
        )
        self._report(request_id, "granted", prompt_tokens)
        for waiting in self._awaited.pop(transfer_id, ()):
            if not waiting.done():
                waiting.set_result(None)

    def find(self, key: str) -> Grant | None:
        """By request id or transfer id."""
        found = self._open.get(key)
        if found is None and key:
            return next((g for g in self._open.values() if g.transfer_id == key), None)
        return found

    async def wait_for(self, transfer_id: str) -> Grant | None:
        """As `find`, but a grant may still come within one lease. Cancel: safe."""
        found = self.find(transfer_id)
        if found is not None:
            return found
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._awaited.setdefault(transfer_id, []).append(waiting)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(waiting, self._lease_s)
        return self.find(transfer_id)

    def renew(self, grant: Grant) -> None:
        """A waiting peer is alive: its lease begins anew."""
        grant.lease.cancel()
        loop = asyncio.get_running_loop()
        grant.lease = loop.call_later(self._lease_s, self._end, grant.request_id, "expired")

    def take(self, grant: Grant) -> None:
        self._end(grant.request_id, "taken")

    def release(self, parts_of_ids: Iterable[str]) -> None:
        """End every grant whose request id contains one of the parts."""
        parts = [part for part in parts_of_ids if part]
        for request_id in [r for r in self._open if any(part in r for part in parts)]:
            self._end(request_id, "released")

    def _end(self, request_id: str, outcome: Outcome) -> None:
        grant = self._open.pop(request_id, None)
        if grant is None:
            return
        grant.lease.cancel()
        self._free(grant.blocks)
        self._report(request_id, outcome, grant.prompt_tokens)
        if outcome == "expired":
            self._on_expired()

    def _report(self, request_id: str, outcome: Outcome, prompt_tokens: int) -> None:
        self._reporter.send(
            TransferRecord(request_id, "prefill", outcome, time.time(), prompt_tokens)
        )


class SideChannel:
    """Serves `grants` to peers."""

    def __init__(self, config: KvConfig, engine_id: str, grants: Grants, faults: Faults) -> None:
        self._config = config
        self._engine_id = engine_id
        self._grants = grants
        self._faults = faults
        self._server: asyncio.Server | None = None
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
                message = orjson.loads(await _read_frame(reader))
                refusal, contents = await self._answer(message)
                _write_frame(writer, orjson.dumps({"refused": refusal}))
                if contents is not None:
                    _write_frame(writer, b"".join(contents))
                await writer.drain()
        writer.close()

    async def _answer(self, message: dict[str, Any]) -> tuple[str, list[bytes] | None]:
        if message["engine_id"] != self._engine_id:
            return f"engine {message['engine_id']} is not here; this is {self._engine_id}", None
        if self._faults.spec.fail_transfers:
            return "simulated transfer fault", None
        if self._config.dialect == "mooncake" and message["op"] == "pull":
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


class Puller:
    """Decode's half. One per engine; `close` ends its HTTP session."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._bootstrap: dict[tuple[str, str], tuple[str, int]] = {}
        self._session: aiohttp.ClientSession | None = None
        self._notes: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for note in list(self._notes):
            note.cancel()
        if self._session is not None:
            await self._session.close()

    async def pull(self, params: dict[str, Any], skip: int, lack: int) -> list[bytes]:
        """Contents of the `lack` blocks after the first `skip`; prefill may free its own then.

        Raises: TransferFailed. Cancel: safe; prefill's lease runs out by itself.
        """
        if self._faults.spec.fail_transfers:
            raise TransferFailed("simulated transfer fault")
        try:
            address, engine_id, key, numbers = await self._locate(params)
            message = {
                "op": "pull",
                "engine_id": engine_id,
                "key": key,
                "skip": skip,
                "block_ids": None if numbers is None else numbers[skip:],
            }
            reader, writer = await asyncio.wait_for(
                asyncio.open_connection(*address), PEER_TIMEOUT_S
            )
            try:
                await _call(reader, writer, message)
                packed = await _read_frame(reader)
                await _call(reader, writer, {**message, "op": "done", "block_ids": None})
            finally:
                writer.close()
        except (KeyError, TypeError, ValueError) as error:
            raise TransferFailed(f"kv_transfer_params are incomplete: {error!r}") from error
        except (OSError, asyncio.IncompleteReadError, TimeoutError, aiohttp.ClientError) as error:
            raise TransferFailed(f"peer does not answer: {error!r}") from error
        contents = [packed[at : at + CONTENT_BYTES] for at in range(0, len(packed), CONTENT_BYTES)]
        if len(contents) < lack:
            raise TransferFailed(f"peer has {len(contents)} of the {lack} missing blocks")
        return contents[:lack]

    def decline(self, params: dict[str, Any]) -> None:
        """The request will not run here: let prefill free its blocks. Returns at once."""
        self._in_background(self._tell(params, "done"), "decline transfer")

    def renewing(self, params: dict[str, Any], lease_s: float) -> asyncio.Task[None]:
        """Renews prefill's lease until cancelled, for a request that has to wait here."""

        async def renew() -> None:
            while True:
                await asyncio.sleep(lease_s / RENEWALS_PER_LEASE)
                await self._tell(params, "renew")

        return self._in_background(renew(), "renew lease")

    def _in_background(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        note = asyncio.create_task(work, name=name)
        self._notes.add(note)
        note.add_done_callback(self._notes.discard)
        return note

    async def _tell(self, params: dict[str, Any], op: str) -> None:
        """Say it if the peer is there to hear it."""
        with contextlib.suppress(
            TransferFailed, OSError, LookupError, TypeError, ValueError, aiohttp.ClientError
        ):
            address, engine_id, key, _ = await self._locate(params)
            reader, writer = await asyncio.open_connection(*address)
            try:
                await _call(reader, writer, {"op": op, "engine_id": engine_id, "key": key})
            finally:
                writer.close()

    async def _locate(
        self, params: dict[str, Any]
    ) -> tuple[tuple[str, int], str, str, Sequence[int] | None]:
        """(host, port), engine id, key of the grant, remote block ids (nixl only)."""
        engine_id = params["remote_engine_id"]
        if "transfer_id" in params:
            address = await self._ask_bootstrap(params["remote_bootstrap_addr"], engine_id)
            return address, engine_id, params["transfer_id"], None
        address = (params["remote_host"], int(params["remote_port"]))
        return address, engine_id, params["remote_request_id"], params["remote_block_ids"][0]

    async def _ask_bootstrap(self, bootstrap: str, engine_id: str) -> tuple[str, int]:
        known = self._bootstrap.get((bootstrap, engine_id))
        if known is not None:
            return known
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=PEER_TIMEOUT_S)
            )
        async with self._session.get(f"{bootstrap}/query") as answer:
            ranks = await answer.json()
        for entry in ranks.values():
            if entry["engine_id"] == engine_id:
                host, _, port = entry["worker_addr"]["0"]["0"].rpartition(":")
                self._bootstrap[bootstrap, engine_id] = address = (host, int(port))
                return address
        raise TransferFailed(f"engine {engine_id} is not registered at {bootstrap}")


async def _call(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: dict[str, Any]
) -> None:
    _write_frame(writer, orjson.dumps(message))
    refused = orjson.loads(await _read_frame(reader))["refused"]
    if refused:
        raise TransferFailed(refused)


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))


def _write_frame(writer: asyncio.StreamWriter, payload: bytes) -> None:
    writer.write(len(payload).to_bytes(4, "big") + payload)
