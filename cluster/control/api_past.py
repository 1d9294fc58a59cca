"""The control API's answer to what the cluster did over a longer time.

    GET /v1/past?span_s=SECONDS      the page's charts, from Prometheus

Called by: control.api. Changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Protocol

from fastapi import APIRouter, Query, Response
from pydantic import TypeAdapter

from cluster.control.api_answers import INVALID, UNAVAILABLE, json
from cluster.control.past import LEAST_SPAN_S, MOST_SPAN_S, Past

# Not in wire: the page alone reads it, and commands must not load what asks Prometheus.
_PAST = TypeAdapter(Past)


class PastControls(Protocol):
    """What the route needs of a controller. `past` as Controller.past."""

    async def past(self, span_s: float) -> Past: ...


def remembering(controls: PastControls) -> APIRouter:
    """The route."""
    router = APIRouter(prefix="/v1", responses={**INVALID, **UNAVAILABLE})

    @router.get("/past", response_model=Past)
    async def past(
        span_s: Annotated[
            float, Query(ge=LEAST_SPAN_S, le=MOST_SPAN_S, description="How far back, in seconds.")
        ],
    ) -> Response:
        """What the Prometheus that scrapes the cluster knows of it, at most some 240 moments. Where
        there is none, `source` is empty and `why` says so; `/v1/live` needs none."""
        return json(_PAST.dump_json(await controls.past(span_s)))

    return router
