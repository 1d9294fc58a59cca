"""A rack's file as Ray's half of a config, and a fake ssh, for tests of cluster.nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.nodes.ssh import Answer, Host, Unreachable

HEAD = "10.0.0.1"


def rack(**types: list[str]) -> dict[str, Any]:
    """A head and worker types with these hosts, all of them started."""
    workers = {
        name: {
            "resources": {"CPU": 4},
            "labels": {"kind": name},
            "min_workers": len(hosts),
            "max_workers": len(hosts),
            "node_config": {"hosts": hosts},
        }
        for name, hosts in types.items()
    }
    return {
        "cluster_name": "r",
        "max_workers": sum(len(hosts) for hosts in types.values()),
        "provider": {"type": "external", "module": "cluster.nodes.BareHostProvider"},
        "auth": {"ssh_user": "someone", "ssh_private_key": "~/key"},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 2}, "node_config": {"hosts": [HEAD]}},
            **workers,
        },
        "file_mounts": {},
        "worker_setup_commands": [],
        "initialization_commands": [],
        "head_start_ray_commands": ["python3 -m cluster.nodes.start ray start --head"],
        "worker_start_ray_commands": ["python3 -m cluster.nodes.start ray start --address=x:1"],
    }


@dataclass
class FakeSsh:
    """Answers as told; notes down what was asked. `silent`: hosts that do not answer, and why."""

    silent: Mapping[str, str] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, host: Host, remote: str, bound_s: float) -> Answer:
        self.asked.append((host.address, remote))
        if host.address in self.silent:
            raise Unreachable(host.address, self.silent[host.address])
        return self.answers.get(host.address, Answer(0, "", ""))

    def ended(self) -> list[str]:
        """Hosts on which the cluster was ended, in order."""
        return [host for host, remote in self.asked if "cluster.nodes.end" in remote]
