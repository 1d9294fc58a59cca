"""What must agree within one pool. Pure. Called by: topology.checks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.identity import Role
from cluster.topology.findings import Finding, KeyPath, names_a_secret
from cluster.topology.pairing import GENERATIONS, MIXED_ONLY
from cluster.topology.reserved import instead_of_flag, instead_of_variable
from cluster.topology.schema import HardwareName, PoolSpec

_ACCELERATORS = ("GPU", "NPU")
# Accelerators an engine has no kernels for.
_FOREIGN = {"vllm": "NPU", "vllm_ascend": "GPU"}


@dataclass(frozen=True, slots=True)
class _Hardware:
    """The accelerator that Ray counts on such a node, and how many there can be; None: not
    limited here."""

    accelerator: str | None
    most_per_node: int | None = None


_CPU_BLOCK_TOKENS = 32  # vllm/v1/attention/backends/cpu_attn.py, 0.32

# An Atlas 800 A3 has 8 cards of two dies each, and every die is a device; an Atlas 800 A2 has 8.
_HARDWARE: dict[HardwareName, _Hardware] = {
    "cpu": _Hardware(None),
    "h200": _Hardware("GPU"),
    "atlas_a2": _Hardware("NPU", 8),
    "atlas_a3": _Hardware("NPU", 16),
}
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
    yield from _role(pool, at)
    yield from _ranks(pool, at)
    yield from _devices(pool, at)
    yield from _blocks(pool, at)
    yield from _flags(pool, at)
    yield from _environment(pool, at)


def _role(pool: PoolSpec, at: KeyPath) -> Iterator[Finding]:
    if pool.engine in MIXED_ONLY and pool.role is not Role.MIXED:
        yield Finding(
            (*at, "role"),
            f"{pool.role} with engine {pool.engine}; {MIXED_ONLY[pool.engine]}",
            "write `role: mixed`",
            rests_on=((*at, "role"), (*at, "engine")),
        )


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


def _devices(pool: PoolSpec, at: KeyPath) -> Iterator[Finding]:
    """Engine and hardware against the devices asked for. A simulated engine uses none and may
    stand for any hardware."""
    resources, key = pool.placement.resources, (*at, "placement", "resources")
    foreign = _FOREIGN.get(pool.engine)
    if foreign is not None and foreign in resources:
        fix = "write `engine: vllm_ascend`" if foreign == "NPU" else "write `engine: vllm`"
        yield Finding(
            (*at, "engine"),
            f"engine {pool.engine} cannot use the {foreign} that placement.resources asks for",
            f"{fix}, or ask for what it runs on",
            rests_on=((*at, "engine"), (*key, foreign)),
        )
        return
    if pool.hardware is None or pool.engine == "simulated":
        return
    kind, name = _HARDWARE[pool.hardware], GENERATIONS[pool.hardware]
    grounds: tuple[KeyPath, ...] = (key, (*at, "hardware"))
    for other in _ACCELERATORS:
        if other in resources and other != kind.accelerator:
            fix = "take it out, or correct `hardware`"
            if kind.accelerator is not None:
                fix = f"ask for {kind.accelerator}, or correct `hardware`"
            yield Finding((*key, other), f"{name} has no {other}", fix, rests_on=grounds)
            return
    if kind.accelerator is None:
        return
    asked = resources.get(kind.accelerator)
    if asked is None:
        found = f"hardware {pool.hardware}, but placement.resources asks for no {kind.accelerator}"
        fix = f"add `{kind.accelerator}: N`, the devices that one node of a replica takes"
        yield Finding((*at, "hardware"), found, fix, rests_on=grounds)
    elif kind.most_per_node is not None and asked > kind.most_per_node:
        yield Finding(
            (*key, kind.accelerator),
            f"found {asked:g}; one {name} node has {kind.most_per_node}",
            f"write {kind.most_per_node} or less, and more nodes_per_replica",
            rests_on=grounds,
        )


def _blocks(pool: PoolSpec, at: KeyPath) -> Iterator[Finding]:
    """vLLM's attention on CPUs; a size that it does not take fails only as the engine loads."""
    size = pool.block_size_tokens
    is_on_cpu = pool.hardware in (None, "cpu") and not pool.placement.resources.keys() & set(
        _ACCELERATORS
    )
    if pool.engine == "vllm" and is_on_cpu and size is not None and size % _CPU_BLOCK_TOKENS:
        key = (*at, "block_size_tokens")
        yield Finding(
            key,
            f"found {size}; vLLM on a CPU takes multiples of {_CPU_BLOCK_TOKENS}",
            f"write {-(-size // _CPU_BLOCK_TOKENS) * _CPU_BLOCK_TOKENS}, or leave it out",
            rests_on=(key, (*at, "engine"), (*at, "hardware"), (*at, "placement", "resources")),
        )


def _flags(pool: PoolSpec, at: KeyPath) -> Iterator[Finding]:
    for flag in pool.engine_args:
        key = (*at, "engine_args", flag)
        instead = instead_of_flag(flag, pool.engine)
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
