"""Where every argument and variable of a rendered command came from, for people.

In: the file as read, and its rendered workers. Out: rows of name, value and origin, which is one of

    FILE:LINE KEY         the file says so
    preset NAME           a preset said so and the file left it (topology.presets)
    default of KEY        nobody said anything
    pdcluster: REASON     not the operator's to say

Pure. Called by: cli.files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.launcher.render import MASK, Rendered
from cluster.topology import presets
from cluster.topology.findings import SERVING, KeyPath, dotted
from cluster.topology.source import Document

_KEY = re.compile(r"(pool|model|island)\.(\S+)")
# Below these, what follows is one key, dots and all.
_FREE = ("engine_args", "env", "speculative")
_SECRET = "pdcluster: a secret that `up` makes, never printed"


@dataclass(frozen=True, slots=True)
class Row:
    """`name` is a flag, a variable, or what the words before the flags are."""

    name: str
    value: str
    origin: str


@dataclass(frozen=True, slots=True)
class Explained:
    """One node of one replica."""

    worker: Rendered
    arguments: tuple[Row, ...]
    variables: tuple[Row, ...]


def explain(document: Document, rendered: Sequence[Rendered]) -> tuple[Explained, ...]:
    """`document`: a file without faults, and the one that was rendered."""
    book = _Book(document)
    return tuple(
        Explained(
            worker,
            tuple(
                Row(name, value, book.origin(worker, name))
                for name, value in _arguments(worker.argv)
            ),
            tuple(
                Row(name, value, _SECRET if value == MASK else book.origin(worker, name))
                for name, value in worker.env.items()
            ),
        )
        for worker in rendered
    )


def sources(document: Document) -> dict[str, str]:
    """Source of each preset that the file uses, by name, in the order of the file."""
    return {preset.name: preset.source for preset in _Book(document).presets.values()}


def _arguments(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Name and value of each argument; what is no flag has a name without dashes."""
    name = "command"
    words: list[str] = []
    for word in argv:
        if word == "--":
            yield name, " ".join(words)
            name, words = "command", []
        elif word.startswith("--"):
            yield name, " ".join(words)
            name, equals, value = word.partition("=")
            words = [value] if equals else []
        elif words and words[-1] == "serve" and name == "command":
            yield name, " ".join(words)
            name, words = "model", [word]
        else:
            words.append(word)
    yield name, " ".join(words)


class _Book:
    """The serving half as the file has it, and the presets of its pools."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._serving: dict[str, Any] = document.value["metadata"]["serving"]
        self._pools = {pool["name"]: index for index, pool in enumerate(self._serving["pools"])}
        self.presets = {
            pool["name"]: presets.preset(pool["preset"])
            for pool in self._serving["pools"]
            if pool.get("preset") is not None
        }

    def origin(self, worker: Rendered, name: str) -> str:
        if name == "command":
            stated = self._path("pool", ("interpreter",), worker.pool)
            if self._in_file(stated):
                return self._line(stated)
            return "pdcluster: how this engine is started"
        said = worker.origins.get("--model" if name == "model" else name, "")
        match = _KEY.fullmatch(said)
        if match is None:
            return f"pdcluster: {said}" if said else "pdcluster"
        return self._key_origin(match[1], _parts(match[2]), worker.pool)

    def _key_origin(self, owner: str, parts: tuple[str, ...], pool: str) -> str:
        path = self._path(owner, parts, pool)
        preset = self._preset_with(owner, parts, pool)
        if not self._in_file(path):
            return f"preset {preset}" if preset else f"default of {dotted(path)}"
        merged = preset and isinstance(_at(self._serving, path), Mapping)
        return self._line(path) + (f" over preset {preset}" if merged else "")

    def _path(self, owner: str, parts: tuple[str, ...], pool: str) -> KeyPath:
        if owner == "model":
            return ("model", *parts)
        if owner == "pool":
            return ("pools", self._pools[pool], *parts)
        islands = self._serving["islands"]
        index = next(i for i, island in enumerate(islands) if pool in island["pools"])
        return ("islands", index, *parts)

    def _preset_with(self, owner: str, parts: tuple[str, ...], pool: str) -> str | None:
        """The preset that a key can have come from."""
        own = self.presets.get(pool)
        if owner == "model":
            # Parsers are filled in from any pool's preset.
            found = (p for p in self.presets.values() if parts[0] in p.model)
            return next((preset.name for preset in found), None)
        if owner == "island" or own is None:
            return None
        at, below = (parts[1:], own.model) if parts[0] == "model" else (parts, own.pool)
        return own.name if _at(below, at) is not None else None

    def _in_file(self, path: KeyPath) -> bool:
        return _at(self._serving, path) is not None

    def _line(self, path: KeyPath) -> str:
        line = self._document.line(SERVING + path)
        return f"{self._document.file}:{line} {dotted(path)}"


def _parts(key: str) -> tuple[str, ...]:
    first, _, rest = key.partition(".")
    if first in _FREE or not rest:
        return (first, rest) if rest else (first,)
    return (first, *rest.split("."))


def _at(value: Any, path: KeyPath) -> Any:
    """What stands at `path`; None: nothing."""
    for part in path:
        if isinstance(value, Mapping):
            value = value.get(part)
        elif isinstance(value, Sequence) and isinstance(part, int):
            value = value[part]
        else:
            return None
    return value
