"""What a vLLM-Ascend engine is started with, word for word.

The published commands that this comes from stand in test_engines_vllm_ascend_guides.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from commands import (
    HEAD,
    HOST,
    command,
    context,
    flags,
    launch,
    words,
)

from cluster.engines.base import HostFacts
from cluster.engines.registry import adapter
from cluster.errors import InvalidInput

MODEL = {"id": "/weights/GLM-5.2-w8a8", "served_name": "glm-52"}
PREFILL = {"name": "prefill", "role": "prefill", "preset": "glm-5.2-a3-w8a8-prefill"}
DECODE = {"name": "decode", "role": "decode", "preset": "glm-5.2-a3-w8a8-decode"}


def pd(first: dict[str, Any], second: dict[str, Any], **options: Any) -> Any:
    options = {"connector": "ascend_mooncake", "lease_s": 480, "model": MODEL, **options}
    return launch([first, second], **options)


def test_prefill_of_two_a3_nodes_word_for_word():
    launched = pd(PREFILL, DECODE)
    assert words(launched) == (
        *("/venv/bin/python", "-m", "vllm.entrypoints.cli.main", "serve", "/weights/GLM-5.2-w8a8"),
        *("--host", "10.0.0.5"),
        *("--port", "100"),
        *("--served-model-name", "glm-52"),
        *("--quantization", "ascend"),
        *("--dtype", "auto"),
        *("--max-model-len", "135000"),
        "--trust-remote-code",
        "--enable-auto-tool-choice",
        *("--tool-call-parser", "glm47"),
        *("--reasoning-parser", "glm45"),
        *("--max-num-seqs", "64"),
        *("--max-num-batched-tokens", "4096"),
        *("--prefix-caching-hash-algo", "sha256_cbor"),
        "--speculative-config",
        '{"num_speculative_tokens":5,"method":"deepseek_mtp","enforce_eager":true}',
        *("--tensor-parallel-size", "16"),
        *("--data-parallel-size", "2"),
        "--enable-expert-parallel",
        *("--data-parallel-size-local", "1"),
        *("--data-parallel-address", "10.0.0.5"),
        *("--data-parallel-rpc-port", "MEETING_PORT"),
        *("--api-server-count", "1"),
        "--kv-transfer-config",
        '{"kv_connector":"MooncakeConnectorV1","kv_role":"kv_producer","kv_port":'
        f'{_kv_port(PREFILL, DECODE)},"engine_id":"prefill-0-3-0","kv_load_failure_policy":"fail",'
        '"kv_connector_extra_config":{"use_ascend_direct":true,'
        '"prefill":{"dp_size":2,"tp_size":16},"decode":{"dp_size":8,"tp_size":4}}}',
        "--kv-events-config",
        '{"enable_kv_cache_events":true,"publisher":"zmq",'
        '"endpoint":"tcp://[::ffff:10.0.0.5]:101","replay_endpoint":"tcp://10.0.0.5:103"}',
        "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
        *("--seed", "1024"),
        *("--gpu-memory-utilization", "0.95"),
        "--async-scheduling",
        "--enforce-eager",
        "--additional-config",
        '{"enable_sparse_c8":false,"enable_dsa_cp":true}',
    )
    assert launched.env == {
        "VLLM_HOST_IP": "10.0.0.5",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONHASHSEED": "0",
        "HF_HUB_OFFLINE": "1",
        "VLLM_RPC_BASE_PATH": "/run/x",
        "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": "480",
        "HCCL_IF_IP": "10.0.0.5",
        "GLOO_SOCKET_IFNAME": "eth0",
        "TP_SOCKET_IFNAME": "eth0",
        "HCCL_SOCKET_IFNAME": "eth0",
        "HCCL_OP_EXPANSION_MODE": "AIV",
        "OMP_PROC_BIND": "false",
        "OMP_NUM_THREADS": "1",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "HCCL_BUFFSIZE": "400",
        "ASCEND_AGGREGATE_ENABLE": "1",
        "ASCEND_TRANSPORT_PRINT": "1",
        "ACL_OP_INIT_MODE": "1",
        "ASCEND_A3_ENABLE": "1",
        "VLLM_ASCEND_ENABLE_FLASHCOMM1": "1",
        "VLLM_ASCEND_ENABLE_FUSED_MC2": "1",
    }
    assert launched.secret_env == {"VLLM_API_KEY": "secret-key"}


def test_the_other_node_is_headless_and_counts_on():
    head, follower = pd(PREFILL, DECODE), pd(PREFILL, DECODE, node_rank=1)
    mine, theirs = flags(words(follower)), flags(words(head))
    assert {name for name in theirs if mine.get(name) != theirs[name]} == {
        "--host",
        "--api-server-count",
        "--kv-transfer-config",  # an engine id of its own
        "--kv-events-config",
    }
    assert mine["--headless"] is True
    assert mine["--data-parallel-start-rank"] == 1
    assert mine["--data-parallel-address"] == HEAD
    assert follower.env["HCCL_IF_IP"] == HOST
    assert _transfer(follower)["engine_id"] != _transfer(head)["engine_id"]


def test_ports_have_room_for_every_rank_and_keep_clear_of_the_transport():
    """kv_port + data rank x tensor x pipeline x prefill context + device (kv_p2p/
    mooncake_connector.py), below the 20000 where its transport begins to take ports."""
    made = context([DECODE | {"engine_args": {"prefill_context_parallel_size": 2}}, PREFILL],
                   connector="ascend_mooncake")  # fmt: skip
    needs = adapter("vllm_ascend").ports(made.pool, made.island)
    assert {need.name: need.span for need in needs}["ascend_kv"] == 8 * 4 * 2
    assert all(need.window is not None and need.window.stop <= 20_000 for need in needs)


def test_ranks_of_one_copy_on_two_nodes_count_from_the_head_s_port_under_one_name():
    pools = [
        {"name": name, "role": name, "engine": "vllm_ascend", "parallel": {"tensor": 32},
         "placement": {"resources": {"NPU": 16}}, "nodes_per_replica": 2}
        for name in ("prefill", "decode")
    ]  # fmt: skip
    head = _transfer(pd(*pools))
    follower = _transfer(pd(*pools, node_rank=1))
    assert (head["kv_port"], head["engine_id"]) == (follower["kv_port"], follower["engine_id"])


def test_a_mixed_worker_on_one_node_moves_nothing_and_needs_no_network():
    launched = _mixed("glm-5.2-a3-w8a8")
    assert "--kv-transfer-config" not in launched.argv
    assert not any(name.endswith("IFNAME") or name == "HCCL_IF_IP" for name in launched.env)


def test_no_flag_that_its_vllm_does_not_know():
    """vLLM has --enable-scale-out from 0.30 on; vLLM-Ascend 0.23 builds on vLLM 0.23 (its
    Dockerfile at 50e87d63: VLLM_TAG=v0.23.0)."""
    assert "--enable-scale-out" not in _mixed("glm-5.2-a3-w8a8").argv


def test_the_key_is_in_no_argument_and_in_nothing_that_is_printed():
    launched = _mixed("glm-5.2-a3-w8a8")
    assert "secret-key" not in " ".join((*launched.argv, *launched.env.values()))


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ([], "found no pool at the other end of its links"),
        (
            [DECODE, DECODE | {"name": "other", "parallel": {"tensor": 8, "data": 4}}],
            "takes one size for all decode pools",
        ),
    ],
)
def test_the_connector_wants_one_size_at_the_other_end(second: list[dict[str, Any]], says: str):
    with pytest.raises(InvalidInput, match=says):
        launch([PREFILL, *second], connector="ascend_mooncake", model=MODEL)


def test_other_connectors_and_other_nodes_are_refused_with_the_fix():
    with pytest.raises(InvalidInput, match="speaks ascend_mooncake and ascend_layerwise"):
        pd(PREFILL, DECODE, connector="nixl")
    pool = {"name": "p", "role": "mixed", "engine": "vllm_ascend"}
    made = context([pool | {"placement": {"resources": {"GPU": 8}}}])
    assert made.host_facts == HostFacts("cuda", cores=192)
    with pytest.raises(InvalidInput, match="write `engine: vllm`"):
        adapter("vllm_ascend").launch(made)


def test_peers_learn_where_its_events_are_and_ask_the_rest_of_its_answers():
    made = context([PREFILL, DECODE], connector="ascend_mooncake", model=MODEL)
    assert adapter("vllm_ascend").kv_address(made) == {
        "events": "tcp://10.0.0.5:101",
        "replay": "tcp://10.0.0.5:103",
    }


def _mixed(preset: str, **options: Any) -> Any:
    pool = {"name": "atlas", "role": "mixed", "preset": preset}
    return launch([pool], connector="ascend_mooncake", model=MODEL, **options)


def _transfer(launched: Any) -> dict[str, Any]:
    found: dict[str, Any] = flags(launched.argv)["--kv-transfer-config"]
    return found


def _kv_port(first: dict[str, Any], second: dict[str, Any]) -> int:
    return context([first, second], connector="ascend_mooncake").ports["ascend_kv"]


def test_what_is_compared_here_is_the_whole_command():
    whole = command(_mixed("glm-5.2-a3-w8a8"))
    assert whole.flags["--max-num-seqs"] == 48
    assert whole.env["HCCL_BUFFSIZE"] == "200"
