"""Which adapter an engine name of the topology stands for."""

from __future__ import annotations

from cluster.engines.base import EngineAdapter
from cluster.engines.ktransformers import KTransformersAdapter
from cluster.engines.sglang import SglangAdapter
from cluster.engines.simulated.adapter import SimulatedAdapter
from cluster.engines.vllm import VllmAdapter
from cluster.engines.vllm_ascend import VllmAscendAdapter
from cluster.engines.xllm import XllmAdapter
from cluster.errors import InvalidInput

_ALL: tuple[EngineAdapter, ...] = (
    VllmAdapter(),
    VllmAscendAdapter(),
    SglangAdapter(),
    XllmAdapter(),
    KTransformersAdapter(),
    SimulatedAdapter(),
)
_ADAPTERS: dict[str, EngineAdapter] = {adapter.name: adapter for adapter in _ALL}


def adapter(name: str) -> EngineAdapter:
    """Raises: InvalidInput."""
    try:
        return _ADAPTERS[name]
    except KeyError:
        known = ", ".join(sorted(_ADAPTERS))
        raise InvalidInput(f"engine: found {name!r}; write one of {known}") from None
