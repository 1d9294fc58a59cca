"""The control API: what HTTP asks of the controller.

    GET /health                          is it there; asks for no token, tells nothing
    GET /v1/status                       the cluster as its controller sees it
    GET /v1/workers/POOL/INDEX/log       a piece of an engine's log
    GET /v1/transfers?request_id=        the KV transfers of a request
    control.api_changes                  what changes the cluster, how far it is, events
    control.api_scaling                  what the autoscaler decided
    control.api_live                     what is new, for whoever watches
    control.api_past                     what it did over a longer time, from Prometheus
    control.api_requests                 what became of one request
    control.api_metrics                  metrics, and what Prometheus is to scrape
    control.api_page                     the page; asks for no token, tells nothing of the cluster
    GET /openapi.json                    all of this, for programs

The token is asked for before a request is looked at any further; whatever is not `/health` or a
file of the page, also what does not exist, needs it. Errors are `{"error": {"message", "type"}}`.
Called by: control.api_server. No Ray here: the controller is passed in.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
from http import HTTPStatus
from typing import Annotated, Protocol

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster import __version__
from cluster.control import wire
from cluster.control.api_answers import INVALID, UNAUTHORIZED, UNAVAILABLE, json, refused
from cluster.control.api_changes import ChangeControls, changing, watching
from cluster.control.api_live import LiveControls, living
from cluster.control.api_metrics import MetricsControls, measuring
from cluster.control.api_page import Page
from cluster.control.api_past import PastControls, remembering
from cluster.control.api_requests import RequestControls, explaining
from cluster.control.api_scaling import scaling
from cluster.control.state import ClusterStatus, LogWindow
from cluster.errors import ClusterError, InvalidInput, PeerGone
from cluster.transfers import TransferRecord

log = logging.getLogger(__name__)

_OPEN = "/health"
_DEFAULT_LOG_BYTES = 1 << 18


class Controls(
    ChangeControls, LiveControls, MetricsControls, PastControls, RequestControls, Protocol
):
    """What the API needs of a controller."""

    async def transfers(self, request_id: str) -> list[TransferRecord]: ...

    async def read_log(
        self, worker: str, offset: int, limit_bytes: int, rank: int = 0
    ) -> LogWindow: ...


class Bearer:
    """Checks the Authorization header. Keeps and compares digests, in constant time."""

    def __init__(self, token: str) -> None:
        self.replace(token)

    def replace(self, token: str) -> None:
        """Take another token; the former one is refused from now on."""
        self._digest = hashlib.sha256(token.encode()).digest()

    def admits(self, authorization: bytes | None) -> bool:
        scheme, _, token = (authorization or b"").partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        is_right = hmac.compare_digest(digest, self._digest)
        return scheme.lower() == b"bearer" and is_right


def create_app(controls: Controls, bearer: Bearer) -> ASGIApp:
    """The whole API as an ASGI app. `bearer` may be told another token later."""
    app = FastAPI(
        title="pdcluster control API",
        version=__version__,
        openapi_url="/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.get(_OPEN)(health)
    api = APIRouter(
        # For the document only; whether a request has the token is judged before (_Guarded).
        dependencies=[Depends(HTTPBearer(auto_error=False))],
        responses=UNAUTHORIZED,
    )
    for router in (
        *(_reading(controls), changing(controls), watching(controls)),
        *(scaling(controls), living(controls), remembering(controls)),
        *(measuring(controls), explaining(controls)),
    ):
        api.include_router(router)
    app.include_router(api)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(InvalidInput, _invalid_input)
    app.add_exception_handler(ClusterError, _cluster_error)
    app.add_exception_handler(Exception, _mistake)
    return Page(_Guarded(app, bearer))


async def health() -> dict[str, str]:
    """Whether the controller's process is there."""
    return {"status": "ok"}


def _reading(controls: Controls) -> APIRouter:
    """What changes nothing."""
    router = APIRouter(prefix="/v1", responses=UNAVAILABLE)

    @router.get("/status", response_model=ClusterStatus)
    async def status() -> Response:
        """Pools, workers and why one is not ready, failed ones, links, recent events."""
        return json(wire.status_json(await controls.status()))

    @router.get("/transfers", response_model=wire.Transfers, responses=INVALID)
    async def transfers(
        request_id: Annotated[str, Query(min_length=1, description="`x-request-id` of an answer.")],
    ) -> Response:
        """The KV transfers of one request, as both of its engines reported them, by time."""
        return json(wire.transfers_json(await controls.transfers(request_id)))

    @router.get(
        "/workers/{pool}/{index}/log",
        response_class=Response,
        responses={
            **INVALID,
            200: {
                "content": {"application/octet-stream": {}},
                "headers": {
                    wire.NEXT_OFFSET_HEADER: {
                        "description": "Where the next piece begins.",
                        "schema": {"type": "integer"},
                    },
                    wire.GENERATION_HEADER: {
                        "description": "Whose log it is: another generation begins at 0.",
                        "schema": {"type": "integer"},
                    },
                },
            },
            404: {
                "model": wire.Refusal,
                "description": "No such worker runs now, or no such rank.",
            },
            503: {"model": wire.Refusal, "description": "The worker does not answer."},
        },
    )
    async def worker_log(
        pool: Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9-]*$")],
        index: Annotated[int, Path(ge=0)],
        offset: Annotated[
            int, Query(description="Byte to begin at; a negative one counts from the end.")
        ] = 0,
        limit_bytes: Annotated[
            int, Query(ge=1, le=wire.MOST_LOG_BYTES, description="Longest answer.")
        ] = _DEFAULT_LOG_BYTES,
        rank: Annotated[
            int, Query(ge=0, description="Which node of a replica that spans several.")
        ] = 0,
    ) -> Response:
        """Bytes of the log of the worker's present engine."""
        name = f"{pool}/{index}"
        try:
            window = await controls.read_log(name, offset, limit_bytes, rank)
        except InvalidInput as error:
            return refused(HTTPStatus.NOT_FOUND, str(error), wire.UNKNOWN_NAME)
        except PeerGone as error:
            known = {report.id.name for report in (await controls.status()).workers}
            status = HTTPStatus.SERVICE_UNAVAILABLE if name in known else HTTPStatus.NOT_FOUND
            return refused(status, str(error), wire.WORKER_GONE)
        return Response(
            window.data,
            media_type="application/octet-stream",
            headers={
                wire.NEXT_OFFSET_HEADER: str(window.next_offset),
                wire.GENERATION_HEADER: str(window.generation),
            },
        )

    return router


class _Guarded:
    """Lets through what carries the token. In front of the app, so that not even a path or a body
    of somebody else's is looked at."""

    def __init__(self, app: ASGIApp, bearer: Bearer) -> None:
        self._app = app
        self._bearer = bearer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != _OPEN:
            authorization = dict(scope["headers"]).get(b"authorization")
            if not self._bearer.admits(authorization):
                what = "a wrong token" if authorization else "no token"
                answer = refused(
                    HTTPStatus.UNAUTHORIZED,
                    f"{what}; send `Authorization: Bearer TOKEN`",
                    "unauthorized",
                    {"www-authenticate": "Bearer"},
                )
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = HTTPStatus(error.status_code).name.lower()
    headers = dict(error.headers) if error.headers else None
    return refused(error.status_code, str(error.detail), kind, headers)


async def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    said = "; ".join(
        f"{'.'.join(str(part) for part in fault['loc'][1:])}: {fault['msg']}"
        for fault in error.errors()
    )
    return refused(HTTPStatus.BAD_REQUEST, said, wire.INVALID)


async def _invalid_input(_request: Request, error: Exception) -> Response:
    return refused(HTTPStatus.BAD_REQUEST, str(error), wire.REFUSED)


async def _cluster_error(_request: Request, error: Exception) -> Response:
    return refused(HTTPStatus.SERVICE_UNAVAILABLE, str(error), "unavailable")


async def _mistake(_request: Request, error: Exception) -> Response:
    log.error("request failed", exc_info=error)
    return refused(HTTPStatus.INTERNAL_SERVER_ERROR, "a mistake in pdcluster", "internal")
