"""Folders that are whole or not there, whatever happens while they are made."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.models import cache
from cluster.models.errors import ModelError


class Maker:
    """Fills a folder with two files and counts how often it was asked to."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, folder: Path, progress) -> None:
        self.runs += 1
        (folder / "config.json").write_text("{}")
        (folder / "weights").write_bytes(b"x" * 1000)


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pdcluster" / "models"


@pytest.fixture
def said():
    return []


@pytest.fixture
def ensure(said):
    def call(fill, needed_bytes: int = 2000) -> Path:
        return cache.ensure("m", "1", needed_bytes, fill, lambda what, part: said.append(what))

    return call


def test_a_folder_is_made_once(root, ensure):
    maker = Maker()
    assert ensure(maker) == ensure(maker) == root / "m-1"
    assert maker.runs == 1
    assert {path.name for path in root.iterdir()} == {"m-1", "m-1.lock"}


@pytest.mark.parametrize(
    "harm",
    [
        lambda place: (place / "weights").write_bytes(b"x" * 999),
        lambda place: (place / "weights").write_bytes(b"x" * 999 + b"y"),
        lambda place: (place / "weights").unlink(),
        lambda place: (place / cache.MANIFEST).unlink(),
        lambda place: (place / cache.MANIFEST).write_text("{"),
        lambda place: (place / cache.MANIFEST).write_text('{"files": {"weights": 1}}'),
    ],
    ids=["cut", "flipped", "missing", "no-manifest", "no-json", "no-manifest-shape"],
)
def test_a_damaged_folder_is_found_and_made_again(ensure, said, harm):
    maker = Maker()
    place = ensure(maker)
    harm(place)
    assert cache.damage(ensure(maker)) is None
    assert maker.runs == 2
    assert "is damaged" in said[0]


def test_a_failed_fill_leaves_nothing(root, ensure):
    def fill(folder, progress):
        (folder / "half").write_text("")
        raise RuntimeError("broke")

    with pytest.raises(RuntimeError, match="broke"):
        ensure(fill)
    assert [path.name for path in root.iterdir()] == ["m-1.lock"]


def test_a_killed_process_leaves_no_half_folder(root, ensure):
    script = """
import pathlib, time
from cluster.models import cache
def fill(folder, progress):
    (folder / "config.json").write_text("{}")
    print("filling", flush=True)
    time.sleep(60)
cache.ensure("m", "1", 0, fill, lambda what, part: None)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "filling\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = root / f"m-1.partial-{process.pid}"
    assert left.exists()
    assert not (root / "m-1").exists()

    maker = Maker()
    assert cache.damage(ensure(maker)) is None
    assert maker.runs == 1
    assert not left.exists()


def test_the_second_of_two_waits_and_finds_it_made(ensure, said):
    begun, may_end = threading.Event(), threading.Event()
    maker = Maker()

    def slow(folder, progress):
        begun.set()
        assert may_end.wait(30)
        maker(folder, progress)

    first = threading.Thread(target=ensure, args=(slow,))
    first.start()
    assert begun.wait(30)
    second = threading.Thread(target=ensure, args=(maker,))
    second.start()
    while not said and second.is_alive():
        second.join(0.01)
    may_end.set()
    first.join(30)
    second.join(30)
    assert maker.runs == 1
    assert said == ["waiting for the process that is making m-1"]


def test_too_little_space_is_refused_before_anything_is_made(root, ensure, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=3_000_000))
    maker = Maker()
    with pytest.raises(ModelError, match=r"needs 4 MB in .*models, which has 3 MB left") as caught:
        ensure(maker, needed_bytes=4_000_000)
    assert str(root) in str(caught.value)
    assert maker.runs == 0


def test_a_disk_that_fills_up_meanwhile_is_reported_and_cleaned(root, ensure):
    def fill(folder, progress):
        (folder / "config.json").write_text("{}")
        Path("/dev/full").write_bytes(b"x")  # the kernel's own ENOSPC

    with pytest.raises(ModelError, match=r"needs 0 MB in .*no space is left; free some, or"):
        ensure(fill)
    assert [path.name for path in root.iterdir()] == ["m-1.lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch, ensure):
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a-file"))
    with pytest.raises(ModelError, match=r"a-file.*Not a directory; make .* writable, or set XDG"):
        ensure(Maker())


def test_a_whole_folder_is_used_without_writing_to_the_cache(root, ensure):
    place = ensure(Maker())
    (root / "m-1.lock").unlink()
    before = os.stat(root).st_mtime_ns
    assert ensure(Maker()) == place
    assert os.stat(root).st_mtime_ns == before


def test_the_manifest_lists_every_file_with_size_and_sum(ensure):
    files = json.loads((ensure(Maker()) / cache.MANIFEST).read_text())["files"]
    assert files.keys() == {"config.json", "weights"}
    assert files["weights"]["size"] == 1000
    assert len(files["weights"]["sha256"]) == 64
