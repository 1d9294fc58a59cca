"""The topologies that are tormented. Everything on loopback, on ports that are free now."""

from __future__ import annotations

import random
import socket
from typing import Any

# Ray's workers take theirs up to 19999, engines up to 29999, the kernel from 32768 on.
_PORTS = range(30_000, 32_700)

HUNG_AFTER_S = 3.0
LEASE_S = 5.0
MODEL = "simulated"
REAL_MODEL = "smollm2-135m-instruct"


def simulated(
    cluster: str, prefill: int = 3, decode: int = 3, prefill_tokens_per_s: float = 20_000.0
) -> Any:
    """One island over NIXL's flow; a token of an answer takes 20 ms."""
    pools = []
    for role, count in (("prefill", prefill), ("decode", decode)):
        pools.append(
            {
                "name": role,
                "role": role,
                "engine": "simulated",
                "replicas": {"initial": count, "min": 1, "max": count + 2},
                # Tickets: room for those that are added while the run goes.
                "placement": {"resources": {"CPU": 0.1}},
                "simulated": {
                    "prefill_tokens_per_s": prefill_tokens_per_s,
                    "decode_step_s": 0.02,
                    "kv_capacity_tokens": 65_536,
                },
                "engine_args": {"fault-endpoint": True, "core-process": True},
            }
        )
    model = {"id": MODEL, "max_model_len_tokens": 16_384}
    return _file(cluster, model, pools, HUNG_AFTER_S, backoff_max_s=2.0)


def real(cluster: str) -> Any:
    """topologies/local-cpu.yaml with a second decode engine."""
    pools = [
        {
            "name": role,
            "role": role,
            "replicas": {"initial": count, "min": 1, "max": count + 1},
            "placement": {"resources": {"CPU": 0.5}},
            "kv_cache_gib": 0.5,
            "max_num_seqs": 16,
        }
        for role, count in (("prefill", 1), ("decode", 2))
    ]
    model = {"id": REAL_MODEL, "max_model_len_tokens": 4096, "dtype": "float32"}
    return _file(cluster, model, pools, 20.0, backoff_max_s=2.0)


def _file(
    cluster: str,
    model: dict[str, Any],
    pools: list[dict[str, Any]],
    hung_after_s: float,
    backoff_max_s: float,
) -> Any:
    ports = free_ports(2)
    serving = {
        "model": model,
        "pools": pools,
        "islands": [
            {
                "name": "one",
                "pools": [pool["name"] for pool in pools],
                "connector": "nixl",
                "lease_s": LEASE_S,
            }
        ],
        "health": {
            "hung_after_s": hung_after_s,
            "restart_backoff_s": 0.5,
            "restart_backoff_max_s": backoff_max_s,
        },
        "gateway": {"port": ports[0], "ingress": "direct", "replicas": 2},
        "control": {"port": ports[1]},
        "observability": {"prometheus": {"mode": "off"}},
    }
    return {
        "cluster_name": cluster,
        "max_workers": 0,
        "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
        "auth": {"ssh_user": "root"},
        "metadata": {"serving": serving},
    }


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    found: list[int] = []
    # From anywhere: others may look for theirs at this moment.
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"fewer than {count} ports are free in {_PORTS}")
