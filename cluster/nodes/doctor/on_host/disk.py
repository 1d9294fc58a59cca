"""Room and rights on a host's disk, and which models are there: names and sizes, no weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MOST_FILES = 20_000


def folders() -> dict[str, dict[str, Any]]:
    """Where pdcluster, the hub's client and Ray write, by what for (cluster/settings.py, HF_HOME,
    RAY_TMPDIR)."""
    temporary = tempfile.gettempdir()
    places = {
        "state": os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state"),
        "runtime": os.environ.get("XDG_RUNTIME_DIR") or temporary,
        "cache": _cache(),
        "hub": _hub(),
        "ray": os.environ.get("RAY_TMPDIR") or f"{temporary}/ray",
    }
    return {name: _folder(path) for name, path in places.items()}


def models(needs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each model as it is here, in the order of `needs`."""
    return [_model(need) for need in needs]


def _cache() -> str:
    return os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")


def _hub() -> str:
    home = os.environ.get("HF_HOME") or f"{_cache()}/huggingface"
    return os.environ.get("HF_HUB_CACHE") or f"{home}/hub"


def _folder(path: str) -> dict[str, Any]:
    """Whether this user can make things in a folder, which need not exist yet; and the room."""
    place = _existing(path)
    room = os.statvfs(place)
    try:
        owner = Path(place).owner()
    except KeyError:
        owner = str(os.stat(place).st_uid)
    return {
        "path": path,
        "writable": os.access(place, os.W_OK | os.X_OK) and not room.f_flag & os.ST_RDONLY,
        "owner": owner,
        "free_bytes": room.f_bavail * room.f_frsize,
    }


def _existing(path: str) -> str:
    while not os.path.isdir(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path or "."


def _model(need: dict[str, Any]) -> dict[str, Any]:
    path = _place(need)
    found: dict[str, Any] = {"id": need["id"], "path": str(path), "exists": path.is_dir()}
    if found["exists"]:
        found.update(_contents(path))
    room = os.statvfs(_existing(str(path)))
    found["free_bytes"] = room.f_bavail * room.f_frsize
    return found


def _place(need: dict[str, Any]) -> Path:
    if need["kind"] == "made":
        return Path(_cache()) / "pdcluster" / "models" / f"{need['id']}-{need['revision']}"
    given = Path(os.path.expanduser(str(need["id"])))
    if need["kind"] == "folder" or given.is_dir():
        return given.absolute()
    # The layout of the hub's cache: refs/NAME holds the commit whose files are in snapshots/COMMIT.
    repository = Path(_hub()) / ("models--" + str(need["id"]).replace("/", "--"))
    revision = str(need["revision"] or "main")
    with contextlib.suppress(OSError):
        revision = (repository / "refs" / revision).read_text().strip()
    return repository / "snapshots" / revision


def _contents(folder: Path) -> dict[str, Any]:
    """`digest` is equal for two folders with the same files of the same sizes."""
    sizes = dict(_sizes(folder))
    listing = "".join(f"{name}\0{sizes[name]}\0" for name in sorted(sizes))
    config = folder / "config.json"
    return {
        "files": len(sizes),
        "bytes": sum(size for size in sizes.values() if size > 0),
        "digest": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16],
        "config": hashlib.sha256(config.read_bytes()).hexdigest()[:16] if config.is_file() else "",
        "missing": [name for name in _indexed(folder) if sizes.get(name, -1) < 0],
    }


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Every file's size; -1 for a link whose file is gone. Raises: OSError: far too many files."""
    count = 0
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            try:
                size = path.stat().st_size
            except OSError:
                size = -1
            yield str(path.relative_to(folder)), size
        count += len(names)
        if count > _MOST_FILES:
            raise OSError(f"{folder}: more than {_MOST_FILES} files; is it a model's folder?")


def _indexed(folder: Path) -> list[str]:
    """Weight files that the folder's own index names."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        return sorted({str(name) for name in index["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []
