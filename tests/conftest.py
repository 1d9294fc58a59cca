"""What holds for all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

TESTS = Path(__file__).parent
# By what is asked for with -m: folders in which no test is of that kind, as unit/test_repo_rules.py
# sees to. Importing all tests takes each process 4.7 s of CPU, those of real engines alone 1.5 s.
_WITHOUT = {
    "not e2e": ("e2e",),
    "slow": ("unit", "e2e"),
    "e2e and not slow": ("unit", "integration"),
}

# Files that take longest, the longest first: begun last, one of them would keep all others waiting.
_FIRST = (
    *("test_failures_chaos", "test_autoscaling", "test_prometheus", "test_up_broken_off"),
    *("test_up_down", "test_workers_ray", "test_engine_simulated"),
    *("test_gateway_midstream", "test_doctor_ssh", "test_workers_engine", "test_page"),
    *("test_workers_quiesce", "test_gateway_orders", "test_workers_nodes", "test_cli_commands"),
)

# Where PYTHONDONTWRITEBYTECODE is set, each process that a test starts compiles the package anew
# (up to 0.4 s of CPU), and each process of pytest also rewrites every test's assertions (6 s).
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# How often a property is tried; CONTRIBUTING.md, "Tests". The ordinary run tries the same examples
# each time, so that what it says depends on the change alone; the thorough one looks for new ones.
settings.register_profile("ordinary", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("PDCLUSTER_TEST_PROFILE", "ordinary"))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`, which pyproject.toml asks for: tests without real engines wait most of the time,
    so several processes share them, file by file: four, or three where a test says within what time
    a stream goes on. Real engines fill the machine by themselves and share one cluster per session:
    one process."""
    return {"not e2e": 4, "slow": 3}.get(config.option.markexpr or "", 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _FIRST.index(s) if (s := item.path.stem) in _FIRST else len(_FIRST))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    ignored = _WITHOUT.get(config.option.markexpr or "", ())
    return True if collection_path in [TESTS / name for name in ignored] else None
