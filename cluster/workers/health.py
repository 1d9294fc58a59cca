"""Is an engine alive? Judged by what it gets done, not by whether its port is open.

An engine is hung when it has had work in hand, or has not answered at all, for `hung_after_s` (H)
without a token, a step or a change in its KV blocks (a long prefill makes no token, but takes
blocks chunk by chunk), and a generation asked of it then does not come back either. A slow engine
gets something done and is left alone: killing what is merely loaded is the commonest fault of
health checks.

One that says it has no work is given a token to make once in H: its HTTP server may go on
answering with old figures while the process behind it stands still.

How soon, with look_s = min(2, H / 2), the time that one look at it may take:

    work in hand, or no answer at all     hung within  H + 3 look_s  of the last thing it got done
    no work in hand, its server answers   hung within  2 H + 4 look_s + 5 s
    never hung: an engine that answers and gets something done every  H - look_s

H is 60 s unless the topology says otherwise: 66 s then, and 133 s. `detection_bound_s` and
`idle_detection_bound_s` compute them; tests/integration/workers/test_workers_hang.py measures.

All here is pure: it takes what was known, adds one look, and says what is known now. The caller
(workers.watch) looks, asks for the generation, and keeps to `pause_s`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.engines.client import EngineSample

# Prompt and external tokens; then what only a working engine makes, whoever asks.
Mark = tuple[int, int, int, int, float]
_MADE = 2

LOOK_PERIOD_S = 1.0
# An engine without work is looked at less often: its /metrics page is half of what it costs idle.
REST_PERIOD_S = 5.0
_LOOK_BOUND_S = 2.0
# One token of an engine that is alive and loaded to its limit.
_PROBE_BOUND_S = 10.0


def look_bound_s(hung_after_s: float) -> float:
    """How long its metrics may take to answer before that counts as no answer."""
    return min(_LOOK_BOUND_S, hung_after_s / 2)


def detection_bound_s(hung_after_s: float) -> float:
    """At most this long after it last got something done, an engine with work in hand, or one
    that does not answer, is HUNG: see above."""
    return hung_after_s + 3 * look_bound_s(hung_after_s)


def idle_detection_bound_s(hung_after_s: float) -> float:
    """The same for one that answers, says it has no work, and would do none."""
    return 2 * hung_after_s + 4 * look_bound_s(hung_after_s) + REST_PERIOD_S


@dataclass(frozen=True, slots=True)
class Progress:
    """What the engine had got done. Times are monotonic."""

    mark: Mark | None  # None: it has not been seen yet
    since_s: float  # since when nothing further got done that should have been
    made_s: float  # when it was last seen to have got something done


@dataclass(frozen=True, slots=True)
class Healthy:
    progress: Progress


@dataclass(frozen=True, slots=True)
class Suspect:
    """Nothing got done since the last look, which may well be in order. `why` says what is seen."""

    progress: Progress
    idle_s: float
    why: str


@dataclass(frozen=True, slots=True)
class Hung:
    """Nothing got done for too long. `why` is a sentence for people."""

    progress: Progress
    why: str


Verdict = Healthy | Suspect | Hung


def judge(
    previous: Progress, sample: EngineSample | None, in_flight: int, now_s: float
) -> Healthy | Suspect:
    """Add one look at the engine to what was known of it.

    `sample` is None when its metrics did not answer. `in_flight`: requests it is known to hold."""
    if sample is None:
        idle_s = now_s - previous.since_s
        held = f"{in_flight} requests in hand when they last did"
        return Suspect(previous, idle_s, f"its metrics do not answer, {held}")
    mark = _mark(sample)
    if mark != previous.mark:
        return Healthy(Progress(mark, now_s, now_s))
    if in_flight == 0:
        return Healthy(replace(previous, since_s=now_s))
    return Suspect(previous, now_s - previous.since_s, f"{in_flight} requests in hand")


def is_untried(progress: Progress, now_s: float, hung_after_s: float) -> bool:
    """Whether an engine without work has shown nothing for so long that it is to make a token."""
    return now_s - progress.made_s >= hung_after_s


def is_doubtful(suspect: Suspect, hung_after_s: float) -> bool:
    """Whether it is time to ask for a generation, so that its answer is there when the time is
    over."""
    return suspect.idle_s >= hung_after_s - _probe_s(hung_after_s)


def probe_bound_s(progress: Progress, now_s: float, hung_after_s: float) -> float:
    """How long that generation may take: until the time is over, or as long as one look."""
    return max(look_bound_s(hung_after_s), progress.since_s + hung_after_s - now_s)


def after_failed_probe(
    previous: Progress, sample: EngineSample | None, now_s: float, hung_after_s: float, why: str
) -> Verdict:
    """A generation was asked for and did not come back: hung once the time is over, unless others
    moved meanwhile.

    Prompt tokens are no evidence here, the probe brought some itself; nor is having no work in
    hand, for clients give up on an engine that is stuck."""
    progress = previous
    if sample is not None and previous.mark is not None:
        mark = _mark(sample)
        if mark[_MADE:] != previous.mark[_MADE:]:
            return Healthy(Progress(mark, now_s, now_s))
        progress = replace(previous, mark=mark)
    idle_s = now_s - previous.since_s
    if idle_s < hung_after_s:
        return Suspect(progress, idle_s, why)
    return Hung(progress, why)


def progressed(progress: Progress, at_s: float) -> Healthy:
    """The engine was seen to work in another way than by its metrics, some time ago or now."""
    since_s, made_s = max(progress.since_s, at_s), max(progress.made_s, at_s)
    return Healthy(Progress(progress.mark, since_s, made_s))


def pause_s(progress: Progress, is_resting: bool, now_s: float, hung_after_s: float) -> float:
    """Until the next look: a period, cut short where doubt begins or the time is over."""
    over_s = progress.since_s + hung_after_s
    moments = (over_s - _probe_s(hung_after_s), over_s)
    period_s = REST_PERIOD_S if is_resting else LOOK_PERIOD_S
    return min([period_s, *(moment - now_s for moment in moments if moment > now_s)])


def _probe_s(hung_after_s: float) -> float:
    return min(_PROBE_BOUND_S, hung_after_s / 2)


def _mark(sample: EngineSample) -> Mark:
    return (
        sample.prompt_tokens,
        sample.external_tokens,
        sample.generation_tokens,
        sample.steps,
        sample.kv_usage_sum,
    )
