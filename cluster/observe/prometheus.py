"""Questions to a Prometheus over its HTTP API. Asks; writes nothing.

Called by: observe.verify, control.past.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from cluster.errors import Final


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
class Series:
    """`points`: seconds of the wall clock and a number, oldest first. What is no number or infinite
    is left out."""

    labels: Mapping[str, str]
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Found:
    """Answer to one query: those series that have a point. `problem`: what Prometheus says against
    the query; "": nothing."""

    series: tuple[Series, ...] = ()
    problem: str = field(default="", kw_only=True)


class Prometheus:
    """One at `url`. `session` is the caller's, who closes it, and sets the time it may take.

    Every call raises PrometheusError. Cancel: safe.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url.rstrip("/")

    async def at(self, expr: str, at_s: float) -> Found:
        """`expr` at one moment."""
        return await self._ask("/api/v1/query", {"query": expr, "time": f"{at_s:.3f}"})

    async def over(self, expr: str, start_s: float, end_s: float, step_s: float) -> Found:
        """`expr` at `start_s` and every `step_s` after it, up to `end_s`."""
        span = {"start": f"{start_s:.3f}", "end": f"{end_s:.3f}", "step": f"{step_s:.3f}"}
        return await self._ask("/api/v1/query_range", {"query": expr, **span})

    async def _ask(self, path: str, asked: dict[str, str]) -> Found:
        try:
            async with self._session.post(self._url + path, data=asked) as answer:
                found = await answer.json()
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise PrometheusError(self._url, str(error) or type(error).__name__) from error
        if not isinstance(found, dict) or "status" not in found:
            raise PrometheusError(self._url, f"{path} does not answer as Prometheus' does")
        if found["status"] != "success":
            return Found(problem=str(found.get("error", "refused")))
        series = (Series(one["metric"], _points(one)) for one in found["data"]["result"])
        return Found(tuple(one for one in series if one.points))


def _points(series: dict[str, Any]) -> tuple[tuple[float, float], ...]:
    points = series["values"] if "values" in series else [series["value"]]
    return tuple(
        (float(at_s), number) for at_s, value in points if math.isfinite(number := float(value))
    )
