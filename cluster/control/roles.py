"""Workers that serve in another role than their pool's: may they, how, and which links they get.

A worker changes its role without a new start where its engine can do both (the adapter says so);
else it is replaced by one that is started for the other role. Either way it stays in its pool and
island. Pure. Called by: control.operations, control.snapshots, control.loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.control.state import DesiredState
from cluster.engines.registry import adapter
from cluster.identity import Role, WorkerId
from cluster.topology.pairing import MIXED_ONLY, Side, objections
from cluster.topology.schema import PoolSpec, ServingSpec

Pair = tuple[str, str]
OTHER: Mapping[Role, Role] = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}


def why_restart(serving: ServingSpec, pool: str) -> str:
    """Why a worker of `pool` must be started anew to serve in the other role; "" if it need not.

    Raises: KeyError."""
    spec, island = serving.pool(pool), serving.island_of(pool)
    return adapter(spec.engine).why_fixed_role(spec, island)


def why_never(serving: ServingSpec, pool: str) -> str:
    """Why no worker of `pool` can serve in the other role at all; "" if one can.

    Raises: KeyError."""
    spec, island = serving.pool(pool), serving.island_of(pool)
    if spec.role is Role.MIXED:
        return f"pool {pool} is mixed: its workers do both for the requests they take"
    if spec.engine in MIXED_ONLY:
        return MIXED_ONLY[spec.engine]
    reasons: list[str] = []
    for prefill, decode in loan_pairs(serving, pool):
        against = objections(island.connector, _side(serving, prefill), _side(serving, decode))
        if not against:
            return ""
        reasons += [
            f"{prefill} cannot feed {decode} ({fault.about}: {fault.prefill} and {fault.decode})"
            for fault in against
        ]
    return "; ".join(reasons) or f"pool {pool} exchanges KV with no other pool"


def loan_pairs(serving: ServingSpec, pool: str) -> tuple[Pair, ...]:
    """The (prefill, decode) pairs of pools that a worker of `pool` makes possible by serving in
    the other role. A decode worker that prefills feeds whom the prefill pools feed that feed it,
    its own pool too; a prefill worker that decodes is fed by whoever feeds the pools it feeds."""
    pairs = serving.pairs()
    if serving.pool(pool).role is Role.DECODE:
        feeders = {prefill for prefill, decode in pairs if decode == pool}
        return tuple(
            dict.fromkeys((pool, decode) for prefill, decode in pairs if prefill in feeders)
        )
    fed = {decode for prefill, decode in pairs if prefill == pool}
    return tuple(dict.fromkeys((prefill, pool) for prefill, decode in pairs if decode in fed))


def extra_pairs(
    desired: DesiredState, workers: Sequence[tuple[WorkerId, Role]]
) -> tuple[Pair, ...]:
    """Pairs beyond the topology's that exist because of workers that serve in another role."""
    serving = desired.serving
    known = {pool.name: pool.role for pool in serving.pools}
    lent = {
        worker.pool
        for worker, role in workers
        if worker.pool in known and role is not known[worker.pool] and role in OTHER
    }
    found: dict[Pair, None] = {}
    for pool in sorted(lent):
        found |= dict.fromkeys(loan_pairs(serving, pool))
    # Both have lent: the one's loan may feed the other's.
    found |= {(b, a): None for a, b in serving.pairs() if a in lent and b in lent}
    return tuple(pair for pair in found if pair not in set(serving.pairs()))


def lent(roles: Mapping[str, Role], pool: str) -> frozenset[int]:
    """Indices of a pool's workers that are to serve in the other role."""
    workers = (WorkerId.parse(name) for name in roles)
    return frozenset(worker.index for worker in workers if worker.pool == pool)


def without_stale(roles: Mapping[str, Role], serving: ServingSpec) -> dict[str, Role]:
    """Roles that still differ from their pool's, of pools that still exist."""
    known: dict[str, PoolSpec] = {pool.name: pool for pool in serving.pools}
    return {
        name: role
        for name, role in roles.items()
        if (pool := known.get(WorkerId.parse(name).pool)) is not None and pool.role is not role
    }


def _side(serving: ServingSpec, pool: str) -> Side:
    spec = serving.pool(pool)
    return Side(spec.hardware or "", spec.parallel.tensor)
