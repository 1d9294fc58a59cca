"""The state of a cluster that runs here, as `up` notes it down."""

from __future__ import annotations

from typing import Any

from cluster.launcher.running import Running


def running_state(cluster: str = "c", **more: Any) -> Running:
    values = {
        "cluster": cluster,
        "phase": "up",
        "topology_file": "/t.yaml",
        "topology_digest": "d",
        "started_at_s": 1.0,
        "model": "m",
        "endpoint": "http://127.0.0.1:8000",
        "key_file": None,
        "ingress": "direct",
    }
    return Running.model_validate(values | more)
