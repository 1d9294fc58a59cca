"""What `pdcluster watch` and the page draw: the cluster as a picture, and what is new since they
asked last. In: desired state, reports, Recent. Out: Live. Pure.

Rows of workers are kept with the point at which they last changed, so that an answer to somebody
who polls holds those only, and the names of those that are gone.
Called by: control.controller, control.loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from cluster.control.changes import Change, ChangeState
from cluster.control.events import Told
from cluster.control.points import Columns, Pair, came, columns, pair_since, shown
from cluster.control.recent import EVERY_S, Recent
from cluster.control.state import ClusterStatus, DesiredState, FailedSlot, LinkStatus
from cluster.identity import Role, WorkerState
from cluster.workers.report import Counters, WorkerReport

# Of changes that have ended, the newest; those that run are all told.
_ENDED_TOLD = 10
_STEPS_TOLD = 8


@dataclass(frozen=True, slots=True)
class WorkerLive:
    """One worker. Rates are of the last ten seconds."""

    id: str  # POOL/INDEX#GENERATION
    name: str  # POOL/INDEX
    generation: int
    pool: str
    role: Role
    state: WorkerState
    message: str
    epoch: int
    node: str  # address of rank 0's node; "": not placed yet
    started_at_s: float  # wall clock
    running: int
    waiting: int
    kv_usage: float
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    transfers_per_s: float
    bytes_per_s: float
    acceptance_length: float | None  # since it started


@dataclass(frozen=True, slots=True)
class PoolLive:
    """One pool, in its island. `least`, `most`: bounds of the autoscaler."""

    name: str
    role: Role
    engine: str
    hardware: str  # "": not stated
    island: str
    desired: int
    present: int
    ready: int
    least: int
    most: int
    nodes_per_replica: int


@dataclass(frozen=True, slots=True)
class IslandLive:
    name: str
    connector: str
    pools: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LinkLive:
    """A pair of pools over which KV may move. Engines count what they pull, not from whom: where
    several pools feed one, its bytes are shared out by the tokens that each pair had to move."""

    prefill: str
    decode: str
    connector: str
    is_open: bool
    mismatches: tuple[str, ...]
    requests_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class NodeLive:
    id: str  # Ray's
    address: str
    workers: int
    is_drained: bool


@dataclass(frozen=True, slots=True)
class Live:
    """An answer. `seq`: to be sent as `since` with the next question. `is_whole`: `workers` are
    all there are; else those that differ from what they were at `since`, and `gone` have gone."""

    cluster: str
    model: str
    version: int
    controller_started_at_s: float  # wall clock
    at_s: float  # wall clock, of this answer
    every_s: float  # a new point comes about so often
    seq: int
    is_whole: bool
    columns: Columns
    islands: tuple[IslandLive, ...] = ()
    pools: tuple[PoolLive, ...] = ()
    links: tuple[LinkLive, ...] = ()
    nodes: tuple[NodeLive, ...] = ()
    workers: tuple[WorkerLive, ...] = ()
    gone: tuple[str, ...] = ()  # ids
    failed: tuple[FailedSlot, ...] = ()
    changes: tuple[Change, ...] = ()  # that run, and the last that ended; newest last
    events: tuple[Told, ...] = ()  # newest last


@dataclass(slots=True)
class Rows:
    """Workers as they were at the newest point. Written by `keep` only."""

    rows: dict[str, tuple[WorkerLive, int]] = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict)

    def keep(self, recent: Recent, reports: Sequence[WorkerReport]) -> None:
        """Call it whenever `recent` has taken a point."""
        found = {str(report.id): _worker(report, recent) for report in reports}
        for id in self.rows.keys() - found.keys():
            self.gone[id] = recent.seq
        self.gone = {id: at for id, at in self.gone.items() if id not in found and recent.keeps(at)}
        self.rows = {
            id: former if (former := self.rows.get(id)) and former[0] == row else (row, recent.seq)
            for id, row in found.items()
        }


def answer(
    status: ClusterStatus,
    desired: DesiredState | None,
    recent: Recent,
    rows: Rows,
    since: int,
    changes: Sequence[Change],
    at_s: float,
) -> Live:
    """`status`: what is known now; its events become those of the answer."""
    is_whole = not recent.keeps(since)
    return Live(
        cluster=status.cluster,
        model=status.model,
        version=status.version,
        controller_started_at_s=status.controller_started_at_s,
        at_s=at_s,
        every_s=EVERY_S,
        seq=recent.seq,
        is_whole=is_whole,
        columns=columns(recent.after(since)),
        islands=_islands(desired),
        pools=_pools(status, desired),
        links=_links(status, recent),
        nodes=_nodes(status.workers, desired),
        workers=tuple(row for row, seq in rows.rows.values() if is_whole or seq > since),
        gone=() if is_whole else tuple(id for id, seq in rows.gone.items() if seq > since),
        failed=tuple(replace(slot, last_words=slot.last_words[-3:]) for slot in status.failed),
        changes=_changes(changes),
        events=status.events,
    )


def _worker(report: WorkerReport, recent: Recent) -> WorkerLive:
    done, span_s = recent.done_by(report.id)
    span_s = span_s or 1.0
    length = report.counters.acceptance_length
    return WorkerLive(
        id=str(report.id),
        name=report.id.name,
        generation=report.id.generation,
        pool=report.id.pool,
        role=report.role,
        state=report.state,
        message=report.message,
        epoch=report.epoch,
        node=report.node_ip,
        started_at_s=report.started_at_s,
        running=report.load.running,
        waiting=report.load.waiting,
        kv_usage=shown(report.load.kv_usage),
        prompt_tokens_per_s=shown(done.prompt_tokens / span_s),
        generation_tokens_per_s=shown(done.generation_tokens / span_s),
        transfers_per_s=shown(done.transfers / span_s),
        bytes_per_s=shown(done.bytes_pulled / span_s),
        acceptance_length=shown(length) if length is not None else None,
    )


def _islands(desired: DesiredState | None) -> tuple[IslandLive, ...]:
    if desired is None:
        return ()
    return tuple(
        IslandLive(island.name, island.connector, tuple(island.pools))
        for island in desired.serving.islands
    )


def _pools(status: ClusterStatus, desired: DesiredState | None) -> tuple[PoolLive, ...]:
    if desired is None:
        return ()
    serving = desired.serving
    return tuple(
        PoolLive(
            name=pool.name,
            role=pool.role,
            engine=pool.engine,
            hardware=serving.pool(pool.name).hardware or "",
            island=serving.island_of(pool.name).name,
            desired=pool.desired,
            present=pool.present,
            ready=pool.ready,
            least=serving.pool(pool.name).replicas.min,
            most=serving.pool(pool.name).replicas.max,
            nodes_per_replica=serving.pool(pool.name).nodes_per_replica,
        )
        for pool in status.pools
    )


def _links(status: ClusterStatus, recent: Recent) -> tuple[LinkLive, ...]:
    requests, moved = _moving(recent, [_ends(state) for state in status.links])
    return tuple(
        LinkLive(
            *_ends(state),
            state.link.connector,
            state.is_open,
            state.mismatches,
            shown(requests.get(_ends(state), 0.0)),
            shown(moved.get(_ends(state), 0.0)),
        )
        for state in status.links
    )


def _ends(state: LinkStatus) -> Pair:
    return state.link.prefill_pool, state.link.decode_pool


def _moving(recent: Recent, links: Sequence[Pair]) -> tuple[dict[Pair, float], dict[Pair, float]]:
    """Requests/s and bytes/s of each link, lately."""
    lately = recent.lately()
    if lately is None:
        return {}, {}
    now, then = lately
    span_s = now.at_s - then.at_s
    came_by = {pair: pair_since(now.pairs.get(pair), then.pairs.get(pair)) for pair in links}
    requests = {pair: part.arrived / span_s for pair, part in came_by.items()}
    moved: dict[Pair, float] = {}
    for decode in {pair[1] for pair in links}:
        before = then.pools.get(decode, Counters())
        per_s = came(now.pools.get(decode, Counters()), before).bytes_pulled / span_s
        feeders = [pair for pair in links if pair[1] == decode]
        # What finished last may lag behind what moves now: where none has, all count alike.
        tokens = [came_by[pair].prompt_tokens - came_by[pair].held_tokens for pair in feeders]
        for pair, weight in zip(feeders, tokens, strict=True):
            share = weight / sum(tokens) if sum(tokens) > 0 else 1 / len(feeders)
            moved[pair] = per_s * share
    return requests, moved


def _nodes(reports: Sequence[WorkerReport], desired: DesiredState | None) -> tuple[NodeLive, ...]:
    drained = desired.drained_nodes if desired is not None else {}
    addresses = {
        **drained,
        **{report.node_id: report.node_ip for report in reports if report.node_id},
    }
    return tuple(
        NodeLive(
            id=node,
            address=address,
            workers=sum(node in {report.node_id, *report.node_ids} for report in reports),
            is_drained=node in drained,
        )
        for node, address in sorted(addresses.items())
    )


def _changes(changes: Sequence[Change]) -> tuple[Change, ...]:
    ended = [change.id for change in changes if change.state is not ChangeState.RUNNING]
    told = set(ended[-_ENDED_TOLD:])
    return tuple(
        replace(change, steps=change.steps[-_STEPS_TOLD:])
        for change in changes
        if change.state is ChangeState.RUNNING or change.id in told
    )
