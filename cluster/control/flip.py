"""A loaded worker changes its role: a routing change, with what it has in hand finished first.

    READY as r, epoch e ─▶ CHANGING: no new work ─▶ gateways have seen it ─▶ nothing in hand, no
    blocks still to be pulled ─▶ READY as r', epoch e' > e

Past its grace what it has in hand goes on elsewhere (`lets_go`). No snapshot shows it in two roles
or with a role and half of its work gone. A request that was routed before CHANGING and arrives
after the flip is answered all the same: only engines that do both come here.
Called by: control.crew.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from cluster.control.clock import Clock
from cluster.control.events import Event, RoleChanged, RoleKept, WorkerLetGo
from cluster.control.fleet import Tracked
from cluster.errors import ClusterError
from cluster.identity import Role, WorkerState

# A gateway that does not answer is not waited for; its requests are answered all the same.
ACKNOWLEDGED_WITHIN_S = 1.0
# What is let go has left by then: gateways break those connections at once.
LET_GO_S = 5.0


@dataclass(frozen=True, slots=True)
class Way:
    """What a flip needs of the controller. `publish` gives the version that shows what is now."""

    publish: Callable[[], Awaitable[int]]
    acknowledged: Callable[[int, float], Awaitable[bool]]
    emit: Callable[[Event], None]
    clock: Clock


async def flip(tracked: Tracked, role: Role, grace_s: float, way: Way) -> None:
    """Have `tracked`, which is marked as changing, serve as `role`. If it fails meanwhile, it keeps
    its role and says so.

    Cancel: it keeps its role."""
    was, begun_s = tracked.role, way.clock.now_s()
    try:
        handle = tracked.handle
        if handle is None:
            return
        await way.acknowledged(await way.publish(), ACKNOWLEDGED_WITHIN_S)
        is_quiet = await handle.quiesce(grace_s)
        if not is_quiet:
            tracked.lets_go = True
            way.emit(WorkerLetGo(tracked.id, f"its grace of {grace_s:g} s is over"))
            await way.acknowledged(await way.publish(), ACKNOWLEDGED_WITHIN_S)
            await handle.quiesce(LET_GO_S)
        drained_s = way.clock.now_s() - begun_s
        if tracked.shown().state is not WorkerState.CHANGING:
            way.emit(RoleKept(tracked.id, f"it is {tracked.shown().state}"))
            return
        # Versions only grow, over restarts too: the next one is a good number for the epoch.
        tracked.serve_as(role, await way.publish() + 1)
        await way.publish()
        way.emit(RoleChanged(tracked.id, was, role, way.clock.now_s() - begun_s, drained_s))
    except ClusterError as error:
        way.emit(RoleKept(tracked.id, str(error)))
    finally:
        tracked.is_changing = tracked.lets_go = False
