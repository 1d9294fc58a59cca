"""vLLM-Ascend: vLLM's server with Huawei's plugin, on Atlas A2 and A3.

adapter   engines.base.EngineAdapter; what it shares with vLLM is imported from there
kv        --kv-transfer-config of its two Mooncake connectors, and their ports

Sources are named beside the golden commands, tests/unit/test_engines_vllm_ascend_command.py.
"""

from __future__ import annotations

from cluster.engines.vllm_ascend.adapter import VllmAscendAdapter

__all__ = ["VllmAscendAdapter"]
