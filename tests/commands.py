"""What an adapter makes of pools as a file has them, and how that differs from a published command.

launched = launch([{"name": "p", "role": "mixed", "preset": "glm-5.2-h200-fp8"}])
compare(launched, published("NAME=value ...", "--flag value ..."))
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from cluster.engines.base import HostFacts, Launch, LaunchContext, Platform
from cluster.engines.registry import adapter
from cluster.identity import WorkerId
from cluster.topology import presets
from cluster.topology.schema import ServingSpec

HOST, HEAD, INTERFACE = "10.0.0.6", "10.0.0.5", "eth0"
FIRST_PORT = 100
_PLATFORMS: dict[str, Platform] = {"GPU": "cuda", "NPU": "npu"}
# Where the nodes of a replica meet: chosen anew for each generation.
_MEETING_PORTS = ("--data-parallel-rpc-port", "--master-port")


@dataclass(frozen=True)
class Command:
    """Flags and variables, JSON as values, bare flags as True."""

    flags: dict[str, Any]
    env: dict[str, str]


@dataclass(frozen=True)
class Differences:
    """`changed`: flag or variable -> (published, ours)."""

    left_out: set[str]
    added: set[str]
    changed: dict[str, tuple[Any, Any]]


def context(
    pools: list[dict[str, Any]],
    *,
    connector: str = "nixl",
    lease_s: float = 30,
    model: dict[str, Any] | None = None,
    node_rank: int = 0,
    host: str | None = None,
) -> LaunchContext:
    """The first pool's, on one node of its first replica. Its ports count from FIRST_PORT."""
    model = {"id": "/models/m", "served_name": "glm", **(model or {})}
    island = {
        "name": "island",
        "pools": [pool["name"] for pool in pools],
        "connector": connector,
        "lease_s": lease_s,
    }
    value, findings = presets.applied({"model": model, "pools": pools, "islands": [island]})
    assert not findings
    serving = ServingSpec.model_validate(value)
    pool = serving.pools[0]
    ports, next_port = {}, FIRST_PORT
    for need in adapter(pool.engine).ports(pool, serving.islands[0]):
        ports[need.name], next_port = next_port, next_port + need.span
    platform = next((_PLATFORMS[r] for r in _PLATFORMS if r in pool.placement.resources), "cpu")
    own_model = serving.model_of(pool.name)
    return LaunchContext(
        worker=WorkerId(pool.name, 0, 3),
        role=pool.role,
        model=own_model,
        model_path=own_model.id,
        pool=pool,
        island=serving.islands[0],
        host=host or (HOST if node_rank else HEAD),
        host_facts=HostFacts(platform, cores=192),
        ports=ports,
        runtime_dir="/run/x",
        python=pool.interpreter or "/venv/bin/python",
        engine_key="secret-key",
        node_rank=node_rank,
        head_host=HEAD if node_rank else "",
        head_ports=ports,
        peers=serving.peers_of(pool.name),
        interface=INTERFACE,
    )


def launch(pools: list[dict[str, Any]], **options: Any) -> Launch:
    """As `context` has it; see there."""
    made = context(pools, **options)
    return adapter(made.pool.engine).launch(made)


def words(launched: Launch) -> tuple[str, ...]:
    """argv with MEETING_PORT in place of the port where a replica's nodes meet."""
    argv = list(launched.argv)
    for flag in _MEETING_PORTS:
        if flag in argv:
            argv[argv.index(flag) + 1] = "MEETING_PORT"
    return tuple(argv)


def flags(argv: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """By name with dashes, whatever stands between the words; words before the first flag are
    left out."""
    found: dict[str, Any] = {}
    name = ""
    for word in argv:
        if word.startswith("--") and word != "--":
            name, equals, value = word.partition("=")
            name = "--" + name[2:].replace("_", "-")
            found[name] = _value(value) if equals else True
        elif name:
            found[name], name = _value(word), ""
    return found


def command(launched: Launch) -> Command:
    return Command(flags(words(launched)), dict(launched.env))


def published(env: str, arguments: str) -> Command:
    """A vendor's command: `NAME=value ...` and `--flag value ...`, spread over lines at will."""
    variables = dict(word.split("=", 1) for word in shlex.split(env))
    return Command(flags(shlex.split(arguments)), variables)


def compare(launched: Launch, theirs: Command) -> Differences:
    ours = command(launched)
    mine, others = {**ours.flags, **ours.env}, {**theirs.flags, **theirs.env}
    return Differences(
        left_out=set(others) - set(mine),
        added=set(mine) - set(others),
        changed={
            name: (others[name], mine[name])
            for name in others
            if name in mine and others[name] != mine[name]
        },
    )


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word
