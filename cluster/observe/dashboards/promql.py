"""Fragments of PromQL, and what is in an expression.

Every series carries its cluster. Those of engines and of the controller carry pool, role, island
and hardware too; those of gateways carry the two pools of a pair: a pair is shown when either of
its pools is chosen, hence `or`, which drops what the first side has already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

WINDOW = "$__rate_interval"

POOL = 'pool=~"$pool"'
PREFILL_POOL = 'prefill_pool=~"$pool"'
DECODE_POOL = 'decode_pool=~"$pool"'

CLUSTER = 'cluster=~"$cluster"'
_CHOSEN = (CLUSTER, POOL, 'role=~"$role"', 'island=~"$island"', 'hardware=~"$hardware"')
_NAME = re.compile(r"\b[a-zA-Z_][a-zA-Z0-9_:]*(?=\{)|\b(?:pdcluster|vllm|sglang):[a-z0-9_:]+")
_VARIABLE = re.compile(r"\$\{?([a-zA-Z_][a-zA-Z0-9_]*)\}?")


def pools(name: str, *more: str) -> str:
    """The series `name` of the chosen pools. `more`: further matchers, such as `role="prefill"`."""
    return f"{name}{{{', '.join((*_CHOSEN, *more))}}}"


def everywhere(name: str, *more: str) -> str:
    """The series `name`, which lacks some of the labels that `pools` asks for."""
    return f"{name}{{{', '.join((CLUSTER, *more))}}}"


def rate(selector: str, window: str = WINDOW) -> str:
    return f"rate({selector}[{window}])"


def pairs(name: str, *more: str, function: str = "rate", window: str = WINDOW) -> str:
    """`function` over the counters `name` of pairs in which a chosen pool takes part."""
    sides = (
        f"{function}({everywhere(name, side, *more)}[{window}])"
        for side in (DECODE_POOL, PREFILL_POOL)
    )
    return f"({' or '.join(sides)})"


def total(expr: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) ({expr})" if by else f"sum({expr})"


def quantile(q: float, buckets: str, *by: str) -> str:
    """The q-quantile of what was counted in `buckets`, already a rate."""
    return f"histogram_quantile({q:g}, {total(buckets, 'le', *by)})"


def ratio(part: str, whole: str) -> str:
    """Nothing where `whole` is nought: no traffic is neither good nor bad."""
    return f"{part} / ({whole} > 0)"


def or_none(expr: str, label: str) -> str:
    """`expr`, or a nought named `none` where it has no series: counters appear with their first
    increment, and what has never failed is not "no data"."""
    return f'{expr} or on() label_replace(vector(0), "{label}", "none", "", "")'


def or_zero(expr: str) -> str:
    return f"({expr} or on() vector(0))"


def names(expr: str) -> frozenset[str]:
    """Metrics that `expr` asks for. Every selector here has braces."""
    return frozenset(match[0] for match in _NAME.finditer(expr))


def variables(expr: str) -> frozenset[str]:
    return frozenset(match[1] for match in _VARIABLE.finditer(expr))


def filled(expr: str, values: Mapping[str, str]) -> str:
    """With variables as Grafana fills them. Raises: KeyError: a variable without a value."""
    return _VARIABLE.sub(lambda match: values[match[1]], expr)
