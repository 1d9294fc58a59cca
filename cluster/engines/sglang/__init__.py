"""SGLang on CUDA and Ascend.

adapter   engines.base.EngineAdapter
flags     from the topology's words to its command line; KTransformers shares them
kv        prefill/decode hand-over: bootstrap server, transfer backend
metrics   names of its Prometheus series

Flags as SGLang 0.5.23 has them; sources are named beside the golden commands,
tests/unit/test_engines_sglang_command.py.
"""

from __future__ import annotations

from cluster.engines.sglang.adapter import SglangAdapter

__all__ = ["SglangAdapter"]
