"""The autoscaler at work: look at the cluster, decide, and ask the controller, or only say so.

    every second   reports, gateways' reports ─▶ a Sample, kept for a load window
    every          samples ─ autoscale.gather ─▶ Signals ─ autoscale.policy.decide ─▶ actions
    `interval_s`     ─▶ asked of the controller as anybody else would (control.changes)
                     ─▶ or, with `dry_run`, an event that says what would be asked

Nothing happens unless `scaling.mode` is slo. It keeps nothing but memory: one that is begun anew
with its controller waits for a load window, then for the policy's windows. An operator goes first:
while a change that somebody else asked for is running, its pools are left alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from cluster.control import roles
from cluster.control.autoscale import gather, view
from cluster.control.autoscale.decision import Action, ChangeRole, PolicyState, ScaleUp
from cluster.control.autoscale.policy import decide
from cluster.control.autoscale.samples import Sample, sample
from cluster.control.autoscale.view import Scaling, ScalingAction
from cluster.control.changes import Ask, Change, ChangeState, Scale
from cluster.control.changes import ChangeRole as AskChangeRole
from cluster.control.clock import Clock
from cluster.control.events import AutoscalerDecided, Event
from cluster.control.state import ClusterStatus, DesiredState
from cluster.errors import ClusterError
from cluster.topology.scaling import ScalingSpec
from cluster.traffic import GatewayReport

log = logging.getLogger(__name__)

ASKED_BY = "autoscaler"
_LOOK_PERIOD_S = 1.0
# After a change of its own was refused or failed, what stood against it is given time to go.
_PAUSE_S = 60.0
# The same words are said again once they have not been true for this long.
_SAID_FOR_S = 60.0


class Scalable(Protocol):
    """What the autoscaler needs of a controller."""

    async def desired(self) -> DesiredState | None: ...

    async def status(self) -> ClusterStatus: ...

    async def gateways(self) -> tuple[GatewayReport, ...]: ...

    async def changes(self) -> tuple[Change, ...]: ...

    async def ask(self, ask: Ask, asked_by: str, why: str = "") -> Change: ...


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An action in the words of control.changes. `ask` None: there is nothing to ask for."""

    pools: tuple[str, ...]
    what: str
    ask: Ask | None
    problem: str = ""


class Autoscaler:
    """One per controller. `emit`: where events go."""

    def __init__(self, cluster: Scalable, clock: Clock, emit: Callable[[Event], None]) -> None:
        self._cluster = cluster
        self._clock = clock
        self._emit = emit
        self._told = ""  # what engines and the policy are told, as far as memory depends on it
        self._samples: tuple[Sample, ...] = ()
        self._learnt = gather.Learnt()
        self._state = PolicyState()
        self._next_at_s = 0.0
        self._scaling = Scaling("manual", False, ScalingSpec().interval_s)
        self._said: dict[str, tuple[str, float]] = {}  # pool: words, when they were last true
        self._paused_until_s: dict[str, float] = {}
        self._watched: dict[int, tuple[str, ...]] = {}  # own changes that run: their pools

    def scaling(self) -> Scaling:
        """The last decision and what became of it."""
        return self._scaling

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.step()
            except Exception as error:
                # The controller restarting its head, say: the next look may find it well.
                log.exception("autoscaler step failed")
                self._scaling = replace(
                    self._scaling, problem=f"{type(error).__name__}: {error}; see the log"
                )
            await asyncio.sleep(_LOOK_PERIOD_S)

    async def step(self) -> None:
        """Look once; decide if it is time to."""
        desired = await self._cluster.desired()
        policy = desired.serving.scaling if desired is not None else ScalingSpec()
        if desired is None or policy.mode != "slo":
            self._told = ""
            self._forget()
            self._scaling = Scaling(policy.mode, policy.dry_run, policy.interval_s)
            return
        self._begin_anew_if_told_otherwise(desired)
        status = await self._cluster.status()
        now_s = self._clock.now_s()
        self._look(
            sample(now_s, desired, status.workers, await self._cluster.gateways()),
            policy.load_window_s,
        )
        if now_s < self._next_at_s:
            return
        self._next_at_s = now_s + policy.interval_s
        await self._decide(desired, status, now_s)

    def _forget(self) -> None:
        self._samples = ()
        self._learnt = gather.Learnt()
        self._state = PolicyState()
        self._next_at_s = 0.0

    def _begin_anew_if_told_otherwise(self, desired: DesiredState) -> None:
        """Step times and speeds are those of engines that were told the same."""
        pools = [(pool.name, desired.revision(pool.name)) for pool in desired.serving.pools]
        told = repr((desired.serving.scaling, pools))
        if told != self._told:
            self._told = told
            self._forget()
            self._scaling = Scaling(
                "slo", desired.serving.scaling.dry_run, desired.serving.scaling.interval_s
            )

    def _look(self, seen: Sample, window_s: float) -> None:
        if self._samples:
            self._learnt = self._learnt.followed(self._samples[-1], seen)
        self._samples = gather.within((*self._samples, seen), window_s)

    async def _decide(self, desired: DesiredState, status: ClusterStatus, now_s: float) -> None:
        policy = desired.serving.scaling
        signals, self._learnt = gather.signals(
            desired, self._samples, status.failed, self._learnt, exchangeable(desired)
        )
        decision, after = decide(policy, signals, self._state, now_s)
        held = self._held(await self._cluster.changes(), now_s)
        done: set[str] = set()
        outcomes: list[ScalingAction] = []
        for action in decision.actions:
            # Counted anew for each: a scaling before it may have changed what is wanted.
            wanted = _wanted(action, await self._cluster.desired() or desired)
            outcome = await self._carry_out(wanted, action.why, policy, held, now_s)
            outcomes.append(outcome)
            if outcome.outcome == "asked":
                done |= set(wanted.pools)
        self._said = {
            pool: said for pool, said in self._said.items() if now_s - said[1] < _SAID_FOR_S
        }
        self._state = _as_if_only(done, after, self._state)
        self._scaling = view.scaling(
            policy, signals, decision, tuple(outcomes), held, self._clock.wall_s()
        )

    def _held(self, changes: tuple[Change, ...], now_s: float) -> Mapping[str, str]:
        """Pools that are to be left alone, and why. "": all of them."""
        held: dict[str, str] = {}
        for change in changes:
            if change.asked_by == ASKED_BY:
                pools = self._watched.get(change.id, ())
                if change.state is ChangeState.FAILED:
                    self._paused_until_s |= dict.fromkeys(pools, now_s + _PAUSE_S)
                if change.state is not ChangeState.RUNNING:
                    self._watched.pop(change.id, None)
            elif change.state is ChangeState.RUNNING:
                why = f"{change.asked_by} goes first: {change.what} is running"
                held |= dict.fromkeys(change.pools or ("",), why)
        for pool, until_s in self._paused_until_s.items():
            if now_s < until_s:
                why = f"what was asked last did not come about; {until_s - now_s:.0f} s to go"
                held.setdefault(pool, why)
        return held

    async def _carry_out(
        self,
        wanted: _Wanted,
        why: str,
        policy: ScalingSpec,
        held: Mapping[str, str],
        now_s: float,
    ) -> ScalingAction:
        against = next((held[pool] for pool in (*wanted.pools, "") if pool in held), "")
        if against or wanted.ask is None:
            return ScalingAction(wanted.what, "held", why, problem=against or wanted.problem)
        if policy.dry_run:
            self._say(wanted, "would", why, now_s)
            return ScalingAction(wanted.what, "would", why)
        try:
            change = await self._cluster.ask(wanted.ask, ASKED_BY, why)
        except ClusterError as error:
            self._paused_until_s |= dict.fromkeys(wanted.pools, now_s + _PAUSE_S)
            self._say(wanted, "refused", str(error), now_s)
            return ScalingAction(wanted.what, "refused", why, problem=str(error))
        self._watched[change.id] = wanted.pools
        return ScalingAction(wanted.what, "asked", why, change=change.id)

    def _say(self, wanted: _Wanted, outcome: str, why: str, now_s: float) -> None:
        """Once, as long as it stays the same."""
        pool = wanted.pools[-1]
        before = self._said.get(pool, ("", 0.0))[0]
        self._said[pool] = (f"{outcome} {wanted.what}", now_s)
        if before != self._said[pool][0]:
            self._emit(AutoscalerDecided(pool, wanted.what, outcome, why))


def exchangeable(desired: DesiredState) -> tuple[tuple[str, str], ...]:
    """Pairs with a target whose workers, on both sides, change roles without a new start."""

    def can(pool: str) -> bool:
        serving = desired.serving
        return not roles.why_never(serving, pool) and not roles.why_restart(serving, pool)

    return tuple(
        (target.prefill, target.decode)
        for target in desired.serving.scaling.targets
        if can(target.prefill) and can(target.decode)
    )


def _wanted(action: Action, desired: DesiredState) -> _Wanted:
    """A number of replicas is asked for against what is wanted now: it has those in it whose
    workers fail, which the policy does not count."""
    if isinstance(action, ChangeRole):
        return _Wanted(
            (action.source, action.target),
            f"have {action.worker.name} serve as {action.role}",
            AskChangeRole(action.worker.name, action.role),
        )
    replicas = desired.serving.pool(action.pool).replicas
    by = action.by if isinstance(action, ScaleUp) else -action.by
    to = max(replicas.min, min(replicas.initial + by, replicas.max))
    what = f"scale {action.pool} from {replicas.initial} to {to}"
    if to == replicas.initial:
        bound = f"maximum of {replicas.max}" if by > 0 else f"minimum of {replicas.min}"
        problem = f"{to} are wanted already, its {bound}; not all of them work"
        return _Wanted((action.pool,), what, None, problem)
    return _Wanted((action.pool,), what, Scale(action.pool, to))


def _as_if_only(done: set[str], after: PolicyState, before: PolicyState) -> PolicyState:
    """Cooldowns begin with what was asked, not with what would have been."""
    return PolicyState(
        {
            pool: memory
            if pool in done
            else replace(
                memory,
                gained_at_s=before.of(pool).gained_at_s,
                lost_at_s=before.of(pool).lost_at_s,
            )
            for pool, memory in after.pools.items()
        }
    )
