"""May one engine's KV blocks be read by another? Plain sentences of what differs.

In: two fingerprints. Out: nothing, or why not. Pure. Most fields must be equal; hardware and
tensor-parallel sizes are judged by the connector's own rule (`topology.pairing`, the same that
`pdcluster validate` applies to a file). Called before any traffic between two workers: by the
gateway when it pairs workers, by the coordinator at each transfer.
"""

from __future__ import annotations

from dataclasses import fields

from cluster.errors import KvMismatch
from cluster.snapshot import Fingerprint, WorkerView
from cluster.topology.pairing import Side, objections

# What people call the fields that must be equal, and those that a connector's rule judges. A field
# that is missing here would be compared and not be named.
_EQUAL = {
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
_JUDGED = {"hardware": "hardware generation", "tensor_parallel": "tensor-parallel size"}
assert {*_EQUAL, *_JUDGED} == {field.name for field in fields(Fingerprint)}


def differences(prefill: Fingerprint, decode: Fingerprint) -> tuple[str, ...]:
    """One sentence per difference, in the order of the fields. Empty: blocks may pass."""
    unequal = [
        f"{name} is {_shown(mine)} on prefill and {_shown(theirs)} on decode"
        for key, name in _EQUAL.items()
        if (mine := getattr(prefill, key)) != (theirs := getattr(decode, key))
    ]
    sides = (Side(one.hardware, one.tensor_parallel) for one in (prefill, decode))
    judged = [
        f"{_JUDGED[objection.about]} is {objection.prefill} on prefill and {objection.decode} on "
        f"decode ({objection.fix})"
        for objection in objections(prefill.connector, *sides)
    ]
    return (*unequal, *judged)


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
    if prefill.model_revision != decode.model_revision:
        why = (
            f"model revision is {_shown(prefill.model_revision)} on prefill and "
            f"{_shown(decode.model_revision)} on decode"
        )
        raise KvMismatch(prefill.id.name, decode.id.name, (why,))
    # Pools of one kind are the rule: equal fingerprints cost one comparison.
    if prefill.fingerprint != decode.fingerprint:
        unlike = differences(prefill.fingerprint, decode.fingerprint)
        if unlike:
            raise KvMismatch(prefill.id.name, decode.id.name, unlike)


def _shown(value: str | int) -> str:
    return repr(value) if isinstance(value, str) else str(value)
