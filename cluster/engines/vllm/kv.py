"""How a vLLM engine exchanges KV blocks and announces them. Pure.

Called by: engines.vllm.adapter. The connector classes are ours (cluster.kv.connectors), loaded by
the engine by module path: they record transfers, obey release commands, and are quiet on CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from ipaddress import IPv4Address, ip_address
from typing import Any

from cluster.engines.base import LaunchContext, Platform, PortNeed
from cluster.identity import Role
from cluster.topology.schema import ConnectorName, PoolSpec

CONNECTOR_MODULES = "cluster.kv.connectors"
_CONNECTORS: Mapping[tuple[ConnectorName, bool], str] = {
    ("nixl", True): "QuietNixlConnector",
    ("nixl", False): "RecordingNixlConnector",
    ("mooncake", True): "CpuMooncakeConnector",
    ("mooncake", False): "RecordingMooncakeConnector",
}
_MOONCAKE_ROLES = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer"}

EVENTS, REPLAY, NIXL, BOOTSTRAP = "kv_events", "kv_replay", "nixl", "mooncake_bootstrap"


def moves_kv(role: Role) -> bool:
    """A mixed worker prefills and decodes the same request: nothing to move."""
    return role is not Role.MIXED


def event_ports(pool: PoolSpec) -> list[PortNeed]:
    """vLLM adds the data-parallel rank to each of these ports."""
    return [PortNeed(EVENTS, pool.parallel.data), PortNeed(REPLAY, pool.parallel.data)]


def ports(pool: PoolSpec, connector: ConnectorName) -> list[PortNeed]:
    """vLLM adds the data-parallel rank to each of these ports, except the bootstrap's."""
    needs = event_ports(pool)
    if moves_kv(pool.role):
        if connector == "nixl":
            needs.append(PortNeed(NIXL, pool.parallel.data))
        elif pool.role is Role.PREFILL:
            needs.append(PortNeed(BOOTSTRAP))
    return needs


def why_fixed_role(connector: ConnectorName) -> str:
    """What ties a running engine to prefill or to decode; "": nothing."""
    if connector == "nixl":
        return ""
    return (
        f"with {connector} an engine is started as kv_producer or as kv_consumer "
        "(--kv-transfer-config); another role takes a new start"
    )


def transfer_config(context: LaunchContext, platform: Platform) -> dict[str, Any] | None:
    """--kv-transfer-config, or None for a worker that moves nothing."""
    if not moves_kv(context.role):
        return None
    connector, on_cpu = context.island.connector, platform == "cpu"
    config: dict[str, Any] = {
        "kv_connector": _CONNECTORS[connector, on_cpu],
        "kv_connector_module_path": f"{CONNECTOR_MODULES}.{connector}",
        # NIXL's roles are equal, so a worker may change its role without a restart.
        "kv_role": "kv_both" if connector == "nixl" else _MOONCAKE_ROLES[context.role],
        # The gateway sees the failure and decides by the island's policy; `recompute` would hide
        # it and let a decode worker prefill behind the router's back.
        "kv_load_failure_policy": "fail",
    }
    extra: dict[str, Any] = {}
    if connector == "nixl":
        extra["kv_lease_duration"] = lease_s(context)
        if on_cpu:
            config["kv_buffer_device"] = "cpu"
    elif on_cpu:
        extra["mooncake_protocol"] = "tcp"
    if extra:
        config["kv_connector_extra_config"] = extra
    return config


def lease_s(context: LaunchContext) -> int:
    """vLLM takes whole seconds."""
    return math.ceil(context.island.lease_s)


def transfer_env(context: LaunchContext) -> dict[str, str]:
    if not moves_kv(context.role):
        return {}
    if context.island.connector == "nixl":
        return {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": context.host,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(context.ports[NIXL]),
        }
    env = {"VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": str(lease_s(context))}
    if context.role is Role.PREFILL:
        env["VLLM_MOONCAKE_BOOTSTRAP_PORT"] = str(context.ports[BOOTSTRAP])
    return env


def events_config(context: LaunchContext) -> dict[str, Any]:
    """--kv-events-config, bound to the worker's address only."""
    return {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": bound_endpoint(context.host, context.ports[EVENTS]),
        "replay_endpoint": endpoint(context.host, context.ports[REPLAY]),
    }


def bound_endpoint(host: str, port: int) -> str:
    """vLLM binds a publisher only if the endpoint holds `*` or `::`, and connects it otherwise.
    ZeroMQ takes an IPv4-mapped IPv6 address for the IPv4 address it is, and binds just that."""
    try:
        address = ip_address(host)
    except ValueError:
        return f"tcp://*:{port}"
    if isinstance(address, IPv4Address):
        return f"tcp://[::ffff:{address}]:{port}"
    return f"tcp://*:{port}"


def endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def address(context: LaunchContext) -> dict[str, str | int]:
    """What WorkerView.kv says of this worker."""
    known: dict[str, str | int] = {
        "events": endpoint(context.host, context.ports[EVENTS]),
        "replay": endpoint(context.host, context.ports[REPLAY]),
    }
    if BOOTSTRAP in context.ports:
        known["bootstrap_addr"] = f"http://{context.host}:{context.ports[BOOTSTRAP]}"
    return known
