"""Errors cross actors and processes: each must arrive whole and still read as a sentence."""

from __future__ import annotations

import pickle

import pytest

from cluster import errors

EXAMPLES: dict[type[errors.ClusterError], errors.ClusterError] = {
    errors.ClusterError: errors.ClusterError("something"),
    errors.InvalidInput: errors.InvalidInput("--port: found 0; write 1 to 65535"),
    errors.TopologyError: errors.TopologyError(
        (errors.Fault("a.yaml", 3, "pools", "is empty", "name at least one pool"),)
    ),
    errors.Retryable: errors.Retryable("busy"),
    errors.PeerGone: errors.PeerGone("decode/0#2", "its generation is now 3"),
    errors.NoCapacity: errors.NoCapacity("no decode worker is ready", 2.0),
    errors.EngineFailed: errors.EngineFailed("prefill/0#1", None, "connection reset"),
    errors.Final: errors.Final("no"),
    errors.StartFailed: errors.StartFailed("decode/0#1", "exit code 1", ("last line",)),
    errors.KvMismatch: errors.KvMismatch("a/0", "b/0", ("block size 16 here, 32 there",)),
}


def _tree(root: type[errors.ClusterError]) -> list[type[errors.ClusterError]]:
    # Rooms may derive their own (models.ModelError); this walks the shared tree.
    own = [c for c in root.__subclasses__() if c.__module__ == errors.__name__]
    return [root] + [found for child in own for found in _tree(child)]


def test_every_class_of_the_tree_has_an_example() -> None:
    assert set(_tree(errors.ClusterError)) == set(EXAMPLES)


@pytest.mark.parametrize("error", EXAMPLES.values(), ids=lambda e: type(e).__name__)
def test_an_error_keeps_its_fields_through_pickle(error: errors.ClusterError) -> None:
    arrived = pickle.loads(pickle.dumps(error))
    assert type(arrived) is type(error)
    assert vars(arrived) == vars(error)
    assert str(arrived) == str(error)


def test_a_fault_says_where_what_and_what_to_write() -> None:
    fault = errors.Fault("t.yaml", 41, "pools[1].replicas", "found -1", "write 0 or more")
    assert str(fault) == "t.yaml:41 pools[1].replicas: found -1; write 0 or more"


def test_a_start_failure_shows_the_engines_last_words() -> None:
    shown = str(errors.StartFailed("decode/0", "exit code 1", ("ValueError: no such file",)))
    assert shown.splitlines() == [
        "decode/0 did not start: exit code 1",
        "    ValueError: no such file",
    ]
