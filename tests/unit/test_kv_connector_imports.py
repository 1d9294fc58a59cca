"""Connectors run in the engine's own interpreter, which has vLLM and not our dependencies."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import cluster

PACKAGE = Path(cluster.__file__).parent
CONNECTORS = sorted((PACKAGE / "kv" / "connectors").glob("*.py"))
ON_THE_WAY = [PACKAGE / "__init__.py", PACKAGE / "kv" / "__init__.py", PACKAGE / "transfers.py"]
OURS = ("cluster.transfers", "cluster.kv.connectors")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module
            assert not node.level
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", [*CONNECTORS, *ON_THE_WAY], ids=lambda path: path.stem)
def test_a_connector_needs_nothing_but_the_standard_library_vllm_and_the_records(
    path: Path,
) -> None:
    foreign = {
        name
        for name in imported(path)
        if name.partition(".")[0] not in sys.stdlib_module_names
        and name.partition(".")[0] not in ("vllm", "torch")
        and not name.startswith(OURS)
    }
    assert not foreign


@pytest.mark.parametrize("path", ON_THE_WAY, ids=lambda path: path.stem)
def test_what_is_imported_on_the_way_needs_the_standard_library_only(path: Path) -> None:
    assert all(name.partition(".")[0] in sys.stdlib_module_names for name in imported(path))
