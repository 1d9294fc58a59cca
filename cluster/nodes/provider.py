"""Ray's node provider for hosts that are simply there: unlike machines, listed by type.

    provider: {type: external, module: cluster.nodes.BareHostProvider}

Ray makes one on the operator's machine for each of its commands (nodes.operator) and one on the
head, in the autoscaler (nodes.on_head). `ray up` tells the head's copy of the file which it is.
docs/racks.md says what hosts need and what happens when. Called by: Ray.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from ray.autoscaler._private.util import hash_launch_conf
from ray.autoscaler.node_provider import NodeProvider

from cluster.nodes.assignment import address_of
from cluster.nodes.config import INJECTED, TOKEN_FILE, Access, Hosts, findings
from cluster.nodes.on_head import OnHead
from cluster.nodes.operator import Operator
from cluster.nodes.operator_lock import OperatorLock
from cluster.nodes.runner import BareHostRunner, ContainerRunner
from cluster.nodes.state import Store
from cluster.topology.findings import dotted


class BareHostProvider(NodeProvider):  # type: ignore[misc]  # Ray ships no types
    """Nodes on the hosts that the file lists. Thread-safe."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        if INJECTED not in provider_config:
            raise click.ClickException(
                "this config has not been through BareHostProvider.bootstrap_config: hand the "
                "topology file itself to `ray up`"
            )
        self._hosts = Hosts.model_validate(provider_config[INJECTED])
        self._side: OnHead | Operator
        if self._hosts.on_head:
            self._side = OnHead(cluster_name, self._hosts, Store.of(cluster_name))
        else:
            head = self._hosts.host(self._hosts.head)
            self._side = Operator(cluster_name, self._hosts, OperatorLock(head, cluster_name))

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        """The config with what the provider needs of its other sections.

        Raises: click.ClickException with every fault of it."""
        if INJECTED in cluster_config["provider"]:
            return cluster_config  # the head's own copy
        faults = [f"{dotted(f.key)}: {f.found}; {f.fix}" for f in findings(cluster_config)]
        faults += _missing_files(cluster_config)
        if faults:
            raise click.ClickException("the file is not valid:\n  " + "\n  ".join(faults))
        config = copy.deepcopy(cluster_config)
        hosts = Hosts.of(config)
        head = config["available_node_types"][hosts.head_type]["node_config"]
        launch_hash = hash_launch_conf(head, config["auth"])
        hosts = hosts.model_copy(update={"launch_hash": launch_hash})
        config["provider"][INJECTED] = hosts.model_dump(mode="json")
        return config

    def prepare_for_head_node(self, cluster_config: dict[str, Any]) -> dict[str, Any]:
        """The head's copy of the config. Ray calls this in `ray up`, before it touches the head."""
        assert isinstance(self._side, Operator)
        self._side.take_lock()
        config = copy.deepcopy(cluster_config)
        there = self._hosts.model_copy(
            update={"on_head": True, "access": Access.of(config["auth"])}
        )
        config["provider"][INJECTED] = there.model_dump(mode="json")
        config["provider"].pop("_config_cache_path", None)
        return config

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        return self._side.nodes(tag_filters)

    def nodes_for_teardown(self, tag_filters: dict[str, str]) -> list[str]:
        if isinstance(self._side, Operator):
            return self._side.for_teardown(tag_filters)
        return self._side.nodes(tag_filters)

    def is_running(self, node_id: str) -> bool:
        return self._side.is_known(node_id)

    def is_terminated(self, node_id: str) -> bool:
        return not self._side.is_known(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        return self._side.tags(node_id)

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self._side.set_tags(node_id, tags)

    def external_ip(self, node_id: str) -> str:
        return address_of(node_id)

    def internal_ip(self, node_id: str) -> str:
        return address_of(node_id)

    def create_node(self, node_config: dict[str, Any], tags: dict[str, str], count: int) -> None:
        self._side.create(node_config["hosts"], tags, count)

    def terminate_node(self, node_id: str) -> None:
        if isinstance(self._side, Operator):
            self._side.forget(node_id)
        else:
            self._side.terminate([node_id])

    def terminate_nodes(self, node_ids: list[str]) -> None:
        self._side.terminate(node_ids)

    def get_command_runner(
        self,
        log_prefix: str,
        node_id: str,
        auth_config: dict[str, Any],
        cluster_name: str,
        process_runner: ModuleType,
        use_internal_ip: bool,
        docker_config: dict[str, Any] | None = None,
    ) -> Any:
        """What Ray runs its commands on the node with."""
        common: dict[str, Any] = {
            "log_prefix": log_prefix,
            "node_id": node_id,
            "provider": self,
            "auth_config": auth_config,
            "cluster_name": cluster_name,
            "process_runner": process_runner,
            "use_internal_ip": use_internal_ip,
            "host": self._hosts.host(address_of(node_id)),
            "has_token": self._hosts.has_token,
            "before_stop": self._before_stop,
        }
        if docker_config and docker_config.get("container_name"):
            return ContainerRunner(docker_config, **common)
        return BareHostRunner(**common)

    def _before_stop(self) -> None:
        # `ray down` sends this before it asks the provider for anything.
        if isinstance(self._side, Operator):
            self._side.take_lock()


def _missing_files(config: dict[str, Any]) -> list[str]:
    """Files to be sent that are not there: Ray itself would stop in the middle."""
    faults = []
    for remote, local in config.get("file_mounts", {}).items():
        if not os.path.exists(Path(local).expanduser()):
            make = "make it: ray get-auth-token --generate" if remote == TOKEN_FILE else "make it"
            faults.append(f'file_mounts["{remote}"]: {local} does not exist; {make}')
    key = config["auth"].get("ssh_private_key")
    if key is not None and not Path(key).expanduser().exists():
        faults.append(f"auth.ssh_private_key: {key} does not exist; write the key's path")
    return faults
