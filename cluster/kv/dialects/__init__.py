"""What a connector wants the two engines of a request to be told, and in which order.

    base       the three orders, and what a dialect must be able to say in each
    nixl       vLLM, prefill first
    mooncake   vLLM, prefill first, with a question to prefill's bootstrap server
    ascend     vLLM-Ascend: prefill first (ascend_mooncake), decode first (ascend_layerwise)
    sglang     SGLang, both together (sglang_mooncake, sglang_nixl, sglang_ascend)

Called by: kv.coordinator, which owns one of each; the gateway asks `ORDERS` and
`decode_can_prefill` when it plans.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from cluster.kv.dialects.ascend import AscendLayerwiseDialect, AscendMooncakeDialect
from cluster.kv.dialects.base import (
    DecodeFirst,
    Dialect,
    Fields,
    Order,
    PrefillFirst,
    Together,
)
from cluster.kv.dialects.mooncake import QUERY_TIMEOUT_S, MooncakeDialect
from cluster.kv.dialects.nixl import NixlDialect
from cluster.kv.dialects.sglang import SglangDialect
from cluster.topology.schema import ConnectorName

__all__ = [
    "ORDERS",
    "QUERY_TIMEOUT_S",
    "AscendLayerwiseDialect",
    "AscendMooncakeDialect",
    "DecodeFirst",
    "Dialect",
    "Fields",
    "MooncakeDialect",
    "NixlDialect",
    "Order",
    "PrefillFirst",
    "SglangDialect",
    "Together",
    "decode_can_prefill",
    "make_dialects",
]

_CLASSES: Mapping[ConnectorName, type[Dialect]] = {
    "nixl": NixlDialect,
    "mooncake": MooncakeDialect,
    "ascend_mooncake": AscendMooncakeDialect,
    "ascend_layerwise": AscendLayerwiseDialect,
    "sglang_mooncake": SglangDialect,
    "sglang_nixl": SglangDialect,
    "sglang_ascend": SglangDialect,
}
ORDERS: Mapping[str, Order] = {name: kind.order for name, kind in _CLASSES.items()}


def decode_can_prefill(connector: str) -> bool:
    """Whether a decode engine of this connector can serve a request that nobody prefilled."""
    return all(kind.decode_prefills for name, kind in _CLASSES.items() if name == connector)


def make_dialects(ask: Callable[[str], Awaitable[Any]]) -> dict[str, Dialect]:
    """One of each. `ask(url)`: the parsed JSON answer to a GET; see MooncakeDialect."""
    made: list[Dialect] = [
        NixlDialect(),
        MooncakeDialect(ask),
        AscendMooncakeDialect(),
        AscendLayerwiseDialect(),
        *(SglangDialect(name) for name, kind in _CLASSES.items() if kind is SglangDialect),
    ]
    return {dialect.connector: dialect for dialect in made}
