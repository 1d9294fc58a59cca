"""The control API's answer to what the autoscaler does.

    GET /v1/scaling      its last decision: actions, what each pool needs and why, targets

Called by: control.api; the answer alone, control.api_live. Changes nothing.
"""

from __future__ import annotations

from typing import Protocol

from fastapi import APIRouter, Response

from cluster.control import wire
from cluster.control.api_answers import UNAVAILABLE, json
from cluster.control.autoscale.view import Scaling


class ScalingControls(Protocol):
    """What the route needs of a controller."""

    async def scaling(self) -> Scaling: ...


def scaling(controls: ScalingControls) -> APIRouter:
    """The route."""
    router = APIRouter(prefix="/v1", responses=UNAVAILABLE)

    @router.get("/scaling", response_model=Scaling)
    async def last_decision() -> Response:
        """What each pool has and needs, why, and what was or would be done. In mode `manual`
        nothing is decided."""
        return json(wire.scaling_json(await controls.scaling()))

    return router
