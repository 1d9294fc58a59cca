"""Real engines for the whole session: one bare vLLM server for reference answers, then one cluster
per connector. Never more than three engines at a time, each started once.

The order matters on a 2-core machine: the reference server answers every prompt first and is gone
before a cluster starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e.harness import TOPOLOGIES, Cluster, Prompt, reference_answers, running_cluster

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a whole cluster come last: those before them start engines of their own, and three
    at a time are what the machine carries."""

    def on_cluster(item: pytest.Item) -> bool:
        return item.path.parent == HERE and "cluster" in getattr(item, "fixturenames", ())

    items.sort(key=on_cluster)


@pytest.fixture(scope="session")
def private_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """State and runtime of the tests' clusters apart from the user's; models stay shared."""
    base = tmp_path_factory.mktemp("pd")
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(base)
    yield base
    if before is None:
        del os.environ["XDG_STATE_HOME"]
    else:
        os.environ["XDG_STATE_HOME"] = before


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """Every prompt with the answer of one plain vLLM server."""
    return reference_answers(tmp_path_factory.mktemp("reference") / "vllm.log")


@pytest.fixture(scope="session", params=list(TOPOLOGIES))
def cluster(
    request: pytest.FixtureRequest,
    private_state: Path,
    references: list[Prompt],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    """One running cluster per connector. pytest groups the tests by parameter, so that one
    cluster is down before the next comes up; `only(...)` restricts a test to some."""
    connector = request.param
    with running_cluster(TOPOLOGIES[connector], tmp_path_factory.mktemp(connector)) as running:
        yield running
