"""What must agree within one pool. Pure. Called by: topology.checks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.topology.findings import Finding, KeyPath, names_a_secret
from cluster.topology.reserved import instead_of_flag, instead_of_variable
from cluster.topology.schema import PoolSpec

_ACCELERATORS = ("GPU", "NPU")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def pool_faults(pool: PoolSpec, at: KeyPath) -> Iterator[Finding]:
    """Findings of one pool that stands at `at`."""
    if pool.simulated is not None and pool.engine != "simulated":
        yield Finding(
            (*at, "simulated"),
            f"timings for the simulated engine on a pool with engine {pool.engine}",
            "write `engine: simulated`, or take the block out",
            rests_on=((*at, "engine"),),
        )
    yield from _ranks(pool, at)
    yield from _flags(pool, at)
    yield from _environment(pool, at)


def _ranks(pool: PoolSpec, at: KeyPath) -> Iterator[Finding]:
    sizes, nodes = pool.parallel, pool.nodes_per_replica
    ranks = sizes.tensor * sizes.pipeline * sizes.data
    product = f"tensor {sizes.tensor} x pipeline {sizes.pipeline} x data {sizes.data}"
    grounds: tuple[KeyPath, ...] = ((*at, "parallel"), (*at, "nodes_per_replica"))
    if sizes.data > 1 and sizes.data % nodes:
        yield Finding(
            (*at, "parallel", "data"),
            f"{sizes.data} copies cannot be spread over {nodes} nodes alike",
            f"write a multiple of nodes_per_replica ({nodes}), or 1 to split one copy over them",
            rests_on=grounds,
        )
    elif ranks % nodes:
        yield Finding(
            (*at, "nodes_per_replica"),
            f"{product} = {ranks} ranks cannot be spread over {nodes} nodes alike",
            f"write sizes in `parallel` whose product is a multiple of {nodes}, or fewer nodes",
            rests_on=grounds,
        )
    for name in _ACCELERATORS:
        devices = pool.placement.resources.get(name)
        if devices is None:
            continue
        key = (*at, "placement", "resources", name)
        if devices > 1 and not devices.is_integer():
            fix = "write a whole number; only one shared device can be given in part"
            yield Finding(key, f"found {devices:g}", fix)
        elif ranks % nodes == 0 and ranks // nodes > max(devices, 1):
            yield Finding(
                key,
                f"found {devices:g}, but {product} makes {ranks // nodes} ranks per node",
                f"write {ranks // nodes}, one {name} per rank, or lower `parallel`",
                rests_on=(key, *grounds),
            )


def _flags(pool: PoolSpec, at: KeyPath) -> Iterator[Finding]:
    for flag in pool.engine_args:
        key = (*at, "engine_args", flag)
        instead = instead_of_flag(flag)
        if instead is not None:
            yield Finding(key, "pdcluster sets this engine flag itself", instead)
        elif flag.startswith("-"):
            yield Finding(key, "a flag with its dashes", f"write `{flag.lstrip('-')}`")
        elif names_a_secret(flag):
            found = "it looks like a secret, which would be seen in the list of processes"
            yield Finding(key, found, "take it out; export it where Ray is started on the nodes")


def _environment(pool: PoolSpec, at: KeyPath) -> Iterator[Finding]:
    for name in pool.env:
        key = (*at, "env", name)
        instead = instead_of_variable(name)
        if instead is not None:
            yield Finding(key, "pdcluster sets this variable itself", instead)
        elif not _VARIABLE.fullmatch(name):
            fix = "write letters, digits and underscores only"
            yield Finding(key, "this is no name of an environment variable", fix)
        elif names_a_secret(name):
            yield Finding(
                key,
                "it looks like a secret in plain text",
                "take it out and export it where Ray is started on the nodes, engines inherit it; "
                "clients' keys belong in gateway.auth.keys_env or keys_file",
            )
