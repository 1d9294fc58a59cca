"""Who may feed whom: what each connector asks of the two engines whose KV blocks it moves.

One rule per connector, looked at twice: by `topology.checks` for two pools of a file, and by
`kv.fingerprint` for two engines that run. What must simply be equal (block size, dtypes, hash
seed) is not here: the file's settings are compared in `checks`, the engines' in `fingerprint`.

Sources of the tensor-parallel rules:
    nixl             vLLM's NixlConnector: a decode rank reads a part of one prefill rank; gathering
                     from several is refused for most attention layouts (nixl/base_worker.py,
                     _validate_remote_agent_handshake; 0.32)
    mooncake         vLLM's MooncakeConnector: either way round, sizes must divide (_get_tp_ratio)
    ascend_*         vLLM-Ascend's: a decode rank gathers from several prefill ranks; a smaller
                     prefill size is a ValueError (kv_p2p/mooncake_connector.py)
    sglang_*         SGLang sends each rank's heads to whoever needs them (disaggregation/common)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.topology.schema import EngineName


@dataclass(frozen=True, slots=True)
class TensorRule:
    """`allows(prefill_tp, decode_tp)`; `wanted` completes the sentence "write ..."."""

    allows: Callable[[int, int], bool]
    wanted: str


@dataclass(frozen=True, slots=True)
class ConnectorRule:
    """What one connector asks for. `serves_both_roles`: an engine started with it can prefill and
    decode, so that a worker's role may change without a restart."""

    engines: tuple[EngineName, ...]
    tensor: TensorRule
    serves_both_roles: bool = False


@dataclass(frozen=True, slots=True)
class Side:
    """One end of a pair. "" and 0: not stated, so not held against it."""

    hardware: str = ""
    tensor_parallel: int = 0


@dataclass(frozen=True, slots=True)
class Objection:
    """Why a pair must not exchange blocks: what each side has, and what to write instead."""

    about: Literal["hardware", "tensor_parallel"]
    prefill: str
    decode: str
    fix: str


_DIVIDES = TensorRule(
    lambda prefill, decode: decode % prefill == 0,
    "a prefill size that divides the decode size (nixl)",
)
_EITHER = TensorRule(
    lambda prefill, decode: decode % prefill == 0 or prefill % decode == 0,
    "sizes of which one divides the other (mooncake)",
)
_MULTIPLE = TensorRule(
    lambda prefill, decode: prefill % decode == 0,
    "a prefill size that is a multiple of the decode size (vLLM-Ascend)",
)
_ANY = TensorRule(lambda prefill, decode: True, "")

RULES: Mapping[str, ConnectorRule] = {
    "nixl": ConnectorRule(("vllm", "simulated"), _DIVIDES, serves_both_roles=True),
    "mooncake": ConnectorRule(("vllm", "simulated"), _EITHER),
    "ascend_mooncake": ConnectorRule(("vllm_ascend", "simulated"), _MULTIPLE),
    "ascend_layerwise": ConnectorRule(("vllm_ascend", "simulated"), _MULTIPLE),
    "sglang_mooncake": ConnectorRule(("sglang", "simulated"), _ANY),
    "sglang_nixl": ConnectorRule(("sglang", "simulated"), _ANY),
    "sglang_ascend": ConnectorRule(("sglang", "simulated"), _ANY),
}

# Engines whose workers do both halves of a request, and why they cannot share it.
MIXED_ONLY: Mapping[str, str] = {
    "xllm": "xLLM pairs its prefill and decode instances itself, through its own service and etcd",
    "ktransformers": "KTransformers has no KV hand-over to another engine",
}

# The vendor and generation that a hardware name stands for, as people write it.
GENERATIONS: Mapping[str, str] = {
    "cpu": "CPU",
    "h200": "NVIDIA H200",
    "atlas_a2": "Atlas A2",
    "atlas_a3": "Atlas A3",
}


def speaks(engine: str, connector: str) -> bool:
    """Whether an engine has this connector. A connector without a rule is spoken by none."""
    return connector in RULES and engine in RULES[connector].engines


def connectors_of(engine: str) -> tuple[str, ...]:
    """The connectors that an engine speaks."""
    return tuple(name for name, rule in RULES.items() if engine in rule.engines)


def serves_both_roles(connector: str) -> bool:
    """Whether a worker with this connector may turn from prefill to decode without a restart."""
    return connector in RULES and RULES[connector].serves_both_roles


def objections(connector: str, prefill: Side, decode: Side) -> tuple[Objection, ...]:
    """All that speaks against blocks passing from `prefill` to `decode` over `connector`."""
    found = []
    kinds = (prefill.hardware, decode.hardware)
    if all(kinds) and kinds[0] != kinds[1]:
        one, other = (GENERATIONS.get(kind, kind) for kind in kinds)
        fix = "put pools of two hardware generations into islands of their own"
        found.append(Objection("hardware", one, other, fix))
    sizes = (prefill.tensor_parallel, decode.tensor_parallel)
    if all(sizes) and connector in RULES and not RULES[connector].tensor.allows(*sizes):
        fix = f"write {RULES[connector].tensor.wanted}"
        found.append(Objection("tensor_parallel", str(sizes[0]), str(sizes[1]), fix))
    return tuple(found)
