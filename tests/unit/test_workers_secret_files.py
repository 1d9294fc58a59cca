"""Secrets that an engine reads from a file."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cluster.workers import secret_files


def test_only_this_user_can_read_them(tmp_path: Path):
    secret_files.write(tmp_path, {"sglang.yaml": 'api-key: "k"\n'})
    written = tmp_path / "sglang.yaml"
    assert written.read_text() == 'api-key: "k"\n'
    assert stat.S_IMODE(written.stat().st_mode) == 0o600


def test_nothing_that_is_there_is_written_over(tmp_path: Path):
    (tmp_path / "x").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        secret_files.write(tmp_path, {"x": "secret"})
    assert not (tmp_path / "elsewhere").exists()
