"""Put together what `status` shows. In: all the controller knows. Out: ClusterStatus. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.control import snapshots
from cluster.control.events import Recorded
from cluster.control.reconcile import Slot, SlotKey
from cluster.control.state import ClusterStatus, DesiredState, FailedSlot, PoolStatus, SilentHost
from cluster.identity import WorkerState
from cluster.workers.report import WorkerReport


def cluster_status(
    cluster: str,
    desired: DesiredState | None,
    version: int,
    started_at_s: float,
    reports: Sequence[WorkerReport],
    failed: Sequence[FailedSlot],
    events: tuple[Recorded, ...],
    silent: tuple[SilentHost, ...],
) -> ClusterStatus:
    return ClusterStatus(
        cluster=cluster,
        model=desired.serving.model.public_name if desired is not None else "",
        version=version,
        controller_started_at_s=started_at_s,
        pools=tuple(
            PoolStatus(
                name=pool.name,
                role=pool.role,
                engine=pool.engine,
                desired=pool.replicas.initial,
                present=sum(report.id.pool == pool.name for report in reports),
                ready=sum(
                    report.id.pool == pool.name and report.state is WorkerState.READY
                    for report in reports
                ),
            )
            for pool in (desired.serving.pools if desired is not None else ())
        ),
        workers=tuple(reports),
        failed=tuple(failed),
        links=snapshots.links(desired, reports) if desired is not None else (),
        events=tuple(recorded.told() for recorded in events),
        silent_hosts=silent,
    )


def failed_slots(
    slots: Mapping[SlotKey, Slot],
    reports: Sequence[WorkerReport],
    last_words: Mapping[SlotKey, tuple[str, ...]],
    now_s: float,
) -> tuple[FailedSlot, ...]:
    """Slots whose latest worker failed, and those that were restarted because of it."""
    taken = {(report.id.pool, report.id.index) for report in reports}
    return tuple(
        FailedSlot(
            worker=f"{key[0]}/{key[1]}",
            failures=slot.failures,
            restart_in_s=None if key in taken else max(0.0, slot.not_before_s - now_s),
            why=slot.why,
            last_words=last_words.get(key, ()),
        )
        for key, slot in sorted(slots.items())
        if slot.failures
    )
