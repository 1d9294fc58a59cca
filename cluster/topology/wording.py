"""pydantic's errors in an operator's words: what was found, and what to write instead.

In: a ValidationError of ServingSpec. Out: Findings, one per key.
Called by: topology.loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from cluster.topology import shape
from cluster.topology.findings import Finding, KeyPath, did_you_mean, names_a_secret, nearest, quote

# Words of other tools' files and flags that no spelling distance leads to ours.
_ELSEWHERE = {
    "tp": "parallel.tensor",
    "tensor_parallel_size": "parallel.tensor",
    "pp": "parallel.pipeline",
    "pipeline_parallel_size": "parallel.pipeline",
    "dp": "parallel.data",
    "data_parallel_size": "parallel.data",
    "num_replicas": "replicas",
    "count": "replicas",
    "resources": "placement.resources",
    "labels": "placement.labels",
    "args": "engine_args",
    "speculative_config": "speculative",
    "max_model_len": "max_model_len_tokens",
    "backend": "connector",
    "kv_connector": "connector",
    "api_key": "auth.keys_file",
    "api_keys": "auth.keys_file",
}

NAME_RULE = (
    "write at most 48 lower-case letters, digits and dashes, beginning and ending with a letter "
    "or digit"
)
_WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number that is not infinite",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping (key: value)",
    "path_type": "a path",
}

_EXAMPLES = {
    "model": "{id: smollm2-135m-instruct}",
    "id": "smollm2-135m-instruct",
    "name": "NAME",
    "role": "prefill",
    "pools": "[POOL, ...]",
    "islands": "[{name: NAME, pools: [POOL, ...]}]",
    "prefill": "POOL",
    "decode": "POOL",
    "host": "127.0.0.1",
}


def findings(error: ValidationError, value: Any) -> tuple[Finding, ...]:
    """One Finding per faulty key of `value`, which `error` is about."""
    by_key: dict[KeyPath, Finding] = {}
    for detail in error.errors(include_url=False):
        finding = _finding(detail, value)
        by_key.setdefault(finding.key, finding)  # the first of a union's many complaints
    return tuple(by_key.values())


def _finding(detail: ErrorDetails, value: Any) -> Finding:
    kind, loc = detail["type"], detail["loc"]
    if kind == "missing":
        return Finding(loc, "missing", f"add `{loc[-1]}: {_example(loc)}`")
    path, found_value = _present(loc, value)
    if kind == "extra_forbidden":
        return Finding(path, f'unknown key "{path[-1]}"', _known_key(path))
    name = next((part for part in reversed(path) if isinstance(part, str)), "")
    found, fix = _wording(detail, path, name, found_value)
    return Finding(path, found, fix)


def _present(loc: KeyPath, value: Any) -> tuple[KeyPath, Any]:
    """Cut what pydantic adds to a path (the member of a union) and look up what stands there."""
    for depth, part in enumerate(loc):
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return loc[:depth], value
    return loc, value


def _wording(detail: ErrorDetails, path: KeyPath, name: str, value: Any) -> tuple[str, str]:
    kind, context = detail["type"], detail.get("ctx", {})
    found = f"found {quote(value, under=name)}"
    if kind == "value_error":
        said, _, fix = str(context["error"]).partition("; ")
        return said, fix
    if kind == "string_pattern_mismatch":
        return found, NAME_RULE
    if kind in ("literal_error", "enum"):
        known = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return found, did_you_mean(str(value), known) + f" ({' | '.join(known)})"
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal"):
        return found, f"write {_bound(kind, context)}"
    if kind == "too_short":
        return "found an empty list", "write at least one item: - ..."
    if kind == "string_too_short":
        return "found an empty text", f"write {_example(path)}"
    if kind in ("model_type", "model_attributes_type"):
        return found, _section(path, value)
    if kind == "string_type" and not isinstance(value, Mapping | list | None):
        said = str(value).lower() if isinstance(value, bool) else str(value)
        return found, "put it in quotes" + ("" if names_a_secret(name) else f': "{said}"')
    if kind in _WANTED:
        return found, f"write {_WANTED[kind]}"
    return found, f"write what docs/topologies.md says for `{name}` ({detail['msg']})"


def _bound(kind: str, context: Mapping[str, Any]) -> str:
    limits = {
        "greater_than": ("a number greater than", "gt"),
        "greater_than_equal": ("a number of at least", "ge"),
        "less_than": ("a number less than", "lt"),
        "less_than_equal": ("a number of at most", "le"),
    }
    words, key = limits[kind]
    return f"{words} {context[key]}"


def _section(path: KeyPath, value: Any) -> str:
    """What to write where a mapping with known keys belongs."""
    model = shape.model_at(path)
    names = list(model.model_fields) if model is not None else []
    keys = f"a mapping with keys such as {', '.join(names[:4])}" if names else "a mapping"
    field = shape.field_at(path)
    optional = field is not None and not field.is_required()
    if value is None and optional:
        return f"write {keys}, or take the key out for its defaults"
    if field is not None and path[-1] == "replicas":
        return "write a whole number, or a mapping with keys initial, min, max"
    return f"write {keys}"


def _known_key(path: KeyPath) -> str:
    """The fix for an unknown key: the near one, or where a key of that name belongs."""
    word = str(path[-1])
    model = shape.model_at(path[:-1])
    here = list(model.model_fields) if model is not None else []
    meant = nearest(word, here)
    if meant is not None:
        return f"did you mean `{meant}`?"
    below = _ELSEWHERE.get(word)
    if below is not None and below.partition(".")[0] in here:
        return f"write `{below}` instead"
    places = [key.path for key in shape.every_key() if key.name == word]
    if places:
        return f"move it: `{word}` is a key at metadata.serving.{places[0]}"
    return f"take it out; the keys here are {', '.join(here)}" if here else "take it out"


def _example(path: KeyPath) -> str:
    """Something that may stand at a key, for people to copy."""
    return _EXAMPLES.get(str(path[-1]), "...")
