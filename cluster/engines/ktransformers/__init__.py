"""KTransformers: SGLang with the experts of a mixture on the CPU, prefill and decode in one server.

Started as kvcache-ai/ktransformers starts it (doc/en/kt-kernel/GLM-5.2-Tutorial.md at 95009ea6).
"""

from __future__ import annotations

from cluster.engines.ktransformers.adapter import KTransformersAdapter

__all__ = ["KTransformersAdapter"]
