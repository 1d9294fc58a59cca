"""What a vLLM engine is started with, word for word."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from cluster.engines.base import HostFacts, Launch, LaunchContext
from cluster.engines.registry import adapter
from cluster.errors import InvalidInput
from cluster.identity import Role, WorkerId
from cluster.topology.schema import IslandSpec, ModelSpec, ParallelSpec, PoolSpec

AVX2 = HostFacts("cpu", frozenset({"avx2"}), cores=2)
H200 = HostFacts("cuda", frozenset({"avx512_bf16"}), cores=192)
PORTS = {
    "http": 20001,
    "kv_events": 20002,
    "kv_replay": 20003,
    "nixl": 20004,
    "mooncake_bootstrap": 20005,
    "rendezvous": 20006,
}
HEAD_PORTS = {"http": 21001, "rendezvous": 21006}  # another node's
SMOL = ModelSpec(id="smollm2-135m-instruct", max_model_len_tokens=8192)
GLM = ModelSpec(
    id="zai-org/GLM-5.2-FP8",
    served_name="glm-5.2",
    kv_cache_dtype="fp8",
    tool_call_parser="glm47",
    reasoning_parser="glm45",
)
NGRAM = {"method": "ngram", "num_speculative_tokens": 4}


def launch(
    role: Role = Role.DECODE,
    connector: str = "nixl",
    facts: HostFacts = AVX2,
    model: ModelSpec = SMOL,
    model_path: str = "/models/smol",
    host: str = "127.0.0.1",
    node_rank: int = 0,
    head_host: str = "",
    interface: str = "eth0",
    **pool: Any,
) -> Launch:
    spec = PoolSpec(name="pool", role=role, **pool)
    island = IslandSpec(name="i", pools=["pool"], connector=connector, lease_s=29.5)
    needed = {need.name for need in adapter("vllm").ports(spec, island)}
    return adapter("vllm").launch(
        LaunchContext(
            worker=WorkerId("pool", 0, 3),
            role=role,
            model=model,
            model_path=model_path,
            pool=spec,
            island=island,
            host=host,
            host_facts=facts,
            ports={name: port for name, port in PORTS.items() if name in needed},
            runtime_dir="/run/x",
            python="/venv/bin/python",
            engine_key="secret-key",
            node_rank=node_rank,
            head_host=head_host,
            head_ports=HEAD_PORTS if node_rank else {},
            interface=interface,
        )
    )


def flag(launched: Launch, name: str) -> str | None:
    """The word after --name; None if the flag is not there."""
    words = launched.argv
    return words[words.index(f"--{name}") + 1] if f"--{name}" in words else None


def test_cpu_prefill_over_nixl():
    launched = launch(Role.PREFILL, kv_cache_gib=0.5, max_num_seqs=16)
    assert launched.argv == (
        *("/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", "/models/smol"),
        *("--host", "127.0.0.1"),
        *("--port", "20001"),
        *("--served-model-name", "smollm2-135m-instruct"),
        *("--dtype", "float32"),
        *("--max-model-len", "8192"),
        *("--max-num-seqs", "16"),
        *("--kv-cache-memory-bytes", "536870912"),
        *("--prefix-caching-hash-algo", "sha256_cbor"),
        "--enforce-eager",
        *("--distributed-executor-backend", "uni"),
        "--kv-transfer-config",
        '{"kv_connector":"QuietNixlConnector",'
        '"kv_connector_module_path":"cluster.kv.connectors.nixl",'
        '"kv_role":"kv_both",'
        '"kv_load_failure_policy":"fail",'
        '"kv_buffer_device":"cpu",'
        '"kv_connector_extra_config":{"kv_lease_duration":30}}',
        "--kv-events-config",
        '{"enable_kv_cache_events":true,"publisher":"zmq",'
        '"endpoint":"tcp://[::ffff:127.0.0.1]:20002",'
        '"replay_endpoint":"tcp://127.0.0.1:20003"}',
        "--enable-prompt-tokens-details",
        "--enable-scale-out",
        "--disable-uvicorn-access-log",
    )
    assert launched.env == {
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_RPC_BASE_PATH": "/run/x",
        "PYTHONHASHSEED": "0",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": "20004",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    assert launched.secret_env == {"VLLM_API_KEY": "secret-key"}


def test_who_has_the_model_compiled_has_the_helpers_compiled_too():
    launched = launch(Role.PREFILL, engine_args={"enforce_eager": False})
    assert "--enforce-eager" not in launched.argv
    assert "TORCHDYNAMO_DISABLE" not in launched.env


def test_cpu_decode_over_nixl_differs_from_prefill_only_in_what_its_pool_says():
    prefill, decode = launch(Role.PREFILL), launch(Role.DECODE, speculative=NGRAM)
    extra = ("--speculative-config", '{"method":"ngram","num_speculative_tokens":4}')
    at = decode.argv.index("--speculative-config")
    assert decode.argv[at : at + 2] == extra
    assert decode.argv[:at] + decode.argv[at + 2 :] == prefill.argv
    assert decode.env == prefill.env


@pytest.mark.parametrize(
    ("role", "kv_role"), [(Role.PREFILL, "kv_producer"), (Role.DECODE, "kv_consumer")]
)
def test_cpu_over_mooncake(role: Role, kv_role: str):
    launched = launch(role, "mooncake")
    assert flag(launched, "kv-transfer-config") == (
        '{"kv_connector":"CpuMooncakeConnector",'
        '"kv_connector_module_path":"cluster.kv.connectors.mooncake",'
        f'"kv_role":"{kv_role}",'
        '"kv_load_failure_policy":"fail",'
        '"kv_connector_extra_config":{"mooncake_protocol":"tcp"}}'
    )
    assert launched.env["VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT"] == "30"
    bootstrap = launched.env.get("VLLM_MOONCAKE_BOOTSTRAP_PORT")
    assert bootstrap == ("20005" if role is Role.PREFILL else None)
    assert not any("NIXL" in name for name in launched.env)


def test_cuda_eight_way_tensor_parallel():
    launched = launch(
        Role.PREFILL,
        facts=H200,
        model=GLM,
        model_path="zai-org/GLM-5.2-FP8",
        host="10.0.0.5",
        parallel=ParallelSpec(tensor=8, expert=True),
        speculative={"method": "mtp", "num_speculative_tokens": 5},
        engine_args={"gpu_memory_utilization": 0.9, "async-scheduling": True},
    )
    assert launched.argv == (
        *("/venv/bin/python", "-m", "vllm.entrypoints.cli.main", "serve", "zai-org/GLM-5.2-FP8"),
        *("--host", "10.0.0.5"),
        *("--port", "20001"),
        *("--served-model-name", "glm-5.2"),
        *("--dtype", "auto"),
        *("--kv-cache-dtype", "fp8"),
        "--enable-auto-tool-choice",
        *("--tool-call-parser", "glm47"),
        *("--reasoning-parser", "glm45"),
        *("--prefix-caching-hash-algo", "sha256_cbor"),
        *("--speculative-config", '{"method":"mtp","num_speculative_tokens":5}'),
        *("--tensor-parallel-size", "8"),
        "--enable-expert-parallel",
        "--kv-transfer-config",
        '{"kv_connector":"RecordingNixlConnector",'
        '"kv_connector_module_path":"cluster.kv.connectors.nixl",'
        '"kv_role":"kv_both",'
        '"kv_load_failure_policy":"fail",'
        '"kv_connector_extra_config":{"kv_lease_duration":30}}',
        "--kv-events-config",
        '{"enable_kv_cache_events":true,"publisher":"zmq",'
        '"endpoint":"tcp://[::ffff:10.0.0.5]:20002",'
        '"replay_endpoint":"tcp://10.0.0.5:20003"}',
        "--enable-prompt-tokens-details",
        "--enable-scale-out",
        "--disable-uvicorn-access-log",
        *("--gpu-memory-utilization", "0.9"),
        "--async-scheduling",
    )
    assert launched.env == {
        "VLLM_HOST_IP": "10.0.0.5",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_RPC_BASE_PATH": "/run/x",
        "PYTHONHASHSEED": "0",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.0.5",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": "20004",
    }


def test_the_key_is_never_in_argv_or_in_what_is_printed():
    launched = launch()
    assert not any("secret-key" in word for word in launched.argv)
    assert not any("secret-key" in value for value in launched.env.values())


def test_a_mixed_pool_moves_nothing_and_still_announces_its_blocks():
    launched = launch(Role.MIXED)
    assert flag(launched, "kv-transfer-config") is None
    assert flag(launched, "kv-events-config") is not None
    assert not any("NIXL" in name for name in launched.env)


@pytest.mark.parametrize(
    ("facts", "asked", "given"),
    [
        (AVX2, "auto", "float32"),
        (HostFacts("cpu", frozenset({"avx512_bf16"})), "auto", "bfloat16"),
        (HostFacts("cpu", frozenset({"amx_bf16"})), "float32", "float32"),
        (AVX2, "bfloat16", "bfloat16"),
        (H200, "auto", "auto"),
    ],
)
def test_dtype_is_what_the_hardware_does_fast_unless_stated(
    facts: HostFacts, asked: str, given: str
):
    model = SMOL.model_copy(update={"dtype": asked})
    assert flag(launch(facts=facts, model=model), "dtype") == given


def test_engine_args_are_passed_through_and_may_take_flags_out():
    launched = launch(
        engine_args={
            "enforce_eager": None,
            "enable-prefix-caching": False,
            "hf_overrides": {"a": [1]},
            "seed": 7,
        }
    )
    assert "--enforce-eager" not in launched.argv
    assert "--no-enable-prefix-caching" in launched.argv
    assert flag(launched, "hf-overrides") == '{"a":[1]}'
    assert flag(launched, "seed") == "7"


def test_pool_env_wins_over_ours():
    assert launch(env={"OMP_NUM_THREADS": "1"}).env["OMP_NUM_THREADS"] == "1"


def test_cpu_threads_follow_what_the_pool_reserves():
    wide = HostFacts("cpu", frozenset(), cores=64)
    launched = launch(facts=wide, placement={"resources": {"CPU": 16}})
    assert launched.env["OMP_NUM_THREADS"] == "16"


def test_more_ranks_on_a_cpu_need_processes():
    launched = launch(parallel=ParallelSpec(tensor=2))
    assert flag(launched, "distributed-executor-backend") == "mp"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in launched.env


def test_tensor_ranks_over_two_nodes_meet_at_the_head():
    shape: dict[str, Any] = {
        "facts": H200,
        "nodes_per_replica": 2,
        "parallel": ParallelSpec(tensor=16),
    }
    head = launch(host="10.0.0.5", **shape)
    follower = launch(host="10.0.0.6", node_rank=1, head_host="10.0.0.5", **shape)
    for rank, one in enumerate((head, follower)):
        assert flag(one, "nnodes") == "2"
        assert flag(one, "node-rank") == str(rank)
        assert flag(one, "master-addr") == "10.0.0.5"
    assert (flag(head, "master-port"), flag(follower, "master-port")) == ("20006", "21006")
    assert "--headless" in follower.argv
    assert "--headless" not in head.argv


def test_data_parallel_ranks_over_two_nodes():
    shape: dict[str, Any] = {
        "facts": H200,
        "nodes_per_replica": 2,
        "parallel": ParallelSpec(tensor=8, data=4),
    }
    head = launch(host="10.0.0.5", **shape)
    follower = launch(host="10.0.0.6", node_rank=1, head_host="10.0.0.5", **shape)
    for one in (head, follower):
        assert flag(one, "data-parallel-size") == "4"
        assert flag(one, "data-parallel-size-local") == "2"
        assert flag(one, "data-parallel-address") == "10.0.0.5"
    assert flag(head, "data-parallel-rpc-port") == "20006"
    assert flag(follower, "data-parallel-rpc-port") == "21006"
    assert flag(follower, "data-parallel-start-rank") == "2"
    assert flag(head, "data-parallel-start-rank") is None


@pytest.mark.parametrize("parallel", [ParallelSpec(tensor=2), ParallelSpec(data=2)])
def test_cpu_ranks_above_0_run_the_headless_program_for_the_cpu_build(parallel: ParallelSpec):
    shape: dict[str, Any] = {"nodes_per_replica": 2, "parallel": parallel}
    head = launch(host="10.0.0.5", **shape)
    follower = launch(host="10.0.0.6", node_rank=1, head_host="10.0.0.5", **shape)
    assert head.argv[:3] == ("/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server")
    assert follower.argv[:3] == ("/venv/bin/python", "-m", "cluster.engines.vllm_headless")
    assert "--headless" in follower.argv
    assert flag(follower, "distributed-executor-backend") == "mp"


def test_collectives_of_a_replica_over_nodes_take_the_interface_that_has_its_address():
    shape: dict[str, Any] = {"nodes_per_replica": 2, "parallel": ParallelSpec(tensor=2)}
    on_cpu = launch(**shape).env
    assert on_cpu["GLOO_SOCKET_IFNAME"] == "eth0"
    assert "NCCL_SOCKET_IFNAME" not in on_cpu
    on_cuda = launch(facts=H200, **shape)
    assert on_cuda.env["NCCL_SOCKET_IFNAME"] == on_cuda.env["GLOO_SOCKET_IFNAME"] == "eth0"
    assert on_cuda.origins["NCCL_SOCKET_IFNAME"] == "the interface that has the node's address"
    assert "GLOO_SOCKET_IFNAME" not in launch(interface="", **shape).env
    assert "GLOO_SOCKET_IFNAME" not in launch().env


@pytest.mark.parametrize(
    ("pool", "says"),
    [
        (
            {"nodes_per_replica": 2, "parallel": ParallelSpec(pipeline=2)},
            "write `tensor` or `data` in its place",
        ),
        ({"facts": HostFacts("npu")}, "Ascend NPU"),
        (
            {"role": Role.MIXED, "speculative": {"method": "ngram"}},
            "leave `speculative` out, or write a prefill pool and a decode pool",
        ),
        (
            {"facts": H200, "nodes_per_replica": 3, "parallel": ParallelSpec(tensor=8)},
            "multiple of nodes_per_replica",
        ),
        (
            {"facts": H200, "nodes_per_replica": 2, "parallel": ParallelSpec(tensor=8, data=3)},
            "multiple of nodes_per_replica",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(pool: dict[str, Any], says: str):
    with pytest.raises(InvalidInput, match=says):
        launch(**pool)


def test_addresses_for_peers_leave_out_what_the_worker_does_not_have():
    context_of = {role: _address(role) for role in (Role.PREFILL, Role.DECODE)}
    assert context_of[Role.PREFILL] == {
        "events": "tcp://127.0.0.1:20002",
        "replay": "tcp://127.0.0.1:20003",
        "bootstrap_addr": "http://127.0.0.1:20005",
    }
    assert "bootstrap_addr" not in context_of[Role.DECODE]


def _address(role: Role) -> dict[str, str | int]:
    spec = PoolSpec(name="pool", role=role)
    island = IslandSpec(name="i", pools=["pool"], connector="mooncake")
    names = {need.name for need in adapter("vllm").ports(spec, island)}
    context = LaunchContext(
        worker=WorkerId("pool", 0),
        role=role,
        model=SMOL,
        model_path="/m",
        pool=spec,
        island=island,
        host="127.0.0.1",
        host_facts=AVX2,
        ports={name: PORTS[name] for name in names},
        runtime_dir="/run/x",
        python=sys.executable,
        engine_key="",
    )
    return dict(adapter("vllm").kv_address(context))


def test_every_data_parallel_rank_has_ports_of_its_own():
    spec = PoolSpec(name="p", role=Role.DECODE, parallel=ParallelSpec(data=4))
    needs = adapter("vllm").ports(spec, IslandSpec(name="i", pools=["p"]))
    assert {need.name: need.span for need in needs} == {
        "http": 1,
        "kv_events": 4,
        "kv_replay": 4,
        "nixl": 4,
    }


def test_json_flags_are_json():
    launched = launch(speculative=NGRAM)
    for name in ("kv-transfer-config", "kv-events-config", "speculative-config"):
        assert isinstance(json.loads(flag(launched, name) or ""), dict)


def test_unknown_engine_names_the_known_ones():
    with pytest.raises(InvalidInput, match="simulated, vllm"):
        adapter("vlm")
