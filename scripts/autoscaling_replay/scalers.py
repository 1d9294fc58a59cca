"""The ways of scaling that are compared. Each is asked once per interval what to change."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from autoscaling_replay.fleet import Fleet
from autoscaling_replay.measure import Meter
from cluster.control.autoscale.decision import Action, PolicyState, ScaleDown, ScaleUp
from cluster.control.autoscale.policy import decide
from cluster.identity import Role
from cluster.topology.scaling import ScalingSpec

POOLS = (Role.PREFILL, Role.DECODE)


class Scaler(Protocol):
    def decide(self, meter: Meter, fleet: Fleet, now_s: float) -> tuple[Action, ...]: ...


class Fixed:
    """Leaves everything as it was begun."""

    def decide(self, meter: Meter, fleet: Fleet, now_s: float) -> tuple[Action, ...]:
        return ()


@dataclass
class Slo:
    """cluster.control.autoscale."""

    policy: ScalingSpec
    is_exchangeable: bool
    least: int = 1  # replicas.min of both pools
    state: PolicyState = field(default_factory=PolicyState)
    log: list[tuple[float, str]] = field(default_factory=list)

    def decide(self, meter: Meter, fleet: Fleet, now_s: float) -> tuple[Action, ...]:
        signals = meter.look(now_s, self.is_exchangeable, self.least)
        decision, self.state = decide(self.policy, signals, self.state, now_s)
        self.log += [(now_s, line) for line in decision.lines() if decision.actions]
        return decision.actions


@dataclass
class Utilisation:
    """What Kubernetes' HorizontalPodAutoscaler does with a share and its target.

    wanted = ceil(replicas x share / target), no change within 10 %, no more than the double at
    once, down only to the most wanted in five minutes: the defaults of
    https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/"""

    prefill_target: float
    decode_target: float
    by_batch: bool  # decode: how full the batch is, in place of the share of time it is not empty
    most: int
    least: int = 1
    window_s: float = 30.0
    stabilisation_s: float = 300.0
    tolerance: float = 0.1
    wanted: dict[Role, deque[tuple[float, int]]] = field(
        default_factory=lambda: {role: deque() for role in POOLS}
    )

    def decide(self, meter: Meter, fleet: Fleet, now_s: float) -> tuple[Action, ...]:
        meter.look(now_s, False)
        actions: list[Action] = []
        for role in POOLS:
            share = meter.busy_share(role, self.window_s)
            if role is Role.DECODE and self.by_batch:
                share = meter.batch_share()
            target = self.prefill_target if role is Role.PREFILL else self.decode_target
            if share is not None:
                actions += self._pool(role, share / target, fleet, now_s)
        return tuple(actions)

    def _pool(self, role: Role, ratio: float, fleet: Fleet, now_s: float) -> list[Action]:
        has = len(fleet.of(role))
        ready = sum(r.is_ready for r in fleet.of(role))
        want = has if abs(ratio - 1) <= self.tolerance else math.ceil(ready * ratio)
        past = self.wanted[role]
        past.append((now_s, want))
        while past[0][0] < now_s - self.stabilisation_s:
            past.popleft()
        want = want if want > has else min(has, max(w for _, w in past))
        want = max(self.least, min(want, self.most, max(4, 2 * has)))
        if want > has:
            return [ScaleUp(role.value, want - has, "")]
        return [ScaleDown(role.value, has - want, "")] if want < has else []
