from cluster.topology.schema import PoolSpec
from cluster.workers.placement import (
    NodeFacts,
    PlacementRequest,
    explain_unplaceable,
    request_of,
)


def node(name, free, total=None, node_id="", **labels):
    if node_id:
        labels["ray.io/node-id"] = node_id
    return NodeFacts(name=name, labels=labels, total=total or free, free=free)


def test_a_missing_resource_is_named_with_the_nodes_that_lack_it():
    nodes = [
        node("10.0.0.1", {"CPU": 8.0}),
        node("10.0.0.2", {"CPU": 8.0, "NPU": 8.0}),
        node("10.0.0.3", {"CPU": 8.0, "NPU": 4.0}, {"CPU": 8.0, "NPU": 16.0}),
    ]
    text = explain_unplaceable(PlacementRequest({"CPU": 1.0, "NPU": 16.0}), nodes)
    assert "needs a node with CPU 1, NPU 16" in text
    assert "on 10.0.0.1: no NPU" in text
    assert "on 10.0.0.2: only NPU 8" in text
    assert "on 10.0.0.3: NPU 4 of 16 free" in text


def test_a_label_that_does_not_match_is_named_with_what_was_found():
    nodes = [node("a", {"GPU": 8.0}, gen="h100"), node("b", {"GPU": 8.0})]
    text = explain_unplaceable(PlacementRequest({"GPU": 8.0}, {"gen": "h200"}), nodes)
    assert "on a: label gen=h100" in text
    assert "on b: no label gen" in text


def test_a_replica_over_nodes_says_on_how_many_it_fits():
    nodes = [node("a", {"NPU": 16.0}), node("b", {"CPU": 4.0})]
    text = explain_unplaceable(PlacementRequest({"NPU": 16.0}, nodes=2), nodes)
    assert "2 nodes, each with NPU 16" in text
    assert "fits on 1 of 2" in text


def test_a_hundred_alike_nodes_make_one_short_sentence():
    nodes = [node(f"10.0.0.{n}", {"CPU": 8.0}) for n in range(100)]
    text = explain_unplaceable(PlacementRequest({"GPU": 1.0}), nodes)
    assert "and 96 more: no GPU" in text
    assert len(text) < 200


def test_what_fits_waits_for_ray_and_no_node_is_said_plainly():
    assert "waits for Ray" in explain_unplaceable(
        PlacementRequest({"CPU": 1.0}), [node("a", {"CPU": 1.0})]
    )
    assert "no living node" in explain_unplaceable(PlacementRequest({"CPU": 1.0}), [])


def test_a_pool_becomes_bundles_and_options_that_take_a_whole_bundle():
    pool = PoolSpec.model_validate(
        {
            "name": "d",
            "role": "decode",
            "nodes_per_replica": 2,
            "placement": {"resources": {"CPU": 2, "GPU": 8, "NPU": 16}},
        }
    )
    request = request_of(pool)
    assert request.bundles == [{"CPU": 2.0, "GPU": 8.0, "NPU": 16.0}] * 2
    assert request.strategy == "STRICT_SPREAD"
    assert request.actor_options == {"num_cpus": 2.0, "num_gpus": 8.0, "resources": {"NPU": 16.0}}


def test_avoided_nodes_become_a_label_selector_beside_the_pools_own():
    pool = PoolSpec.model_validate(
        {"name": "d", "role": "decode", "placement": {"labels": {"rack": "r1"}}}
    )
    assert request_of(pool, ("a1", "b2")).label_selectors == [
        {"rack": "r1", "ray.io/node-id": "!in(a1,b2)"}
    ]
    assert request_of(pool).label_selectors == [{"rack": "r1"}]
    assert PlacementRequest({}).label_selectors is None
    assert (
        PlacementRequest({}, nodes=2, avoided=("a1",)).label_selectors
        == [{"ray.io/node-id": "!in(a1)"}] * 2
    )


def test_a_drained_node_is_called_that_whatever_else_it_lacks():
    nodes = [
        node("10.0.0.1", {"CPU": 8.0}, node_id="a1"),
        node("10.0.0.2", {"CPU": 0.0}, {"CPU": 8.0}, node_id="b2"),
    ]
    text = explain_unplaceable(PlacementRequest({"CPU": 1.0}, avoided=("a1",)), nodes)
    assert text == "needs a node with CPU 1; on 10.0.0.1: drained; on 10.0.0.2: CPU 0 of 8 free"
