"""Choose the workers of one request. Pure: snapshot and own load in, a pair out.

`compile_table` does once per snapshot what does not depend on the request: it groups workers that
are alike (same pool, role, model revision and fingerprint) and keeps the pairs of groups between
which KV blocks may move. `choose` then looks at each worker once: linear in workers, not in pairs.

All islands are looked at alike. A pair is always of one link, so of one island; going to another
island means to prefill again there, and is worth it as soon as that costs less.

A pair is always of one model revision, and an answer stays with the one that began it. A worker is
used as what the snapshot says it is. That may be out of date by a change of role, and still ends
well: an engine whose role can change takes both kinds of calls at any time, and the controller
waits, before it tells of the new role, for gateways to know that the old one is over.

Cost is in requests at the fastest pool: what a worker has running and waiting, what this gateway
has sent it since the snapshot, and the request itself, over the pool's relative speed; plus shares
for a full KV cache, minus a share for a prompt already held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from cluster.errors import NoCapacity
from cluster.identity import Role, WorkerId
from cluster.kv.dialects import decode_can_prefill
from cluster.snapshot import Fingerprint, Link, Snapshot, WorkerView

# A request that waits costs more than one that runs: it says that the batch is full.
_WAITING_WEIGHT = 2.0
# A full KV cache preempts; that is as bad as this many running requests.
_KV_USAGE_WEIGHT = 8.0
# A prompt held completely is worth this many running requests of detour, a shorter one than
# _HELD_TOKENS less: a system prompt's two blocks must not draw all short requests to one place.
_HELD_WEIGHT = 4.0
_HELD_TOKENS = 512
# An answer of no stated length may well be this long; a worker with less room than that cuts it
# short, which is as bad as this many running requests.
_LIKELY_ANSWER_TOKENS = 512
_TIGHT_COST = 16.0
# Last resorts, the worst first: a worker that just failed somebody; recomputing while a fed pair
# exists; an island in which this very request has failed (whole islands lose their power or their
# switch); a prompt of unknown length where not the longest is taken.
_SUSPECT_COST = 1e6
_RECOMPUTE_COST = _SUSPECT_COST / 2
_FAILED_ISLAND_COST = _SUSPECT_COST / 4
_UNSURE_COST = _SUSPECT_COST / 8
_RETRY_AFTER_S = 2.0

T = TypeVar("T")
Differences = Callable[[Fingerprint, Fingerprint], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Group:
    """Workers that are alike as far as KV transfer goes."""

    pool: str
    role: Role
    island: str
    fingerprint: Fingerprint | None
    revision: str
    workers: tuple[WorkerView, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A snapshot, prepared for routing."""

    snapshot: Snapshot
    groups: tuple[Group, ...] = ()
    receivers: tuple[int, ...] = ()  # indices of the groups that answer: decode and mixed
    fed_only: frozenset[int] = frozenset()  # of those, who cannot prefill at all, not even a little
    # decode group's index -> (prefill group's index, link)
    feeds: Mapping[int, tuple[tuple[int, Link], ...]] = field(default_factory=dict)
    # decode pool -> what its links do when no prefill worker can serve
    on_prefill_failure: Mapping[str, str] = field(default_factory=dict)
    mismatches: tuple[str, ...] = ()  # linked groups that cannot exchange blocks, and why
    # The longest prompt + answer that any decode or mixed pool is meant to take, up or not; and
    # that any ready worker takes.
    longest_tokens: int = 0
    longest_ready_tokens: int = 0
    # Ready workers: those that answer, and those that prefill for others.
    decode_choices: int = 0
    prefill_choices: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """What routing needs to know of a request."""

    prompt_tokens: int = 0  # 0: unknown, the engine will count
    answer_tokens: int = 0
    alone: str = ""  # why decode must prefill by itself; "" if it need not
    revision: str | None = None  # of the model that began the answer; None: nothing was said yet


@dataclass(frozen=True, slots=True)
class Conditions:
    """What this gateway replica knows beyond the snapshot."""

    sent: Mapping[WorkerId, int] = field(default_factory=dict)  # own requests since the snapshot
    held_tokens: Mapping[WorkerId, int] = field(default_factory=dict)
    excluded: frozenset[WorkerId] = frozenset()
    suspects: frozenset[WorkerId] = frozenset()
    turn: int = 0  # grows by one per choice: equals take turns
    local_prefill_below_tokens: int = 0
    failure: str = ""  # why an earlier pair did not do; ends up in Route.why
    may_prefill_elsewhere: bool = True  # False: enough prefill workers were tried


@dataclass(frozen=True, slots=True)
class Route:
    """`prefill` None: decode prefills by itself, for the reason in `why`."""

    decode: WorkerView
    why: str
    prefill: WorkerView | None = None
    link: Link | None = None


def compile_table(snapshot: Snapshot, differences: Differences) -> Table:
    """Group the ready workers and pair the groups. `differences` is kv.fingerprint's."""
    members: dict[tuple[str, Role, str, Fingerprint | None, str], list[WorkerView]] = {}
    for worker in snapshot.workers:
        if worker.takes_work and not worker.lets_go:
            alike = (
                worker.id.pool,
                worker.role,
                worker.island,
                worker.fingerprint,
                worker.model_revision,
            )
            members.setdefault(alike, []).append(worker)
    groups = tuple(Group(*alike, tuple(workers)) for alike, workers in members.items())
    receivers = tuple(i for i, group in enumerate(groups) if group.role is not Role.PREFILL)
    longest_ready_tokens = max(
        (worker.max_model_len_tokens for i in receivers for worker in groups[i].workers), default=0
    )
    feeds: dict[int, list[tuple[int, Link]]] = {}
    mismatches: list[str] = []
    for link in snapshot.links:
        for source, prefill in enumerate(groups):
            if prefill.pool != link.prefill_pool or prefill.role is not Role.PREFILL:
                continue
            for target, decode in enumerate(groups):
                if decode.pool != link.decode_pool or decode.role is not Role.DECODE:
                    continue
                if decode.island != prefill.island:
                    continue  # a pool moved between islands; its old workers are draining
                why = _mismatch(prefill, decode, differences)
                if why:
                    mismatches.append(f"{prefill.pool} cannot feed {decode.pool}: {why}")
                else:
                    feeds.setdefault(target, []).append((source, link))
    return Table(
        snapshot=snapshot,
        groups=groups,
        receivers=receivers,
        fed_only=frozenset(i for i in receivers if _is_fed_only(groups[i])),
        feeds={target: tuple(sources) for target, sources in feeds.items()},
        on_prefill_failure={
            link.decode_pool: link.on_prefill_failure for link in reversed(snapshot.links)
        },
        mismatches=tuple(dict.fromkeys(mismatches)),
        longest_tokens=max(snapshot.longest_tokens, longest_ready_tokens),
        longest_ready_tokens=longest_ready_tokens,
        decode_choices=sum(len(groups[i].workers) for i in receivers),
        prefill_choices=sum(len(group.workers) for group in groups if group.role is Role.PREFILL),
    )


def choose(table: Table, facts: Facts, conditions: Conditions) -> Route:
    """The best pair for a request. Raises: NoCapacity."""
    failure = conditions.failure
    failed_islands = _failed_islands(table, conditions.excluded)
    sources: dict[int, tuple[float, WorkerView] | None] = {}
    best: tuple[float, Route] | None = None
    stranded = ""
    for index in _in_turn(table.receivers, conditions.turn):
        group = table.groups[index]
        if facts.revision is not None and group.revision != facts.revision:
            continue
        decode = _best(table, index, facts, conditions, facts.answer_tokens)
        if decode is None:
            continue
        total, worker = decode
        alone = 1 / worker.relative_speed  # what prefilling here adds
        is_fed_only = index in table.fed_only
        if group.role is Role.MIXED:
            route = Route(worker, f"recompute:{failure}" if failure else "mixed")
            total += alone
        elif facts.alone and not is_fed_only:
            route = Route(worker, f"alone:{facts.alone}")
            total += alone
        elif not is_fed_only and _can_prefill_itself(worker, facts, conditions):
            route = Route(worker, "local-prefill")
        else:
            pair = _best_source(table, index, sources, facts, conditions)
            if pair is not None:
                source_cost, source, link = pair
                total += source_cost
                route = Route(worker, "disaggregated", source, link)
            elif not is_fed_only and _may_recompute(table, group.pool):
                why = failure or _why_unfed(table, index, facts, conditions)
                route = Route(worker, f"recompute:{why}")
                total += alone + _RECOMPUTE_COST  # a fed decode worker elsewhere comes first
            else:
                why = failure or _why_unfed(table, index, facts, conditions)
                stranded = f"no prefill worker can feed pool {group.pool}"
                nor_alone = "its engines cannot prefill" if is_fed_only else "its policy is to fail"
                stranded += f" ({why}) and {nor_alone}"
                continue
        if group.island in failed_islands:
            total += _FAILED_ISLAND_COST
        if best is None or total < best[0]:
            best = (total, route)
    if best is None:
        raise NoCapacity(stranded or _why_none(table, facts, conditions), _RETRY_AFTER_S)
    return best[1]


def can_route(table: Table) -> bool:
    """Whether a plain request would find workers now."""
    try:
        choose(table, Facts(), Conditions())
    except NoCapacity:
        return False
    return True


def cost(worker: WorkerView, facts: Facts, conditions: Conditions) -> float:
    """What it costs to put a request on this worker, in requests at the fastest pool."""
    load = worker.load
    sent = conditions.sent.get(worker.id, 0)
    requests = max(0.0, load.running + load.waiting + sent) + 1
    requests += (_WAITING_WEIGHT - 1) * load.waiting
    total = requests / worker.relative_speed + _KV_USAGE_WEIGHT * load.kv_usage
    if facts.prompt_tokens and conditions.held_tokens:
        held = min(conditions.held_tokens.get(worker.id, 0), facts.prompt_tokens)
        total -= _HELD_WEIGHT * held / max(facts.prompt_tokens, _HELD_TOKENS)
    if worker.id in conditions.suspects:
        total += _SUSPECT_COST
    return total


def _in_turn(items: tuple[T, ...], turn: int) -> tuple[T, ...]:
    """All of them, beginning with another one each turn."""
    start = turn % len(items) if items else 0
    return items[start:] + items[:start]


def _best(
    table: Table, index: int, facts: Facts, conditions: Conditions, answer_tokens: int
) -> tuple[float, WorkerView] | None:
    """The cheapest worker of a group that the request fits into; equals take turns."""
    needed_tokens = facts.prompt_tokens + max(1, answer_tokens)
    likely_tokens = facts.prompt_tokens + _LIKELY_ANSWER_TOKENS if not answer_tokens else 0
    sure_tokens = table.longest_ready_tokens if not facts.prompt_tokens else 0
    best: tuple[float, WorkerView] | None = None
    # Once all groups have had their turn, it is the next worker's in each of them.
    turn = conditions.turn // max(1, len(table.receivers))
    for worker in _in_turn(table.groups[index].workers, turn):
        limit_tokens = worker.max_model_len_tokens
        if worker.id in conditions.excluded or limit_tokens < needed_tokens:
            continue
        worker_cost = cost(worker, facts, conditions)
        if limit_tokens < likely_tokens:
            worker_cost += _TIGHT_COST
        if limit_tokens < sure_tokens:
            worker_cost += _UNSURE_COST
        if best is None or worker_cost < best[0]:
            best = (worker_cost, worker)
    return best


def _best_source(
    table: Table,
    decode_group: int,
    found: dict[int, tuple[float, WorkerView] | None],
    facts: Facts,
    conditions: Conditions,
) -> tuple[float, WorkerView, Link] | None:
    if not conditions.may_prefill_elsewhere:
        return None
    best: tuple[float, WorkerView, Link] | None = None
    for index, link in table.feeds.get(decode_group, ()):
        if index not in found:
            found[index] = _best(table, index, facts, conditions, 1)
        candidate = found[index]
        if candidate is not None and (best is None or candidate[0] < best[0]):
            best = (*candidate, link)
    return best


def _can_prefill_itself(worker: WorkerView, facts: Facts, conditions: Conditions) -> bool:
    """Whether so little is missing that fetching it costs more than computing it."""
    if not facts.prompt_tokens:
        return False
    held = conditions.held_tokens.get(worker.id, 0)
    lacks = facts.prompt_tokens - held
    if lacks < conditions.local_prefill_below_tokens:
        return True
    # An engine always computes a prompt's last token, so its last block is never held.
    block = worker.fingerprint.block_size_tokens if worker.fingerprint else 1
    return held > 0 and lacks <= block


def _is_fed_only(group: Group) -> bool:
    fingerprint = group.fingerprint
    if group.role is not Role.DECODE or fingerprint is None:
        return False
    return not decode_can_prefill(fingerprint.connector)


def _may_recompute(table: Table, pool: str) -> bool:
    return table.on_prefill_failure.get(pool, "recompute") == "recompute"


def _mismatch(prefill: Group, decode: Group, differences: Differences) -> str:
    if prefill.revision != decode.revision:
        revisions = (prefill.revision, decode.revision)
        return "model revision is {!r} on prefill and {!r} on decode".format(*revisions)
    if prefill.fingerprint is None or decode.fingerprint is None:
        return "the engines have not said yet what they are"
    return "; ".join(differences(prefill.fingerprint, decode.fingerprint))


def _why_unfed(table: Table, index: int, facts: Facts, conditions: Conditions) -> str:
    pool = table.groups[index].pool
    is_linked = index in table.feeds
    if not is_linked and any(
        text.split(":")[0].endswith(f" feed {pool}") for text in table.mismatches
    ):
        return "kv-mismatch"
    sources = [table.groups[source] for source, _ in table.feeds.get(index, ())]
    if _ids(sources) - conditions.excluded:
        return "too-long-for-prefill"
    return "no-prefill"


def _failed_islands(table: Table, excluded: frozenset[WorkerId]) -> frozenset[str]:
    """Islands of workers that failed this request. They may have left the ready ones meanwhile."""
    if not excluded:
        return frozenset()
    pools = {worker.pool for worker in excluded}
    return frozenset(view.island for view in table.snapshot.workers if view.id.pool in pools)


def _why_none(table: Table, facts: Facts, conditions: Conditions) -> str:
    ready = [table.groups[index] for index in table.receivers]
    if not ready:
        return "no worker that can decode is ready"
    which = ""
    if facts.revision is not None:
        ready = [group for group in ready if group.revision == facts.revision]
        which = f" and has the model revision {facts.revision!r} that it was begun with"
    if not ready:
        return f"no worker{which.replace(' and', ' that', 1)} is ready"
    if conditions.excluded & _ids(ready):
        return f"every worker that can decode{which} has failed this request"
    return f"no worker that is ready{which} takes a request of this length"


def _ids(groups: Iterable[Group]) -> frozenset[WorkerId]:
    return frozenset(worker.id for group in groups for worker in group.workers)
