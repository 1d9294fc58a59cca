"""Blocks that prefill keeps for a peer, under a lease. Called by: handover, side_channel."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.engines.simulated.kv import Block
from cluster.transfers import Outcome, TransferRecord, TransferReporter


@dataclass(slots=True)
class Grant:
    """Blocks of one finished prefill, kept for a peer."""

    request_id: str
    key: str
    blocks: list[Block]
    contents: list[bytes]
    prompt_tokens: int
    lease: asyncio.TimerHandle
    ended: asyncio.Future[Outcome]


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
        key: str,
        blocks: list[Block],
        contents: list[bytes],
        prompt_tokens: int,
    ) -> None:
        """The grant owns `blocks` from now on. `key`: what a peer asks for them by besides the
        request's id (a transfer id, a room); "": nothing else."""
        loop = asyncio.get_running_loop()
        lease = loop.call_later(self._lease_s, self._end, request_id, "expired")
        self._open[request_id] = Grant(
            request_id, key, blocks, contents, prompt_tokens, lease, loop.create_future()
        )
        self._report(request_id, "granted", prompt_tokens)
        for waiting in self._awaited.pop(key, ()):
            if not waiting.done():
                waiting.set_result(None)

    def find(self, key: str) -> Grant | None:
        """By request id or key."""
        found = self._open.get(key)
        if found is None and key:
            return next((g for g in self._open.values() if g.key == key), None)
        return found

    async def wait_for(self, key: str) -> Grant | None:
        """As `find`, but a grant may still come within one lease. Cancel: safe."""
        found = self.find(key)
        if found is not None:
            return found
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._awaited.setdefault(key, []).append(waiting)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(waiting, self._lease_s)
        return self.find(key)

    async def end_of(self, request_id: str) -> Outcome:
        """Wait until the grant has ended, and how. Cancel: ends it as released."""
        grant = self._open.get(request_id)
        if grant is None:
            return "released"
        try:
            return await asyncio.shield(grant.ended)
        except asyncio.CancelledError:
            self._end(request_id, "released")
            raise

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
        grant.ended.set_result(outcome)
        self._free(grant.blocks)
        self._report(request_id, outcome, grant.prompt_tokens)
        if outcome == "expired":
            self._on_expired()

    def _report(self, request_id: str, outcome: Outcome, prompt_tokens: int) -> None:
        self._reporter.send(
            TransferRecord(request_id, "prefill", outcome, time.time(), prompt_tokens)
        )
