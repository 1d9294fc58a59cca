"""The table of connectors' rules: complete, and the same for a file and for running engines."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.kv.fingerprint import differences
from cluster.snapshot import Fingerprint
from cluster.topology.checks import cross_faults
from cluster.topology.pairing import (
    GENERATIONS,
    MIXED_ONLY,
    RULES,
    connectors_of,
    serves_both_roles,
    speaks,
)
from cluster.topology.schema import ConnectorName, EngineName, HardwareName, ServingSpec

HARDWARE = [None, *get_args(HardwareName)]


def test_every_connector_has_a_rule_and_every_hardware_a_name() -> None:
    assert set(RULES) == set(get_args(ConnectorName))
    assert set(GENERATIONS) == set(get_args(HardwareName))


def test_every_engine_speaks_a_connector_or_is_for_mixed_pools_only() -> None:
    for engine in get_args(EngineName):
        assert bool(connectors_of(engine)) is not (engine in MIXED_ONLY), engine
    assert connectors_of("simulated") == tuple(RULES)


@pytest.mark.parametrize(
    ("engine", "connector"),
    [("vllm", "ascend_mooncake"), ("vllm_ascend", "mooncake"), ("sglang", "nixl"), ("vllm", "x")],
)
def test_no_engine_speaks_the_connector_of_another(engine: str, connector: str) -> None:
    assert not speaks(engine, connector)


def test_only_nixl_lets_a_worker_change_its_role_without_a_restart() -> None:
    assert [name for name in RULES if serves_both_roles(name)] == ["nixl"]
    assert not serves_both_roles("no-such-connector")


@given(
    st.sampled_from(sorted(RULES)),
    st.integers(1, 16),
    st.integers(1, 16),
    st.sampled_from(HARDWARE),
    st.sampled_from(HARDWARE),
)
def test_a_file_is_refused_exactly_if_its_engines_would_not_pair(
    connector: str, prefill_tp: int, decode_tp: int, prefill_on: str | None, decode_on: str | None
) -> None:
    def pool(role: str, tensor: int, hardware: str | None) -> dict[str, object]:
        parallel = {"tensor": tensor}
        return {"name": role, "role": role, "engine": "simulated", "parallel": parallel} | (
            {"hardware": hardware} if hardware else {}
        )

    def print_(tensor: int, hardware: str | None) -> Fingerprint:
        return Fingerprint(
            "m", "none", "auto", 16, connector, "1", "simulated", "1", "0", hardware or "", tensor
        )

    serving = ServingSpec.model_validate(
        {
            "model": {"id": "m"},
            "pools": [
                pool("prefill", prefill_tp, prefill_on),
                pool("decode", decode_tp, decode_on),
            ],
            "islands": [{"name": "i", "pools": ["prefill", "decode"], "connector": connector}],
        }
    )
    unlike = differences(print_(prefill_tp, prefill_on), print_(decode_tp, decode_on))
    assert bool(cross_faults(serving)) is bool(unlike)
