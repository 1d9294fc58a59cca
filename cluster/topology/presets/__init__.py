"""Published configurations that a pool can start from: `preset: NAME`.

Each is a YAML file beside this module: `source` says where it was published and what of it is
derived, `pool` holds keys of the pool, `model` what its engines need to be told of the model. They
go UNDER the file's own keys before anything is validated, so that a file can override every key:

    pool    mappings merge key by key; null in the file takes a key of the preset out
    model   parsers, which clients see, fill `model`; the rest fills the pool's `model`, unless
            `model` or the pool says it

Called by: topology.loader, and launcher.explain, which asks where a key came from.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from cluster.topology.findings import Finding, did_you_mean, quote

# Flags may be spelled with dashes or underscores; a null stays, for it takes a flag out that the
# adapter would set.
_FLAGS = "engine_args"
# What clients see, hence the same for all pools.
_FOR_ALL = ("tool_call_parser", "reasoning_parser")


@dataclass(frozen=True, slots=True)
class Preset:
    """`source`: sentences for people. `pool` and `model`: keys as a file would have them."""

    name: str
    source: str
    pool: Mapping[str, Any]
    model: Mapping[str, Any]


@cache
def names() -> tuple[str, ...]:
    """All presets, by name."""
    found = (entry.name for entry in files(__package__).iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in found if name.endswith(".yaml")))


@cache
def preset(name: str) -> Preset:
    """Raises: KeyError."""
    if name not in names():
        raise KeyError(name)
    text = files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    value = yaml.safe_load(text)
    return Preset(name, " ".join(value["source"].split()), value["pool"], value.get("model", {}))


def applied(value: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Finding, ...]]:
    """`metadata.serving` as read, with presets under its keys, and a finding for each pool whose
    preset is not known. Bears any shape: what is wrong with it is for the schema to say."""
    merged = copy.deepcopy(dict(value))
    found = merged.get("pools")
    pools: list[Any] = found if isinstance(found, list) else []
    findings = []
    for index, pool in enumerate(pools):
        if not isinstance(pool, dict) or pool.get("preset") is None:
            continue
        name = pool["preset"]
        if not isinstance(name, str):
            continue
        if name not in names():
            fix = did_you_mean(name, names())
            findings.append(Finding(("pools", index, "preset"), f"found {quote(name)}", fix))
            continue
        base = preset(name)
        pools[index] = _over(base.pool, pool)
        _add_model(base, merged, pools[index])
    return merged, tuple(findings)


def _over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` over `base`; both stay as they are."""
    merged: dict[str, Any] = copy.deepcopy(dict(base))
    for key, value in own.items():
        if key == _FLAGS and isinstance(value, dict):
            merged[key] = _flags_over(merged.get(key, {}), value)
        elif value is None and key in base:
            del merged[key]
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _over(merged[key], value)
        else:
            merged[key] = value
    return merged


def _flags_over(base: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """As `_over`, but a flag may be spelled otherwise, and its null stays. Flags that take JSON are
    mappings like any other."""
    below = {_spelled(flag): value for flag, value in base.items()}
    stated = {_spelled(flag) for flag in own}
    kept = {flag: value for flag, value in base.items() if _spelled(flag) not in stated}
    for flag, value in own.items():
        under = below.get(_spelled(flag))
        if isinstance(value, dict) and isinstance(under, dict):
            value = _over(under, value)
        kept[flag] = value
    return kept


def _spelled(flag: Any) -> str:
    return str(flag).replace("_", "-")


def _add_model(base: Preset, serving: dict[str, Any], pool: dict[str, Any]) -> None:
    model = serving.get("model")
    if not isinstance(model, dict):
        return
    own = pool.get("model")
    if own is not None and not isinstance(own, dict):
        return
    for key, value in base.model.items():
        if key in model:
            continue
        if key in _FOR_ALL:
            model[key] = value
        else:
            if own is None:
                own = pool["model"] = {}
            own.setdefault(key, value)
