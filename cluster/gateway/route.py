"""Choose the workers of one request. Pure: snapshot and own load in, a pair out.

`compile_table` does once per snapshot what does not depend on the request: it groups workers that
are alike (same pool, same fingerprint) and keeps the pairs of groups between which KV blocks may
move. `choose` then looks at each worker once: linear in workers, not in pairs.

Cost is in requests: what a worker has running and waiting, plus what this gateway has sent it
since the snapshot, plus shares for a full KV cache, minus a share for a prompt already held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from cluster.errors import NoCapacity
from cluster.identity import Role, WorkerId
from cluster.snapshot import Fingerprint, Link, Snapshot, WorkerView

# A request that waits costs more than one that runs: it says that the batch is full.
_WAITING_WEIGHT = 2.0
# A full KV cache preempts; that is as bad as this many running requests.
_KV_USAGE_WEIGHT = 8.0
# A prompt held completely is worth this many running requests of detour.
_HELD_WEIGHT = 4.0
# A worker that just failed somebody is taken only if there is no other.
_SUSPECT_COST = 1e6
_RETRY_AFTER_S = 2.0

Differences = Callable[[Fingerprint, Fingerprint], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Group:
    """Workers that are alike as far as KV transfer goes."""

    pool: str
    role: Role
    fingerprint: Fingerprint | None
    workers: tuple[WorkerView, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A snapshot, prepared for routing."""

    snapshot: Snapshot
    groups: tuple[Group, ...] = ()
    # decode group's index -> (prefill group's index, link)
    feeds: Mapping[int, tuple[tuple[int, Link], ...]] = field(default_factory=dict)
    # decode pool -> what its links do when no prefill worker can serve
    on_prefill_failure: Mapping[str, str] = field(default_factory=dict)
    mismatches: tuple[str, ...] = ()  # linked groups that cannot exchange blocks, and why
    longest_tokens: int = 0  # the longest context any ready decode or mixed worker takes


@dataclass(frozen=True, slots=True)
class Facts:
    """What routing needs to know of a request."""

    prompt_tokens: int = 0  # 0: unknown, the engine will count
    answer_tokens: int = 0
    alone: str = ""  # why decode must prefill by itself; "" if it need not


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
    members: dict[tuple[str, Role, Fingerprint | None], list[WorkerView]] = {}
    for worker in snapshot.workers:
        if worker.takes_work:
            members.setdefault((worker.id.pool, worker.role, worker.fingerprint), []).append(worker)
    groups = tuple(
        Group(pool, role, fingerprint, tuple(workers))
        for (pool, role, fingerprint), workers in members.items()
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
                why = _mismatch(prefill, decode, differences)
                if why:
                    mismatches.append(f"{prefill.pool} cannot feed {decode.pool}: {why}")
                else:
                    feeds.setdefault(target, []).append((source, link))
    return Table(
        snapshot=snapshot,
        groups=groups,
        feeds={target: tuple(sources) for target, sources in feeds.items()},
        on_prefill_failure={
            link.decode_pool: link.on_prefill_failure for link in reversed(snapshot.links)
        },
        mismatches=tuple(dict.fromkeys(mismatches)),
        longest_tokens=max(
            (
                worker.max_model_len_tokens
                for group in groups
                if group.role is not Role.PREFILL
                for worker in group.workers
            ),
            default=0,
        ),
    )


def choose(table: Table, facts: Facts, conditions: Conditions) -> Route:
    """The best pair for a request. Raises: NoCapacity."""
    failure = conditions.failure
    sources: dict[int, tuple[float, WorkerView] | None] = {}
    best: tuple[float, Route] | None = None
    stranded = ""
    for index, group in enumerate(table.groups):
        if group.role is Role.PREFILL:
            continue
        decode = _best(group.workers, facts, conditions, facts.answer_tokens)
        if decode is None:
            continue
        cost, worker = decode
        if group.role is Role.MIXED:
            route = Route(worker, f"recompute:{failure}" if failure else "mixed")
        elif facts.alone:
            route = Route(worker, f"alone:{facts.alone}")
        elif _can_prefill_itself(worker, facts, conditions):
            route = Route(worker, "local-prefill")
        else:
            pair = _best_source(table, index, sources, facts, conditions)
            if pair is not None:
                source_cost, source, link = pair
                cost += source_cost
                route = Route(worker, "disaggregated", source, link)
            elif table.on_prefill_failure.get(group.pool, "recompute") == "recompute":
                route = Route(worker, f"recompute:{failure or _why_unfed(table, group)}")
                cost += _SUSPECT_COST / 2  # a fed decode worker elsewhere comes first
            else:
                stranded = f"no prefill worker can feed pool {group.pool}"
                stranded += f" ({failure or _why_unfed(table, group)}) and its policy is to fail"
                continue
        if best is None or cost < best[0]:
            best = (cost, route)
    if best is None:
        raise NoCapacity(stranded or _why_none(table, conditions), _RETRY_AFTER_S)
    return best[1]


def can_route(table: Table) -> bool:
    """Whether a plain request would find workers now."""
    try:
        choose(table, Facts(), Conditions())
    except NoCapacity:
        return False
    return True


def cost(worker: WorkerView, facts: Facts, conditions: Conditions) -> float:
    """How much is in the way of a request at this worker, in running requests."""
    load = worker.load
    sent = conditions.sent.get(worker.id, 0)
    total = max(0.0, load.running + load.waiting + sent)
    total += (_WAITING_WEIGHT - 1) * load.waiting + _KV_USAGE_WEIGHT * load.kv_usage
    if facts.prompt_tokens and conditions.held_tokens:
        held = min(conditions.held_tokens.get(worker.id, 0), facts.prompt_tokens)
        total -= _HELD_WEIGHT * held / facts.prompt_tokens
    if worker.id in conditions.suspects:
        total += _SUSPECT_COST
    return total


def _best(
    workers: tuple[WorkerView, ...], facts: Facts, conditions: Conditions, answer_tokens: int
) -> tuple[float, WorkerView] | None:
    """The cheapest worker that the request fits into; equals take turns."""
    needed_tokens = facts.prompt_tokens + max(1, answer_tokens)
    start = conditions.turn % len(workers)
    best: tuple[float, WorkerView] | None = None
    for worker in (*workers[start:], *workers[:start]):
        if worker.id in conditions.excluded or worker.max_model_len_tokens < needed_tokens:
            continue
        worker_cost = cost(worker, facts, conditions)
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
            found[index] = _best(table.groups[index].workers, facts, conditions, 1)
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


def _mismatch(prefill: Group, decode: Group, differences: Differences) -> str:
    if prefill.fingerprint is None or decode.fingerprint is None:
        return "the engines have not said yet what they are"
    return "; ".join(differences(prefill.fingerprint, decode.fingerprint))


def _why_unfed(table: Table, group: Group) -> str:
    if any(text.split(":")[0].endswith(f" feed {group.pool}") for text in table.mismatches):
        return "kv-mismatch"
    return "no-prefill"


def _why_none(table: Table, conditions: Conditions) -> str:
    ready = [group for group in table.groups if group.role is not Role.PREFILL]
    if not ready:
        return "no worker that can decode is ready"
    if conditions.excluded & _ids(ready):
        return "every worker that can decode has failed this request"
    return "no worker that is ready takes a request of this length"


def _ids(groups: Iterable[Group]) -> frozenset[WorkerId]:
    return frozenset(worker.id for group in groups for worker in group.workers)
