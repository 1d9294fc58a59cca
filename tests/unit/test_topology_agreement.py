"""Pools against the nodes that Ray's half offers: what is refused, and what must not be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.topology.agreement import NodeType, Offer, disagreements
from cluster.topology.findings import Finding, serving_key
from cluster.topology.schema import ServingSpec

HEAD = NodeType("head", 0, is_head=True, resources={"CPU": 4.0})
H200 = NodeType("h200", 2, resources={"CPU": 64.0, "GPU": 8.0}, labels={"kind": "H200"})
ATLAS = NodeType("atlas-a2", 1, resources={"CPU": 64.0, "NPU": 8.0}, labels={"kind": "A2"})
RACK = Offer((HEAD, H200, ATLAS), max_workers=3)


def pool(name: str = "p", **keys: Any) -> dict[str, Any]:
    return {"name": name, "role": "mixed", **keys}


def asks(resources: dict[str, float], **labels: str) -> dict[str, Any]:
    return {"resources": resources, "labels": labels}


def findings(offer: Offer, *pools: dict[str, Any]) -> tuple[Finding, ...]:
    islands = [{"name": "i", "pools": [entry["name"] for entry in pools]}]
    serving = ServingSpec.model_validate({"model": {"id": "m"}, "pools": pools, "islands": islands})
    return disagreements(serving, offer)


@pytest.mark.parametrize(
    ("entry", "key", "found", "fix"),
    [
        (
            pool(placement=asks({"NPU": 16})),
            "pools[0].placement.resources.NPU",
            "found 16; no node type offers more than 8 (head: 0, h200: 0, atlas-a2: 8)",
            "lower it, spread the replica over more nodes_per_replica, or add a node type",
        ),
        (
            pool(placement=asks({"TPU": 1})),
            "pools[0].placement.resources.TPU",
            "no node type offers TPU (head, h200, atlas-a2)",
            "add `TPU: 1` to the resources of a node type, or ask for what there is: CPU, GPU, NPU",
        ),
        (
            pool(placement=asks({"NPU": 8}, kind="H200")),
            "pools[0].placement.resources.NPU",
            "no node type that its labels match offers NPU (h200)",
            "ask for what there is: CPU, GPU",
        ),
        (
            pool(placement=asks({"NPU": 8, "GPU": 8})),
            "pools[0].placement.resources",
            "no node type offers all of these together (NPU 8, GPU 8)",
            "lower one",
        ),
        (
            pool(placement=asks({"CPU": 1}, kind="H20")),
            "pools[0].placement.labels.kind",
            'no node type has a label that fits "H20" (there is A2, H200)',
            "did you mean `H200`?",
        ),
        (
            pool(placement=asks({"CPU": 1}, kinds="H200")),
            "pools[0].placement.labels.kinds",
            'no node type has the label "kinds"',
            "did you mean `kind`?",
        ),
        (
            pool(placement=asks({"CPU": 1}, kind="!in(H200, A2)", **{"ray.io/x": "y"}), name="q"),
            None,
            "",
            "",
        ),
        (
            pool(nodes_per_replica=3, placement=asks({"GPU": 8}), parallel={"tensor": 24}),
            "pools[0].nodes_per_replica",
            "a replica takes 3 nodes; there are 2 nodes at most (h200: 2; max_workers 3)",
            "raise max_workers",
        ),
        (
            pool(replicas=3, placement=asks({"GPU": 8})),
            "pools[0].replicas",
            "found 3 replicas; 2 replicas can be placed on 2 nodes at most",
            "lower it, or raise max_workers",
        ),
    ],
)
def test_a_pool_that_no_node_can_take_is_told_what_there_is(
    entry: dict[str, Any], key: str | None, found: str, fix: str
) -> None:
    said = findings(RACK, entry)
    if key is None:
        assert said == ()  # the head has no label `kind`, so it is not H200 and not A2
        return
    (finding,) = said
    assert serving_key(finding.key[2:]) == f"metadata.serving.{key}"
    assert found in finding.found
    assert fix in finding.fix


def test_labels_that_only_unlike_nodes_have_are_refused_together() -> None:
    offer = Offer((NodeType("a", 1, labels={"x": "1"}), NodeType("b", 1, labels={"y": "1"})), 2)
    (finding,) = findings(offer, pool(placement=asks({"CPU": 1}, x="1", y="1")))
    assert finding.key[-1] == "labels"
    assert "no node type has all of these labels together (x: 1, y: 1)" in finding.found
    assert "add a node type that has them all" in finding.fix


def test_pools_that_fit_alone_but_not_together_are_refused() -> None:
    first = pool("a", replicas=1, placement=asks({"GPU": 8}))
    second = pool("b", replicas=2, placement=asks({"GPU": 8}))
    assert findings(RACK, first) == findings(RACK, second) == ()
    (finding,) = findings(RACK, first, second)
    assert serving_key(finding.key[2:]) == "metadata.serving.pools[1].replicas"
    assert "all replicas of a, b take 24 GPU together; h200 offer 16" in finding.found
    assert "raise max_workers" in finding.fix


def test_max_workers_of_the_file_bounds_what_node_types_allow() -> None:
    entry = pool(replicas=2, placement=asks({"GPU": 8}))
    assert findings(Offer((HEAD, H200), max_workers=2), entry) == ()
    (finding,) = findings(Offer((HEAD, H200), max_workers=1), entry)
    assert "1 replica can be placed on 1 node at most (h200: 2; max_workers 1)" in finding.found


def test_the_head_takes_replicas_beside_max_workers() -> None:
    assert findings(Offer((HEAD,), 0), pool(replicas=4, placement=asks({"CPU": 1}))) == ()
    (finding,) = findings(Offer((HEAD,), 0), pool(replicas=5, placement=asks({"CPU": 1})))
    assert "4 replicas can be placed on 1 node at most" in finding.found


@pytest.mark.parametrize(
    "placement",
    [
        asks({"CPU": 1000}),  # not stated by `bare`: Ray counts the cores itself
        asks({"memory": 1e9}),
        asks({"node:10.0.0.1": 0.01}),
        asks({"CPU": 1}, **{"ray.io/accelerator-type": "H200"}),
    ],
)
def test_what_ray_finds_out_by_itself_is_not_held_against_a_file(
    placement: dict[str, Any],
) -> None:
    offer = Offer((NodeType("bare", 1, is_head=True),), 1)
    assert findings(offer, pool(replicas=50, placement=placement)) == ()


def test_an_open_ended_node_type_may_have_anything_but_more_nodes() -> None:
    offer = Offer((NodeType("host", 0, is_head=True, open_ended=True),), 0)
    assert findings(offer, pool(replicas=9, placement=asks({"X": 3}, zone="b"))) == ()
    (finding,) = findings(offer, pool(nodes_per_replica=2, parallel={"tensor": 2}))
    assert finding.key[-1] == "nodes_per_replica"


@pytest.mark.parametrize(
    ("selector", "fits"),
    [
        ("H200", True),
        ("A3", False),
        ("!H200", True),  # the Atlas fits
        ("in(A3, H200)", True),
        ("in(A3,B4)", False),
        ("!in(A2, H200)", False),
    ],
)
def test_label_selectors_mean_what_they_mean_to_ray(selector: str, fits: bool) -> None:
    entry = pool(placement=asks({"CPU": 1}, kind=selector))
    offer = Offer((H200, ATLAS), 3)
    assert (findings(offer, entry) == ()) is fits


SIZES = st.integers(1, 8)


@given(
    nodes=st.lists(st.tuples(SIZES, st.integers(0, 3)), min_size=1, max_size=3),
    head=st.integers(0, 8),
    demands=st.lists(st.tuples(SIZES, st.integers(0, 4)), min_size=1, max_size=3),
)
def test_what_can_be_placed_is_never_refused(
    nodes: list[tuple[int, int]], head: int, demands: list[tuple[int, int]]
) -> None:
    kinds = tuple(NodeType(f"n{i}", most, resources={"X": x}) for i, (x, most) in enumerate(nodes))
    offer = Offer(
        (NodeType("head", 0, is_head=True, resources={"X": head}), *kinds),
        max_workers=sum(most for _, most in nodes),
    )
    free = [head] + [x for x, most in nodes for _ in range(most)]
    placed = True
    for amount, count in demands:
        for _ in range(count):
            best = max(range(len(free)), key=free.__getitem__)
            placed = placed and free[best] >= amount
            free[best] -= amount
    entries = [
        pool(f"p{i}", replicas=count, placement=asks({"X": amount}))
        for i, (amount, count) in enumerate(demands)
    ]
    if placed and all(count for _, count in demands):
        assert findings(offer, *entries) == ()
