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
    hardware="h200",
    tensor_parallel=4,
)
JUDGED = {"hardware", "tensor_parallel"}
OTHER = {
    field.name: 16 if field.name == "block_size_tokens" else "other"
    for field in dataclasses.fields(Fingerprint)
    if field.name not in JUDGED
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
    other = dataclasses.replace(SAME, **OTHER, hardware="atlas_a3", tensor_parallel=3)  # type: ignore[arg-type]
    assert len(fingerprint.differences(SAME, other)) == len(dataclasses.fields(Fingerprint))


def test_a_worker_that_has_not_said_what_it_is_is_refused() -> None:
    with pytest.raises(KvMismatch, match="d/0 has not said which model and engine it runs"):
        fingerprint.check(view("p", SAME), view("d", None))


@pytest.mark.parametrize(
    ("connector", "prefill", "decode", "fits"),
    [
        ("nixl", 4, 8, True),
        ("nixl", 8, 4, False),
        ("mooncake", 8, 4, True),
        ("mooncake", 4, 8, True),
        ("mooncake", 2, 3, False),
        ("ascend_mooncake", 16, 4, True),
        ("ascend_mooncake", 4, 16, False),
        ("ascend_layerwise", 8, 6, False),
        ("sglang_ascend", 16, 1, True),
    ],
)
def test_each_connector_judges_tensor_parallel_sizes_its_own_way(
    connector: str, prefill: int, decode: int, fits: bool
) -> None:
    one = dataclasses.replace(SAME, connector=connector, tensor_parallel=prefill)
    other = dataclasses.replace(one, tensor_parallel=decode)
    found = fingerprint.differences(one, other)
    assert (found == ()) == fits
    if not fits:
        (sentence,) = found
        assert f"tensor-parallel size is {prefill} on prefill and {decode} on decode" in sentence


def test_two_hardware_generations_do_not_exchange_blocks() -> None:
    a2 = dataclasses.replace(SAME, connector="ascend_mooncake", hardware="atlas_a2")
    a3 = dataclasses.replace(a2, hardware="atlas_a3")
    (sentence,) = fingerprint.differences(a2, a3)
    assert sentence.startswith(
        "hardware generation is Atlas A2 on prefill and Atlas A3 on decode (put pools"
    )
    with pytest.raises(KvMismatch, match="Atlas A3"):
        fingerprint.check(view("p", a2), view("d", a3))


def test_hardware_that_nobody_stated_is_not_held_against_a_pair() -> None:
    unstated = dataclasses.replace(SAME, hardware="")
    assert fingerprint.differences(SAME, unstated) == ()
    fingerprint.check(view("p", unstated), view("d", SAME))


def test_unlike_connectors_never_pair_whatever_their_rules_say() -> None:
    other = dataclasses.replace(SAME, connector="mooncake")
    assert fingerprint.differences(SAME, other) != ()
    assert fingerprint.differences(other, SAME) != ()
