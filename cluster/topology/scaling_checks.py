"""Whether `scaling.targets` name pairs of pools that exist and are linked.

In: the spec, and its pairs as `checks` worked them out. Called by: topology.checks. Pure.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from cluster.identity import Role
from cluster.topology.findings import Finding, KeyPath, did_you_mean
from cluster.topology.schema import ServingSpec


def scaling_faults(serving: ServingSpec, pairs: Collection[tuple[str, str]]) -> Iterator[Finding]:
    """Keys from `metadata.serving` down. Every target wants a pair of its own."""
    roles = {pool.name: pool.role for pool in serving.pools}
    earlier: dict[tuple[str, str], int] = {}
    for number, target in enumerate(serving.scaling.targets):
        at: KeyPath = ("scaling", "targets", number)
        sound = True
        for side, name, role in (
            ("prefill", target.prefill, Role.PREFILL),
            ("decode", target.decode, Role.DECODE),
        ):
            if name not in roles:
                sound = False
                fit = [other for other, its_role in roles.items() if its_role is role]
                fix = did_you_mean(name, fit or roles)
                yield Finding((*at, side), f'no pool is called "{name}"', fix)
            elif roles[name] is not role:
                sound = False
                found = f'pool "{name}" has role {roles[name]}'
                yield Finding((*at, side), found, f"name a pool with `role: {role}`")
        pair = (target.prefill, target.decode)
        if sound and pair not in pairs:
            yield Finding(
                at,
                f'"{target.prefill}" does not feed "{target.decode}"',
                "name a pair that `islands` and `links` allow",
                rests_on=(at, ("islands",), ("links",)),
            )
        if pair in earlier:
            found = f"the same pair as targets[{earlier[pair]}]"
            yield Finding(at, found, "keep one of the two")
        earlier.setdefault(pair, number)
