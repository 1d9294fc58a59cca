"""vLLM on CPU and CUDA: how its vendor documents it, plus what was measured on CPUs.

adapter   engines.base.EngineAdapter: ports, launch, addresses, versions, metric names
flags     flags of one engine as a mapping, and argv out of it
kv        --kv-transfer-config and --kv-events-config
"""

from __future__ import annotations

from cluster.engines.vllm.adapter import VllmAdapter

__all__ = ["VllmAdapter"]
