"""Which tensor-parallel sizes a connector can carry KV between. One rule per connector.

NIXL: a decode rank pulls from whole prefill ranks, so several prefill ranks cannot feed one.
Mooncake, as the Ascend engines use it: the other way round, a decode rank gathers from several
prefill ranks. Both need one size to be a multiple of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.topology.schema import ConnectorName


@dataclass(frozen=True, slots=True)
class TensorRule:
    """`allows(prefill_tp, decode_tp)`; `wanted` completes the sentence "write ..."."""

    allows: Callable[[int, int], bool]
    wanted: str


_DIVIDES = TensorRule(
    lambda prefill, decode: decode % prefill == 0,
    "a prefill size that divides the decode size (nixl)",
)
_MULTIPLE = TensorRule(
    lambda prefill, decode: prefill % decode == 0,
    "a prefill size that is a multiple of the decode size (mooncake)",
)

TENSOR_RULES: dict[ConnectorName, TensorRule] = {
    "nixl": _DIVIDES,
    "mooncake": _MULTIPLE,
    "ascend_mooncake": _MULTIPLE,
    "ascend_layerwise": _MULTIPLE,
    "sglang_mooncake": TensorRule(lambda prefill, decode: True, ""),
    "sglang_nixl": TensorRule(lambda prefill, decode: True, ""),
    "sglang_ascend": TensorRule(lambda prefill, decode: True, ""),
}
