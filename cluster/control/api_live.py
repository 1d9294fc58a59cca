"""The control API's answer to whoever watches: `pdcluster watch`, and the page.

    GET /v1/live?since=SEQ&events_after=SEQ      the picture, and what is new

Called by: control.api. Changes nothing.
"""

from __future__ import annotations

from typing import Annotated, Protocol

from fastapi import APIRouter, Query, Response

from cluster.control import wire
from cluster.control.api_answers import INVALID, UNAVAILABLE, json
from cluster.control.api_scaling import ScalingControls
from cluster.control.live import Live


class LiveControls(ScalingControls, Protocol):
    """What the route needs of a controller. `live` as Controller.live."""

    async def live(self, since: int, events_after: int) -> Live: ...


def living(controls: LiveControls) -> APIRouter:
    """The route."""
    router = APIRouter(prefix="/v1", responses={**INVALID, **UNAVAILABLE})

    @router.get("/live", response_model=wire.Looked)
    async def live(
        since: Annotated[
            int, Query(ge=0, description="`seq` of the last answer; 0: all that is kept.")
        ] = 0,
        events_after: Annotated[
            int, Query(ge=0, description="`seq` of the last event that is known.")
        ] = 0,
    ) -> Response:
        """Pools, links and changes as they are; points, workers and events as far as they are new.
        A point about every two seconds, of the last quarter of an hour."""
        found = await controls.live(since, events_after)
        return json(wire.looked_json(wire.Looked(found, await controls.scaling())))

    return router
