"""One prompt's way from a prefill to a decode engine, in the order its connector wants.

    PREFILL_FIRST  prefill answers, then decode is called with what it said
    DECODE_FIRST   decode is called; its engine tells the metaserver where it has room; prefill is
                   called with that, at decode's side
    TOGETHER       both are called at once

A `Passage` has two calls to make, given as functions of the fields that the dialect adds, and ends
when decode has begun to answer. Until then the first call that fails decides: the other one is
ended, and the failure says which engine it was. After that prefill's call, if it still runs, is
nobody's concern; it ends with the passage at the latest.

Who writes is ended before who owns the memory: prefill before decode where prefill pushes, decode
before prefill's blocks are released where decode pulls. Called by: gateway.attempt.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Generic, TypeVar

from cluster.errors import EngineFailed
from cluster.gateway.fleet import Fleet
from cluster.gateway.metaserver import Expected, Metaserver
from cluster.kv.coordinator import Transfer
from cluster.kv.dialects import Fields, Order
from cluster.kv.lease import Failure

T = TypeVar("T")
# Each raises EngineFailed or Rejected, and closes its connection when it is cancelled.
PrefillCall = Callable[[Order, Fields], Awaitable[Mapping[str, Any]]]
DecodeCall = Callable[[Fields], Coroutine[Any, Any, T]]


class Passage(ABC, Generic[T]):
    """`begin` once, then `close`, whatever happened. Owns `transfer`."""

    def __init__(
        self,
        transfer: Transfer,
        fleet: Fleet,
        metaserver: Metaserver,
        budget_s: float,
        prefill: PrefillCall,
        decode: DecodeCall[T],
    ) -> None:
        """`budget_s`: how long prefill may take, whatever it is waiting for."""
        self._transfer = transfer
        self._fleet = fleet
        self._metaserver = metaserver
        self._budget_s = budget_s
        self._call_prefill = prefill
        self._call_decode = decode

    @abstractmethod
    async def begin(self) -> T:
        """Decode's beginning: what its call returned.

        Raises: EngineFailed, PeerGone, Rejected, NoCapacity. Cancel: ends both calls."""

    @abstractmethod
    async def close(self, close_decode: Callable[[], None], failure: Failure) -> None:
        """End what still runs, in the right order. `close_decode`: closes decode's answer;
        `failure`: why decode has no blocks, if it has none."""

    async def _prefill(self, fields: Fields) -> Mapping[str, Any]:
        return await self._call_prefill(self._transfer.order, fields)

    def _prefill_is_late(self) -> EngineFailed:
        return EngineFailed(
            self._transfer.prefill.id.name, None, f"prefill took longer than {self._budget_s:.1f} s"
        )


class PrefillFirst(Passage[T]):
    """See the module. No task of its own: this is the path of most requests."""

    async def begin(self) -> T:
        transfer = self._transfer
        try:
            async with asyncio.timeout(self._budget_s):
                with self._fleet.busy(transfer.prefill.id):
                    answer = await self._prefill(await transfer.prefill_fields())
        except TimeoutError:
            raise self._prefill_is_late() from None
        transfer.prefilled(answer)
        begun = await self._call_decode(await transfer.decode_fields())
        transfer.finish()
        return begun

    async def close(self, close_decode: Callable[[], None], failure: Failure) -> None:
        close_decode()
        self._transfer.abandon(failure)


class AtOnce(Passage[T]):
    """Prefill's call runs in a task beside decode's."""

    _beside: asyncio.Task[None] | None = None

    async def _race(self, prefill: Coroutine[Any, Any, None], fields: Fields) -> T:
        name = self._transfer.request_id
        # From now on, also while decode has not asked for it yet: the next request should see it.
        busy = self._fleet.busy(self._transfer.prefill.id)
        busy.__enter__()
        beside = self._beside = asyncio.create_task(prefill, name=f"prefill {name}")
        beside.add_done_callback(lambda task: busy.__exit__())
        decode = asyncio.create_task(self._call_decode(fields), name=f"decode {name}")
        try:
            await asyncio.wait((beside, decode), return_when=asyncio.FIRST_COMPLETED)
            if not decode.done():
                beside.result()
                await asyncio.wait((decode,))
            begun = decode.result()
        finally:
            if not decode.done() or decode.cancelled() or decode.exception() is not None:
                await _ended(beside)
                await _ended(decode)
        self._transfer.finish()
        return begun

    async def close(self, close_decode: Callable[[], None], failure: Failure) -> None:
        if self._beside is not None:
            await _ended(self._beside)
        close_decode()
        self._transfer.abandon(failure)


class Together(AtOnce[T]):
    """See the module."""

    async def begin(self) -> T:
        fields = self._transfer.shared_fields()
        return await self._race(self._run(fields), fields)

    async def _run(self, fields: Fields) -> None:
        try:
            async with asyncio.timeout(self._budget_s):
                await self._prefill(fields)
        except TimeoutError:
            raise self._prefill_is_late() from None


class DecodeFirst(AtOnce[T]):
    """See the module."""

    async def begin(self) -> T:
        await self._metaserver.start()
        with self._metaserver.expect() as expected:
            fields = self._transfer.waiting_fields(expected.url)
            return await self._race(self._push(expected), fields)

    async def _push(self, expected: Expected) -> None:
        is_asked = False
        try:
            async with asyncio.timeout(self._budget_s):
                fields = self._transfer.pushing_fields(await expected.message())
                is_asked = True
                await self._prefill(fields)
        except TimeoutError:
            if is_asked:
                raise self._prefill_is_late() from None
            raise EngineFailed(
                self._transfer.decode.id.name,
                None,
                f"its engine did not call the metaserver at {_address(expected.url)} within "
                f"{self._budget_s:.1f} s; is it full, or can its host not reach that address?",
            ) from None


KINDS: Mapping[Order, type[Passage[Any]]] = {
    Order.PREFILL_FIRST: PrefillFirst,
    Order.DECODE_FIRST: DecodeFirst,
    Order.TOGETHER: Together,
}


def _address(url: str) -> str:
    """Without the path, which is a secret."""
    return url.split("/", 3)[2]


async def _ended(task: asyncio.Task[Any]) -> None:
    """Cancel `task` if it runs, and wait until it is over. What came of it is dropped."""
    if not task.done():
        task.cancel()
        await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()
