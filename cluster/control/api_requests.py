"""The control API's answer to what became of one request.

    GET /v1/requests/ID      why this pair, what was held and pulled, how long each part took

Called by: control.api. Changes nothing.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated, Protocol

from fastapi import APIRouter, Path, Response

from cluster.control import wire
from cluster.control.api_answers import INVALID, UNAVAILABLE, json, refused
from cluster.control.requests import TOLD_WITHIN_S, Explained, UnknownRequest
from cluster.request_records import REQUEST_ID


class RequestControls(Protocol):
    """What the route needs of a controller. `explain` as Controller.explain."""

    async def explain(self, request_id: str) -> Explained: ...


def explaining(controls: RequestControls) -> APIRouter:
    """The route."""
    router = APIRouter(prefix="/v1", responses={**INVALID, **UNAVAILABLE})

    @router.get(
        # A path, so that an id with a slash is told what is wrong with it.
        "/requests/{request_id:path}",
        response_model=Explained,
        responses={
            404: {
                "model": wire.Refusal,
                "description": "No request of this id is known, or not any more; said after "
                f"{TOLD_WITHIN_S:g} s, as one that has just ended is not known at once.",
            }
        },
    )
    async def request(
        request_id: Annotated[
            str,
            Path(pattern=f"^{REQUEST_ID}$", description="`x-request-id` of an answer."),
        ],
    ) -> Response:
        """A request that has ended: its workers and why these, what decode held, what it pulled,
        how long each part took, each change of workers and its cause. Of several with the same id,
        the newest."""
        try:
            return json(wire.explained_json(await controls.explain(request_id)))
        except UnknownRequest as unknown:
            return refused(HTTPStatus.NOT_FOUND, str(unknown), wire.UNKNOWN_REQUEST)

    return router
