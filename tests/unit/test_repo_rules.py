"""Rules that CONTRIBUTING.md states and that no linter checks."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
(CONTRACT,) = PYPROJECT["tool"]["importlinter"]["contracts"]
MODULES = sorted((ROOT / "cluster").rglob("*.py"))
SCRIPTS = sorted(
    path
    for folder in ("scripts", ".ci")
    for path in (ROOT / folder).iterdir()
    if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")
)

# Distributions whose import name is not their own name.
IMPORT_NAME = {
    "grafana-foundation-sdk": "grafana_foundation_sdk",
    "opentelemetry-exporter-otlp-proto-http": "opentelemetry",
    "opentelemetry-sdk": "opentelemetry",
    "prometheus-client": "prometheus_client",
    "pyyaml": "yaml",
    "pyzmq": "zmq",
}


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match
    return match[0].lower()


@pytest.mark.parametrize(
    "requirement",
    [*PROJECT["dependencies"], *(r for e in PROJECT["optional-dependencies"].values() for r in e)],
)
def test_every_dependency_has_a_lower_and_an_upper_bound(requirement):
    pinned = "==" in requirement
    assert pinned or (">=" in requirement and "<" in requirement.replace("<=", "<"))


@pytest.fixture(scope="module")
def imported():
    names = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("requirement", PROJECT["dependencies"])
def test_every_runtime_dependency_is_imported(requirement, imported):
    name = name_of(requirement)
    assert IMPORT_NAME.get(name, name) in imported


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_opens_with_its_map_and_fits_one_reading(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 450
    if source.strip():
        assert ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses_runs_strictly_and_may_be_executed(path):
    subprocess.run(["bash", "-n", path], check=True)
    assert re.search(r"^set -e?uo pipefail$", path.read_text(), re.MULTILINE)
    assert path.stat().st_mode & 0o111


def test_every_room_is_in_the_contract_on_imports_and_on_the_page_of_rooms():
    rooms = {
        path.stem for path in (ROOT / "cluster").iterdir() if path.suffix == ".py" or path.is_dir()
    } - {"__init__", "__pycache__", "py"}
    assert rooms == set(CONTRACT["layers"])
    order = re.sub(r"\s+", " ", (ROOT / "CONTRIBUTING.md").read_text())
    assert f"`{' > '.join(CONTRACT['layers'])}`" in order
    page = (ROOT / "docs/architecture.md").read_text()
    assert {room for room in rooms if f"`{room}`" not in page} == set()


def test_files_that_the_page_of_architecture_names_exist():
    page = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"`([a-z_/]+\.py)`", page))
    missing = {name for name in named if not any((ROOT / "cluster").rglob(name))}
    assert len(named) > 10
    assert missing == set()


def test_ci_runs_the_two_commands_of_the_readme():
    commands = ("scripts/demo --once", "scripts/test")
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in commands:
        assert command in readme
        assert command in ci


def test_setup_with_a_wrong_interpreter_says_which_variable(tmp_path):
    """A copy of the script, so that the real environment is not touched."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "setup").write_bytes((ROOT / "scripts" / "setup").read_bytes())
    (tmp_path / "pyproject.toml").write_text("")
    done = subprocess.run(
        ["bash", scripts / "setup"],
        env={"PATH": "/usr/bin:/bin", "PDCLUSTER_PYTHON": "/bin/true-but-not-python"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "PDCLUSTER_PYTHON=/bin/true-but-not-python is not a Python 3.11 or 3.12" in done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_name_no_package_index(path):
    assert not re.search(r"https?://(?!127\.0\.0\.1|localhost)", path.read_text())


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [("unit", [set()]), ("integration", [set(), {"e2e", "slow"}]), ("e2e", [{"e2e"}])],
)
def test_no_test_is_marked_as_what_is_not_looked_for_in_its_folder(folder, allowed):
    """tests/conftest.py leaves out whole folders: such a test would never run."""
    for path in (ROOT / "tests" / folder).rglob("test_*.py"):
        marks = re.findall(r"(@?)pytest\.mark\.(e2e|slow)\b", path.read_text())
        assert not any(at for at, _ in marks), f"{path}: mark the whole file, with pytestmark"
        assert {mark for _, mark in marks} in allowed, path
