"""What adapters share: flags as a mapping, where each came from, ranks of a node. Pure.

A flag is a key without dashes; None: not given. How values are written is each engine's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.engines.base import LaunchContext
from cluster.errors import InvalidInput
from cluster.identity import Role
from cluster.topology.schema import PoolSpec

Flags = dict[str, Any]

# Of every engine, whatever its flags are called.
ADDRESS = "each engine binds its node's own address"
PORT = "reserved on the node at each start"


def passed_through(pool: PoolSpec, word: str = "-") -> Flags:
    """The pool's `engine_args`, one spelling for each; `word` is what the engine puts between the
    words of a flag."""
    other = "_" if word == "-" else "-"
    return {name.replace(other, word): value for name, value in pool.engine_args.items()}


def origins(
    flags: Mapping[str, Any], env: Mapping[str, str], pool: PoolSpec, known: Mapping[str, str]
) -> dict[str, str]:
    """`Launch.origins` of what is set. `known`: flag or variable -> key or reason."""
    stated = {name.replace("_", "-"): name for name in pool.engine_args}
    found: dict[str, str] = {}
    for name, value in flags.items():
        own = stated.get(name.replace("_", "-"))
        if value is None:
            continue
        if own is not None:
            found[f"--{name}"] = f"pool.engine_args.{own}"
        elif name in known:
            found[f"--{name}"] = known[name]
    for name in env:
        if name in pool.env:
            found[name] = f"pool.env.{name}"
        elif name in known:
            found[name] = known[name]
    return found


def model_origins(context: LaunchContext, names: Mapping[str, str]) -> dict[str, str]:
    """Keys of the model's flags. `names`: key of ModelSpec -> flag. A pool may state its own."""
    own = context.pool.model
    return {
        flag: f"pool.model.{key}"
        if own is not None and getattr(own, key, None) is not None
        else f"model.{key}"
        for key, flag in names.items()
    }


def length_origin(context: LaunchContext) -> str:
    owner = "model" if context.pool.max_model_len_tokens is None else "pool"
    return f"{owner}.max_model_len_tokens"


def served_name_origin(context: LaunchContext) -> str:
    return "model.id" if context.model.served_name is None else "model.served_name"


def ranks_per_node(pool: PoolSpec) -> int:
    """Raises: InvalidInput: the nodes cannot share the ranks alike."""
    sizes = pool.parallel
    ranks = sizes.tensor * sizes.pipeline * sizes.data
    local, rest = divmod(ranks, pool.nodes_per_replica)
    if rest:
        raise InvalidInput(
            f"pools[{pool.name}].nodes_per_replica: found {pool.nodes_per_replica} for {ranks} "
            "ranks; write sizes in `parallel` whose product is a multiple of it"
        )
    return local


def why_fixed_role(pool: PoolSpec, reason: str) -> str:
    """EngineAdapter.why_fixed_role, where `reason` ("": none) ties an engine to its role."""
    if pool.role is Role.MIXED:
        return f"pool {pool.name} is mixed: its engines prefill and decode alike"
    return reason


def head_port(context: LaunchContext, name: str) -> int:
    """The port of that name that rank 0 reserved, for a replica that spans nodes."""
    return context.head_ports.get(name, context.ports[name])
