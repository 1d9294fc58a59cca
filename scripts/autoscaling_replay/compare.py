"""Which ways of scaling are compared, and what each of them came to.

Runs are independent of each other and go to as many processes as asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from autoscaling_replay.replay import MOST, POLICY, TARGET, Moment, Outcome, run
from autoscaling_replay.scalers import Fixed, Scaler, Slo, Utilisation
from cluster.engines.simulated.model import Vocabulary
from cluster.models import store
from cluster.topology.schema import ModelSpec

BEGIN = (3, 2)
HEADROOMS = (0.0, 0.15, 0.4, 0.8)
BUSY_TARGETS = ((0.6, 0.6), (0.8, 0.8))
BATCH_TARGETS = ((0.55, 0.25), (0.7, 0.4), (0.85, 0.53))


@dataclass(frozen=True, slots=True)
class Way:
    """One way of scaling. `series` groups those that differ in one setting only."""

    series: str
    setting: str
    begin: tuple[int, int]
    scaler: Callable[[], Scaler]

    @property
    def name(self) -> str:
        return f"{self.series}, {self.setting}" if self.setting else self.series


@dataclass(frozen=True, slots=True)
class Result:
    """An Outcome in figures, fit for JSON."""

    series: str
    setting: str
    worker_hours: float
    kept: float
    ttft_kept: float
    tpot_kept: float
    ttft_p95_s: float
    tpot_p95_s: float
    requests: int
    most_prefill: int
    most_decode: int
    ups: int
    downs: int
    role_changes: int
    moments: tuple[Moment, ...]

    @property
    def name(self) -> str:
        return f"{self.series}, {self.setting}" if self.setting else self.series


SLO, LEAST_TWO, NO_ROLES = "SLO", "SLO with min: 2", "SLO without role changes"
BUSY, BATCH = "utilisation by busy time", "utilisation by batch"
BATCH_TWO = "utilisation by batch with min: 2"
FIXED = "fixed"


def scaling_ways() -> list[Way]:
    """All that scale by themselves."""
    ways = [Way(SLO, f"headroom {h:g}", BEGIN, _Slo(h, True)) for h in HEADROOMS]
    ways += [
        Way(LEAST_TWO, f"headroom {h:g}", BEGIN, _Slo(h, True, least=2)) for h in HEADROOMS[1:]
    ]
    default = POLICY.headroom
    ways.append(Way(NO_ROLES, f"headroom {default:g}", BEGIN, _Slo(default, False)))
    for series, targets, by_batch, least in (
        (BUSY, BUSY_TARGETS, False, 1),
        (BATCH, BATCH_TARGETS, True, 1),
        (BATCH_TWO, BATCH_TARGETS[:2], True, 2),
    ):
        ways += [
            Way(series, f"targets {p:.0%} and {d:.0%}", BEGIN, _Utilisation(p, d, by_batch, least))
            for p, d in targets
        ]
    return ways


def fixed_ways(average: float, peak: tuple[int, int]) -> list[Way]:
    """Every sensible split of the average number, of two more, and provisioning for the peak."""
    few = max(2, round(average))
    splits = {(p, n - p) for n in (few, few + 2) for p in range(1, n) if abs(2 * p - n) <= 2}
    return [Way(FIXED, f"{p} + {d}", (p, d), Fixed) for p, d in sorted(splits | {peak}, key=sum)]


def default_of(results: list[Result]) -> Result:
    """The autoscaler with the settings it has if a file does not say otherwise."""
    wanted = f"headroom {POLICY.headroom:g}"
    return next(r for r in results if r.series == SLO and r.setting == wanted)


def compare(
    seed: int, length_s: float, shape: str, jobs: int, progress: Callable[[Result], None]
) -> list[Result]:
    """Run them all; the fixed splits come last, for they follow from what the autoscaler used."""
    with ProcessPoolExecutor(jobs) as pool:
        results = []
        for ways in (scaling_ways, lambda: _fixed(results, length_s)):
            for result in pool.map(_run, ((way, seed, length_s, shape) for way in ways())):
                progress(result)
                results.append(result)
    return results


def _fixed(results: list[Result], length_s: float) -> list[Way]:
    default = default_of(results)
    average = default.worker_hours * 3600 / length_s
    return fixed_ways(average, (default.most_prefill, default.most_decode))


@dataclass(frozen=True, slots=True)
class _Slo:
    """Makes the scaler in the process that runs it."""

    headroom: float
    is_exchangeable: bool
    least: int = 1

    def __call__(self) -> Scaler:
        policy = POLICY.model_copy(update={"headroom": self.headroom})
        return Slo(policy, self.is_exchangeable, self.least)


@dataclass(frozen=True, slots=True)
class _Utilisation:
    """As _Slo."""

    prefill: float
    decode: float
    by_batch: bool
    least: int

    def __call__(self) -> Scaler:
        return Utilisation(self.prefill, self.decode, self.by_batch, MOST, self.least)


def _run(job: tuple[Way, int, float, str]) -> Result:
    way, seed, length_s, shape = job
    model = store.resolve(ModelSpec(id="simulated"), lambda what, fraction: None)
    vocabulary = Vocabulary(model.path)
    outcome = run(way.name, way.scaler(), way.begin, seed, vocabulary, length_s, shape)
    return _result(way, outcome)


def _result(way: Way, outcome: Outcome) -> Result:
    share = TARGET.percentile / 100
    prefill, decode = outcome.most
    return Result(
        series=way.series,
        setting=way.setting,
        worker_hours=round(outcome.worker_hours, 2),
        kept=round(outcome.kept(), 4),
        ttft_kept=round(outcome.kept("ttft"), 4),
        tpot_kept=round(outcome.kept("tpot"), 4),
        ttft_p95_s=round(outcome.quantile("ttft_s", share), 2),
        tpot_p95_s=round(outcome.quantile("tpot_s", share), 4),
        requests=len(outcome.served),
        most_prefill=prefill,
        most_decode=decode,
        ups=outcome.actions["up"],
        downs=outcome.actions["down"],
        role_changes=outcome.actions["role"],
        moments=outcome.moments,
    )
