"""What an SGLang server is started with, word for word, beside what its project publishes.

sgl-project/sglang: docs_new/src/snippets/configs/zai-org/glm-5.2.jsx at 0415ca35 ("low-latency"
cell for H200 in FP8, card "PD Disaggregation"); docs_new/docs/hardware-platforms/ascend-npus/
ascend_npu_glm5.2_examples.mdx at 01e689db. Flags and ports as in the wheel of SGLang 0.5.23.
"""

from __future__ import annotations

from typing import Any

import pytest
from commands import compare, context, flags, launch, published

from cluster.engines.base import Probes
from cluster.engines.registry import adapter
from cluster.errors import InvalidInput

MODEL = {"id": "/models/GLM-5.2-FP8", "served_name": "glm-5.2"}
LOW_LATENCY = """--model-path /models/GLM-5.2-FP8 --tp-size 8 --speculative-algorithm EAGLE
    --speculative-num-steps 5 --speculative-eagle-topk 1 --speculative-num-draft-tokens 6
    --mem-fraction-static 0.8 --host 0.0.0.0 --port 30000
    --reasoning-parser glm45 --tool-call-parser glm47 """
OURS = {
    "--served-model-name",
    "--enable-metrics",
    "--enable-cache-report",
    "--config",
    "SGLANG_HOST_IP",
    "PYTHONHASHSEED",
    "HF_HUB_OFFLINE",
}
PREFILL = {"name": "prefill", "role": "prefill", "preset": "glm-5.2-h200-sglang-prefill"}
DECODE = {"name": "decode", "role": "decode", "preset": "glm-5.2-h200-sglang-decode"}


def test_prefill_word_for_word():
    launched = launch([PREFILL, DECODE], connector="sglang_mooncake", model=MODEL)
    assert launched.argv == (
        *("/venv/bin/python", "-m", "sglang.launch_server"),
        *("--model-path", "/models/GLM-5.2-FP8"),
        *("--host", "10.0.0.5"),
        *("--port", "100"),
        *("--served-model-name", "glm-5.2"),
        *("--tool-call-parser", "glm47"),
        *("--reasoning-parser", "glm45"),
        *("--tp-size", "8"),
        *("--speculative-algorithm", "EAGLE"),
        *("--speculative-num-steps", "5"),
        *("--speculative-eagle-topk", "1"),
        *("--speculative-num-draft-tokens", "6"),
        "--enable-metrics",
        "--enable-cache-report",
        *("--disaggregation-mode", "prefill"),
        *("--disaggregation-transfer-backend", "mooncake"),
        *("--disaggregation-bootstrap-port", "101"),
        *("--mem-fraction-static", "0.8"),
        *("--config", "/run/x/sglang.yaml"),
    )
    assert launched.env == {
        "SGLANG_HOST_IP": "10.0.0.5",
        "PYTHONHASHSEED": "0",
        "HF_HUB_OFFLINE": "1",
        "NCCL_SOCKET_IFNAME": "eth0",
        "GLOO_SOCKET_IFNAME": "eth0",
    }


def test_the_key_is_in_a_file_and_nowhere_else():
    launched = launch([PREFILL, DECODE], connector="sglang_mooncake", model=MODEL)
    assert launched.secret_files == {"sglang.yaml": 'api-key: "secret-key"\n'}
    assert "secret-key" not in " ".join((*launched.argv, *launched.env.values()))


def test_one_node_beside_the_cookbook():
    """Its --tp is --tp-size; parsers are its card "Parsers"."""
    pool = {"name": "p", "role": "mixed", "preset": "glm-5.2-h200-sglang"}
    found = compare(launch([pool], model=MODEL), published("", LOW_LATENCY))
    assert (found.left_out, found.added) == (set(), OURS)
    assert set(found.changed) == {"--host", "--port"}


@pytest.mark.parametrize("backend", ["mooncake", "nixl"])
@pytest.mark.parametrize(("mine", "other"), [(PREFILL, DECODE), (DECODE, PREFILL)])
def test_prefill_and_decode_apart_beside_the_cookbook(
    mine: dict[str, Any], other: dict[str, Any], backend: str
):
    launched = launch([mine, other], connector=f"sglang_{backend}", model=MODEL)
    card = (
        f"--disaggregation-mode {mine['role']} --disaggregation-transfer-backend {backend} "
    )  # fmt: skip
    found = compare(launched, published("", LOW_LATENCY + card))
    network = {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}
    bootstrap = {"--disaggregation-bootstrap-port"} if mine is PREFILL else set()
    assert (found.left_out, found.added) == (set(), OURS | network | bootstrap)
    assert set(found.changed) == {"--host", "--port"}


def test_ascend_prefill_beside_the_examples():
    """ "Prefill-Decode Disaggregation", P node; --attn-dp-size is 0.5.23's word for its --dp-size
    with --enable-dp-attention."""
    store = {"ASCEND_MF_STORE_URL": "tcp://10.0.0.5:24707"}
    pool = {
        "name": "prefill",
        "role": "prefill",
        "engine": "sglang",
        "placement": {"resources": {"NPU": 16}},
        "parallel": {"tensor": 16},
        "max_num_seqs": 64,
        "max_batched_tokens": 524288,
        "speculative": {
            "algorithm": "NEXTN",
            "num-steps": 1,
            "eagle-topk": 1,
            "num-draft-tokens": 2,
            "draft-model-quantization": "unquant",
        },
        "engine_args": {"attn-dp-size": 4, "moe-a2a-backend": "deepep", "deepep-mode": "normal"},
        "env": store,
    }
    model = {"served_name": "glm-5", "quantization": "modelslim", "dtype": "bfloat16"}
    launched = launch(
        [pool, pool | {"name": "decode", "role": "decode"}],
        connector="sglang_ascend",
        model=model | {"trust_remote_code": True},
    )
    examples = published(
        "ASCEND_MF_STORE_URL=tcp://10.0.0.5:24707 HCCL_SOCKET_IFNAME=lo GLOO_SOCKET_IFNAME=lo",
        """--model-path /models/m --disaggregation-mode prefill --host 10.0.0.5 --port 8000
        --disaggregation-bootstrap-port 8998 --trust-remote-code --nnodes 1 --node-rank 0
        --tp-size 16 --attention-backend ascend --device npu --quantization modelslim
        --disaggregation-transfer-backend ascend --max-running-requests 64
        --served-model-name glm-5 --chunked-prefill-size 524288 --moe-a2a-backend deepep
        --deepep-mode normal --dtype bfloat16 --dp-size 4 --enable-dp-attention
        --speculative-draft-model-quantization unquant --speculative-algorithm NEXTN
        --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2""",
    )
    found = compare(launched, examples)
    assert found.left_out == {"--nnodes", "--node-rank", "--dp-size", "--enable-dp-attention"}
    # Copies of attention make it talk over TCP, on ports that it derives from this address.
    assert found.added == OURS - {"--served-model-name"} | {"--attn-dp-size", "--dist-init-addr"}
    # Its interfaces are `lo` with a word to put in one's own.
    addresses = {"--port", "--disaggregation-bootstrap-port"}
    assert set(found.changed) == addresses | {"HCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}


def test_two_nodes_meet_at_the_head_beside_the_examples():
    """ "Multi-node Deployment": --tp-size 32 --nnodes 2 --node-rank $i --dist-init-addr $IP_MASTER;
    SGLang derives six more ports from that one (server_args.py, PortArgs)."""
    pool = {
        "name": "p",
        "role": "mixed",
        "engine": "sglang",
        "placement": {"resources": {"NPU": 16}},
        "parallel": {"tensor": 32},
        "nodes_per_replica": 2,
    }
    for rank in (0, 1):
        found = flags(launch([pool], node_rank=rank).argv)
        assert found["--nnodes"] == 2
        assert found["--node-rank"] == rank
        assert found["--dist-init-addr"] == "10.0.0.5:101"
    made = context([pool])
    spans = {need.name: need.span for need in adapter("sglang").ports(made.pool, made.island)}
    assert spans == {"http": 1, "sglang_dist": 7}


def test_readiness_asks_for_a_token_that_moves_nothing():
    """A server with a role wants a bootstrap host in each request; 2.2.2.2 stands for none
    (python/sglang/srt/disaggregation/utils.py, FAKE_BOOTSTRAP_HOST)."""
    sglang = adapter("sglang")
    fake = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}
    apart = context([PREFILL, DECODE], connector="sglang_mooncake", model=MODEL)
    assert sglang.probes(apart) == Probes(version="/server_info", one_token=fake)
    mixed = context([{"name": "p", "role": "mixed", "preset": "glm-5.2-h200-sglang"}])
    assert sglang.probes(mixed) == Probes(version="/server_info")


def test_peers_learn_where_prefill_s_bootstrap_server_is():
    made = context([PREFILL, DECODE], connector="sglang_mooncake", model=MODEL)
    address = {"bootstrap_host": "10.0.0.5", "bootstrap_port": 101}
    assert adapter("sglang").kv_address(made) == address
    made = context([DECODE, PREFILL], connector="sglang_mooncake", model=MODEL)
    assert adapter("sglang").kv_address(made) == {}


@pytest.mark.parametrize(
    ("pool", "connector", "says"),
    [
        ({}, "nixl", "sglang speaks sglang_mooncake, sglang_nixl, sglang_ascend"),
        ({}, "sglang_ascend", "ASCEND_MF_STORE_URL: missing"),
        ({"kv_cache_gib": 8}, "sglang_nixl", "mem-fraction-static: 0.8"),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(pool: dict[str, Any], connector: str, says: str):
    with pytest.raises(InvalidInput, match=says):
        launch([PREFILL | pool, DECODE], connector=connector, model=MODEL)


def test_flags_that_are_false_or_null_are_left_out():
    args = {"disable-radix-cache": False, "enable_cache_report": None, "log-requests": True}
    pool = {"name": "p", "role": "mixed", "engine": "sglang", "engine_args": args}
    found = flags(launch([pool]).argv)
    assert "--disable-radix-cache" not in found
    assert "--enable-cache-report" not in found
    assert found["--log-requests"] is True


def test_every_flag_and_variable_says_where_it_comes_from():
    launched = launch([PREFILL, DECODE], connector="sglang_mooncake", model=MODEL)
    named = {word for word in launched.argv if word.startswith("--")} | set(launched.env)
    assert named <= set(launched.origins)
    assert launched.origins["--speculative-num-steps"] == "pool.speculative.num-steps"
    assert launched.origins["--mem-fraction-static"] == "pool.engine_args.mem-fraction-static"
