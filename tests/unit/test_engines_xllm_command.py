"""What xLLM is started with, word for word, beside its guide; and how its processes live and end.

jd-opensource/xllm at 87e8d6ed: docs/zh/getting_started/quick_start_GLM5.md ("one A3 node", for
GLM-5), flags in xllm/core/framework/config/*.cpp.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from commands import compare, context, flags, launch, published

from cluster.engines.base import Launch
from cluster.engines.registry import adapter
from cluster.engines.xllm.ranks import command_of
from cluster.errors import InvalidInput

POOL = {
    "name": "xllm",
    "role": "mixed",
    "preset": "glm-5.2-a3-xllm",
    "interpreter": "/opt/xllm",
}
DRAFTS = {"speculative": {"draft_model": "/models/MTP", "num_speculative_tokens": 1}}


def test_one_a3_node_word_for_word():
    launched = launch([POOL | DRAFTS])
    assert launched.argv == (
        *(sys.executable, "-m", "cluster.engines.xllm"),
        *("--count", "16", "--first-rank", "0", "--first-port", "100", "--draft-devices", "--"),
        "/opt/xllm",
        "--model=/models/m",
        "--model_id=glm",
        "--host=10.0.0.5",
        "--master_node_addr=10.0.0.5:116",
        "--nnodes=16",
        "--max_tokens_per_batch=8192",
        "--max_seqs_per_batch=32",
        "--block_size=128",
        "--tool_call_parser=glm47",
        "--reasoning_parser=glm45",
        "--dp_size=1",
        "--ep_size=8",
        "--draft_model=/models/MTP",
        "--num_speculative_tokens=1",
        "--max_memory_utilization=0.85",
        "--enable_prefix_cache=false",
        "--enable_chunked_prefill=true",
        "--communication_backend=hccl",
        "--enable_schedule_overlap=true",
        "--enable_graph=true",
        "--enable_graph_mode_decode_no_padding=true",
    )


def rank_command(launched: Launch, index: int) -> list[str]:
    """What the starter runs for the node's NPU number `index`."""
    starter = flags(launched.argv[: launched.argv.index("--")])
    base = launched.argv[launched.argv.index("--") + 1 :]
    return command_of(
        index,
        base,
        starter["--first-rank"],
        starter["--first-port"],
        starter.get("--draft-devices", False),
    )


def test_one_process_of_sixteen_beside_the_guide():
    guide = published(
        """PYTORCH_NPU_ALLOC_CONF=expandable_segments:True NPU_MEMORY_FRACTION=0.96
        ATB_WORKSPACE_MEM_ALLOC_ALG_TYPE=3 ATB_WORKSPACE_MEM_ALLOC_GLOBAL=1 OMP_NUM_THREADS=12
        ALLOW_INTERNAL_FORMAT=1 ATB_LAYER_INTERNAL_TENSOR_REUSE=1 ATB_LLM_ENABLE_AUTO_TRANSPOSE=0
        ATB_CONVERT_NCHW_TO_AND=1 ATB_LAUNCH_KERNEL_WITH_TILING=1 ATB_OPERATION_EXECUTE_ASYNC=2
        ATB_CONTEXT_WORKSPACE_SIZE=0 INF_NAN_MODE_ENABLE=1 HCCL_EXEC_TIMEOUT=300
        HCCL_CONNECT_TIMEOUT=300 HCCL_OP_EXPANSION_MODE=AIV HCCL_IF_BASE_PORT=2864""",
        """--model /models/m --port 18997 --devices=npu:3 --master_node_addr=10.0.0.5:10015
        --nnodes=16 --node_rank=3 --max_memory_utilization=0.85 --max_tokens_per_batch=8192
        --max_seqs_per_batch=32 --block_size=128 --enable_prefix_cache=false
        --enable_chunked_prefill=true --communication_backend=hccl --enable_schedule_overlap=true
        --enable_graph=true --enable_graph_mode_decode_no_padding=true --draft_model=/models/MTP
        --draft_devices=npu:3 --num_speculative_tokens=1 --ep_size=8 --dp_size=1""",
    )
    launched = launch([POOL | DRAFTS])
    found = compare(Launch(tuple(rank_command(launched, 3)), env=launched.env), guide)
    assert found.left_out == set()
    assert found.added == {"--host", "--model-id", "--tool-call-parser", "--reasoning-parser"}
    assert found.changed == {
        "--port": (18997, 103),
        "--master-node-addr": ("10.0.0.5:10015", "10.0.0.5:116"),
    }


def test_ranks_go_on_from_node_to_node():
    """Same guide, two nodes: --node_rank=$((i + LOCAL_NODES)), --rank_tablefile on both."""
    pool = POOL | {
        "nodes_per_replica": 2,
        "parallel": {"tensor": 32},
        "engine_args": {"rank_tablefile": "/etc/ranks.json"},
    }
    second = launch([pool], node_rank=1)
    found = flags(rank_command(second, 2))
    assert found["--node-rank"] == 18
    assert found["--nnodes"] == 32
    assert found["--master-node-addr"] == "10.0.0.5:116"
    assert found["--devices"] == "npu:2"
    assert second.env["HCCL_SOCKET_IFNAME"] == "eth0"


@pytest.mark.parametrize(
    ("pool", "model", "says"),
    [
        ({"role": "decode"}, {}, "through its own service and etcd; write `role: mixed`"),
        ({"nodes_per_replica": 2}, {}, "rank_tablefile: missing"),
        ({"parallel": {"pipeline": 2}}, {}, "pipeline"),
        ({}, {"id": "org/hub-id"}, "loads folders only"),
        ({"placement": {"resources": {"NPU": None, "GPU": 8}}}, {}, "without NPUs"),
    ],
)
def test_what_cannot_work_is_refused_with_the_fix(
    pool: dict[str, Any], model: dict[str, Any], says: str
):
    with pytest.raises(InvalidInput, match=says):
        launch([POOL | pool], model=model)


def test_it_is_asked_where_brpc_answers():
    probes = adapter("xllm").probes(context([POOL]))
    assert (probes.health, probes.metrics, probes.version) == ("/health", "/brpc_metrics", "")


def test_every_flag_and_variable_says_where_it_comes_from():
    launched = launch([POOL | DRAFTS])
    named = {word.partition("=")[0] for word in launched.argv if word.startswith("--")} - {"--"}
    assert named | set(launched.env) <= set(launched.origins)


RANK = """
import os, signal, sys, time
os.write(1, f"{{sys.argv[1:]}}\\n".encode())
if "--node_rank=1" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
time.sleep(0.3 if {dies} and "--node_rank=1" in sys.argv else 60)
sys.exit(5)
"""


def start(tmp_path: Path, dies: bool) -> subprocess.Popen[str]:
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(dies=dies))
    starter = (sys.executable, "-m", "cluster.engines.xllm", "--count", "3")
    args = ("--first-rank", "0", "--first-port", "9000", "--", sys.executable, str(script))
    return subprocess.Popen([*starter, *args], stdout=subprocess.PIPE, text=True)


def lines(process: subprocess.Popen[str], count: int) -> set[str]:
    assert process.stdout is not None
    return {process.stdout.readline().strip() for _ in range(count)}


def test_each_process_has_a_port_a_device_and_a_rank_of_its_own(tmp_path: Path):
    process = start(tmp_path, dies=False)
    assert lines(process, 3) == {
        f"['--port={9000 + i}', '--devices=npu:{i}', '--node_rank={i}']" for i in range(3)
    }
    process.terminate()
    process.wait(20)


def test_all_end_when_one_does_and_its_status_is_told(tmp_path: Path):
    process = start(tmp_path, dies=True)
    began_s = time.monotonic()
    lines(process, 3)
    assert process.wait(20) == 5
    assert time.monotonic() - began_s < 20
    assert not _children_of(process.pid)


def test_a_signal_reaches_all(tmp_path: Path):
    process = start(tmp_path, dies=False)
    lines(process, 3)
    children = _children_of(process.pid)
    assert len(children) == 3
    process.send_signal(signal.SIGTERM)
    # 128 + SIGTERM of a rank that leaves it to the system, or 7 of the one that does not.
    assert process.wait(20) in (7, 128 + signal.SIGTERM)
    assert not any(_is_there(child) for child in children)


def _children_of(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in found.read_text().split()] if found.exists() else []


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
