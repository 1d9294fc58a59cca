"""What must be equal before KV blocks may pass."""

from __future__ import annotations

import dataclasses

import pytest

from cluster.errors import KvMismatch
from cluster.identity import Role, WorkerId, WorkerState
from cluster.kv import fingerprint
from cluster.snapshot import Fingerprint, WorkerView

SAME = Fingerprint(
    model="sha256:aa",
    quantization="none",
    kv_dtype="float32",
    block_size_tokens=128,
    connector="nixl",
    connector_version="nixl-cu12 1.5.1",
    engine="vllm",
    engine_version="0.32.0",
    hash_seed="0",
)
OTHER = {
    field.name: 16 if field.name == "block_size_tokens" else "other"
    for field in dataclasses.fields(Fingerprint)
}


def view(pool: str, print_: Fingerprint | None) -> WorkerView:
    return WorkerView(
        WorkerId(pool, 0), Role.PREFILL, "cpu", WorkerState.READY, "http://h:1", print_, 8192, 1
    )


def test_equal_fingerprints_may_exchange_blocks() -> None:
    assert fingerprint.differences(SAME, dataclasses.replace(SAME)) == ()
    fingerprint.check(view("p", SAME), view("d", dataclasses.replace(SAME)))


@pytest.mark.parametrize("field", list(OTHER))
def test_each_field_that_differs_is_named_with_both_values(field: str) -> None:
    decode = dataclasses.replace(SAME, **{field: OTHER[field]})
    (sentence,) = fingerprint.differences(SAME, decode)
    assert f"is {getattr(SAME, field)!r} on prefill" in sentence
    assert f"{OTHER[field]!r} on decode" in sentence
    with pytest.raises(KvMismatch, match="p/0 cannot feed d/0: ") as caught:
        fingerprint.check(view("p", SAME), view("d", decode))
    assert caught.value.differences == (sentence,)


def test_all_differences_come_at_once() -> None:
    assert len(fingerprint.differences(SAME, Fingerprint(**OTHER))) == len(OTHER)  # type: ignore[arg-type]


def test_a_worker_that_has_not_said_what_it_is_is_refused() -> None:
    with pytest.raises(KvMismatch, match="d/0 has not said which model and engine it runs"):
        fingerprint.check(view("p", SAME), view("d", None))
