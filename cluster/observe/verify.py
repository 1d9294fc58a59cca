"""Whether the boards' queries have data in a live Prometheus. Asks; writes nothing.

Variables are filled as Grafana fills them with everything chosen.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import aiohttp

from cluster.observe.dashboards.panel import Board, Panel, Query
from cluster.observe.dashboards.promql import filled
from cluster.observe.dashboards.variables import CHOICES, EVENTS, TARGETS
from cluster.observe.prometheus import Found, Prometheus

POINTS = 60
_AT_ONCE = 4
_TIMEOUT_S = 30.0


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
    limit = asyncio.Semaphore(_AT_ONCE)
    timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        asked = _Asked(Prometheus(session, url), now_s, window_s)

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
    prometheus: Prometheus
    now_s: float
    window_s: float

    async def check(self, board: Board, panel: Panel, query: Query) -> Checked:
        expr = filled(query.expr, values(self.window_s))
        found = await self._ask(expr, is_instant=panel.is_instant)
        needs = panel.needs.value if panel.needs is not None else ""
        return Checked(
            *(board.title, panel.asks, needs, expr),
            *(len(found.series), found.problem, *_extremes(found)),
        )

    async def event(self, name: str, expr: str) -> Checked:
        expr = filled(expr, values(self.window_s))
        found = await self._ask(expr, is_instant=False)
        return Checked("annotations", name, "", expr, 1, found.problem, *_extremes(found))

    async def _ask(self, expr: str, *, is_instant: bool) -> Found:
        if is_instant:
            return await self.prometheus.at(expr, self.now_s)
        step_s = max(1.0, self.window_s / POINTS)
        return await self.prometheus.over(expr, self.now_s - self.window_s, self.now_s, step_s)


def _extremes(found: Found) -> tuple[float | None, float | None]:
    numbers = [number for one in found.series for _, number in one.points]
    return (min(numbers), max(numbers)) if numbers else (None, None)
