"""Is an engine alive? Judged by what it gets done, not by whether its port is open.

An engine is hung when it has had work in hand, or has not answered at all, for `hung_after_s`
without making a token or a step, and a generation asked of it then does not come back either.
A slow engine makes steps and is left alone, however slow: killing what is merely loaded is the
commonest fault of health checks.

`judge` is pure: it takes what was known, adds one sample, and says what is known now. The caller
(workers.worker) confirms `Hung` by a generation: `progressed` if it comes, `after_failed_probe` if
not. An engine that was hung stays so until one of the two shows it at work.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.engines.client import EngineSample

Mark = tuple[int, int, int, int]
# From here on a mark counts what only a working engine makes.
_GENERATED = 2


@dataclass(frozen=True, slots=True)
class Progress:
    """What the engine had got done, and since when it has got nothing further done."""

    mark: Mark | None  # None: it has not been seen yet
    since_s: float  # monotonic


@dataclass(frozen=True, slots=True)
class Healthy:
    progress: Progress


@dataclass(frozen=True, slots=True)
class Suspect:
    """Nothing got done since the last sample, which may well be in order."""

    progress: Progress
    idle_s: float


@dataclass(frozen=True, slots=True)
class Hung:
    """Nothing got done for too long. `why` is a sentence for people."""

    progress: Progress
    why: str


Verdict = Healthy | Suspect | Hung


def judge(
    previous: Progress,
    sample: EngineSample | None,
    in_flight: int,
    now_s: float,
    hung_after_s: float,
) -> Verdict:
    """Add one look at the engine to what was known of it.

    `sample` is None when its metrics did not answer. `in_flight`: requests it is known to hold.
    """
    mark = previous.mark if sample is None else _mark(sample)
    if sample is not None and (in_flight == 0 or mark != previous.mark):
        return Healthy(Progress(mark, now_s))
    progress = Progress(mark, previous.since_s)
    idle_s = now_s - previous.since_s
    if idle_s < hung_after_s:
        return Suspect(progress, idle_s)
    what = f"{in_flight} requests in hand, no token or step made"
    if sample is None:
        what = f"metrics do not answer, {in_flight} requests in hand when they last did"
    return Hung(progress, f"{what} for {idle_s:.0f} s (hung_after_s {hung_after_s:g})")


def after_failed_probe(
    previous: Progress, sample: EngineSample | None, now_s: float, why: str
) -> Verdict:
    """A generation was asked for and did not come back: hung, unless others moved meanwhile.

    Prompt tokens are no evidence here, the probe brought some itself; nor is having no work in
    hand, for clients give up on an engine that is stuck."""
    if sample is None or previous.mark is None:
        return Hung(previous, why)
    mark = _mark(sample)
    if mark[_GENERATED:] != previous.mark[_GENERATED:]:
        return Healthy(Progress(mark, now_s))
    return Hung(Progress(mark, previous.since_s), why)


def progressed(progress: Progress, now_s: float) -> Progress:
    """The engine was seen to work in another way than by its metrics."""
    return Progress(progress.mark, now_s)


def _mark(sample: EngineSample) -> Mark:
    return (
        sample.prompt_tokens,
        sample.external_tokens,
        sample.generation_tokens,
        sample.steps,
    )
