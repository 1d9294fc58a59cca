"""xLLM on Ascend: one process per NPU, rank 0 with the HTTP port.

adapter   engines.base.EngineAdapter
ranks     `python -m cluster.engines.xllm`: starts a node's processes and ends them together

Its prefill/decode separation is not ours to drive: with --enable_disagg_pd its instances take work
from xLLM-service only, over brpc, and find each other through etcd (xllm/xllm.cpp, create_options:
enable_service_routing || enable_disagg_pd). So pools are `role: mixed`.

Flags as jd-opensource/xllm has them at 87e8d6ed (xllm/core/framework/config/*.cpp).
"""

from __future__ import annotations

from cluster.engines.xllm.adapter import XllmAdapter

__all__ = ["XllmAdapter"]
