"""Whether the boards' queries have data in a live Prometheus. Asks; writes nothing.

Variables are filled as Grafana fills them with everything chosen.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from cluster.errors import Final
from cluster.observe.dashboards.panel import Board, Panel, Query
from cluster.observe.dashboards.promql import filled
from cluster.observe.dashboards.variables import CHOICES, EVENTS, TARGETS

POINTS = 60
_AT_ONCE = 4
_TIMEOUT_S = 30.0


class PrometheusError(Final):
    """Prometheus at `url` does not answer as it should."""

    def __init__(self, url: str, said: str) -> None:
        super().__init__(url, said)
        self.url = url
        self.said = said

    def __str__(self) -> str:
        return (
            f"{self.url} is not Prometheus, or does not answer: {self.said}; give its root URL by "
            "--prometheus, or start it with `pdcluster up`"
        )


@dataclass(frozen=True, slots=True)
class Checked:
    """One query. `series`: those with at least one number in the window (infinity is none), `least`
    and `most`: of all their numbers. `problem`: what Prometheus says against the query. `needs`:
    what the panel must have to show anything."""

    board: str
    panel: str
    needs: str
    expr: str
    series: int
    problem: str = ""
    least: float | None = None
    most: float | None = None

    @property
    def has_data(self) -> bool:
        return self.series > 0 and not self.problem


def values(window_s: float) -> dict[str, str]:
    """Of every variable in the boards' queries."""
    return {
        "__rate_interval": "1m",
        "__range": f"{max(1, round(window_s))}s",
        **{choice.label: ".*" for choice in CHOICES},
        **{target.name: target.default for target in TARGETS},
    }


async def verify(
    url: str, boards: Sequence[Board], now_s: float, window_s: float
) -> tuple[Checked, ...]:
    """Every query of every panel, over `window_s` seconds up to `now_s` (wall clock), and every
    event's query, which need not have any data.

    Raises: PrometheusError. Cancel: safe.
    """
    url = url.rstrip("/")
    limit = asyncio.Semaphore(_AT_ONCE)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        asked = _Asked(session, url, now_s, window_s)

        async def one(board: Board, panel: Panel, query: Query) -> Checked:
            async with limit:
                return await asked.check(board, panel, query)

        return tuple(
            await asyncio.gather(
                *(
                    one(board, panel, query)
                    for board in boards
                    for panel in board.panels()
                    for query in panel.queries
                ),
                *(asked.event(event.name, event.expr) for event in EVENTS),
            )
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    session: aiohttp.ClientSession
    url: str
    now_s: float
    window_s: float

    async def check(self, board: Board, panel: Panel, query: Query) -> Checked:
        expr = filled(query.expr, values(self.window_s))
        numbers, problem = await self._ask(expr, is_instant=panel.is_instant)
        needs = panel.needs.value if panel.needs is not None else ""
        return Checked(
            board.title, panel.asks, needs, expr, len(numbers), problem, *_extremes(numbers)
        )

    async def event(self, name: str, expr: str) -> Checked:
        expr = filled(expr, values(self.window_s))
        numbers, problem = await self._ask(expr, is_instant=False)
        return Checked("annotations", name, "", expr, 1, problem, *_extremes(numbers))

    async def _ask(self, expr: str, *, is_instant: bool) -> tuple[list[list[float]], str]:
        """The numbers of each series that has any, and what Prometheus says against the query."""
        asked = {"query": expr}
        if is_instant:
            asked["time"] = f"{self.now_s:.3f}"
        else:
            asked |= {"start": f"{self.now_s - self.window_s:.3f}", "end": f"{self.now_s:.3f}"}
            asked["step"] = f"{max(1.0, self.window_s / POINTS):.3f}"
        path = "/api/v1/query" if is_instant else "/api/v1/query_range"
        try:
            async with self.session.post(self.url + path, data=asked) as answer:
                found = await answer.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise PrometheusError(self.url, str(error) or type(error).__name__) from error
        if not isinstance(found, dict) or "status" not in found:
            raise PrometheusError(self.url, f"{path} does not answer as Prometheus' does")
        if found["status"] != "success":
            return [], str(found.get("error", "refused"))
        return [numbers for one in found["data"]["result"] if (numbers := _numbers(one))], ""


def _numbers(series: dict[str, Any]) -> list[float]:
    points = series["values"] if "values" in series else [series["value"]]
    return [number for _, value in points if math.isfinite(number := float(value))]


def _extremes(series: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    numbers = [number for one in series for number in one]
    return (min(numbers), max(numbers)) if numbers else (None, None)
