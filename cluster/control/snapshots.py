"""Build snapshots. In: desired state and reports. Out: Snapshot, and why a link is closed. Pure.

A link is open unless every pair of workers that could use it is unlike: with two versions in one
pool, the like ones keep the link alive and routing keeps the unlike ones apart (it compares
fingerprints itself, per pair). Called by: control.loop, control.publisher.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.control.roles import extra_pairs
from cluster.control.state import DesiredState, LinkStatus, model_revision_of
from cluster.identity import Role
from cluster.kv.fingerprint import differences
from cluster.snapshot import Link, Load, Snapshot, WorkerView
from cluster.topology.schema import ServingSpec
from cluster.workers.report import WorkerReport


class Change(enum.IntEnum):
    """What differs between two snapshots. LOAD can wait a moment; STRUCTURE cannot."""

    NONE = 0
    LOAD = 1
    STRUCTURE = 2


def build(desired: DesiredState, reports: Sequence[WorkerReport], version: int) -> Snapshot:
    """The picture for gateways: every worker that exists, and the links that are open."""
    speeds = relative_speeds(desired.serving)
    return Snapshot(
        version=version,
        cluster=desired.cluster,
        model=desired.serving.model.public_name,
        workers=tuple(
            _view(desired, report, speeds.get(report.id.pool, 1.0))
            for report in sorted(reports, key=lambda r: r.id)
        ),
        links=tuple(state.link for state in links(desired, reports) if state.is_open),
        longest_tokens=longest_tokens(desired),
    )


def relative_speeds(serving: ServingSpec) -> dict[str, float]:
    """By pool. The fastest prefill pool has 1, and so has the fastest of the others: routing weighs
    load against other things in requests, and with speeds of 5,000 and 2,500 (tokens/s, say) load
    would weigh nothing."""
    fastest: dict[bool, float] = {}
    for pool in serving.pools:
        side = pool.role is Role.PREFILL
        fastest[side] = max(fastest.get(side, 0.0), pool.relative_speed)
    return {
        pool.name: pool.relative_speed / fastest[pool.role is Role.PREFILL]
        for pool in serving.pools
    }


def longest_tokens(desired: DesiredState) -> int:
    """The longest prompt + answer that the topology promises. A request for a pool that happens to
    be down is one to try again, not one that is too long."""
    return max(
        (
            pool.max_model_len_tokens or desired.max_model_len_tokens
            for pool in desired.serving.pools
            if pool.role is not Role.PREFILL and pool.replicas.initial > 0
        ),
        default=0,
    )


def links(desired: DesiredState, reports: Sequence[WorkerReport]) -> tuple[LinkStatus, ...]:
    """Every link the topology allows, and those of workers that serve in another role than their
    pool, judged by the fingerprints known so far.

    Before both sides have one, a link counts as open: workers without a fingerprint are not ready
    and get no work."""
    by_end: dict[tuple[str, Role], list[WorkerReport]] = {}
    for report in reports:
        if report.fingerprint is not None:
            by_end.setdefault((report.id.pool, report.role), []).append(report)
    pairs = (
        *desired.serving.pairs(),
        *extra_pairs(desired, [(report.id, report.role) for report in reports]),
    )
    return tuple(_judge(_link(desired, prefill, decode), by_end) for prefill, decode in pairs)


def changed(before: Snapshot | None, now: Snapshot) -> Change:
    """What is new in `now`; versions are not compared."""
    if before is None:
        return Change.STRUCTURE
    if replace(before, version=now.version) == now:
        return Change.NONE
    if _idle(before) == replace(_idle(now), version=before.version):
        return Change.LOAD
    return Change.STRUCTURE


def _view(desired: DesiredState, report: WorkerReport, relative_speed: float) -> WorkerView:
    return WorkerView(
        id=report.id,
        role=report.role,
        island=_island(desired, report.id.pool),
        state=report.state,
        url=report.url,
        fingerprint=report.fingerprint,
        max_model_len_tokens=report.max_model_len_tokens,
        kv_bytes_per_token=report.kv_bytes_per_token,
        kv=report.kv,
        load=report.load,
        relative_speed=relative_speed,
        epoch=report.epoch,
        lets_go=report.lets_go,
        model_revision=model_revision_of(report.revision),
    )


def _island(desired: DesiredState, pool: str) -> str:
    try:
        return desired.serving.island_of(pool).name
    except KeyError:  # the pool was taken out of the topology; its workers are draining
        return ""


def _link(desired: DesiredState, prefill: str, decode: str) -> Link:
    island = desired.serving.island_of(decode)
    return Link(
        prefill_pool=prefill,
        decode_pool=decode,
        connector=island.connector,
        lease_s=island.lease_s,
        on_prefill_failure=island.on_prefill_failure,
    )


def _judge(link: Link, by_end: Mapping[tuple[str, Role], Sequence[WorkerReport]]) -> LinkStatus:
    mismatches: list[str] = []
    pairs = likes = 0
    for prefill in by_end.get((link.prefill_pool, Role.PREFILL), ()):
        for decode in by_end.get((link.decode_pool, Role.DECODE), ()):
            assert prefill.fingerprint is not None
            assert decode.fingerprint is not None
            pairs += 1
            unlike = differences(prefill.fingerprint, decode.fingerprint)
            if unlike:
                mismatches.append(
                    f"{prefill.id.name} cannot feed {decode.id.name}: {'; '.join(unlike)}"
                )
            else:
                likes += 1
    return LinkStatus(link, is_open=likes > 0 or pairs == 0, mismatches=tuple(mismatches))


def _idle(snapshot: Snapshot) -> Snapshot:
    """The same without anybody's load."""
    workers = tuple(replace(view, load=Load()) for view in snapshot.workers)
    return replace(snapshot, workers=workers)
