"""The table of every key of `metadata.serving`, as it stands in docs/topologies.md.

Made from the schema, so that the page cannot say anything else; scripts/write_topology_reference
writes it there. Pure.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from cluster.topology.shape import Key, every_key, unit

BEGIN = "<!-- begin: table of keys, written by scripts/write_topology_reference -->"
END = "<!-- end: table of keys -->"


def with_table(page: str) -> str:
    """The page with a fresh table between its two marks. Raises: ValueError if it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no lines {BEGIN} and {END}; put them back")
    return f"{before}{BEGIN}\n\n{table()}\n{END}{after}"


def table() -> str:
    """A Markdown table, one row per key."""
    rows = ["| Key | Takes | Unit | Default | Meaning |", "|---|---|---|---|---|"]
    rows += [
        f"| `{key.path}` | {_takes(key.field.annotation)} | {unit(key.name)} | {_default(key)} | "
        f"{(key.field.description or '').replace('|', chr(92) + '|')} |"
        for key in every_key()
    ]
    return "\n".join(rows) + "\n"


def _takes(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin is list:
        return "list of sections" if _is_section(args[0]) else f"list of {_takes(args[0])}s"
    if origin is dict:
        return "mapping"
    if origin is Annotated:
        return "name" if args[0] is str else _takes(args[0])
    if origin in (types.UnionType, Union):
        return " or ".join("null" if arg is types.NoneType else _takes(arg) for arg in args)
    if _is_section(annotation):
        return "section"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    plain = {bool: "true or false", int: "whole number", float: "number", str: "text"}
    return plain.get(annotation, "path")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _default(key: Key) -> str:
    if key.field.is_required():
        return "**required**"
    value = key.field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "its defaults"
    if value is None or value is PydanticUndefined:
        return ""
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_yaml(item)}" for name, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
