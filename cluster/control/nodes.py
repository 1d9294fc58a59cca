"""The cluster's nodes as the controller sees them: which are silent, and which drained ones are
gone for good.

    look      asks Ray, at most every EVERY_S: it is for people, and for what can wait
    silent    hosts that Ray holds for dead though nobody ended them, and those whose worker does
              not answer; none of them has come back. Known since this controller noticed it
    forgotten drained nodes that Ray has no living node for: an id is never given again

Called by: control.loop, control.controller.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from cluster.control.clock import Clock
from cluster.control.fleet import Tracked, Workers
from cluster.control.state import SilentHost
from cluster.workers.nodes import RayNode

log = logging.getLogger(__name__)

EVERY_S = 5.0
# What one step of the controller, and somebody who asks for a drain, wait for the answer.
_WAIT_S = 0.5
_ASKED_FOR_S = 5.0
_WHY_CHARACTERS = 160


class Nodes:
    """Owned by one controller."""

    def __init__(self, workers: Workers, clock: Clock) -> None:
        self._workers = workers
        self._clock = clock
        self._looked_at_s = float("-inf")
        self._asking: asyncio.Task[tuple[RayNode, ...]] | None = None
        self._known: tuple[RayNode, ...] = ()
        self._silent_since_s: dict[str, float] = {}  # by node id; wall clock

    @property
    def living(self) -> tuple[RayNode, ...]:
        return tuple(node for node in self._known if node.is_alive)

    async def look(self, at_once: bool = False) -> None:
        """Ask Ray, if it was not asked a moment ago, and take in its answer, now or with the next
        call. Never raises: what was known stays. Cancel: safe."""
        now_s = self._clock.now_s()
        is_due = at_once or now_s - self._looked_at_s >= EVERY_S
        if self._asking is None and is_due:
            # One at a time: while Ray's head is away, each takes a thread for a minute.
            self._looked_at_s = now_s
            self._asking = asyncio.create_task(self._workers.nodes(), name="nodes")
        if self._asking is None:
            return
        await asyncio.wait({self._asking}, timeout=_ASKED_FOR_S if at_once else _WAIT_S)
        if not self._asking.done():
            return
        asking, self._asking = self._asking, None
        try:
            self._known = asking.result()
        except Exception as error:
            log.info("Ray did not tell its nodes why=%s", type(error).__name__)
            return
        wall_s = self._clock.wall_s()
        self._silent_since_s = {
            node.id: self._silent_since_s.get(node.id, wall_s)
            for node in self._known
            if node.silence
        }

    def silent(self, workers: Sequence[Tracked]) -> tuple[SilentHost, ...]:
        """Hosts that should be there and are not heard of, by address."""
        alive = {node.facts.name for node in self.living}
        found: dict[str, SilentHost] = {}
        for node in self._known:
            address = node.facts.name
            if node.silence and address not in alive:
                since_s = self._silent_since_s[node.id]
                why = node.silence.partition("\n")[0][:_WHY_CHARACTERS]
                # Of a host that was lost several times, the last.
                if address not in found or since_s > found[address].since_s:
                    found[address] = SilentHost(address, since_s, why)
        for tracked in workers:
            address = tracked.report.node_ip
            if tracked.is_silent and address and address not in found:
                silent_s = self._clock.now_s() - tracked.heard_at_s
                since_s = self._clock.wall_s() - silent_s
                why = f"{tracked.id} does not answer from there"
                found[address] = SilentHost(address, since_s, why)
        return tuple(found[address] for address in sorted(found))

    def forgotten(self, drained: Sequence[str]) -> frozenset[str]:
        """Those of `drained` that are gone for good. None while Ray tells of no node at all."""
        living = {node.id for node in self.living}
        return frozenset(node for node in drained if node not in living) if living else frozenset()
