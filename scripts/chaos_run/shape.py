"""How many workers serve in which role, and which changes leave enough of each. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cluster.control.state import ClusterStatus, PoolStatus
from cluster.identity import Role
from cluster.workers.report import WorkerReport

# So that one can be hit, and one stays.
LEAST = 2


def role_of(status: ClusterStatus, pool: PoolStatus, index: int) -> Role:
    """In which role the pool's worker serves; one that is not there will in its pool's."""
    here = (r.role for r in status.workers if (r.id.pool, r.id.index) == (pool.name, index))
    return next(here, pool.role)


def by_role(status: ClusterStatus) -> Counter[Role]:
    """Of those that are wanted."""
    return Counter(
        role_of(status, pool, index) for pool in status.pools for index in range(pool.desired)
    )


def may_change_role(status: ClusterStatus, usable: Sequence[WorkerReport]) -> list[WorkerReport]:
    """Workers whose role has enough others."""
    roles = by_role(status)
    return [report for report in usable if roles[report.role] > LEAST]


def sizes(status: ClusterStatus, pool: PoolStatus, usual: int) -> list[int]:
    """Other numbers of replicas that the pool may have now: one more or less than usual, or the
    usual one. If there is none: the present one."""
    roles = by_role(status)
    found = []
    for count in (usual - 1, usual, usual + 1):
        going = Counter(role_of(status, pool, index) for index in range(count, pool.desired))
        if count != pool.desired and all(roles[r] - n >= LEAST for r, n in going.items()):
            found.append(count)
    return found or [pool.desired]


def leaves_one(
    present: Sequence[WorkerReport], usable: Sequence[WorkerReport], pool: str, count: int
) -> bool:
    """Whether the pool can shrink to `count` and a usable worker stays of each role that goes."""

    def goes(report: WorkerReport) -> bool:
        going: bool = report.id.pool == pool and report.id.index >= count
        return going

    staying = {report.role for report in usable if not goes(report)}
    return all(report.role in staying for report in present if goes(report))
