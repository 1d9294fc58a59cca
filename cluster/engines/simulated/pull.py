"""Decode takes blocks that a prefill engine keeps for it.

nixl, ascend_mooncake: prefill's answer names engine, request, host, port and block ids.
mooncake: the router names a transfer id; decode asks prefill's bootstrap server (HTTP /query)
for the engine's address, and may ask before prefill has finished.
sglang: the router names a room and prefill's bootstrap server (HTTP /route); decode may be there
before prefill has finished.

A peer that is gone, was restarted (another engine id) or let the lease run out fails the pull. A
real NIXL pull after the lease may read blocks that hold something else by then; here it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Sequence
from typing import Any

import aiohttp

from cluster.engines.simulated.faults import Faults
from cluster.engines.simulated.frames import (
    PEER_TIMEOUT_S,
    TransferFailed,
    call,
    read_frame,
    split,
)

RENEWALS_PER_LEASE = 6  # vLLM's NIXL connector


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
                await call(reader, writer, message)
                packed = await read_frame(reader)
                await call(reader, writer, {**message, "op": "done", "block_ids": None})
            finally:
                writer.close()
        except (KeyError, TypeError, ValueError) as error:
            raise TransferFailed(f"kv_transfer_params are incomplete: {error!r}") from error
        except (OSError, asyncio.IncompleteReadError, TimeoutError, aiohttp.ClientError) as error:
            raise TransferFailed(f"peer does not answer: {error!r}") from error
        contents = split(packed)
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
                await call(reader, writer, {"op": op, "engine_id": engine_id, "key": key})
            finally:
                writer.close()

    async def _locate(
        self, params: dict[str, Any]
    ) -> tuple[tuple[str, int], str | None, str, Sequence[int] | None]:
        """(host, port), engine id if known, key of the grant, remote block ids if known."""
        if "bootstrap_room" in params:
            address = await self._ask_route(params["bootstrap_host"], params["bootstrap_port"])
            return address, None, str(params["bootstrap_room"]), None
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
        ranks = await self._get(f"{bootstrap}/query")
        for entry in ranks.values():
            if entry["engine_id"] == engine_id:
                host, _, port = entry["worker_addr"]["0"]["0"].rpartition(":")
                self._bootstrap[bootstrap, engine_id] = address = (host, int(port))
                return address
        raise TransferFailed(f"engine {engine_id} is not registered at {bootstrap}")

    async def _ask_route(self, host: str, port: int) -> tuple[str, int]:
        """Not remembered: a restarted engine may have the same bootstrap address."""
        first_rank = "prefill_dp_rank=0&prefill_cp_rank=0&target_tp_rank=0&target_pp_rank=0"
        found = await self._get(f"http://{host}:{port}/route?{first_rank}")
        return found["rank_ip"], int(found["rank_port"])

    async def _get(self, url: str) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=PEER_TIMEOUT_S)
            )
        async with self._session.get(url) as answer:
            return await answer.json()
