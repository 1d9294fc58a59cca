"""The provider's half on the head: Ray's autoscaler asks it for nodes, the state file answers.

    create    ask the free hosts whether they answer, choose, note the nodes down; Ray's updater
              then starts Ray there, and tries for 15 min where a host does not answer
    terminate end the cluster's processes on the node's host, then forget the node

Thread-safe. Called by: nodes.provider, in the process of Ray's monitor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    STATUS_UP_TO_DATE,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.nodes import ssh
from cluster.nodes.assignment import choose, with_new
from cluster.nodes.config import Hosts
from cluster.nodes.runner import end_command
from cluster.nodes.ssh import Host, Runner, Unreachable
from cluster.nodes.state import Node, State, Store

log = logging.getLogger(__name__)

_END_BOUND_S = 45.0


class OnHead:
    """Nodes of one cluster, as its head knows them."""

    def __init__(
        self,
        cluster: str,
        hosts: Hosts,
        store: Store,
        runner: Runner = ssh.run,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._cluster = cluster
        self._hosts = hosts
        self._store = store
        self._runner = runner
        self._wall_s = wall_s
        # Ray's autoscaler takes a head that its provider does not list for lost, and stops.
        store.update(self._with_head)

    def nodes(self, tags: Mapping[str, str]) -> list[str]:
        """Ids of nodes that have all of `tags`."""
        return [
            name
            for name, node in self._store.read().nodes.items()
            if all(node.tags.get(key) == value for key, value in tags.items())
        ]

    def tags(self, node_id: str) -> dict[str, str]:
        node = self._store.read().nodes.get(node_id)
        return dict(node.tags) if node is not None else {}

    def set_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self._store.update(lambda state: state.tagged(node_id, tags))

    def is_known(self, node_id: str) -> bool:
        return node_id in self._store.read().nodes

    def create(self, hosts: Sequence[str], tags: dict[str, str], count: int) -> None:
        """Note down `count` new nodes on `hosts`. Raises: TooFewHosts."""
        node_type = tags[TAG_RAY_USER_NODE_TYPE]
        taken = self._store.read().taken
        asked = [self._hosts.host(host) for host in hosts if host not in taken]
        why = ssh.each(asked, lambda host: ssh.why_unreachable(host, self._runner))
        silent = {host: reason for host, reason in why.items() if reason}
        launched_at_ms = round(self._wall_s() * 1000)

        def change(state: State) -> State:
            chosen = choose(hosts, state.taken, silent, count)
            heard = state.heard(silent, set(why) - set(silent))
            return with_new(heard, node_type, tags, chosen, launched_at_ms)

        self._store.update(change)
        for host, reason in silent.items():
            log.warning("host %s (%s) does not answer: %s", host, node_type, reason)

    def terminate(self, node_ids: Sequence[str]) -> None:
        """End these nodes. One that is not known has been ended before: its host may have a newer
        node, which stays. A host that does not answer is forgotten all the same: what is left on
        it ends when the host is used again, or by `ray down`."""
        known = self._store.read().nodes
        ending = {name: known[name] for name in node_ids if name in known}
        workers = {name: node for name, node in ending.items() if not node.is_head}
        silent = end_hosts(
            [self._hosts.host(node.host) for node in workers.values()], self._cluster, self._runner
        )
        for host, why in silent.items():
            log.warning("host %s not ended: %s", host, why)
        self._store.update(lambda state: state.without(tuple(workers)).heard(silent, set()))

    def _with_head(self, state: State) -> State:
        head = self._hosts.head
        node = Node(
            host=head,
            node_type=self._hosts.head_type,
            tags={
                TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
                TAG_RAY_USER_NODE_TYPE: self._hosts.head_type,
                TAG_RAY_NODE_NAME: f"ray-{self._cluster}-head",
                TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            },
        )
        others = {name: known for name, known in state.nodes.items() if not known.is_head}
        return state.model_copy(update={"nodes": {head: node, **others}})


def end_hosts(hosts: Sequence[Host], cluster: str, runner: Runner) -> dict[str, str]:
    """End the cluster's processes on these hosts, all at once. Returns, by host, why it could not
    be done; a host that is not in it has been ended."""

    def end(host: Host) -> str:
        try:
            answer = runner(host, ssh.login_shell(end_command(cluster)), _END_BOUND_S)
        except Unreachable as error:
            return error.why
        return answer.last_words if answer.exit_code else ""

    return {host: why for host, why in ssh.each(hosts, end).items() if why}
