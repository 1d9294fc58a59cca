"""What holds for all tests."""

from __future__ import annotations

import pytest


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`, which pyproject.toml asks for: tests without real engines wait most of the time,
    so three processes share them, file by file. Real engines fill the machine by themselves and
    share one cluster per session: one process."""
    return 3 if (config.option.markexpr or "") in ("not e2e", "slow") else 0
