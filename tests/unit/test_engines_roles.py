"""Which engines can change between prefill and decode while they run, and why others cannot."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, get_args

import pytest

from cluster.engines.base import HostFacts, LaunchContext
from cluster.engines.registry import adapter
from cluster.identity import Role, WorkerId
from cluster.topology.schema import ConnectorName, EngineName, IslandSpec, ModelSpec, PoolSpec

# Where each engine runs, and the connectors it speaks.
ENGINES: dict[str, tuple[str, tuple[str, ...]]] = {
    "simulated": ("cpu", get_args(ConnectorName)),
    "vllm": ("cpu", ("nixl", "mooncake")),
    "vllm_ascend": ("npu", ("ascend_mooncake", "ascend_layerwise")),
    "sglang": ("cuda", ("sglang_nixl", "sglang_mooncake")),
}
PAIRS = [(engine, connector) for engine, (_, all_) in ENGINES.items() for connector in all_]
FREE = {("simulated", "nixl"), ("vllm", "nixl")}
SHAPES: list[dict[str, Any]] = [
    {},
    {"nodes_per_replica": 2, "parallel": {"tensor": 2}},
    {"speculative": {"method": "ngram", "num_speculative_tokens": 4}},
]


def pool_of(engine: str, role: Role = Role.DECODE, **more: Any) -> PoolSpec:
    return PoolSpec(name="p", role=role, engine=engine, **more)


def island_of(connector: str) -> IslandSpec:
    return IslandSpec(name="i", pools=["p"], connector=connector)


def context(engine: str, connector: str, platform: str, pool: PoolSpec) -> LaunchContext:
    island = island_of(connector)
    needs = adapter(engine).ports(pool, island)
    return LaunchContext(
        worker=WorkerId("p", 0, 3),
        role=pool.role,
        model=ModelSpec(id="m", max_model_len_tokens=4096),
        model_path="/models/m",
        pool=pool,
        island=island,
        host="10.0.0.1",
        host_facts=HostFacts(platform, cores=2),
        ports={need.name: 20_000 + 100 * at for at, need in enumerate(needs)},
        runtime_dir="/run/x",
        python=sys.executable,
        engine_key="key",
        interface="eth0",
    )


@pytest.mark.parametrize(("engine", "connector"), PAIRS)
def test_exactly_nixl_of_vllm_and_the_simulated_engine_leaves_the_role_free(engine, connector):
    why = adapter(engine).why_fixed_role(pool_of(engine), island_of(connector))
    assert (why == "") is ((engine, connector) in FREE)
    if why:
        assert "start" in why


@pytest.mark.parametrize(("engine", "connector"), sorted(FREE))
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("stated", [Role.PREFILL, Role.DECODE])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_engine_whose_role_is_free_is_started_alike_for_both(
    engine, connector, platform, stated, shape
):
    ours = adapter(engine)
    pool = pool_of(engine, stated, **shape)
    given = context(engine, connector, platform, pool)
    as_prefill, as_decode = (replace(given, role=role) for role in (Role.PREFILL, Role.DECODE))
    one, other = ours.launch(as_prefill), ours.launch(as_decode)
    assert (one.argv, one.env, one.secret_env) == (other.argv, other.env, other.secret_env)
    assert ours.kv_address(as_prefill) == ours.kv_address(as_decode)
    assert ours.probes(as_prefill) == ours.probes(as_decode)
    ports = [ours.ports(pool_of(engine, r, **shape), given.island) for r in Role if r != "mixed"]
    assert ports[0] == ports[1]


@pytest.mark.parametrize("engine", get_args(EngineName))
def test_a_mixed_pool_has_no_role_to_change(engine):
    why = adapter(engine).why_fixed_role(pool_of(engine, Role.MIXED), island_of("nixl"))
    assert "mixed" in why


@pytest.mark.parametrize("engine", ["xllm", "ktransformers"])
@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
def test_engines_that_hand_nothing_over_say_so(engine, role):
    why = adapter(engine).why_fixed_role(pool_of(engine, role), island_of("nixl"))
    assert "hands no KV over" in why
