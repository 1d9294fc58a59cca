"""What the control API answers with: JSON, or a refusal, and how refusals stand in its document.

Called by: control.api, control.api_*.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from cluster.control import wire

_JSON = "application/json"

# By status, as FastAPI's `responses`. "default" also keeps its own 422, which is never sent here,
# out of the document.
UNAUTHORIZED: dict[int | str, dict[str, Any]] = {
    401: {"model": wire.Refusal, "description": "No token, or a wrong one."},
    "default": {"model": wire.Refusal, "description": "Any other fault, in the same shape."},
}
INVALID: dict[int | str, dict[str, Any]] = {
    400: {"model": wire.Refusal, "description": "What is wrong, and what to send. Nothing is done."}
}
UNAVAILABLE: dict[int | str, dict[str, Any]] = {
    503: {"model": wire.Refusal, "description": "Ray's store does not answer; try again."}
}


def json(body: bytes, status: int = HTTPStatus.OK) -> Response:
    return Response(body, status_code=status, media_type=_JSON)


def refused(
    status: int, message: str, kind: str, headers: dict[str, str] | None = None
) -> Response:
    body = wire.refusal_json(message, kind)
    return Response(body, status_code=status, media_type=_JSON, headers=headers)
