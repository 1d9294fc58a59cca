"""Look at a local model folder without reading its weights.

In: a folder as Hugging Face lays it out. Out: its config, and a digest that two folders share
only if config.json is equal byte for byte and every weight file has the same name, size and
header. A file that was cut short or is not what its name says is found here, in milliseconds,
rather than by an engine after minutes of loading.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.models.errors import ModelError

_INDEX = "model.safetensors.index.json"
# What engines load when there is no safetensors file, in their order of preference.
_OTHER_WEIGHTS = ("*.bin", "*.pt")
_MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit


@dataclass(frozen=True, slots=True)
class LocalModel:
    """What was found in a folder."""

    config: Mapping[str, Any]
    digest: str


def inspect(folder: Path, needs_weights: bool = True) -> LocalModel:
    """Raises: ModelError: names the path, what is missing or damaged, and the fix."""
    if not folder.exists():
        raise ModelError(str(folder), "no such folder", "correct model.id")
    if not folder.is_dir():
        raise ModelError(str(folder), "is a file", "give the folder that holds config.json")
    try:
        raw = (folder / "config.json").read_bytes()
    except OSError as exc:
        raise ModelError(
            str(folder),
            f"config.json cannot be read: {exc.strerror}",
            "give a folder in Hugging Face's layout: config.json, tokenizer and weights",
        ) from exc
    config = _json_object(folder / "config.json", raw)
    digest = hashlib.sha256(raw)
    for path in _weight_files(folder) if needs_weights else ():
        header = _checked_header(path)
        digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(header)
    return LocalModel(config, digest.hexdigest())


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():
        return _indexed_files(folder)
    for pattern in ("*.safetensors", *_OTHER_WEIGHTS):
        files = sorted(folder.glob(pattern))
        if files:
            return files
    raise ModelError(
        str(folder), "no weights (*.safetensors, *.bin, *.pt)", "download or copy them in"
    )


def _indexed_files(folder: Path) -> list[Path]:
    index = _json_object(folder / _INDEX, (folder / _INDEX).read_bytes())
    parts = index.get("weight_map")
    if not isinstance(parts, dict) or not all(isinstance(name, str) for name in parts.values()):
        raise _damaged(folder / _INDEX, "has no weight_map from tensor to file name")
    names = sorted(set(parts.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            str(folder),
            f"{len(missing)} of the {len(names)} weight files in {_INDEX} are missing, first "
            f"{missing[0]}",
            "download or copy them in",
        )
    return [folder / name for name in names]


def _checked_header(path: Path) -> bytes:
    """Length and header of a safetensors file whose size is what the header says; nothing of
    any other file. Raises: ModelError."""
    if path.suffix != ".safetensors":
        return b""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if prefix == b"version ":
                raise _damaged(path, "is a Git LFS pointer, not weights", "run `git lfs pull`")
            if len(prefix) < 8:
                raise _damaged(path, f"has {len(prefix)} bytes")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise _damaged(path, f"says its header has {length} bytes, in a file of {size}")
            text = file.read(length)
    except OSError as exc:
        raise _damaged(path, f"cannot be read: {exc.strerror}") from exc
    tensors = _json_object(path, text)
    tensors.pop("__metadata__", None)
    try:
        end = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
    except (TypeError, KeyError, IndexError, ValueError) as exc:
        raise _damaged(path, "its header has a tensor without data_offsets") from exc
    if size != 8 + length + end:
        raise _damaged(path, f"has {size} bytes where its header says {8 + length + end}")
    return prefix + text


def _json_object(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except ValueError as exc:  # UnicodeDecodeError is one
        raise _damaged(path, f"is not JSON ({exc})") from exc
    if not isinstance(value, dict):
        raise _damaged(path, "is not a JSON object")
    return value


def _damaged(path: Path, found: str, fix: str = "download or copy the file again") -> ModelError:
    return ModelError(str(path.parent), f"{path.name} {found}", fix)
