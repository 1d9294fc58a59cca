"""Do the two halves of a topology agree: is there a node for every replica the pools ask for?

In: the serving half, and what Ray's half offers (an Offer). Out: Findings, keys from the top of the
file. Pure, no Ray: launcher.validate reads the Offer out of Ray's half.
Only what is certain is a finding. A node type may offer more than its text says (CPUs and `ray.io/`
labels are found by Ray itself), and packing is judged by bounds that no placement can beat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.topology.findings import SERVING, Finding, KeyPath, did_you_mean
from cluster.topology.labels import label_matches
from cluster.topology.schema import PoolSpec, ServingSpec

# Every node has some of these, stated or not; Ray adds names with these beginnings by itself.
_FOUND_BY_RAY = frozenset({"CPU", "memory", "object_store_memory"})
_MADE_BY_RAY = ("node:", "accelerator_type:")
_RAY_LABEL = "ray.io/"


@dataclass(frozen=True, slots=True)
class NodeType:
    """Nodes that are alike: at most `most_workers`, and the head if `is_head`. A resource or label
    that is not stated is unknown where `open_ended`, else it is absent."""

    name: str
    most_workers: int
    is_head: bool = False
    resources: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    open_ended: bool = False

    def amount(self, resource: str) -> float | None:
        """How much of a resource one node has; None: not known."""
        stated = self.resources.get(resource)
        if stated is not None:
            return stated
        found_by_ray = resource in _FOUND_BY_RAY or resource.startswith(_MADE_BY_RAY)
        return None if self.open_ended or found_by_ray else 0.0

    def may_match(self, key: str, selector: str) -> bool:
        """Can a node of this type carry a label that the selector takes?"""
        label = self.labels.get(key)
        if label is None and (self.open_ended or key.startswith(_RAY_LABEL)):
            return True
        return label_matches(selector, label)


@dataclass(frozen=True, slots=True)
class Offer:
    """All node types, and how many nodes besides the head there can be of all types together."""

    node_types: tuple[NodeType, ...]
    max_workers: int


def disagreements(serving: ServingSpec, offer: Offer) -> tuple[Finding, ...]:
    """Pools that no node can take, and replicas for which there are too few nodes."""
    findings: list[Finding] = []
    eligible: dict[int, tuple[NodeType, ...]] = {}
    for index, pool in enumerate(serving.pools):
        single = tuple(_single_node(pool, (*SERVING, "pools", index), offer))
        findings += single
        if not single:
            eligible[index] = _eligible(pool, offer)
    for index, types in eligible.items():
        findings += _too_few_nodes(serving.pools[index], (*SERVING, "pools", index), types, offer)
    if not findings:
        findings += _too_little_in_total(serving, eligible, offer)
    return tuple(findings)


def _single_node(pool: PoolSpec, at: KeyPath, offer: Offer) -> Iterator[Finding]:
    """Why no single node can take one node's share of a replica."""
    placement: KeyPath = (*at, "placement")
    labels = pool.placement.labels
    for key, selector in labels.items():
        if not any(kind.may_match(key, selector) for kind in offer.node_types):
            yield _no_such_label((*placement, "labels", key), key, selector, offer)
            return
    matching = [
        kind
        for kind in offer.node_types
        if all(kind.may_match(key, selector) for key, selector in labels.items())
    ]
    if not matching:
        wanted = ", ".join(f"{key}: {selector}" for key, selector in labels.items())
        found = f"no node type has all of these labels together ({wanted})"
        fix = "take one out, or add a node type that has them all"
        yield Finding((*placement, "labels"), found, fix)
        return
    short = [
        finding
        for name, amount in pool.placement.resources.items()
        if (finding := _short_of(name, amount, matching, (*placement, "resources", name), offer))
    ]
    yield from short
    if not short and not any(_takes_one(pool, kind) for kind in matching):
        wanted = ", ".join(f"{name} {n:g}" for name, n in pool.placement.resources.items())
        found = f"no node type offers all of these together ({wanted})"
        fix = "lower one, or add a node type that has them all"
        yield Finding((*placement, "resources"), found, fix)


def _short_of(
    name: str, amount: float, matching: list[NodeType], key: KeyPath, offer: Offer
) -> Finding | None:
    amounts = [kind.amount(name) for kind in matching]
    if any(known is None or known >= amount for known in amounts):
        return None
    best = max(known for known in amounts if known is not None)
    if best > 0:
        offers = ", ".join(f"{kind.name}: {kind.amount(name):g}" for kind in matching)
        return Finding(
            key,
            f"found {amount:g}; no node type offers more than {best:g} ({offers})",
            "lower it, spread the replica over more nodes_per_replica, or add a node type",
        )
    among = "" if len(matching) == len(offer.node_types) else " that its labels match"
    offered = sorted({n for kind in matching for n, x in kind.resources.items() if x})
    return Finding(
        key,
        f"no node type{among} offers {name} ({', '.join(kind.name for kind in matching)})",
        f"add `{name}: {amount:g}` to the resources of a node type, or ask for what there is: "
        f"{', '.join(offered) or 'nothing'}",
    )


def _no_such_label(at: KeyPath, key: str, selector: str, offer: Offer) -> Finding:
    values = sorted({kind.labels[key] for kind in offer.node_types if key in kind.labels})
    if values:
        found = f'no node type has a label that fits "{selector}" (there is {", ".join(values)})'
        return Finding(at, found, did_you_mean(selector, values))
    known = sorted({name for kind in offer.node_types for name in kind.labels})
    found = f'no node type has the label "{key}"'
    fix = f"add `labels: {{{key}: {selector}}}` to a node type"
    return Finding(at, found, f"{fix}, or {did_you_mean(key, known)}" if known else fix)


def _eligible(pool: PoolSpec, offer: Offer) -> tuple[NodeType, ...]:
    return tuple(
        kind
        for kind in offer.node_types
        if all(kind.may_match(k, v) for k, v in pool.placement.labels.items())
        and _takes_one(pool, kind)
    )


def _takes_one(pool: PoolSpec, kind: NodeType) -> bool:
    return all(
        (known := kind.amount(name)) is None or known >= amount
        for name, amount in pool.placement.resources.items()
    )


def _too_few_nodes(
    pool: PoolSpec, at: KeyPath, types: tuple[NodeType, ...], offer: Offer
) -> Iterator[Finding]:
    """One pool alone: more nodes per replica, or more replicas, than its node types can take."""
    nodes = int(_greatest([(kind, 1.0) for kind in types], offer))
    names = ", ".join(f"{kind.name}: {kind.most_workers + kind.is_head}" for kind in types)
    limits = f"{_count(nodes, 'node')} at most ({names}; max_workers {offer.max_workers})"
    if pool.nodes_per_replica > nodes:
        found = f"a replica takes {pool.nodes_per_replica} nodes; there are {limits}"
        fix = "lower it, or raise max_workers of a node type and of the file"
        yield Finding((*at, "nodes_per_replica"), found, fix)
        return
    per_node = [(kind, shares) for kind in types if (shares := _shares(pool, kind)) is not None]
    if len(per_node) < len(types):
        return
    fit = _greatest(per_node, offer)
    wanted = pool.replicas.initial * pool.nodes_per_replica
    if wanted > fit:
        replicas = int(fit) // pool.nodes_per_replica
        yield Finding(
            (*at, "replicas"),
            f"found {pool.replicas.initial} replicas; {_count(replicas, 'replica')} can be placed "
            f"on {limits}",
            "lower it, or raise max_workers of a node type and of the file",
            rests_on=((*at, "replicas"), (*at, "nodes_per_replica"), (*at, "placement")),
        )


def _too_little_in_total(
    serving: ServingSpec, eligible: Mapping[int, tuple[NodeType, ...]], offer: Offer
) -> Iterator[Finding]:
    """All pools that must share the same node types: do their replicas fit together?"""
    groups = {frozenset(kind.name for kind in types) for types in eligible.values()}
    groups.add(frozenset(kind.name for kind in offer.node_types))
    for group in sorted(groups, key=lambda names: (len(names), sorted(names))):
        types = [kind for kind in offer.node_types if kind.name in group]
        members = [index for index, own in eligible.items() if {kind.name for kind in own} <= group]
        wanted: dict[str, float] = {}
        for index in members:
            pool = serving.pools[index]
            for name, amount in pool.placement.resources.items():
                count = pool.replicas.initial * pool.nodes_per_replica
                wanted[name] = wanted.get(name, 0.0) + amount * count
        for name, total in wanted.items():
            amounts = [(kind, n) for kind in types if (n := kind.amount(name)) is not None]
            if len(amounts) < len(types):
                continue
            most = _greatest(amounts, offer)
            if total > most:
                users = [i for i in members if name in serving.pools[i].placement.resources]
                pools = ", ".join(serving.pools[i].name for i in users)
                key: KeyPath = (*SERVING, "pools", users[-1], "replicas")
                yield Finding(
                    key,
                    f"all replicas of {pools} take {total:g} {name} together; "
                    f"{', '.join(sorted(group))} offer {most:g} with max_workers as it is",
                    "lower the replicas of one of them, or raise max_workers",
                    rests_on=tuple((*SERVING, "pools", i) for i in users),
                )
                return


def _shares(pool: PoolSpec, kind: NodeType) -> int | None:
    """How many replicas' shares one node takes; None: not known."""
    counts = []
    for name, amount in pool.placement.resources.items():
        known = kind.amount(name)
        if known is None:
            return None
        # 0.3 + 0.3 + 0.3 + 0.1 is not 1.0; Ray counts in 1/10,000.
        counts.append(round(known * 10_000) // max(round(amount * 10_000), 1))
    return min(counts) if counts else None


def _greatest(amounts: Sequence[tuple[NodeType, float]], offer: Offer) -> float:
    """The most of something that nodes of these types can have together, given what one has."""
    total = sum(amount for kind, amount in amounts if kind.is_head)
    left = offer.max_workers
    for kind, amount in sorted(amounts, key=lambda pair: pair[1], reverse=True):
        workers = min(kind.most_workers, left)
        total += amount * workers
        left -= workers
    return total


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"
