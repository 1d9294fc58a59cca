"""The state file: whoever dies, at whatever point, leaves it whole; writers wait for each other."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ClusterError
from cluster.nodes.state import Node, State, Store

POINTS = ("open", "fdopen", "fsync", "replace")


class Killed(BaseException):
    """The process ends here."""


def node(host: str) -> Node:
    return Node(host=host, node_type="a")


def adding(name: str) -> Callable[[State], State]:
    def add(state: State) -> State:
        return state.model_copy(update={"nodes": {**state.nodes, name: node(name)}})

    return add


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "x" / "nodes.json")


def test_no_file_is_an_empty_state(store: Store) -> None:
    assert store.read() == State()


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_crash_at_any_point_leaves_the_old_or_the_new_state(
    store: Store, monkeypatch: pytest.MonkeyPatch, point: str, when: str
) -> None:
    store.update(adding("old"))
    real = getattr(os, point)

    def dies(*args: Any, **options: Any) -> Any:
        if when == "after":
            real(*args, **options)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, point, dies)
        with pytest.raises(Killed):
            store.update(adding("new"))
    expected = {"old", "new"} if (point, when) == ("replace", "after") else {"old"}
    assert set(store.read().nodes) == expected
    # And the next one goes on from there, lock and leftovers notwithstanding.
    assert set(store.update(adding("next")).nodes) == expected | {"next"}
    assert set(Store(store.path).read().nodes) == expected | {"next"}


def test_a_half_written_draft_is_never_read(store: Store) -> None:
    store.update(adding("old"))
    store.path.with_name("nodes.json.new").write_text('{"version": 1, "nodes": {"x"')
    assert set(store.update(adding("new")).nodes) == {"old", "new"}


def test_a_change_that_raises_changes_nothing(store: Store) -> None:
    store.update(adding("old"))

    def fails(_state: State) -> State:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.update(fails)
    assert set(store.read().nodes) == {"old"}


def test_writers_at_once_lose_nothing(store: Store) -> None:
    names = [f"n{number}" for number in range(24)]
    # Each with its own Store, as processes have.
    threads = [
        threading.Thread(target=lambda n=name: Store(store.path).update(adding(n)))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(store.read().nodes) == set(names)


def test_only_its_user_reads_the_file(store: Store) -> None:
    store.update(adding("a"))
    assert store.path.stat().st_mode & 0o077 == 0
    assert store.path.parent.stat().st_mode & 0o077 == 0


def test_a_file_that_cannot_be_understood_is_named_with_the_fix(store: Store) -> None:
    store.update(adding("a"))
    store.path.write_text("{}}")
    with pytest.raises(ClusterError, match=r"nodes\.json: cannot be understood; delete it"):
        store.read()


def test_a_late_tag_brings_no_node_back() -> None:
    state = State(nodes={"a": node("a")})
    assert state.without(("a",)).tagged("a", {"x": "y"}).nodes == {}
    assert state.tagged("a", {"x": "y"}).nodes["a"].tags == {"x": "y"}


def test_a_host_that_answers_again_is_no_longer_silent() -> None:
    state = State(silent={"a": "refused", "b": "refused"})
    assert state.heard({"c": "timed out"}, {"a"}).silent == {"b": "refused", "c": "timed out"}


def test_forgetting_takes_the_file_away(store: Store) -> None:
    store.update(adding("a"))
    store.forget()
    store.forget()
    assert store.read() == State()
