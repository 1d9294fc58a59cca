"""What the page's charts draw of a longer time, asked of the Prometheus that scrapes the cluster.

    span ─ step_s ─▶ grid of moments        QUERIES ─ Prometheus ─▶ Past: Columns as of points

Columns have the names and the meaning that they have in control.points; each moment tells of the
step before it. Queries need none of our recording rules: another's Prometheus may lack them.
Called by: control.controller, control.api_past.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp

from cluster.control.points import RATIO_OVER_S, Columns, shown
from cluster.observe import catalogue
from cluster.observe.dashboards.promql import (
    CLUSTER,
    everywhere,
    filled,
    quantile,
    rate,
    ratio,
    total,
)
from cluster.observe.prometheus import Found, Prometheus, PrometheusError
from cluster.observe.rules_recording import (
    ACCEPTED,
    DRAFTS,
    GENERATION_TOKENS,
    PROMPT_TOKENS,
    QUANTILES,
    SGLANG_ACCEPTANCE,
    WAITING,
    EngineNames,
)
from cluster.observe.scraping import SCRAPE_S
from cluster.topology.observability import PrometheusSpec

LEAST_SPAN_S = 60.0
MOST_SPAN_S = 31 * 86_400.0

# A chart is some 300 pixels wide.
_POINTS = 240
# About what points have theirs over. A rate wants two samples, also when one scrape has failed.
_RATE_OVER_S = 3.0 * SCRAPE_S
# Another's Prometheus may scrape every 15 s.
_EXTERNAL_OVER_S = 60.0
_AT_ONCE = 4
# Of all queries together: the page waits for 10 s.
_TIMEOUT_S = 8.0


@dataclass(frozen=True, slots=True)
class Past:
    """The last `span_s`, a moment every `step_s`. `source`: "prometheus"; or "", and then there are
    no columns and `why` says what stands against it."""

    source: str
    why: str
    span_s: float
    step_s: float
    columns: Columns = field(default_factory=Columns)


@dataclass(frozen=True, slots=True)
class _Query:
    """`column`: with the names of labels in braces, whose values become part of the name.
    `over_step`: the function that makes one of all numbers of a long step; "": it is a rate over
    that step already."""

    column: str
    expr: str
    over_step: str = ""


# Of rates; of percentiles and ratios.
_WINDOW, _LONGER = "$window", "$longer"


def step_s(span_s: float) -> float:
    """Whole scrapes, so many that a chart of `span_s` has no more points than it can show."""
    return SCRAPE_S * max(1, math.ceil(span_s / _POINTS / SCRAPE_S))


def address(spec: PrometheusSpec) -> str:
    """Whom to ask; "": nobody. The one that `up` starts is on the controller's own node."""
    if spec.mode == "auto":
        return f"http://127.0.0.1:{spec.port}"
    return spec.url or ""


async def look(cluster: str, spec: PrometheusSpec | None, span_s: float, now_s: float) -> Past:
    """The last `span_s` seconds before `now_s` (wall clock), LEAST_SPAN_S to MOST_SPAN_S. `spec`:
    None: nothing is served yet.

    Whatever Prometheus does, there is an answer within _TIMEOUT_S. Cancel: safe."""
    every_s = step_s(span_s)
    if spec is None:
        return Past("", "nothing is served yet", span_s, every_s)
    url = address(spec)
    if not url:
        return Past("", "observability.prometheus.mode is off", span_s, every_s)
    least_s = _EXTERNAL_OVER_S if spec.mode == "external" else 0.0
    windows = {
        "window": f"{max(least_s, _RATE_OVER_S, every_s):g}s",
        "longer": f"{max(least_s, RATIO_OVER_S, every_s):g}s",
    }
    # Moments of a short span stay the same from look to look, or lines would quiver; the newest of
    # a long one is of now, or what has just begun would not be in it.
    end_s = math.floor(now_s / SCRAPE_S) * SCRAPE_S
    moments = [end_s - back * every_s for back in range(math.ceil(span_s / every_s), -1, -1)]
    try:
        async with (
            asyncio.timeout(_TIMEOUT_S),
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S)) as session,
        ):
            found = await _ask_all(
                Prometheus(session, url),
                cluster,
                windows,
                moments,
                every_s,
            )
    except PrometheusError as error:
        return Past("", f"{error.url} does not answer: {error.said}", span_s, every_s)
    except TimeoutError:
        return Past("", f"{url} takes longer than {_TIMEOUT_S:g} s", span_s, every_s)
    problem = next((answer.problem for _, answer in found if answer.problem), "")
    if problem:
        return Past("", f"{url} refuses what is asked: {problem}", span_s, every_s)
    columns = _columns(found, moments, every_s)
    if not columns.at_s:
        return Past("", f"{url} has nothing of cluster {cluster}", span_s, every_s)
    return Past("prometheus", "", span_s, every_s, columns)


async def _ask_all(
    prometheus: Prometheus,
    cluster: str,
    windows: Mapping[str, str],
    moments: Sequence[float],
    every_s: float,
) -> list[tuple[_Query, Found]]:
    limit = asyncio.Semaphore(_AT_ONCE)
    known = {"cluster": cluster, **windows}

    async def one(query: _Query) -> tuple[_Query, Found]:
        expr = filled(_of_step(query, every_s), known)
        async with limit:
            return query, await prometheus.over(expr, moments[0], moments[-1], every_s)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(query)) for query in QUERIES]
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    return [task.result() for task in tasks]


def _of_step(query: _Query, every_s: float) -> str:
    """A number every few seconds is the number of that moment; what happened between two moments
    that are minutes apart must not be lost."""
    if not query.over_step or every_s <= 2 * SCRAPE_S:
        return query.expr
    fine_s = max(SCRAPE_S, every_s / 12)
    return f"{query.over_step}(({query.expr})[{every_s:g}s:{fine_s:g}s])"


def _columns(
    found: Iterable[tuple[_Query, Found]], moments: Sequence[float], every_s: float
) -> Columns:
    """At `moments`, but for those before and after all numbers."""
    series: dict[str, list[float | None]] = {}
    for query, answer in found:
        for one in answer.series:
            name = query.column.format_map(_Labels(one.labels))
            column = series.setdefault(name, [None] * len(moments))
            for at_s, number in one.points:
                column[round((at_s - moments[0]) / every_s)] = shown(number)
    told = [at for at in range(len(moments)) if any(c[at] is not None for c in series.values())]
    if not told:
        return Columns()
    begin, end = told[0], told[-1] + 1
    return Columns(
        tuple(moments[begin:end]),
        {name: tuple(column[begin:end]) for name, column in series.items()},
    )


class _Labels(dict[str, str]):
    """A label that a series has not is empty, as in PromQL."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        super().__init__(labels)

    def __missing__(self, key: str) -> str:
        return ""


def _engines(names: EngineNames, *, is_counter: bool) -> str:
    """Of all engines together. An engine has one of the names, or its numbers would count twice."""
    by_worker = (
        total(rate(name, _WINDOW) if is_counter else name, "worker")
        for name in names.selectors(CLUSTER)
    )
    return total(" or ".join(by_worker))


def _rate(name: str, *by: str, window: str = _WINDOW) -> str:
    return total(rate(everywhere(name), window), *by)


def _held_share() -> str:
    held, pulled = (
        _rate(metric.name, "pool", window=_LONGER)
        for metric in (catalogue.WORKER_KV_TOKENS_HELD, catalogue.WORKER_KV_TOKENS_PULLED)
    )
    return ratio(held, f"({held} + {pulled})")


def _acceptance_length() -> str:
    accepted, drafts = (_rate(name, "pool", window=_LONGER) for name in (ACCEPTED, DRAFTS))
    counted = f"1 + {ratio(accepted, drafts)}"
    return f"{counted} or avg by (pool) ({everywhere(SGLANG_ACCEPTANCE)} > 0)"


_PERCENTILES = tuple(
    _Query(
        f"traffic.{short}_p{percent}_s",
        quantile(percent / 100, rate(everywhere(f"{metric.name}_bucket"), _LONGER)),
    )
    for short, metric in (("ttft", catalogue.TTFT), ("tpot", catalogue.TPOT))
    for percent in QUANTILES
)
_MEAN, _LEAST = "avg_over_time", "min_over_time"
QUERIES = (
    *_PERCENTILES,
    _Query("engines.prompt_tokens_per_s", _engines(PROMPT_TOKENS, is_counter=True)),
    _Query("engines.generation_tokens_per_s", _engines(GENERATION_TOKENS, is_counter=True)),
    _Query("engines.waiting", _engines(WAITING, is_counter=False), _MEAN),
    _Query("gateways.running", total(everywhere(catalogue.REQUESTS_RUNNING.name)), _MEAN),
    _Query("gateways.queued", total(everywhere(catalogue.REQUESTS_QUEUED.name)), _MEAN),
    _Query("pool.{pool}.acceptance_length", _acceptance_length()),
    _Query("pool.{pool}.bytes_per_s", _rate(catalogue.WORKER_KV_BYTES.name, "pool")),
    _Query("pool.{pool}.held_share", _held_share()),
    # A replica that was missing for a minute of a day is to be seen.
    _Query("role.{role}.ready", total(everywhere(catalogue.REPLICAS_READY.name), "role"), _LEAST),
    _Query(
        "role.{role}.desired", total(everywhere(catalogue.REPLICAS_DESIRED.name), "role"), _LEAST
    ),
)
