"""The provider's half on the operator's machine: `ray up`, `ray down`, `ray exec`, ...

It keeps nothing: which host is the head, the file says; whether it has been started, the head's
own state file says. So every operator with the file sees the same, and a laptop that is lost takes
nothing with it. `ray down` ends every host of the file and every one that the head knows of: the
head first, whose autoscaler would start the others again.
Called by: nodes.provider.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import click
from ray.autoscaler.tags import (
    NODE_KIND_HEAD,
    NODE_KIND_WORKER,
    STATUS_UP_TO_DATE,
    TAG_RAY_LAUNCH_CONFIG,
    TAG_RAY_NODE_KIND,
    TAG_RAY_NODE_NAME,
    TAG_RAY_NODE_STATUS,
    TAG_RAY_USER_NODE_TYPE,
)

from cluster.errors import ClusterError
from cluster.nodes import ssh
from cluster.nodes.config import Hosts
from cluster.nodes.on_head import end_hosts
from cluster.nodes.operator_lock import OperatorLock
from cluster.nodes.ssh import Runner, Unreachable
from cluster.nodes.state import FILE_NAME, State

log = logging.getLogger(__name__)

_READ_BOUND_S = 15.0


class Operator:
    """One cluster, as its file and its head describe it. `say` prints a line for the operator."""

    def __init__(
        self,
        cluster: str,
        hosts: Hosts,
        lock: OperatorLock,
        runner: Runner = ssh.run,
        say: Callable[[str], None] = click.echo,
    ) -> None:
        self._cluster = cluster
        self._hosts = hosts
        self._lock = lock
        self._runner = runner
        self._say = say
        self._remote: State | None = None
        self._is_created = False
        self._ended: set[str] = set()
        # How far the running command has come; Ray asks for it back.
        self._progress: dict[str, str] = {}

    def nodes(self, tags: dict[str, str]) -> list[str]:
        """The head, if it has been started and `tags` fit. The workers are the head's affair."""
        head = self._hosts.head
        known = self.tags(head)
        if not all(known.get(key) == value for key, value in tags.items()):
            return []
        return [head] if self._is_created or self._was_started() else []

    def tags(self, node_id: str) -> dict[str, str]:
        """What Ray wants to read of the head. Its launch digest is always the current one: what
        must be restarted is decided on the head, by what really runs there; and no digest of its
        set-up is kept, so that files and settings are sent at every `ray up`."""
        if node_id != self._hosts.head:
            return {TAG_RAY_NODE_KIND: NODE_KIND_WORKER}
        return {
            TAG_RAY_NODE_KIND: NODE_KIND_HEAD,
            TAG_RAY_USER_NODE_TYPE: self._hosts.head_type,
            TAG_RAY_NODE_NAME: f"ray-{self._cluster}-head",
            TAG_RAY_LAUNCH_CONFIG: self._hosts.launch_hash,
            TAG_RAY_NODE_STATUS: STATUS_UP_TO_DATE,
            **self._progress,
        }

    def set_tags(self, node_id: str, tags: dict[str, str]) -> None:
        if TAG_RAY_NODE_STATUS in tags:
            self._progress = {TAG_RAY_NODE_STATUS: tags[TAG_RAY_NODE_STATUS]}

    def is_known(self, node_id: str) -> bool:
        return node_id not in self._ended

    def create(self, hosts: Sequence[str], tags: dict[str, str], count: int) -> None:
        """Ray wants a head: it is where the file says.

        Raises: click.ClickException: it does not answer, or another operator is at work."""
        self.take_lock()
        self._is_created = True
        self.set_tags(self._hosts.head, tags)

    def forget(self, node_id: str) -> None:
        """Ray wants to make the head anew (its `auth` has changed, say). Nothing is ended: what
        must be restarted is decided on the head."""
        self._is_created = False

    def take_lock(self) -> None:
        """From now on no other operator changes this cluster, until this process ends.

        Raises: click.ClickException, which Ray's command line prints as it is."""
        try:
            self._lock.acquire()
        except ClusterError as error:
            raise click.ClickException(str(error)) from error

    def for_teardown(self, tags: dict[str, str]) -> list[str]:
        """Hosts that `ray down` has not yet seen to, by what they are."""
        head = self._hosts.head
        known = self._state().taken
        workers = [*self._hosts.workers, *sorted(known - {head, *self._hosts.workers})]
        listed = [head] if tags.get(TAG_RAY_NODE_KIND) == NODE_KIND_HEAD else workers
        return [host for host in listed if host not in self._ended]

    def terminate(self, node_ids: Sequence[str]) -> None:
        """End the cluster's processes on these hosts, and say which hosts do not answer.

        Raises: click.ClickException: after all others have been ended, naming those that could
            not be; or another operator is at work."""
        try:
            self._lock.acquire()
        except Unreachable:
            pass  # The head is dead. Its workers must end all the same.
        except ClusterError as error:
            raise click.ClickException(str(error)) from error
        first = [host for host in node_ids if host == self._hosts.head]
        failed: dict[str, str] = {}
        for group in (first, [host for host in node_ids if host not in first]):
            failed |= end_hosts(
                [self._hosts.host(host) for host in group], self._cluster, self._runner
            )
        self._ended |= set(node_ids)
        if not failed:
            return
        listed = "".join(f"\n  {host}: {why}" for host, why in failed.items())
        raise click.ClickException(
            f"{len(node_ids) - len(failed)} of {len(node_ids)} hosts of cluster {self._cluster} "
            f"have ended; these could not be reached, and something may still run there:{listed}\n"
            "Run `ray down` again when they answer."
        )

    def _was_started(self) -> bool:
        return any(node.is_head for node in self._state().nodes.values())

    def _state(self) -> State:
        """The head's state file, read once. Empty if there is none, or no answer: said aloud."""
        if self._remote is None:
            folder = '"${XDG_STATE_HOME:-$HOME/.local/state}"'
            file = f"{folder}/pdcluster/{self._cluster}/{FILE_NAME}"
            head = self._hosts.host(self._hosts.head)
            try:
                answer = self._runner(
                    head, ssh.login_shell(f"cat {file} 2>/dev/null"), _READ_BOUND_S
                )
                self._remote = State.model_validate_json(answer.out) if answer.out else State()
            except Unreachable as error:
                self._say(str(error))
                self._remote = State()
            except ValueError:
                self._say(f"{head}: {FILE_NAME} cannot be understood; taken for empty")
                self._remote = State()
        return self._remote
