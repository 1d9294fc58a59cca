"""The schema as a tree to look keys up in: which model, which field, which unit stands at a path?

In: a path below `metadata.serving`. Out: the models and fields of `topology.schema`.
Called by: topology.wording (which keys are known here?) and topology.reference (all of them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cluster.topology.findings import KeyPath
from cluster.topology.schema import ServingSpec

# The last match counts: `prefill_tokens_per_s` is a rate, not a time.
_UNITS = (
    ("_s", "s"),
    ("_gib", "GiB"),
    ("_mib", "MiB"),
    ("_tokens", "tokens"),
    ("_tokens_per_s", "tokens/s"),
    ("_bytes_per_token", "bytes/token"),
)


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the schema. `path` has `[]` where a list's index would be."""

    path: str
    field: FieldInfo

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def unit(name: str) -> str:
    """The unit that a key's name states, or an empty string."""
    found = ""
    for ending, symbol in _UNITS:
        if name.endswith(ending):
            found = symbol
    return found


def model_at(path: KeyPath) -> type[BaseModel] | None:
    """The model whose keys stand below `path`, or None where keys are free."""
    model: type[BaseModel] | None = ServingSpec
    for part in path:
        if isinstance(part, int):
            continue  # the field before it was a list; its items' model is already in hand
        field = model.model_fields.get(part) if model is not None else None
        model = _model_of(field.annotation) if field is not None else None
    return model


def field_at(path: KeyPath) -> FieldInfo | None:
    """The field at `path`, or None if the schema has no such key."""
    if not path or not isinstance(path[-1], str):
        return None
    model = model_at(path[:-1])
    return model.model_fields.get(path[-1]) if model is not None else None


def every_key(model: type[BaseModel] = ServingSpec, above: str = "") -> Iterator[Key]:
    """Every key, in the order of the schema, sections before what is in them."""
    for name, field in model.model_fields.items():
        path = f"{above}{name}"
        yield Key(path, field)
        below = _model_of(field.annotation)
        if below is not None:
            yield from every_key(below, f"{path}[]." if is_list(field.annotation) else f"{path}.")


def is_list(annotation: Any) -> bool:
    return get_origin(annotation) is list


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model in `X`, `X | None` and `list[X]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) is dict:
        return None
    return next((model for arg in get_args(annotation) if (model := _model_of(arg))), None)
