"""Waiting times and batch sizes from load and speed: what a number of replicas would do. Pure.

Prefill is a queue: a replica reads one prompt after the other, and prompts go to the replica that
is free first (GI/G/c). Decode is processor sharing: every sequence in the batch moves one step at
a time, and the step takes longer the more there are.

Sources:
  waiting time      A. O. Allen, Probability, Statistics, and Queueing Theory, 2nd ed. 1990, 5.3.5
                    (the Allen-Cunneen approximation of the mean wait); the chance of waiting after
                    H. Sakasegawa, An approximation formula Lq = a rho^b/(1-rho), Ann. Inst.
                    Statist. Math. 29 (1977); exact for one server with exponential times
  batch size        J. W. Cohen, The multiple phase service network with generalized processor
                    sharing, Acta Informatica 12 (1979): the number present depends on the mean
                    of the work only, not on its distribution
  N = rate x time   J. D. C. Little, Operations Research 9 (1961)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import NormalDist

_QUANTILES = 40  # points that stand for a distribution of lengths: 2.5 % each
# Batches that differ by less say nothing of how steps grow: at 1 and 1.2 sequences, a step time
# that is 5 % off would be a slope of a quarter of a step per sequence.
_LEAST_SPREAD = 1.5
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long the pieces of work are: mean (> 0) and squared coefficient of variation (≥ 0)."""

    mean: float
    squared_cv: float = 1.0

    def quantiles(self) -> tuple[float, ...]:
        """Equally likely lengths of a log-normal distribution with this mean and spread."""
        if self.squared_cv <= 0:
            return (self.mean,) * _QUANTILES
        variance = math.log1p(self.squared_cv)
        middle = math.log(self.mean) - variance / 2
        raw = [
            math.exp(middle + math.sqrt(variance) * _NORMAL.inv_cdf((i + 0.5) / _QUANTILES))
            for i in range(_QUANTILES)
        ]
        # Few points miss the end of the tail, and with it a part of the mean.
        scale = self.mean * _QUANTILES / sum(raw)
        return tuple(value * scale for value in raw)


def waits_longer(
    servers: int,
    per_s: float,
    service_s: float,
    wait_s: float,
    squared_cv: tuple[float, float] = (1.0, 1.0),
) -> float:
    """Share of arrivals that wait longer than `wait_s` (< 0: all) for one of `servers` (≥ 1).

    `service_s` is the mean service time; `squared_cv` that of arrivals and of service. 1.0 if the
    servers cannot keep up."""
    utilisation = per_s * service_s / servers
    if wait_s < 0 or utilisation >= 1:
        return 1.0
    if utilisation <= 0:
        return 0.0
    waits_at_all = math.pow(utilisation, math.sqrt(2 * (servers + 1)) - 1)
    mean_s = service_s * sum(squared_cv) / 2 / (servers * (1 - utilisation))
    return waits_at_all * math.exp(-wait_s / mean_s) if mean_s > 0 else waits_at_all


def late_share(
    servers: int,
    per_s: float,
    service: Lengths,
    limit_s: float,
    arrivals_squared_cv: float = 1.0,
) -> float:
    """Share of arrivals whose wait and service together take longer than `limit_s`."""
    spread = (arrivals_squared_cv, service.squared_cv)
    points = service.quantiles()
    late = (waits_longer(servers, per_s, service.mean, limit_s - own_s, spread) for own_s in points)
    return sum(late) / len(points)


def longer_than(service: Lengths, limit_s: float) -> float:
    """Share of work that takes longer than `limit_s` on a server of its own."""
    points = service.quantiles()
    return sum(own_s > limit_s for own_s in points) / len(points)


@dataclass(frozen=True, slots=True)
class StepModel:
    """Time of a decode step with `batch` sequences: base_s + per_sequence_s x batch."""

    base_s: float
    per_sequence_s: float

    def step_s(self, batch: float) -> float:
        return self.base_s + self.per_sequence_s * batch


def fit_steps(points: Iterable[tuple[float, float]]) -> StepModel | None:
    """The line through measured (batch, step time in s), by least squares; neither part below 0.

    None without points that mean something. If the batch hardly varied, the step is taken to be
    the same at every batch."""
    good = [(b, t) for b, t in points if math.isfinite(b) and math.isfinite(t) and b > 0 and t > 0]
    if not good:
        return None
    mean_b = sum(b for b, _ in good) / len(good)
    mean_t = sum(t for _, t in good) / len(good)
    spread = sum((b - mean_b) ** 2 for b, _ in good)
    if max(b for b, _ in good) < _LEAST_SPREAD * min(b for b, _ in good):
        return StepModel(mean_t, 0.0)
    slope = sum((b - mean_b) * (t - mean_t) for b, t in good) / spread
    if slope <= 0:
        return StepModel(mean_t, 0.0)
    base = mean_t - slope * mean_b
    if base < 0:
        return StepModel(0.0, sum(b * t for b, t in good) / sum(b * b for b, _ in good))
    return StepModel(base, slope)


def batch_at(
    replicas: int, tokens_per_s: float, acceptance_length: float, steps: StepModel, share: float
) -> float:
    """Sequences per replica, counted by a newcomer, that are not exceeded for `share` of them.

    `tokens_per_s` over all replicas, among which load is balanced; `acceptance_length` tokens per
    step. Infinite if the replicas cannot keep up. With a step time linear in the batch, the number
    present is negative-binomial; its upper quantile is taken from mean and variance."""
    per_step = tokens_per_s / acceptance_length  # sequences x steps per second
    utilisation = per_step * steps.per_sequence_s / replicas
    if utilisation >= 1:
        return math.inf
    mean = per_step * (steps.base_s + steps.per_sequence_s / replicas) / (1 - utilisation)
    deviation = math.sqrt(mean / (1 - utilisation))
    return 1 + (mean + _NORMAL.inv_cdf(share) * deviation) / replicas
