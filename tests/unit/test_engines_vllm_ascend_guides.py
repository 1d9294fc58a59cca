"""The commands of vLLM-Ascend's presets beside those that its vendor publishes, difference by
difference.

All are vllm-project/vllm-ascend's. GLM5.2: docs/source/tutorials/models/GLM5.2.md at b19127c7
(releases/v0.24.0rc). GLM5: docs/source/tutorials/models/GLM5.md at 182b75ea (main).
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from commands import Differences, compare, flags, launch, published

MODEL = {"id": "/weights/GLM-5.2-w8a8", "served_name": "glm-52"}
PREFILL = {"name": "prefill", "role": "prefill", "preset": "glm-5.2-a3-w8a8-prefill"}
DECODE = {"name": "decode", "role": "decode", "preset": "glm-5.2-a3-w8a8-decode"}

# What every engine of ours has besides, and why: see cluster/engines/vllm/origins.py.
OURS = {
    "--dtype",
    "--prefix-caching-hash-algo",
    "--kv-events-config",
    "--enable-prompt-tokens-details",
    "--disable-uvicorn-access-log",
    "VLLM_HOST_IP",
    "VLLM_NO_USAGE_STATS",
    "PYTHONHASHSEED",
    "HF_HUB_OFFLINE",
    "VLLM_RPC_BASE_PATH",
}
PARSERS = {"--enable-auto-tool-choice", "--tool-call-parser", "--reasoning-parser"}
# The image of the guides is known to them by this; where Ray puts the devices is Ray's to say.
OF_THE_IMAGE = {"VLLM_VERSION", "LD_LIBRARY_PATH"}


def pd(first: dict[str, Any], second: dict[str, Any], **options: Any) -> Any:
    options = {"connector": "ascend_mooncake", "lease_s": 480, "model": MODEL, **options}
    return launch([first, second], **options)


def test_prefill_of_two_a3_nodes_beside_the_guide():
    """GLM5.2, "Prefill-Decode Disaggregation", prefill node 0, and how it is started below."""
    guide = published(
        """HCCL_OP_EXPANSION_MODE=AIV HCCL_IF_IP=10.0.0.5 GLOO_SOCKET_IFNAME=eth0
        TP_SOCKET_IFNAME=eth0 HCCL_SOCKET_IFNAME=eth0 OMP_PROC_BIND=false OMP_NUM_THREADS=1
        PYTORCH_NPU_ALLOC_CONF=expandable_segments:True HCCL_BUFFSIZE=400 ASCEND_AGGREGATE_ENABLE=1
        ASCEND_TRANSPORT_PRINT=1 ACL_OP_INIT_MODE=1 ASCEND_A3_ENABLE=1
        VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT=480 VLLM_ASCEND_ENABLE_FLASHCOMM1=1
        VLLM_ASCEND_ENABLE_FUSED_MC2=1 VLLM_VERSION=0.21.0 LD_LIBRARY_PATH=/usr/local/lib""",
        """--host 0.0.0.0 --port 9081 --data-parallel-size 2 --data-parallel-rank 0
        --data-parallel-address 10.0.0.5 --data-parallel-rpc-port 16591 --tensor-parallel-size 16
        --enable-expert-parallel --seed 1024 --served-model-name glm-52 --max-model-len 135000
        --speculative-config
        '{"num_speculative_tokens":5,"method":"deepseek_mtp","enforce_eager":true}'
        --additional-config '{"enable_sparse_c8":false,"enable_dsa_cp":true}'
        --max-num-batched-tokens 4096 --trust-remote-code --max-num-seqs 64 --async-scheduling
        --quantization ascend --gpu-memory-utilization 0.95 --enforce-eager
        --enable-auto-tool-choice --tool-call-parser glm47 --reasoning-parser glm45
        --kv-transfer-config '{"kv_connector":"MooncakeConnectorV1","kv_role":"kv_producer",
        "kv_port":"30000","engine_id":"0","kv_connector_extra_config":{"use_ascend_direct":true,
        "prefill":{"dp_size":2,"tp_size":16},"decode":{"dp_size":8,"tp_size":4}}}'""",
    )
    launched = pd(PREFILL, DECODE)
    found = compare(launched, guide)
    # One server for all data-parallel ranks, as the guide's own 1M deployment has it.
    assert found.left_out == {"--data-parallel-rank"} | OF_THE_IMAGE
    assert found.added == {"--data-parallel-size-local", "--api-server-count"} | OURS
    _changed_only_in_addresses(found)
    _same_transfer_but_for_addresses(launched, guide)


def test_decode_of_two_a3_nodes_beside_the_guide():
    """GLM5.2, "Prefill-Decode Disaggregation", decode node 0, and how it is started below."""
    guide = published(
        """HCCL_OP_EXPANSION_MODE=AIV HCCL_IF_IP=10.0.0.5 GLOO_SOCKET_IFNAME=eth0
        TP_SOCKET_IFNAME=eth0 HCCL_SOCKET_IFNAME=eth0 OMP_PROC_BIND=false OMP_NUM_THREADS=1
        PYTORCH_NPU_ALLOC_CONF=expandable_segments:True HCCL_BUFFSIZE=500 ASCEND_AGGREGATE_ENABLE=1
        ASCEND_TRANSPORT_PRINT=1 ACL_OP_INIT_MODE=1 ASCEND_A3_ENABLE=1 TASK_QUEUE_ENABLE=1
        DYNAMIC_EPLB=1 VLLM_ASCEND_ENABLE_FUSED_MC2=1 VLLM_ASCEND_ENABLE_MLAPO=1
        VLLM_VERSION=0.21.0 LD_LIBRARY_PATH=/usr/local/lib""",
        """--host 0.0.0.0 --port 9900 --data-parallel-size 8 --data-parallel-rank 0
        --data-parallel-address 10.0.0.5 --data-parallel-rpc-port 16600 --tensor-parallel-size 4
        --enable-expert-parallel --seed 1024 --served-model-name glm-52 --max-model-len 135000
        --max-num-batched-tokens 164 --compilation-config '{"cudagraph_mode":"FULL_DECODE_ONLY"}'
        --speculative-config
        '{"num_speculative_tokens":5,"method":"deepseek_mtp","enforce_eager":true}'
        --additional-config '{"enable_sparse_c8":false,"recompute_scheduler_enable":true}'
        --trust-remote-code --max-num-seqs 48 --gpu-memory-utilization 0.92 --async-scheduling
        --quantization ascend --enable-auto-tool-choice --tool-call-parser glm47
        --reasoning-parser glm45
        --kv-transfer-config '{"kv_connector":"MooncakeConnectorV1","kv_role":"kv_consumer",
        "kv_port":"30100","engine_id":"1","kv_connector_extra_config":{"use_ascend_direct":true,
        "prefill":{"dp_size":2,"tp_size":16},"decode":{"dp_size":8,"tp_size":4}}}'""",
    )
    launched = pd(DECODE, PREFILL)
    found = compare(launched, guide)
    assert found.left_out == {"--data-parallel-rank"} | OF_THE_IMAGE
    # The guide has the timeout on prefill; its 1M deployment on both.
    ours = {
        "--data-parallel-size-local",
        "--api-server-count",
        "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT",
    }
    assert found.added == ours | OURS
    _changed_only_in_addresses(found)
    _same_transfer_but_for_addresses(launched, guide)


def test_one_a3_node_in_w8a8_beside_the_guide():
    """GLM5.2, "Single-node Deployment"; parsers from its FAQ."""
    guide = published(
        """HCCL_OP_EXPANSION_MODE=AIV OMP_PROC_BIND=false OMP_NUM_THREADS=1 HCCL_BUFFSIZE=200
        PYTORCH_NPU_ALLOC_CONF=expandable_segments:True VLLM_ASCEND_BALANCE_SCHEDULING=1
        VLLM_ASCEND_ENABLE_MLAPO=1 VLLM_VERSION=0.21.0""",
        """--host 0.0.0.0 --port 8077 --data-parallel-size 2 --tensor-parallel-size 8
        --enable-expert-parallel --seed 1024 --served-model-name glm-52 --max-num-seqs 48
        --max-model-len 20480 --max-num-batched-tokens 4096 --trust-remote-code
        --gpu-memory-utilization 0.95 --quantization ascend --async-scheduling
        --additional-config '{"multistream_overlap_shared_expert":true}'
        --compilation-config '{"cudagraph_mode":"FULL_DECODE_ONLY"}' --speculative-config
        '{"num_speculative_tokens":3,"method":"deepseek_mtp","enforce_eager":true}'""",
    )
    found = compare(_mixed("glm-5.2-a3-w8a8"), guide)
    assert found.left_out == {"VLLM_VERSION"}
    assert found.added == OURS | PARSERS
    _changed_only_in_addresses(found)


def test_two_a2_nodes_in_w8a8_beside_the_guide():
    """GLM5.2, "Multi-node Deployment", A2 series, node 0 and node 1; parsers from its FAQ."""
    env = """HCCL_OP_EXPANSION_MODE=AIV GLOO_SOCKET_IFNAME=eth0 TP_SOCKET_IFNAME=eth0
        HCCL_SOCKET_IFNAME=eth0 VLLM_RPC_TIMEOUT=360000 VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=3000
        HCCL_EXEC_TIMEOUT=200 HCCL_CONNECT_TIMEOUT=120 OMP_PROC_BIND=false OMP_NUM_THREADS=10
        PYTORCH_NPU_ALLOC_CONF=expandable_segments:True ACL_OP_INIT_MODE=1 TASK_QUEUE_ENABLE=1
        CPU_AFFINITY_CONF=1 VLLM_ENGINE_READY_TIMEOUT_S=1200 VLLM_VERSION=0.21.0 """
    arguments = """--max_model_len 40000 --max-num-batched-tokens 4096 --served-model-name glm-52
        --seed 1024 --gpu-memory-utilization 0.95 --max-num-seqs 16 --data-parallel-size 2
        --data-parallel-size-local 1 --data-parallel-address 10.0.0.5
        --data-parallel-rpc-port 13389 --tensor-parallel-size 8 --enable-expert-parallel
        --quantization ascend --port 7000 --safetensors-load-strategy prefetch --block-size 128
        --async-scheduling --additional-config '{"multistream_overlap_shared_expert":true}'
        --compilation-config '{"cudagraph_mode":"FULL_DECODE_ONLY"}' --speculative-config
        '{"num_speculative_tokens":5,"method":"deepseek_mtp","enforce_eager":true}' """
    nodes = (
        published(env + "HCCL_IF_IP=10.0.0.5", arguments + "--api-server-count 1"),
        published(
            env + "HCCL_IF_IP=10.0.0.6", arguments + "--headless --data-parallel-start-rank 1"
        ),
    )
    for rank, guide in enumerate(nodes):
        found = compare(_mixed("glm-5.2-a2-w8a8", node_rank=rank), guide)
        assert found.left_out == {"VLLM_VERSION"}
        # The guide trusts no code here, and does on A3 with the same weights.
        assert found.added == {"--host", "--trust-remote-code"} | OURS | PARSERS
        _changed_only_in_addresses(found)


@pytest.mark.parametrize(
    ("side", "other", "sizes", "extra"),
    [
        (
            "prefill",
            "decode",
            """--data-parallel-size 4 --tensor-parallel-size 8 --max-model-len 115168
            --max-num-batched-tokens 4096 --max-num-seqs 64 --gpu-memory-utilization 0.95
            --enable-chunked-prefill --enforce-eager --additional-config '{"enable_sparse_c8":false,
            "multistream_overlap_shared_expert":true,"enable_dsa_cp":true}'""",
            """HCCL_BUFFSIZE=256 VLLM_ASCEND_ENABLE_FLASHCOMM1=1
            VLLM_NIXL_ABORT_REQUEST_TIMEOUT=300000""",
        ),
        (
            "decode",
            "prefill",
            """--data-parallel-size 8 --tensor-parallel-size 4 --max-model-len 135168
            --max-num-batched-tokens 164 --max-num-seqs 48 --gpu-memory-utilization 0.92
            --compilation-config '{"cudagraph_mode":"FULL_DECODE_ONLY"}' --additional-config
            '{"enable_sparse_c8":false,"multistream_overlap_shared_expert":true,
            "recompute_scheduler_enable":true}'""",
            "HCCL_BUFFSIZE=500 VLLM_ASCEND_ENABLE_MLAPO=1 TASK_QUEUE_ENABLE=1 DYNAMIC_EPLB=1",
        ),
    ],
)
def test_eight_a2_nodes_apart_beside_the_guide(side: str, other: str, sizes: str, extra: str):
    """GLM5.2, "Deployment on 8 Atlas 800 A2". Its connector is the same class by module path."""
    guide = published(
        """HCCL_IF_IP=10.0.0.5 GLOO_SOCKET_IFNAME=eth0 TP_SOCKET_IFNAME=eth0
        HCCL_SOCKET_IFNAME=eth0 VLLM_HOST_IP=10.0.0.5 HCCL_OP_EXPANSION_MODE=AIV
        OMP_PROC_BIND=false OMP_NUM_THREADS=1 PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
        ASCEND_AGGREGATE_ENABLE=1 ASCEND_TRANSPORT_PRINT=1 ACL_OP_INIT_MODE=1 VLLM_VERSION=0.21.0
        LD_LIBRARY_PATH=/usr/local/lib """
        + extra,
        """--host 0.0.0.0 --port 9081 --data-parallel-rank 0 --data-parallel-address 10.0.0.5
        --data-parallel-rpc-port 16591 --enable-expert-parallel --seed 1024
        --served-model-name glm-52 --trust-remote-code --quantization ascend --async-scheduling
        --enable-prefix-caching --enable-auto-tool-choice --tool-call-parser glm47
        --reasoning-parser glm45 --kv-transfer-config '{}' --speculative-config
        '{"num_speculative_tokens":3,"method":"deepseek_mtp","enforce_eager":true}' """
        + sizes,
    )
    pools = [
        {"name": name, "role": name, "preset": f"glm-5.2-a2-w8a8-{name}"} for name in (side, other)
    ]
    found = compare(pd(*pools), guide)
    of_prefill = {"VLLM_NIXL_ABORT_REQUEST_TIMEOUT"} if side == "prefill" else set()
    assert found.left_out == {"--data-parallel-rank"} | OF_THE_IMAGE | of_prefill
    ours = {
        "--data-parallel-size-local",
        "--api-server-count",
        "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT",
    }
    assert found.added == ours | (OURS - {"VLLM_HOST_IP"})
    _changed_only_in_addresses(found)


def test_two_a3_nodes_in_bf16_beside_the_guide_for_glm_5():
    """GLM5, section 5.2, A3 series, "glm-5-bf16", node 0. Nothing is published for GLM-5.2."""
    guide = published(
        """HCCL_OP_EXPANSION_MODE=AIV HCCL_IF_IP=10.0.0.5 GLOO_SOCKET_IFNAME=eth0
        TP_SOCKET_IFNAME=eth0 HCCL_SOCKET_IFNAME=eth0 OMP_PROC_BIND=false OMP_NUM_THREADS=1
        HCCL_BUFFSIZE=200 VLLM_ASCEND_BALANCE_SCHEDULING=1
        PYTORCH_NPU_ALLOC_CONF=expandable_segments:True""",
        """--host 0.0.0.0 --port 8077 --data-parallel-size 2 --data-parallel-size-local 1
        --data-parallel-address 10.0.0.5 --data-parallel-rpc-port 12890 --tensor-parallel-size 16
        --seed 1024 --served-model-name glm-5 --enable-expert-parallel --max-num-seqs 16
        --max-model-len 8192 --max-num-batched-tokens 4096 --trust-remote-code
        --gpu-memory-utilization 0.95 --compilation-config '{"cudagraph_mode":"FULL_DECODE_ONLY"}'
        --speculative-config
        '{"num_speculative_tokens":3,"method":"deepseek_mtp","enforce_eager":true}'""",
    )
    launched = _mixed("glm-5.2-a3-bf16")
    found = compare(launched, guide)
    assert found.left_out == set()
    assert found.added == {"--api-server-count"} | OURS | PARSERS
    assert found.changed.pop("--served-model-name") == ("glm-5", "glm-52")
    _changed_only_in_addresses(found)
    assert "--quantization" not in launched.argv


def test_four_a2_nodes_in_bf16_beside_the_template_that_they_are_derived_from():
    """GLM5.2, "Co-located Deployment on 4 Nodes (200k context)", node 0, which is W8A8."""
    guide = published(
        """HCCL_OP_EXPANSION_MODE=AIV HCCL_IF_IP=10.0.0.5 GLOO_SOCKET_IFNAME=eth0
        TP_SOCKET_IFNAME=eth0 HCCL_SOCKET_IFNAME=eth0 VLLM_RPC_TIMEOUT=360000
        VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=3000 HCCL_EXEC_TIMEOUT=200 HCCL_CONNECT_TIMEOUT=120
        OMP_PROC_BIND=false OMP_NUM_THREADS=10 PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
        ACL_OP_INIT_MODE=1 TASK_QUEUE_ENABLE=1 CPU_AFFINITY_CONF=1
        VLLM_ENGINE_READY_TIMEOUT_S=1200 VLLM_VERSION=0.21.0""",
        """--max_model_len 200000 --max-num-batched-tokens 4096 --served-model-name glm-52
        --seed 1024 --api-server-count 1 --gpu-memory-utilization 0.95 --max-num-seqs 32
        --data-parallel-size 4 --data-parallel-size-local 1 --data-parallel-address 10.0.0.5
        --data-parallel-rpc-port 13389 --tensor-parallel-size 8 --enable-expert-parallel
        --quantization ascend --port 7000 --safetensors-load-strategy prefetch --block-size 128
        --enable-chunked-prefill --no-enable-prefix-caching --async-scheduling
        --additional-config '{"multistream_overlap_shared_expert":true}'
        --compilation-config '{"cudagraph_mode":"FULL_DECODE_ONLY"}' --speculative-config
        '{"num_speculative_tokens":5,"method":"deepseek_mtp","enforce_eager":true}'""",
    )
    found = compare(_mixed("glm-5.2-a2-bf16"), guide)
    assert found.left_out == {
        "VLLM_VERSION",
        "--quantization",
        "--additional-config",
        # Not in GLM-5's BF16 command, whose limits are taken over.
        "--async-scheduling",
        "--enable-chunked-prefill",
        "--no-enable-prefix-caching",
    }
    assert found.added == {"--host", "--trust-remote-code"} | OURS | PARSERS
    assert found.changed.pop("--max-model-len") == (200000, 8192)
    assert found.changed.pop("--max-num-seqs") == (32, 16)
    assert found.changed.pop("--speculative-config")[1]["num_speculative_tokens"] == 3
    _changed_only_in_addresses(found)


@pytest.mark.parametrize(
    ("side", "other", "role"),
    [("prefill", "decode", "kv_producer"), ("decode", "prefill", "kv_consumer")],
)
def test_layerwise_beside_the_guide(side: str, other: str, role: str):
    """docs/source/tutorials/features/pd_disaggregation_mooncake_multi_node.md at 182b75ea,
    "Layerwise", whose sizes these are (DeepSeek-R1; none is published for GLM-5.2)."""
    sizes = {"prefill": {"data": 2, "tensor": 8}, "decode": {"data": 32, "tensor": 1}}
    pools = [
        {
            "name": name,
            "role": name,
            "engine": "vllm_ascend",
            "parallel": sizes[name],
            "placement": {"resources": {"NPU": 16}},
            "nodes_per_replica": 2 if name == "decode" else 1,
        }
        for name in (side, other)
    ]
    launched = pd(*pools, connector="ascend_layerwise")
    found = _transfer(launched)
    assert {k: v for k, v in found.items() if k not in ("kv_port", "engine_id")} == {
        "kv_connector": "MooncakeLayerwiseConnector",
        "kv_role": role,
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {
            "prefill": {"dp_size": 2, "tp_size": 8},
            "decode": {"dp_size": 32, "tp_size": 1},
        },
    }
    assert "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT" not in launched.env


def _mixed(preset: str, **options: Any) -> Any:
    pool = {"name": "atlas", "role": "mixed", "preset": preset}
    return launch([pool], connector="ascend_mooncake", model=MODEL, **options)


def _transfer(launched: Any) -> dict[str, Any]:
    found: dict[str, Any] = flags(launched.argv)["--kv-transfer-config"]
    return found


def _changed_only_in_addresses(found: Differences) -> None:
    addresses = {"--host", "--port", "--data-parallel-rpc-port", "--kv-transfer-config"}
    assert set(found.changed) <= addresses, found.changed


def _same_transfer_but_for_addresses(launched: Any, guide: Any) -> None:
    ours, theirs = _transfer(launched), guide.flags["--kv-transfer-config"]
    assert ours.pop("kv_load_failure_policy") == "fail"
    for config in (ours, theirs):
        assert config.pop("kv_port")
        assert config.pop("engine_id")
    assert json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True)
