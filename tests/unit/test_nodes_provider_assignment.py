"""Hosts are given out once, and a file that says the same changes nothing. Any file, any order."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nodes_rack import rack
from ray.autoscaler import tags as ray_tags

from cluster.nodes import state as states
from cluster.nodes.assignment import (
    TooFewHosts,
    address_of,
    change,
    choose,
    node_id,
    start_digests,
    with_new,
)
from cluster.nodes.config import Hosts
from cluster.nodes.state import Node, State

WORKER = {ray_tags.TAG_RAY_NODE_KIND: ray_tags.NODE_KIND_WORKER}
HEAD = {ray_tags.TAG_RAY_NODE_KIND: ray_tags.NODE_KIND_HEAD}

ADDRESSES = [f"10.0.1.{number}" for number in range(1, 9)]


@st.composite
def racks(draw: st.DrawFn) -> dict[str, list[str]]:
    """Hosts by node type: each host in one type or none."""
    found: dict[str, list[str]] = {"a": [], "b": [], "c": []}
    for host in draw(st.permutations(ADDRESSES)):
        kind = draw(st.sampled_from(["a", "b", "c", ""]))
        if kind:
            found[kind].append(host)
    return {kind: hosts for kind, hosts in found.items() if hosts}


def ray_up(before: State, types: dict[str, list[str]], silent: set[str], now_ms: int) -> State:
    """What a `ray up` with these hosts comes to, once Ray has started what is missing."""
    config = rack(**types)
    hosts, starts = Hosts.of(config), start_digests(config)
    leaving = change(before, hosts, starts, is_new_head=False)
    state = before.without(tuple(node.node_id for node in leaving))
    state = state.model_copy(update={"starts": starts})
    for kind, addresses in types.items():
        running = sum(node.node_type == kind for node in state.nodes.values())
        chosen = choose(addresses, state.taken, silent, len(addresses) - running)
        state = with_new(state, kind, WORKER, chosen, now_ms)
    return state


@given(st.lists(racks(), min_size=1, max_size=5), st.sets(st.sampled_from(ADDRESSES)))
def test_no_host_is_ever_given_twice(files: list[dict[str, list[str]]], silent: set[str]) -> None:
    state = State()
    for now_ms, types in enumerate(files):
        state = ray_up(state, types, silent, now_ms)
        uses = Counter(node.host for node in state.nodes.values())
        assert set(uses.values()) <= {1}
        expected = {host: kind for kind, hosts in types.items() for host in hosts}
        assert {node.host: node.node_type for node in state.nodes.values()} == expected


@given(racks(), st.integers(1, 4))
def test_the_same_file_again_changes_nothing(types: dict[str, list[str]], times: int) -> None:
    once = ray_up(State(), types, set(), 0)
    state = once
    for now_ms in range(1, times + 1):
        state = ray_up(state, types, set(), now_ms)
    assert state == once


@given(racks(), racks())
def test_a_changed_file_lets_alone_what_it_does_not_change(
    before: dict[str, list[str]], after: dict[str, list[str]]
) -> None:
    first = ray_up(State(), before, set(), 0)
    second = ray_up(first, after, set(), 1)
    stays = {host for kind in before for host in before[kind] if host in after.get(kind, [])}
    kept = {name for name in first.nodes if name in second.nodes}
    assert {address_of(name) for name in kept} == stays


@given(racks(), st.sampled_from(["resources", "labels"]))
def test_nodes_whose_type_changes_are_started_anew_and_no_others(
    types: dict[str, list[str]], key: str
) -> None:
    state = ray_up(State(), types, set(), 0)
    config = rack(**types)
    for kind in types:
        config["available_node_types"][kind][key] = {"X": 1} if key == "resources" else {"x": "y"}
        leaving = change(state, Hosts.of(config), start_digests(config), is_new_head=False)
        assert {node.host for node in leaving} == set(types[kind])
        assert all("another way" in node.why for node in leaving)
        config = rack(**types)


def test_new_start_commands_restart_every_worker() -> None:
    types = {"a": ["10.0.1.1"], "b": ["10.0.1.2"]}
    state = ray_up(State(), types, set(), 0)
    config = rack(**types)
    config["worker_start_ray_commands"] = ["X=1 python3 -m cluster.nodes.start ray start"]
    leaving = change(state, Hosts.of(config), start_digests(config), is_new_head=False)
    assert [node.host for node in leaving] == ["10.0.1.1", "10.0.1.2"]


def test_more_workers_or_another_model_restart_nobody() -> None:
    types = {"a": ["10.0.1.1", "10.0.1.2"]}
    state = ray_up(State(), types, set(), 0)
    config = rack(**types)
    config["max_workers"] = 9
    config["metadata"] = {"serving": {"model": {"id": "another"}}}
    config["available_node_types"]["a"]["node_config"]["hosts"].append("10.0.1.3")
    assert change(state, Hosts.of(config), start_digests(config), is_new_head=False) == ()


def test_a_head_that_begins_anew_takes_no_node_of_its_former_self() -> None:
    types = {"a": ["10.0.1.1"]}
    state = ray_up(State(), types, set(), 0)
    config = rack(**types)
    (only,) = change(state, Hosts.of(config), start_digests(config), is_new_head=True)
    assert only.host == "10.0.1.1"
    assert "former" in only.why


def test_the_head_never_leaves() -> None:
    state = State(nodes={"10.9.9.9": Node(host="10.9.9.9", node_type="gone", tags=HEAD)})
    config = rack(a=["10.0.1.1"])
    assert change(state, Hosts.of(config), start_digests(config), is_new_head=True) == ()


def test_hosts_that_answer_are_taken_before_those_that_do_not() -> None:
    assert choose(["h1", "h2", "h3"], set(), {"h1"}, 2) == ("h2", "h3")
    assert choose(["h1", "h2", "h3"], {"h2"}, {"h1"}, 2) == ("h3", "h1")


def test_too_few_hosts_are_named() -> None:
    with pytest.raises(TooFewHosts, match="asks for 2 more of 2 hosts; in use: h1"):
        choose(["h1", "h2"], {"h1"}, set(), 2)


def test_a_host_used_again_gets_another_id() -> None:
    first, second = node_id("10.0.1.1", 1), node_id("10.0.1.1", 2)
    assert first != second
    assert address_of(first) == address_of(second) == address_of("10.0.1.1") == "10.0.1.1"


def test_the_head_is_known_by_rays_own_tag() -> None:
    # state.py spells it out, to do without Ray's import.
    assert states._KIND_TAG == ray_tags.TAG_RAY_NODE_KIND
    assert states._HEAD_KIND == ray_tags.NODE_KIND_HEAD
