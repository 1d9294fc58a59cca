"""What the controller must not forget, in Ray's GCS key-value store: desired state, the engines'
key, the control API's address and token, the generation of every slot, what was asked of the
cluster, and how far snapshot versions have been given out.

The store lives in the head's GCS process: it outlives every actor, and ends with the Ray cluster.
Called by: control.loop, control.publisher, control.actor, and the launcher through control.actor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Protocol

from cluster.control.reconcile import Slot, SlotKey
from cluster.control.state import DesiredState

_RAY_KV_NAMESPACE = b"pdcluster"


@dataclass(frozen=True, slots=True)
class ApiAccess:
    """Where the control API listens, and the token it asks for."""

    host: str
    port: int
    token: str = field(repr=False)


class KeyValue(Protocol):
    """Bytes by key. Blocks for one round trip to the head."""

    def get(self, key: str) -> bytes | None: ...

    def put(self, key: str, value: bytes) -> None: ...

    def delete(self, key: str) -> None: ...


class RayKeyValue:
    """Ray's GCS key-value store, keys below the cluster's name."""

    def __init__(self, cluster: str) -> None:
        self._prefix = f"{cluster}/"

    def get(self, key: str) -> bytes | None:
        from ray.experimental import internal_kv

        found: bytes | None = internal_kv._internal_kv_get(
            self._prefix + key, namespace=_RAY_KV_NAMESPACE
        )
        return found

    def put(self, key: str, value: bytes) -> None:
        from ray.experimental import internal_kv

        internal_kv._internal_kv_put(
            self._prefix + key, value, overwrite=True, namespace=_RAY_KV_NAMESPACE
        )

    def delete(self, key: str) -> None:
        from ray.experimental import internal_kv

        internal_kv._internal_kv_del(self._prefix + key, namespace=_RAY_KV_NAMESPACE)


class Store:
    """Typed entries over a KeyValue. Every method blocks for one round trip."""

    _DESIRED = "desired"
    _ENGINE_KEY = "engine-key"
    _API_ACCESS = "api-access"
    _SLOTS = "slots"
    _VERSIONS = "versions-given-out"
    _CHANGES = "changes"

    def __init__(self, entries: KeyValue) -> None:
        self._entries = entries

    def desired(self) -> DesiredState | None:
        found = self._entries.get(self._DESIRED)
        return DesiredState.model_validate_json(found) if found is not None else None

    def put_desired(self, desired: DesiredState) -> None:
        self._entries.put(self._DESIRED, desired.model_dump_json().encode())

    def engine_key(self) -> str:
        return (self._entries.get(self._ENGINE_KEY) or b"").decode()

    def put_engine_key(self, key: str) -> None:
        self._entries.put(self._ENGINE_KEY, key.encode())

    def api_access(self) -> ApiAccess | None:
        found = self._entries.get(self._API_ACCESS)
        return ApiAccess(**json.loads(found)) if found is not None else None

    def put_api_access(self, access: ApiAccess) -> None:
        self._entries.put(self._API_ACCESS, json.dumps(asdict(access)).encode())

    def slots(self) -> dict[SlotKey, Slot]:
        """Generations and failures in a row. Pauses are not kept: a new controller's first
        restart does not wait, its second does."""
        found = json.loads(self._entries.get(self._SLOTS) or b"[]")
        return {
            (pool, index): Slot(generation, failures) for pool, index, generation, failures in found
        }

    def put_slots(self, slots: Mapping[SlotKey, Slot]) -> None:
        rows = [
            (pool, index, slot.generation, slot.failures) for (pool, index), slot in slots.items()
        ]
        self._entries.put(self._SLOTS, json.dumps(rows).encode())

    def versions_given_out(self) -> int:
        """No snapshot version above this has ever been published."""
        return int(self._entries.get(self._VERSIONS) or 0)

    def put_versions_given_out(self, version: int) -> None:
        self._entries.put(self._VERSIONS, str(version).encode())

    def changes(self) -> bytes:
        """As history.History.saved gave it."""
        return self._entries.get(self._CHANGES) or b""

    def put_changes(self, saved: bytes) -> None:
        self._entries.put(self._CHANGES, saved)

    def forget(self) -> None:
        """Delete all: the cluster is over, and its gateways are stopped."""
        for key in (
            *(self._DESIRED, self._ENGINE_KEY, self._API_ACCESS),
            *(self._SLOTS, self._VERSIONS, self._CHANGES),
        ):
            self._entries.delete(key)
