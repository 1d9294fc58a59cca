"""The commands of the H200 presets of vLLM beside those that vllm-project/recipes publishes.

At 8959cf64: models/zai-org/GLM-5.2.yaml, "FP8 on 8xH200 (standard)", and
strategies/pd_cluster.yaml.
"""

from __future__ import annotations

from typing import Any

import pytest
from commands import HEAD, compare, flags, launch, published

MODEL = {"id": "zai-org/GLM-5.2-FP8", "served_name": "glm-5.2-fp8"}
RECIPE = """--kv-cache-dtype fp8 --tensor-parallel-size 8
    --speculative-config '{"method":"mtp","num_speculative_tokens":5}'
    --tool-call-parser glm47 --reasoning-parser glm45 --enable-auto-tool-choice
    --served-model-name glm-5.2-fp8 """
# What every engine of ours has besides, and why: see cluster/engines/vllm/origins.py.
OURS = {
    "--host",
    "--port",
    "--dtype",
    "--prefix-caching-hash-algo",
    "--kv-events-config",
    "--enable-prompt-tokens-details",
    "--enable-scale-out",
    "--disable-uvicorn-access-log",
    "VLLM_HOST_IP",
    "VLLM_NO_USAGE_STATS",
    "PYTHONHASHSEED",
    "VLLM_RPC_BASE_PATH",
}


def pool(role: str, preset: str) -> dict[str, Any]:
    return {"name": role, "role": role, "preset": preset}


def test_one_node_beside_the_recipe():
    """The recipe writes --speculative-config.method and so on, which vLLM reads as one mapping."""
    launched = launch([pool("mixed", "glm-5.2-h200-fp8")], model=MODEL)
    found = compare(launched, published("", RECIPE))
    assert (found.left_out, found.added, found.changed) == (set(), OURS, {})
    module = ("-m", "vllm.entrypoints.cli.main", "serve", "zai-org/GLM-5.2-FP8")
    assert launched.argv[:5] == ("/venv/bin/python", *module)


@pytest.mark.parametrize(
    ("side", "other", "arguments", "env"),
    [
        (
            "prefill",
            "decode",
            "--port 8001",
            """NCCL_CUMEM_ENABLE=1 NCCL_MNNVL_ENABLE=1 NCCL_NVLS_ENABLE=1 UCX_NET_DEVICES=all
            VLLM_NIXL_SIDE_CHANNEL_PORT=5557 VLLM_NIXL_SIDE_CHANNEL_HOST=10.0.0.5""",
        ),
        (
            "decode",
            "prefill",
            """--port 8002 --compilation-config '{"cudagraph_mode":"FULL_DECODE_ONLY"}'""",
            "VLLM_NIXL_SIDE_CHANNEL_PORT=5558 VLLM_NIXL_SIDE_CHANNEL_HOST=10.0.0.5",
        ),
    ],
)
def test_prefill_and_decode_apart_beside_recipe_and_strategy(
    side: str, other: str, arguments: str, env: str
):
    pools = [pool(name, f"glm-5.2-h200-fp8-{name}") for name in (side, other)]
    launched = launch(pools, model=MODEL)
    theirs = """--kv-transfer-config '{"kv_connector":"NixlConnector","kv_load_failure_policy":
        "fail","kv_role":"kv_%s"}' """ % ("producer" if side == "prefill" else "consumer")
    found = compare(launched, published(env, RECIPE + theirs + arguments))
    assert (found.left_out, found.added) == (set(), OURS - {"--port"})
    # Addresses, and a connector that records transfers and serves both roles.
    assert set(found.changed) == {"--port", "VLLM_NIXL_SIDE_CHANNEL_PORT", "--kv-transfer-config"}
    assert launched.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == HEAD
    transfer = flags(launched.argv)["--kv-transfer-config"]
    assert transfer["kv_connector"] == "RecordingNixlConnector"
    assert (transfer["kv_role"], transfer["kv_load_failure_policy"]) == ("kv_both", "fail")


def test_every_flag_and_variable_says_where_it_comes_from():
    launched = launch([pool("prefill", "glm-5.2-h200-fp8-prefill"),
                       pool("decode", "glm-5.2-h200-fp8-decode")], model=MODEL)  # fmt: skip
    named = {word for word in launched.argv if word.startswith("--")} | set(launched.env)
    assert named <= set(launched.origins)
    assert launched.origins["--tensor-parallel-size"] == "pool.parallel.tensor"
    assert launched.origins["--kv-cache-dtype"] == "pool.model.kv_cache_dtype"
    assert launched.origins["--tool-call-parser"] == "model.tool_call_parser"
    assert launched.origins["UCX_NET_DEVICES"] == "pool.env.UCX_NET_DEVICES"
