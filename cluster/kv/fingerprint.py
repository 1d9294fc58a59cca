"""May one engine's KV blocks be read by another? Plain sentences of what differs.

In: two fingerprints. Out: nothing, or why not. Pure. Called before any traffic between two
workers: by the gateway when it pairs workers, by the coordinator at each transfer.
"""

from __future__ import annotations

from dataclasses import fields

from cluster.errors import KvMismatch
from cluster.snapshot import Fingerprint, WorkerView

# What people call the field. A field that is missing here would be compared and not be named.
_NAMES = {
    "model": "model (digest of its files, or hub id and revision)",
    "quantization": "quantization",
    "kv_dtype": "KV cache dtype",
    "block_size_tokens": "KV block size in tokens",
    "connector": "connector",
    "connector_version": "connector version",
    "engine": "engine",
    "engine_version": "engine version",
    "hash_seed": "hash seed (PYTHONHASHSEED)",
}
assert set(_NAMES) == {field.name for field in fields(Fingerprint)}


def differences(prefill: Fingerprint, decode: Fingerprint) -> tuple[str, ...]:
    """One sentence per difference, in the order of the fields. Empty: blocks may pass."""
    return tuple(
        f"{name} is {_shown(mine)} on prefill and {_shown(theirs)} on decode"
        for key, name in _NAMES.items()
        if (mine := getattr(prefill, key)) != (theirs := getattr(decode, key))
    )


def check(prefill: WorkerView, decode: WorkerView) -> None:
    """Raises: KvMismatch if blocks must not pass from `prefill` to `decode`.

    A worker that has not said what it is counts as different: it may be anything."""
    if prefill.fingerprint is None or decode.fingerprint is None:
        silent = tuple(
            f"{worker.id.name} has not said which model and engine it runs"
            for worker in (prefill, decode)
            if worker.fingerprint is None
        )
        raise KvMismatch(prefill.id.name, decode.id.name, silent)
    # Pools of one kind are the rule: equal fingerprints cost one comparison.
    if prefill.fingerprint != decode.fingerprint:
        raise KvMismatch(
            prefill.id.name,
            decode.id.name,
            differences(prefill.fingerprint, decode.fingerprint),
        )


def _shown(value: str | int) -> str:
    return repr(value) if isinstance(value, str) else str(value)
