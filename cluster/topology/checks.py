"""What must agree between keys of `metadata.serving`. Pure: looks at nothing but the spec.

Called by: topology.loader. What must agree within one pool is in `pool_checks`, with Ray's half in
`agreement`. Every check words its finding for someone who has the file open.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.identity import Role
from cluster.topology.findings import Finding, KeyPath, did_you_mean, nearest
from cluster.topology.pairing import MIXED_ONLY, Side, connectors_of, objections, speaks
from cluster.topology.pool_checks import pool_faults
from cluster.topology.reserved import canonical
from cluster.topology.scaling_checks import scaling_faults
from cluster.topology.schema import GatewaySpec, IslandSpec, PoolSpec, ServingSpec

# What two pools that exchange KV blocks must load alike.
_MODEL_KEYS = ("id", "revision", "quantization", "dtype", "kv_cache_dtype")
# Settings that change what KV blocks look like or how their hashes come out, and what an engine
# gets where a pool does not say (None: the engine's own choice).
_KV_FLAGS = {
    "attention-backend": None,
    "hf-overrides": None,
    "kv-cache-dtype-skip-layers": None,
    "prefix-caching-hash-algo": "sha256_cbor",
}
_KV_VARIABLES = {
    "PYTHONHASHSEED": "0",
    "VLLM_ATTENTION_BACKEND": None,
    "VLLM_KV_CACHE_LAYOUT": None,
    "VLLM_MLA_DISABLE": None,
}
# Methods of vLLM that draft from the model's hidden states, besides MTP: NIXL's connector refuses a
# pair of which only one has them (0.32, nixl/metadata.py).
_DRAFTING_LAYERS = frozenset({"eagle", "eagle3", "dflash", "dspark"})
# Where a pool states what a connector's rule judges.
_JUDGED_KEYS: dict[str, KeyPath] = {
    "hardware": ("hardware",),
    "tensor_parallel": ("parallel", "tensor"),
}
# Ray Serve with HAProxy (Ray 2.60) opens these on all interfaces of the head.
_HAPROXY_PORTS = {8404: "HAProxy's statistics", 9101: "HAProxy's metrics"}
_SERVE_REPLICA_PORTS = range(30_000, 31_001)

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def cross_faults(serving: ServingSpec) -> tuple[Finding, ...]:
    """All that does not agree, keys given from `metadata.serving` down. Never raises."""
    book, pools = _Book(serving), serving.pools
    return (
        *_names(serving),
        *_membership(book),
        *_links(book),
        *_unlinked(book),
        *_decoders(book),
        *_engines(book),
        *_connectors(book),
        *_pairs(book),
        *(
            finding
            for index, pool in enumerate(serving.pools)
            for finding in pool_faults(pool, _at(index))
        ),
        *_model(serving),
        *_lengths(book),
        *_gateway(serving.gateway),
        *_health(serving),
        *scaling_faults(serving, {(pools[a].name, pools[b].name) for a, b, _ in book.pairs()}),
    )


class _Book:
    """The spec, with names looked up. Unlike ServingSpec's own look-ups it bears bad names."""

    def __init__(self, serving: ServingSpec) -> None:
        self.serving = serving
        self.index: dict[str, int] = {}
        for index, pool in enumerate(serving.pools):
            self.index.setdefault(pool.name, index)
        self.island: dict[str, IslandSpec] = {}
        for island in serving.islands:
            for name in island.pools:
                self.island.setdefault(name, island)

    def pool(self, name: str) -> PoolSpec | None:
        index = self.index.get(name)
        return None if index is None else self.serving.pools[index]

    def pairs(self) -> list[tuple[int, int, IslandSpec]]:
        """(prefill, decode, their island) of every pair that may exchange KV, by index."""
        if self.serving.links:
            wanted = [(link.prefill, link.decode) for link in self.serving.links]
        else:
            wanted = [pair for island in self.serving.islands for pair in _all_pairs(island.pools)]
        found = {}
        for source, target in wanted:
            prefill, decode = self.pool(source), self.pool(target)
            island = self.island.get(source)
            if (
                prefill is not None
                and decode is not None
                and island is not None
                and island is self.island.get(target)
                and (prefill.role, decode.role) == (Role.PREFILL, Role.DECODE)
            ):
                found[self.index[source], self.index[target]] = island
        return [(source, target, island) for (source, target), island in found.items()]


def _all_pairs(names: list[str]) -> list[tuple[str, str]]:
    return [(source, target) for source in names for target in names]


def _at(pool: int) -> KeyPath:
    return ("pools", pool)


def _names(serving: ServingSpec) -> Iterator[Finding]:
    for section, names in (
        ("pools", [pool.name for pool in serving.pools]),
        ("islands", [island.name for island in serving.islands]),
    ):
        for index, name in enumerate(names):
            first = names.index(name)
            if first != index:
                found = f'"{name}" is already the name of {section}[{first}]'
                yield Finding((section, index, "name"), found, "give it a name of its own")


def _membership(book: _Book) -> Iterator[Finding]:
    meant: set[str | None] = set()
    seen: dict[str, IslandSpec] = {}
    for number, island in enumerate(book.serving.islands):
        for place, name in enumerate(island.pools):
            key: KeyPath = ("islands", number, "pools", place)
            if name not in book.index:
                meant.add(nearest(name, book.index))
                yield Finding(key, f'no pool is called "{name}"', did_you_mean(name, book.index))
            elif seen.get(name) is island:
                yield Finding(key, f'pool "{name}" is listed twice', "keep one of the two")
            elif name in seen:
                found = f'pool "{name}" is also in island "{seen[name].name}"'
                yield Finding(key, found, "keep it in one island")
            seen.setdefault(name, island)
    for index, pool in enumerate(book.serving.pools):
        if pool.name not in seen and pool.name not in meant:
            yield Finding(
                (*_at(index), "name"),
                f'pool "{pool.name}" is in no island',
                f'add "{pool.name}" to `pools` of an island (islands: '
                f"{', '.join(island.name for island in book.serving.islands)})",
                rests_on=(("islands",), (*_at(index), "name")),
            )


def _links(book: _Book) -> Iterator[Finding]:
    earlier: dict[tuple[str, str], int] = {}
    for number, link in enumerate(book.serving.links):
        at: KeyPath = ("links", number)
        ends = (("prefill", link.prefill, Role.PREFILL), ("decode", link.decode, Role.DECODE))
        sound = True
        for side, name, role in ends:
            pool = book.pool(name)
            if pool is None:
                sound = False
                fit = [other.name for other in book.serving.pools if other.role is role]
                fix = did_you_mean(name, fit or book.index)
                yield Finding((*at, side), f'no pool is called "{name}"', fix)
            elif pool.role is not role:
                sound = False
                fix = f"name a pool with `role: {role}`; a mixed pool needs no link"
                yield Finding((*at, side), f'pool "{name}" has role {pool.role}', fix)
        one, other = book.island.get(link.prefill), book.island.get(link.decode)
        if sound and one is not None and other is not None and one is not other:
            yield Finding(
                at,
                f'"{link.prefill}" is in island "{one.name}", "{link.decode}" in "{other.name}"',
                "link pools of one island; KV blocks of two islands are not alike",
                rests_on=(at, ("islands",)),
            )
        pair = (link.prefill, link.decode)
        if pair in earlier:
            yield Finding(at, f"the same link as links[{earlier[pair]}]", "keep one of the two")
        earlier.setdefault(pair, number)


def _unlinked(book: _Book) -> Iterator[Finding]:
    pairs = book.pairs()
    fed = {source for source, _, _ in pairs} | {target for _, target, _ in pairs}
    if not any(pool.role is not Role.PREFILL for pool in book.serving.pools):
        return  # nothing decodes at all: that is the fault to report
    for index, pool in enumerate(book.serving.pools):
        island = book.island.get(pool.name)
        if pool.role is Role.MIXED or index in fed or island is None:
            continue
        wanted = Role.DECODE if pool.role is Role.PREFILL else Role.PREFILL
        mates = [name for name in island.pools if (p := book.pool(name)) and p.role is wanted]
        if mates:
            ends = (pool.name, mates[0]) if wanted is Role.DECODE else (mates[0], pool.name)
            found = f'pool "{pool.name}" has no link: `links` names other pools only'
            fix = f"add {{prefill: {ends[0]}, decode: {ends[1]}}} to `links`, or leave out `links`"
        else:
            found = f'pool "{pool.name}" has no link: island "{island.name}" has no {wanted} pool'
            fix = f"add a pool with `role: {wanted}` to the island, or write `role: mixed` here"
        grounds: tuple[KeyPath, ...] = ((*_at(index), "role"), ("islands",), ("links",))
        yield Finding((*_at(index), "role"), found, fix, rests_on=grounds)


def _decoders(book: _Book) -> Iterator[Finding]:
    decoders = [
        (index, pool)
        for index, pool in enumerate(book.serving.pools)
        if pool.role is not Role.PREFILL
    ]
    if not decoders:
        yield Finding(
            ("pools",),
            "zero decode workers: every pool has role prefill",
            "give one pool `role: decode`, or `role: mixed` if it is to do both",
            rests_on=(("pools", 0, "role"),),
        )
    elif not any(pool.replicas.initial for _, pool in decoders):
        names = ", ".join(pool.name for _, pool in decoders)
        yield Finding(
            (*_at(decoders[0][0]), "replicas"),
            f"zero decode workers: no replica of {names} is started",
            f"write `replicas: 1` or more for one of them ({names})",
            rests_on=tuple((*_at(index), "replicas") for index, _ in decoders),
        )


def _engines(book: _Book) -> Iterator[Finding]:
    for island in book.serving.islands:
        members = [book.index[name] for name in island.pools if name in book.index]
        for index in members[1:]:
            first, pool = book.serving.pools[members[0]], book.serving.pools[index]
            if pool.engine != first.engine:
                key = (*_at(index), "engine")
                yield Finding(
                    key,
                    f'engine {pool.engine}, but pool "{first.name}" of the same island '
                    f'"{island.name}" has engine {first.engine}',
                    "use one engine within an island, or put the pool into an island of its own",
                    rests_on=(key, (*_at(members[0]), "engine"), ("islands",)),
                )


def _connectors(book: _Book) -> Iterator[Finding]:
    """Islands whose connector an engine lacks. A mixed pool moves no blocks and needs none."""
    for number, island in enumerate(book.serving.islands):
        for index in (book.index[name] for name in island.pools if name in book.index):
            pool = book.serving.pools[index]
            if pool.role is Role.MIXED or pool.engine in MIXED_ONLY:
                continue
            if not speaks(pool.engine, island.connector):
                key: KeyPath = ("islands", number, "connector")
                yield Finding(
                    key,
                    f'{island.connector}, which engine {pool.engine} of pool "{pool.name}" does '
                    "not speak",
                    f"write {' or '.join(connectors_of(pool.engine))}",
                    rests_on=(key, (*_at(index), "engine"), (*_at(index), "role")),
                )
                break


def _pairs(book: _Book) -> Iterator[Finding]:
    for source, target, island in book.pairs():
        prefill, decode = book.serving.pools[source], book.serving.pools[target]
        for objection in objections(island.connector, _side(prefill), _side(decode)):
            key = _JUDGED_KEYS[objection.about]
            yield Finding(
                (*_at(target), *key),
                f'prefill pool "{prefill.name}" has {objection.prefill}, decode pool '
                f'"{decode.name}" has {objection.decode}',
                objection.fix,
                rests_on=((*_at(source), *key), (*_at(target), *key), ("islands",)),
            )
        settings = (
            *_model_settings(book.serving, prefill, decode),
            *_kv_settings(prefill, decode),
        )
        for key, one, other in settings:
            if one != other:
                yield Finding(
                    (*_at(target), *key),
                    f'{_said(other)} here, {_said(one)} in pool "{prefill.name}", which feeds it; '
                    "their KV blocks would differ",
                    "write the same value in both pools",
                    rests_on=((*_at(source), *key), (*_at(target), *key)),
                )


def _side(pool: PoolSpec) -> Side:
    return Side(pool.hardware or "", pool.parallel.tensor)


def _model_settings(
    serving: ServingSpec, one: PoolSpec, other: PoolSpec
) -> Iterator[tuple[KeyPath, object, object]]:
    mine, theirs = serving.model_of(one.name), serving.model_of(other.name)
    for key in _MODEL_KEYS:
        yield ("model", key), getattr(mine, key), getattr(theirs, key)


def _kv_settings(one: PoolSpec, other: PoolSpec) -> Iterator[tuple[KeyPath, object, object]]:
    yield ("block_size_tokens",), one.block_size_tokens, other.block_size_tokens
    for key in ("id", "revision", "quantization", "dtype", "kv_cache_dtype"):
        yield ("model", key), getattr(one.model, key, None), getattr(other.model, key, None)
    flags = [{canonical(k): v for k, v in pool.engine_args.items()} for pool in (one, other)]
    for flag, unset in _KV_FLAGS.items():
        yield ("engine_args", flag), flags[0].get(flag, unset), flags[1].get(flag, unset)
    for name, unset in _KV_VARIABLES.items():
        yield ("env", name), one.env.get(name, unset), other.env.get(name, unset)
    yield ("speculative", "method"), _drafting_layers(one), _drafting_layers(other)


def _drafting_layers(pool: PoolSpec) -> str | None:
    """The method whose layers keep keys and values beside the model's own; None: it has none."""
    method = str((pool.speculative or {}).get("method", ""))
    if method.endswith("mtp"):
        return "mtp"  # deepseek_mtp and others are older names of it
    return method if method in _DRAFTING_LAYERS else None


def _said(value: object) -> str:
    return "unset" if value is None else f"{value}"


def _model(serving: ServingSpec) -> Iterator[Finding]:
    if not serving.model.public_name.strip():
        found = f'"{serving.model.id}" leaves no name for clients to use'
        yield Finding(("model", "id"), found, "write `served_name: NAME` beside it")


def _lengths(book: _Book) -> Iterator[Finding]:
    pools, most = book.serving.pools, book.serving.model.max_model_len_tokens
    at_model: KeyPath = ("model", "max_model_len_tokens")
    for index, pool in enumerate(pools):
        own, key = pool.max_model_len_tokens, (*_at(index), "max_model_len_tokens")
        if own is not None and most is not None and own > most:
            yield Finding(
                key,
                f"found {own}, more than the model's max_model_len_tokens ({most})",
                f"write {most} or less, or raise the model's",
                rests_on=(key, at_model),
            )
    # Under `recompute` a longer prompt is computed by decode; under `fail` nobody would take it.
    feeders: dict[int, list[int]] = {}
    for source, target, island in book.pairs():
        if island.on_prefill_failure == "fail":
            feeders.setdefault(target, []).append(source)
    for target, sources in feeders.items():
        takes = pools[target].max_model_len_tokens or most
        given = [pools[source].max_model_len_tokens or most for source in sources]
        known = [tokens for tokens in given if tokens is not None]
        if takes is not None and len(known) == len(given) and max(known) < takes:
            best = sources[known.index(max(known))]
            key = (*_at(best), "max_model_len_tokens")
            yield Finding(
                key,
                f'found {max(known)}, less than decode pool "{pools[target].name}" takes ({takes}),'
                " and with `on_prefill_failure: fail` longer prompts would be refused for ever",
                f"write {takes}, lower the decode pool's, or write `on_prefill_failure: recompute`",
                rests_on=(key, (*_at(target), "max_model_len_tokens"), at_model, ("islands",)),
            )


def _gateway(gateway: GatewaySpec) -> Iterator[Finding]:
    # A port below 1024 works for root and where the system allows it, and engines take free ports
    # at random out of thousands: neither is a fault of the file.
    if gateway.ingress == "serve":
        taken = _HAPROXY_PORTS.get(gateway.port)
        if gateway.port in _SERVE_REPLICA_PORTS:
            taken = "Serve's own replicas (30000 to 31000)"
        if taken is not None:
            yield Finding(
                ("gateway", "port"),
                f"port {gateway.port} belongs to {taken}",
                "write another port, such as 8000, or `ingress: direct`",
                rests_on=(("gateway", "port"), ("gateway", "ingress")),
            )
    auth = gateway.auth
    if auth is not None and auth.keys_env is not None and not _VARIABLE.fullmatch(auth.keys_env):
        # Not quoted: it may well be a key.
        yield Finding(
            ("gateway", "auth", "keys_env"),
            "this is no name of an environment variable",
            "write the variable's name, such as PDCLUSTER_KEYS, and put the keys into the variable",
        )


def _health(serving: ServingSpec) -> Iterator[Finding]:
    first, longest = serving.health.restart_backoff_s, serving.health.restart_backoff_max_s
    if first > longest:
        yield Finding(
            ("health", "restart_backoff_max_s"),
            f"found {longest:g}, less than restart_backoff_s ({first:g})",
            f"write {first:g} or more",
            rests_on=(("health",),),
        )
