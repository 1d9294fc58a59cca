"""The requests that ended last, as gateways told of them, for `pdcluster explain`.

Kept packed, in memory, as many as are of use to somebody who has just seen an answer: a busy
cluster forgets sooner. Those that failed or changed workers have a place of their own, so that a
thousand good ones do not push the one out that is asked for. Called by: control.controller.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass

from cluster.control.clock import Clock
from cluster.errors import ClusterError
from cluster.request_records import PackedRecord, RequestRecord, unpack
from cluster.traffic import GatewayReport
from cluster.transfers import TransferRecord

# Some 500 bytes each: 11 MiB.
KEPT = 20_000
KEPT_TROUBLED = 2_000
# Gateways report about once a second; an answer may be asked about at once.
TOLD_WITHIN_S = 2.5
_GATEWAYS_KNOWN = 256


class UnknownRequest(ClusterError):
    """No request of this id is kept."""


@dataclass(frozen=True, slots=True)
class Explained:
    """One request, and what its engines said of moving its KV blocks, by time."""

    request: RequestRecord
    transfers: tuple[TransferRecord, ...]
    alike: int = 0  # further requests of the same id, older ones: clients choose ids


class Requests:
    """Owned by the controller's loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._well: deque[tuple[float, PackedRecord]] = deque(maxlen=KEPT)
        self._troubled: deque[tuple[float, PackedRecord]] = deque(maxlen=KEPT_TROUBLED)
        self._known: OrderedDict[str, int] = OrderedDict()
        self._told = asyncio.Event()

    def take(self, report: GatewayReport) -> int:
        """Take in the records of a report; the number of the newest one that is had of it."""
        first = report.records_to - len(report.records) + 1
        if report.gateway not in self._known and first > 1:
            # A former controller had the others. It sends all that it still has, told of none.
            self._known[report.gateway] = 0
            return 0
        known = self._known.pop(report.gateway, 0)
        heard_s = self._clock.now_s()
        for record in report.records[max(0, known + 1 - first) :]:
            _, is_troubled, _ = record
            (self._troubled if is_troubled else self._well).append((heard_s, record))
        self._known[report.gateway] = known = max(known, report.records_to)
        while len(self._known) > _GATEWAYS_KNOWN:
            self._known.popitem(last=False)
        if report.records:
            self._told.set()
            self._told = asyncio.Event()
        return known

    async def find(self, request_id: str) -> tuple[RequestRecord, int]:
        """The newest request of this id, and how many older ones there are. Waits TOLD_WITHIN_S for
        one that has just ended.

        Raises: UnknownRequest; ValueError: it was told by another version of pdcluster."""
        try:
            async with asyncio.timeout(TOLD_WITHIN_S):
                while not (found := self._of(request_id)):
                    await self._told.wait()
        except TimeoutError:
            raise UnknownRequest(self._why_unknown(request_id)) from None
        records = sorted(map(unpack, found), key=_when)
        return records[-1], len(records) - 1

    def _of(self, request_id: str) -> list[PackedRecord]:
        # A walk over all of them takes 1 ms; an index would cost each request that nobody asks for.
        kept = (*self._well, *self._troubled)
        return [record for _, record in kept if record[0] == request_id]

    def _why_unknown(self, request_id: str) -> str:
        kept = len(self._well) + len(self._troubled)
        said = f"no request {request_id} is known: "
        if not kept:
            return said + "this controller has not heard of any that has ended"
        oldest_s = self._clock.now_s() - min(q[0][0] for q in (self._well, self._troubled) if q)
        return said + (
            "it has not ended yet, its key was refused, or it is older than what is kept "
            f"({kept} of the last {oldest_s:.0f} s)"
        )


def _when(record: RequestRecord) -> float:
    return record.arrived_at_s + record.ended_s
