"""How pdcluster starts a simulated engine."""

from __future__ import annotations

import json
import sys
from typing import Any, get_args

import pytest

from cluster.engines.base import HostFacts, Launch, LaunchContext
from cluster.engines.registry import adapter
from cluster.engines.simulated.config import SimulatedConfig
from cluster.errors import InvalidInput
from cluster.identity import Role, WorkerId
from cluster.topology.schema import ConnectorName, IslandSpec, ModelSpec, PoolSpec


def context(role: Role = Role.PREFILL, connector: str = "mooncake", **pool: Any) -> LaunchContext:
    spec = PoolSpec(name="p", role=role, engine="simulated", **pool)
    island = IslandSpec(name="i", pools=["p"], connector=connector, lease_s=12.5)
    needs = adapter("simulated").ports(spec, island)
    return LaunchContext(
        worker=WorkerId("p", 0),
        role=role,
        model=ModelSpec(id="simulated"),
        model_path="/models/simulated",
        pool=spec,
        island=island,
        host="127.0.0.1",
        host_facts=HostFacts("cpu"),
        ports={need.name: 20_000 + at for at, need in enumerate(needs)},
        runtime_dir="/run/x",
        python=sys.executable,
        engine_key="secret-key",
    )


def launch(role: Role = Role.PREFILL, connector: str = "mooncake", **pool: Any) -> Launch:
    return adapter("simulated").launch(context(role, connector, **pool))


def config(launched: Launch) -> SimulatedConfig:
    return SimulatedConfig.model_validate_json(launched.argv[-1])


def test_command_is_the_module_with_its_whole_configuration():
    launched = launch(speculative={"num_speculative_tokens": 3}, simulated={"decode_step_s": 0.5})
    assert launched.argv[1:4] == ("-m", "cluster.engines.simulated", "--config-json")
    assert json.loads(launched.argv[4]) == {
        "port": 20000,
        "served_model_name": "simulated",
        "model_path": "/models/simulated",
        "num_speculative_tokens": 3,
        "timings": {"decode_step_s": 0.5},
        "kv": {
            "dialect": "mooncake",
            "role": "kv_producer",
            "port": 20003,
            "bootstrap_port": 20004,
            "lease_s": 12.5,
        },
        "events": {
            "endpoint": "tcp://127.0.0.1:20001",
            "replay_endpoint": "tcp://127.0.0.1:20002",
        },
    }
    assert not any("secret-key" in word for word in launched.argv)
    assert launched.secret_env == {"VLLM_API_KEY": "secret-key"}


def test_nixl_workers_have_one_role_and_no_bootstrap():
    kv = config(launch(Role.DECODE, "nixl")).kv
    assert kv is not None
    assert (kv.role, kv.bootstrap_port) == ("kv_both", 0)


@pytest.mark.parametrize("connector", get_args(ConnectorName))
def test_a_pool_can_stand_for_any_connector(connector: str):
    prefill, decode = (config(launch(role, connector)).kv for role in (Role.PREFILL, Role.DECODE))
    assert prefill is not None
    assert decode is not None
    assert prefill.dialect == decode.dialect == connector
    if connector != "nixl":
        assert (prefill.role, decode.role) == ("kv_producer", "kv_consumer")
    has_bootstrap = connector == "mooncake" or connector.startswith("sglang")
    assert (bool(prefill.bootstrap_port), bool(decode.bootstrap_port)) == (has_bootstrap, False)
    address = adapter("simulated").kv_address(context(Role.PREFILL, connector))
    assert ("bootstrap_port" in address) is has_bootstrap


def test_engines_that_meet_in_rooms_are_probed_with_nobodys_room():
    probes = adapter("simulated").probes(context(Role.DECODE, "sglang_ascend"))
    assert probes.one_token == {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
    for alone in (context(Role.MIXED, "sglang_ascend"), context(Role.DECODE, "nixl")):
        assert not adapter("simulated").probes(alone).one_token


def test_mixed_workers_move_nothing():
    assert config(launch(Role.MIXED)).kv is None


def test_context_never_exceeds_a_small_cache_unless_stated():
    small = launch(simulated={"kv_capacity_tokens": 2048})
    assert config(small).max_model_len_tokens == 2048


@pytest.mark.parametrize(
    ("pool", "says"),
    [
        ({"engine_args": {"seed": 1}}, "seed"),
        ({"engine_args": {"faults": {"hng": True}}}, "hng"),
    ],
)
def test_what_it_does_not_know_is_refused(pool: dict[str, Any], says: str):
    with pytest.raises(InvalidInput, match=says):
        launch(**pool)


def test_nodes_of_one_replica_meet_at_rank_0():
    ranks = config(launch(nodes_per_replica=2, connector="nixl")).ranks
    assert ranks is not None
    assert (ranks.nodes, ranks.node_rank, ranks.head_host) == (2, 0, "127.0.0.1")
    assert ranks.head_port == 20003
    assert config(launch()).ranks is None


def test_a_second_process_is_there_when_it_is_asked_for():
    assert not config(launch()).core_process
    assert config(launch(engine_args={"core-process": True})).core_process
