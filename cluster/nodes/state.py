"""What the head knows of its nodes: one JSON file, replaced whole, under a lock.

    nodes.json        this State; absent: no node was ever started
    nodes.json.lock   flock, held for the milliseconds of one change

Ray's autoscaler asks from several threads, and `ray up` changes the file from another process.
Whoever dies at whatever moment leaves the file as it was before or after the change.
Called by: nodes.on_head, nodes.head; nodes.operator reads the head's by ssh.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import ClusterError
from cluster.settings import ClusterPaths

FILE_NAME = "nodes.json"
# As in ray.autoscaler.tags, whose import takes longer than all the rest of `nodes.start`.
_KIND_TAG, _HEAD_KIND = "ray-node-type", "head"


class Node(BaseModel):
    """A Ray node on a host. `tags` are Ray's own; `start` is a digest of how it is started."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str
    node_type: str
    tags: dict[str, str] = Field(default_factory=dict)
    start: str = ""

    @property
    def is_head(self) -> bool:
        return self.tags.get(_KIND_TAG) == _HEAD_KIND


class State(BaseModel):
    """`starts`: by node type, how its nodes are started now. `silent`: hosts that did not answer
    when they were last asked, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    nodes: dict[str, Node] = Field(default_factory=dict)
    starts: dict[str, str] = Field(default_factory=dict)
    silent: dict[str, str] = Field(default_factory=dict)

    @property
    def taken(self) -> set[str]:
        return {node.host for node in self.nodes.values()}

    def without(self, node_ids: Iterator[str] | tuple[str, ...]) -> State:
        gone = set(node_ids)
        kept = {name: node for name, node in self.nodes.items() if name not in gone}
        return self.model_copy(update={"nodes": kept})

    def tagged(self, node_id: str, tags: dict[str, str]) -> State:
        """A node that is gone takes no tags: Ray's updater may come late."""
        node = self.nodes.get(node_id)
        if node is None:
            return self
        changed = node.model_copy(update={"tags": {**node.tags, **tags}})
        return self.model_copy(update={"nodes": {**self.nodes, node_id: changed}})

    def heard(self, silent: dict[str, str], answering: set[str]) -> State:
        """With what a round of asking has found."""
        kept = {host: why for host, why in self.silent.items() if host not in answering}
        return self.model_copy(update={"silent": {**kept, **silent}})


class Store:
    """The state file of one cluster on this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = path.with_name(path.name + ".lock")

    @classmethod
    def of(cls, cluster: str) -> Store:
        return cls(ClusterPaths(cluster).state / FILE_NAME)

    def read(self) -> State:
        """Raises: ClusterError: the file is there and cannot be understood."""
        try:
            text = self.path.read_bytes()
        except FileNotFoundError:
            return State()
        try:
            return State.model_validate_json(text)
        except ValidationError as error:
            raise ClusterError(
                f"{self.path}: cannot be understood; delete it, and `ray up` starts every host anew"
            ) from error

    def update(self, change: Callable[[State], State]) -> State:
        """Apply `change` to the state and keep what comes of it. Blocks while others do so.

        Raises: ClusterError, as `read`; whatever `change` raises, and then nothing is changed."""
        with self._locked():
            before = self.read()
            after = change(before)
            if after != before:
                self._replace(after)
            return after

    def forget(self) -> None:
        """As if no node had ever been started."""
        if not self.path.exists():
            return
        with self._locked():
            self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self._lock, "a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _replace(self, state: State) -> None:
        # One name, not a random one: what a crash leaves is overwritten, not piled up.
        draft = self.path.with_name(self.path.name + ".new")
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(state.model_dump_json(indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.path)
