"""Wait until an engine has nothing in hand and no peer still pulls blocks from it.

Called by: workers.worker, for a stop (drain) and for a change of role (quiesce).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from cluster.engines.client import EngineSample
from cluster.workers.ledger import Ledger

# A change of role is to take less than a second beyond what is in hand.
_PERIOD_S = 0.1
# A request may stand between the engine's HTTP server and its scheduler, where nobody counts it:
# only this many looks in a row without work are believed.
_EMPTY_LOOKS = 2


@dataclass(frozen=True, slots=True)
class InHand:
    """What is still to be done at one look. `requests` is None when the engine did not answer."""

    requests: int | None
    leases: int  # grants of blocks that peers have not pulled yet

    @property
    def is_nothing(self) -> bool:
        return self.requests == 0 and self.leases == 0

    def __str__(self) -> str:
        if self.requests is None:
            return "the engine does not answer"
        leases = f", {_many(self.leases, 'lease')} to be pulled" if self.leases else ""
        return f"{_many(self.requests, 'request')} in hand{leases}"


async def until_empty(
    ask: Callable[[], Awaitable[EngineSample | None]],
    ledger: Ledger,
    lease_s: float,
    left_s: Callable[[], float],
    note: Callable[[InHand], None],
) -> InHand:
    """Look about every 100 ms until nothing is in hand, or `left_s()` is 0 or less. What the last
    look showed: `is_nothing`, or what stood in the way.

    Blocks are waited for no longer than `lease_s` seconds: after that no peer may pull them.
    `ask` may take as long as one look may. Cancel: safe."""
    leases_until_s = time.monotonic() + lease_s
    empty = 0
    while True:
        sample = await ask()
        is_pullable = time.monotonic() < leases_until_s
        in_hand = InHand(
            None if sample is None else sample.running + sample.waiting,
            ledger.leases_open(time.time()) if is_pullable else 0,
        )
        note(in_hand)
        empty = empty + 1 if in_hand.is_nothing else 0
        if empty == _EMPTY_LOOKS or (left_s() <= 0 and not in_hand.is_nothing):
            return in_hand
        await asyncio.sleep(_PERIOD_S)


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
