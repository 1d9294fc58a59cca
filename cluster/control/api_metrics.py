"""The control API's answers to Prometheus.

    GET /metrics                         the controller's own
    GET /v1/discovery/prometheus         what to scrape, as http_sd_config reads it

Called by: control.api. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastapi import APIRouter, Request, Response

from cluster.control import wire
from cluster.control.api_answers import UNAVAILABLE, json
from cluster.control.discovery import TargetGroup
from cluster.observe.gateway_metrics import CONTENT_TYPE


class MetricsControls(Protocol):
    """What the routes need of a controller."""

    async def metrics(self) -> bytes: ...

    async def targets(self, asked_at: str) -> Sequence[TargetGroup]: ...


def measuring(controls: MetricsControls) -> APIRouter:
    """The routes."""
    router = APIRouter(responses=UNAVAILABLE)

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "docs/metrics.md"}},
    )
    async def metrics() -> Response:
        """Pools, workers and what happened to them, in Prometheus' text format."""
        return Response(await controls.metrics(), media_type=CONTENT_TYPE.decode())

    @router.get("/v1/discovery/prometheus", response_model=tuple[TargetGroup, ...])
    async def discovery(request: Request) -> Response:
        """Every engine, gateway replica and this controller, with the labels of their series."""
        asked_at = request.headers.get("host", "")
        return json(wire.targets_json(await controls.targets(asked_at)))

    return router
