"""Which workers live and are ill: they fail what others answer. In: the reports of gateways, the
ready workers, now. Out: whom to replace, and why. Pure.

A worker is ill when UNLIKE requests that are not alike, over FOR_S seconds or more, came to nothing
there, and none to anything, while another of its kind answered. What speaks against it:

    its own      it answered a server error without any other worker's part in it, and the request
                 was answered elsewhere: poison is not, so it makes nobody ill
    a pull       decode's error to a request whose blocks it was to pull speaks against one of two.
                 Against prefill, when nobody pulls from it: two decodes fail to, or the only one
                 that tried pulls from others. Against decode, when what it fails to pull others
                 do pull, or when it fails to pull from two that nobody else fails to pull from.
                 A pair that fails, where each end moves blocks with others, makes neither ill

The last usable worker of its kind, and one whose failed requests nobody answered, must have
answered nothing at all, for LAST_TIMES as long. A slot whose workers are found ill again and again
is given twice the time each time, as crashes wait: what a new start does not cure (a cut network)
costs ever fewer of them.

Called by: control.loop. Times are wall clock, the gateways' own: a few seconds between their clocks
do not matter, a minute does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.identity import Role, WorkerId
from cluster.traffic import Failure, GatewayReport

UNLIKE = 5
FOR_S = 10.0
LONGEST_FOR_S = 120.0
LAST_TIMES = 6
# A worker that nobody has asked anything for so long may have recovered.
_FRESH_S = 60.0
# Of the engine's own words.
_SAID_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker that takes requests. `failures`: of its slot, in a row, before this worker;
    `island`: whose workers exchange blocks with it."""

    id: WorkerId
    role: Role
    failures: int = 0
    island: str = ""


@dataclass(slots=True)
class _Known:
    """What all gateways together know of one worker."""

    answered_at_s: float = 0.0
    pulled_at_s: float = 0.0
    failures: list[Failure] = field(default_factory=list)

    @property
    def pulls(self) -> list[Failure]:
        """The pulls that failed since the last one that went well."""
        return [one for one in self.failures if one.peer and one.last_at_s > self.pulled_at_s]

    @property
    def own(self) -> list[Failure]:
        return [one for one in self.failures if not one.peer and one.last_at_s > self.answered_at_s]

    def partners(self) -> set[str]:
        return {one.peer for one in self.pulls}


def judge(
    reports: Sequence[GatewayReport], ready: Sequence[Ready], now_s: float
) -> dict[WorkerId, str]:
    """The ready workers that are ill, and why each is taken for it."""
    known = _added(reports)
    ill: dict[WorkerId, str] = {}
    # Prefill first: who cannot pull from an ill one is not ill for that.
    for worker in sorted(ready, key=lambda one: (one.role is not Role.PREFILL, one.id)):
        others = [
            other
            for other in ready
            if other.id != worker.id and other.id not in ill and _is_like(other, worker)
        ]
        found = known.get(str(worker.id), _Known())
        decodes = sum(
            other.role is not Role.PREFILL and other.island == worker.island for other in ready
        )
        pulls = _pulls_against(worker, found, known, decodes, {str(one) for one in ill})
        why = _why_ill(worker, [*found.own, *pulls], found, others, known, now_s)
        if why:
            ill[worker.id] = why
    return ill


def _added(reports: Sequence[GatewayReport]) -> dict[str, _Known]:
    known: dict[str, _Known] = {}
    for report in reports:
        for standing in report.standings:
            one = known.setdefault(standing.worker, _Known())
            one.answered_at_s = max(one.answered_at_s, standing.answered_at_s)
            one.pulled_at_s = max(one.pulled_at_s, standing.pulled_at_s)
            one.failures += standing.failures
    return known


def _is_like(one: Ready, other: Ready) -> bool:
    return (one.role is Role.PREFILL) == (other.role is Role.PREFILL)


def _pulls_against(
    worker: Ready, found: _Known, known: Mapping[str, _Known], decodes: int, ill: set[str]
) -> list[Failure]:
    """Those of its failed pulls that are its own fault, as far as can be told."""
    pulls = [one for one in found.pulls if one.peer not in ill]
    if not pulls:
        return []
    since_s = min(one.first_at_s for one in pulls)
    partners = {one.peer for one in pulls}
    moving = {name for name in partners if known.get(name, _Known()).pulled_at_s > since_s}
    if worker.role is Role.PREFILL:
        if len(partners) > 1:
            return pulls
        # Of two that can be told apart by nothing, prefill is tried first, as `gateway.recovery`
        # does; a decode that then fails with the new one as well has failed with two.
        has_others = any(
            known.get(name, _Known()).partners() - {str(worker.id)} for name in partners
        )
        return pulls if decodes == 1 and (moving or not has_others) else []
    failing_me_only = {
        name for name in partners if known.get(name, _Known()).partners() <= {str(worker.id)}
    }
    at_fault = moving | (failing_me_only if len(failing_me_only) > 1 else set())
    return [one for one in pulls if one.peer in at_fault]


def _why_ill(
    worker: Ready,
    failures: Sequence[Failure],
    found: _Known,
    others: Sequence[Ready],
    known: Mapping[str, _Known],
    now_s: float,
) -> str:
    """ "" if it is not, or not yet."""
    for_s = min(FOR_S * 2.0 ** min(worker.failures, 64), LONGEST_FOR_S)
    proven = [one for one in failures if one.is_proven]
    if _are_enough(proven, for_s, now_s) and _has_answered(others, _since_s(proven), known):
        return _said(proven, "others answered them")
    # Those that no other could answer either are the requests' own fault.
    theirs = {
        one.request for other in others for one in known.get(str(other.id), _Known()).failures
    }
    alone = [one for one in failures if one.is_proven or one.request not in theirs]
    is_long = _are_enough(alone, for_s * LAST_TIMES, now_s)
    if is_long and found.answered_at_s < _since_s(alone):
        return _said(alone, "it answered nothing")
    return ""


def _are_enough(failures: Sequence[Failure], for_s: float, now_s: float) -> bool:
    if len({one.request for one in failures}) < UNLIKE:
        return False
    latest_s = max(one.last_at_s for one in failures)
    return latest_s - _since_s(failures) >= for_s and now_s - latest_s < _FRESH_S


def _since_s(failures: Sequence[Failure]) -> float:
    return min(one.first_at_s for one in failures)


def _has_answered(others: Sequence[Ready], since_s: float, known: Mapping[str, _Known]) -> bool:
    """Whether one of them has, since then: it is usable."""
    return any(known.get(str(one.id), _Known()).answered_at_s > since_s for one in others)


def _said(failures: Sequence[Failure], otherwise: str) -> str:
    latest = max(failures, key=lambda one: one.last_at_s)
    took_s = latest.last_at_s - _since_s(failures)
    count = len({one.request for one in failures})
    peers = sorted({one.peer for one in failures if one.peer})
    what = f" for want of blocks ({', '.join(peers)})" if peers else ""
    said = latest.why[:_SAID_CHARACTERS]
    return f"it failed {count} requests in {took_s:.0f} s{what}; {otherwise}; said last: {said}"
