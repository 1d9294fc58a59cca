"""What KTransformers is started with, beside its guide.

kvcache-ai/ktransformers: doc/en/kt-kernel/GLM-5.2-Tutorial.md at 95009ea6, "FP8 Precision".
"""

from __future__ import annotations

import pytest
from commands import compare, launch, published

from cluster.errors import InvalidInput

POOL = {"name": "offload", "role": "mixed", "preset": "glm-5.2-h200-ktransformers"}
MODEL = {"id": "/models/GLM-5.2-FP8", "served_name": "GLM5.2"}
GUIDE = published(
    "PYTORCH_ALLOC_CONF=expandable_segments:True SGLANG_ENABLE_JIT_DEEPGEMM=0",
    """--model-path /models/GLM-5.2-FP8 --kt-weight-path /models/GLM-5.2-FP8 --kt-cpuinfer 96
    --kt-threadpool-count 2 --kt-num-gpu-experts 30 --kt-method FP8
    --kt-gpu-prefill-token-threshold 1024 --kt-enable-dynamic-expert-update
    --kt-expert-placement-strategy uniform --tp-size 8 --trust-remote-code --host 0.0.0.0
    --port 8000 --mem-fraction-static 0.97 --kv-cache-dtype fp8_e4m3 --max-total-tokens 4096
    --max-running-requests 8 --attention-backend nsa --fp8-gemm-backend cutlass
    --disable-shared-experts-fusion --tool-call-parser glm47 --reasoning-parser glm45
    --served-model-name GLM5.2""",
)


def test_eight_gpus_and_the_cpu_word_for_word():
    launched = launch([POOL], model=MODEL)
    assert launched.argv == (
        *("/venv/bin/python", "-m", "sglang.launch_server"),
        *("--model-path", "/models/GLM-5.2-FP8"),
        *("--host", "10.0.0.5"),
        *("--port", "100"),
        *("--served-model-name", "GLM5.2"),
        *("--kv-cache-dtype", "fp8_e4m3"),
        *("--context-length", "4096"),
        "--trust-remote-code",
        *("--tool-call-parser", "glm47"),
        *("--reasoning-parser", "glm45"),
        *("--max-running-requests", "8"),
        *("--tp-size", "8"),
        "--enable-metrics",
        "--enable-cache-report",
        *("--kt-weight-path", "/models/GLM-5.2-FP8"),
        *("--kt-cpuinfer", "96"),
        *("--kt-threadpool-count", "2"),
        *("--kt-num-gpu-experts", "30"),
        *("--kt-method", "FP8"),
        *("--kt-gpu-prefill-token-threshold", "1024"),
        "--kt-enable-dynamic-expert-update",
        *("--kt-expert-placement-strategy", "uniform"),
        *("--mem-fraction-static", "0.97"),
        *("--max-total-tokens", "4096"),
        *("--attention-backend", "nsa"),
        *("--fp8-gemm-backend", "cutlass"),
        "--disable-shared-experts-fusion",
        *("--config", "/run/x/sglang.yaml"),
    )
    assert launched.secret_files == {"sglang.yaml": 'api-key: "secret-key"\n'}


def test_the_command_beside_the_guide():
    found = compare(launch([POOL], model=MODEL), GUIDE)
    assert found.left_out == set()
    assert found.added == {
        "--context-length",  # no request can be longer than all tokens together
        "--enable-metrics",
        "--enable-cache-report",
        "--config",
        "SGLANG_HOST_IP",
        "PYTHONHASHSEED",
        "HF_HUB_OFFLINE",
    }
    assert set(found.changed) == {"--host", "--port"}


def test_it_hands_no_kv_to_another_engine():
    with pytest.raises(InvalidInput, match="write `role: mixed`"):
        launch([POOL | {"role": "decode"}], model=MODEL)
