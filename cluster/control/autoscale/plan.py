"""Turn what pools wish into actions that respect bounds, each other, and the last ready worker.

In: who serves where, one Wish per pool. Out: actions, and why a wish came to nothing. Pure.
Called by: policy.

Bounds hold for two numbers at once: how many serve in a pool, and how many belong to it. A change
of role moves a worker between the first; starting and stopping changes both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cluster.control.autoscale.decision import Action, ChangeRole, ScaleDown, ScaleUp
from cluster.control.autoscale.signals import PoolSignals, Signals, WorkerSignals

# Of what serves, at most one part in this many stops at once (or one worker): the next decision
# sees how the rest does.
_STOP_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Wish:
    """What one pool should gain, or may lose: down to `lend_to` if another role needs a worker,
    down to `stop_to` in any case. None: nothing of the kind.

    `now_to`: what it could do with at this moment, which may not last. `can_wait`: the shortage is
    so young that what may become free elsewhere is waited for."""

    pool: PoolSignals
    gain_to: int | None = None
    can_wait: bool = False
    now_to: int | None = None
    lend_to: int | None = None
    stop_to: int | None = None
    why: str = ""


class Plan:
    """Used once: `actions`, then `gained`, `lost` and `blocked` say what became of each pool."""

    def __init__(self, signals: Signals, wishes: Iterable[Wish]) -> None:
        self._signals = signals
        self._wishes = {wish.pool.name: wish for wish in wishes}
        self._serving: dict[str, list[WorkerSignals]] = {p.name: [] for p in signals.pools}
        for worker in signals.workers:
            self._serving.setdefault(worker.serves, []).append(worker)
        self._members = Counter(worker.id.pool for worker in signals.workers)
        self.gained: frozenset[str] = frozenset()
        self.lost: frozenset[str] = frozenset()
        self.blocked: dict[str, str] = {}

    def actions(self) -> tuple[Action, ...]:
        """Gains first; a pool that gained or lent in them does not stop anything as well."""
        actions: list[Action] = []
        for wish in self._wishes.values():
            if wish.gain_to is not None:
                actions += self._gain(wish, wish.gain_to)
        for wish in self._wishes.values():
            if wish.stop_to is not None and wish.pool.name not in self.gained | self.lost:
                actions += self._stop(wish, wish.stop_to)
        return tuple(actions)

    def _gain(self, wish: Wish, to: int) -> Iterator[Action]:
        pool, has = wish.pool, len(self._serving[wish.pool.name])
        missing = min(to, pool.most) - has
        said = f"has {has}, should have {to}"
        for giver in self._lenders(pool.name):
            movable = self._movable(giver, self._spare(giver, giver.lend_to), pool.name)
            for worker in movable[: max(0, missing)]:
                why = f"{pool.name} {said}: {wish.why}. {giver.pool.name} can spare it: {giver.why}"
                yield self._move(worker, giver.pool.name, pool, why)
                missing -= 1
        hoped = [(g, self._spare(g, g.now_to)) for g in self._lenders(pool.name) if wish.can_wait]
        by = min(missing, pool.most - self._members[pool.name])
        by -= sum(spare for _, spare in hoped)
        if by > 0:
            self._members[pool.name] += by
            self.gained |= {pool.name}
            yield ScaleUp(pool.name, by, f"{said}: {wish.why}")
        elif pool.name in self.gained:
            return
        elif any(spare for _, spare in hoped):
            names = ", ".join(giver.pool.name for giver, spare in hoped if spare)
            self.blocked[pool.name] = f"{names} may be able to lend what is missing"
        else:
            lent = self._members[pool.name] - has
            self.blocked[pool.name] = f"it is at its maximum of {pool.most}" + (
                f", {lent} of them lent" if lent > 0 else ""
            )

    def _stop(self, wish: Wish, to: int) -> Iterator[Action]:
        pool, serving = wish.pool, self._serving[wish.pool.name]
        has, floor = len(serving), self._floor(pool, to)
        ready = sum(worker.is_ready for worker in serving)
        left = min(has - floor, ready - floor, max(1, has // _STOP_AT_ONCE))
        if left <= 0:
            if has > to:
                self.blocked[pool.name] = (
                    f"{has - to} to spare, but of {has} only {ready} are ready"
                )
            return
        said = f"has {has}, can do with {to}: {wish.why}"
        for worker in [w for w in serving if w.id.pool != pool.name and w.is_ready][:left]:
            home = self._signals.pool(worker.id.pool)
            if home is not None and self._can_go_home(pool, home):
                yield self._move(worker, pool.name, home, f"{said}. It goes back")
                left -= 1
        own = sum(worker.id.pool == pool.name for worker in serving)
        by = min(left, own, self._members[pool.name] - pool.least)
        if by > 0:
            self.lost |= {pool.name}
            yield ScaleDown(pool.name, by, said)

    def _can_go_home(self, pool: PoolSignals, home: PoolSignals) -> bool:
        has_room = len(self._serving[home.name]) < home.most and home.name not in self.lost
        return has_room and self._exchangeable(pool.name, home.name)

    def _lenders(self, taker: str) -> list[Wish]:
        """Pools of the other role whose workers can serve here, as far as they have a target."""
        return [
            wish
            for name, wish in self._wishes.items()
            if name != taker and name not in self.gained and self._exchangeable(taker, name)
        ]

    def _exchangeable(self, one: str, other: str) -> bool:
        return any(
            pair.is_exchangeable and {pair.prefill, pair.decode} == {one, other}
            for pair in self._signals.pairs
        )

    def _spare(self, wish: Wish, to: int | None) -> int:
        if to is None:
            return 0
        serving, floor = self._serving[wish.pool.name], self._floor(wish.pool, to)
        return max(0, min(len(serving), sum(worker.is_ready for worker in serving)) - floor)

    def _movable(self, giver: Wish, spare: int, target: str) -> list[WorkerSignals]:
        """Those that belong to the target first, then those with the least to finish."""
        ready = [worker for worker in self._serving[giver.pool.name] if worker.is_ready]
        ready.sort(key=lambda worker: (worker.id.pool != target, worker.requests, worker.id))
        return ready[:spare]

    def _move(
        self, worker: WorkerSignals, source: str, target: PoolSignals, why: str
    ) -> ChangeRole:
        self._serving[source] = [w for w in self._serving[source] if w.id != worker.id]
        self._serving[target.name].append(worker)
        self.lost |= {source}
        self.gained |= {target.name}
        return ChangeRole(worker.id, source, target.name, target.role, why)

    def _floor(self, pool: PoolSignals, to: int) -> int:
        # A pool with a target is needed: its last ready worker stays, whatever `least` says.
        return max(to, pool.least, 1)
