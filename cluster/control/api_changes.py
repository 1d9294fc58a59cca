"""The control API's other half: what changes a cluster, how far that is, and what has happened.

    POST /v1/pools/POOL/scale             have so many replicas
    POST /v1/workers/POOL/INDEX/role      have a worker serve in another role
    POST /v1/workers/POOL/INDEX/drain     end a worker once it has finished what it has
    POST /v1/nodes/NODE/drain, /return    take a node's workers away; let it have some again
    POST /v1/plan, /v1/apply              what another `serving` would change; change it
    GET  /v1/changes, /v1/changes/ID      what was asked for, and what has become of it
    GET  /v1/events?after=&wait_s=        what has happened since, waited for

A POST answers 202 with the Change that it began; its end is to be asked for.
Called by: control.api.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from http import HTTPStatus
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, Body, Header, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from cluster.control import wire
from cluster.control.api_answers import INVALID, UNAVAILABLE, json, refused
from cluster.control.changes import (
    DEFAULT_GRACE_S,
    Apply,
    Ask,
    Change,
    ChangeRole,
    DrainNode,
    DrainWorker,
    Plan,
    ReturnNode,
    Scale,
)
from cluster.control.events import Told
from cluster.control.state import ClusterStatus
from cluster.errors import InvalidInput
from cluster.identity import Role
from cluster.topology.findings import did_you_mean
from cluster.topology.schema import ServingSpec

# Far more than clients that repeat a request have under way at once.
KEYS_KEPT = 256


class ChangeControls(Protocol):
    """What these routes need of a controller. `ask` and `plan` raise InvalidInput: nothing is done;
    `change` raises KeyError."""

    async def status(self) -> ClusterStatus: ...

    async def ask(self, ask: Ask, asked_by: str, why: str = "") -> Change: ...

    async def plan(self, serving: ServingSpec) -> Plan: ...

    async def change(self, id: int) -> Change: ...

    async def changes(self) -> tuple[Change, ...]: ...

    async def events(self, after_seq: int, timeout_s: float) -> tuple[Told, ...]: ...


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Reasoned(_Body):
    why: str = Field(
        default="",
        max_length=wire.MOST_WHY_CHARACTERS,
        pattern=wire.WHY_PATTERN,
        description="The reason, for people; kept with the change's events.",
    )


class _Graceful(_Reasoned):
    grace_s: float = Field(
        default=DEFAULT_GRACE_S,
        ge=0,
        allow_inf_nan=False,
        strict=True,
        description="How long requests in hand may go on where they are; then they move.",
    )


class ScaleRequest(_Graceful):
    replicas: int = Field(ge=0, strict=True, description="How many the pool is to have.")


class RoleRequest(_Graceful):
    role: Literal["prefill", "decode"]
    may_restart: bool = Field(
        default=False,
        strict=True,
        description="Start its engine anew if it cannot change otherwise.",
    )


class DrainRequest(_Graceful):
    pass


class DrainNodeRequest(_Graceful):
    may_end_service: bool = Field(
        default=False,
        strict=True,
        description="Also where no other node could take workers of a kind that is needed.",
    )


class ReturnRequest(_Reasoned):
    pass


class PlanRequest(_Body):
    serving: ServingSpec = Field(description="All of `metadata.serving`.")


class ApplyRequest(PlanRequest, _Graceful):
    surge: bool = Field(
        default=True, strict=True, description="Start a new worker before the old one ends."
    )


_Pool = Annotated[str, Path(pattern=r"^[a-z0-9][a-z0-9-]*$")]
_Index = Annotated[int, Path(ge=0)]
_Node = Annotated[
    str, Path(pattern=wire.NODE_PATTERN, description="Its address, or Ray's id of it.")
]
_AskedBy = Annotated[
    str,
    Header(
        alias=wire.ASKED_BY_HEADER,
        pattern=r"^[!-~]([ -~]{0,126}[!-~])?$",
        description="Who asks, as they say; kept with the change.",
    ),
]
_Key = Annotated[
    str | None,
    Header(
        alias=wire.KEY_HEADER,
        pattern=r"^[!-~]{1,128}$",
        description="The same for each sending of one request: a repeated one begins nothing new.",
    ),
]
_BEGINS: Any = {"status_code": HTTPStatus.ACCEPTED, "response_model": Change}
_UNKNOWN_NAME: dict[int | str, dict[str, Any]] = {
    404: {"model": wire.Refusal, "description": "There is nothing of that name."}
}


def changing(controls: ChangeControls) -> APIRouter:
    """What changes the cluster."""
    router = APIRouter(
        prefix="/v1", responses={**INVALID, **UNAVAILABLE}, generate_unique_id_function=_name
    )
    once = _Once(controls)

    @router.post("/pools/{pool}/scale", **_BEGINS, responses=_UNKNOWN_NAME)
    async def scale(
        pool: _Pool, body: ScaleRequest, asked_by: _AskedBy = "unknown", key: _Key = None
    ) -> Response:
        """Have `replicas` of a pool."""
        return await once.begin(Scale(pool, body.replicas, body.grace_s), asked_by, body.why, key)

    @router.post("/workers/{pool}/{index}/role", **_BEGINS, responses=_UNKNOWN_NAME)
    async def role(
        pool: _Pool,
        index: _Index,
        body: RoleRequest,
        asked_by: _AskedBy = "unknown",
        key: _Key = None,
    ) -> Response:
        """Have a worker serve in another role."""
        ask = ChangeRole(f"{pool}/{index}", Role(body.role), body.grace_s, body.may_restart)
        return await once.begin(ask, asked_by, body.why, key)

    @router.post("/workers/{pool}/{index}/drain", **_BEGINS, responses=_UNKNOWN_NAME)
    async def drain_worker(
        pool: _Pool,
        index: _Index,
        body: Annotated[DrainRequest, Body()] = DrainRequest(),  # noqa: B008 - frozen
        asked_by: _AskedBy = "unknown",
        key: _Key = None,
    ) -> Response:
        """End a worker once it has finished what it has; its pool starts another in its place."""
        ask = DrainWorker(f"{pool}/{index}", body.grace_s)
        return await once.begin(ask, asked_by, body.why, key)

    @router.post("/nodes/{node}/drain", **_BEGINS)
    async def drain_node(
        node: _Node,
        body: Annotated[DrainNodeRequest, Body()] = DrainNodeRequest(),  # noqa: B008 - frozen
        asked_by: _AskedBy = "unknown",
        key: _Key = None,
    ) -> Response:
        """Have no workers on a node, until it is returned."""
        ask = DrainNode(node, body.grace_s, body.may_end_service)
        return await once.begin(ask, asked_by, body.why, key)

    @router.post("/nodes/{node}/return", **_BEGINS)
    async def return_node(
        node: _Node,
        body: Annotated[ReturnRequest, Body()] = ReturnRequest(),  # noqa: B008 - frozen
        asked_by: _AskedBy = "unknown",
        key: _Key = None,
    ) -> Response:
        """Let a drained node take workers again."""
        return await once.begin(ReturnNode(node), asked_by, body.why, key)

    @router.post("/plan", response_model=Plan)
    async def plan(body: PlanRequest) -> Response:
        """What `apply` of the same `serving` would do. Changes nothing."""
        return json(wire.plan_json(await controls.plan(body.serving)))

    @router.post("/apply", **_BEGINS)
    async def apply(
        body: ApplyRequest, asked_by: _AskedBy = "unknown", key: _Key = None
    ) -> Response:
        """Serve as `serving` says, replacing workers one at a time where they must be."""
        ask = Apply(body.serving, body.grace_s, body.surge)
        return await once.begin(ask, asked_by, body.why, key)

    return router


def watching(controls: ChangeControls) -> APIRouter:
    """How changes go on, and what happens."""
    router = APIRouter(
        prefix="/v1", responses={**INVALID, **UNAVAILABLE}, generate_unique_id_function=_name
    )

    @router.get("/changes", response_model=wire.Changes)
    async def changes() -> Response:
        """The latest changes, newest last."""
        return json(wire.changes_json(await controls.changes()))

    @router.get("/changes/{id}", response_model=Change, responses=_UNKNOWN_NAME)
    async def change(id: Annotated[int, Path(ge=0)]) -> Response:
        """One change, and how far it is."""
        try:
            return json(wire.change_json(await controls.change(id)))
        except KeyError:
            said = f"no change {id} is known, or not any more; `pdcluster changes` lists the latest"
            return refused(HTTPStatus.NOT_FOUND, said, wire.UNKNOWN_NAME)

    @router.get("/events", response_model=wire.Events)
    async def events(
        after: Annotated[int, Query(ge=0, description="`seq` of the last one that is known.")] = 0,
        wait_s: Annotated[
            float,
            Query(ge=0, le=wire.LONGEST_WAIT_S, description="How long to wait for a first one."),
        ] = 0.0,
    ) -> Response:
        """Events with a higher `seq` than `after`, oldest first, as far as they are kept: those
        there are, or the first to come within `wait_s`. None: nothing has happened."""
        return json(wire.events_json(await controls.events(after, wait_s)))

    return router


class _Once:
    """Asks the controller, once for each idempotency key, however often a request is repeated.

    The newest KEYS_KEPT keys are kept, and only as long as the controller lives. A repeat that a
    restarted controller gets asks again. Of scale, role, node and apply that is the same, since
    each says what is to be so, not what is to be added; a worker's drain, done in between, would
    end the worker that took its place."""

    def __init__(self, controls: ChangeControls) -> None:
        self._controls = controls
        self._begun: dict[str, tuple[Ask, asyncio.Task[Change]]] = {}

    async def begin(self, ask: Ask, asked_by: str, why: str, key: str | None) -> Response:
        """202 with the Change of `ask`; 404: its pool or worker is unknown (not asked of a repeat,
        in whose course it may have gone). Raises: InvalidInput."""
        if key is None or key not in self._begun:
            unknown = _unknown_name(ask, await self._controls.status())
            if unknown is not None:
                return unknown
        if key is None:
            change = await self._controls.ask(ask, asked_by, why)
        else:
            change = await self._keyed(ask, asked_by, why, key)
        return json(wire.change_json(change), HTTPStatus.ACCEPTED)

    async def _keyed(self, ask: Ask, asked_by: str, why: str, key: str) -> Change:
        is_repeat = key in self._begun
        if not is_repeat:
            asking = asyncio.create_task(self._controls.ask(ask, asked_by, why), name=f"ask {key}")
            self._begun[key] = (ask, asking)
            if len(self._begun) > KEYS_KEPT:
                del self._begun[next(iter(self._begun))]
        former, asking = self._begun[key]
        if former != ask:
            raise InvalidInput(
                f"{wire.KEY_HEADER}: {key} was sent with another request; make a new one for each"
            )
        try:
            # One client that leaves must not end what another waits for.
            change = await asyncio.shield(asking)
        except Exception:
            # Nothing has changed: the same request may be right a little later.
            self._begun.pop(key, None)
            raise
        if not is_repeat:
            return change
        try:
            return await self._controls.change(change.id)
        except KeyError:  # older than what the controller keeps
            return change


def _unknown_name(ask: Ask, status: ClusterStatus) -> Response | None:
    if isinstance(ask, Scale):
        pools = {pool.name for pool in status.pools}
        return None if ask.pool in pools else _unknown("pool", ask.pool, pools)
    if isinstance(ask, ChangeRole | DrainWorker):
        # Also those whose place waits for the next one.
        workers = {report.id.name for report in status.workers}
        workers |= {slot.worker for slot in status.failed}
        return None if ask.worker in workers else _unknown("worker", ask.worker, workers)
    return None


def _unknown(kind: str, name: str, known: Collection[str]) -> Response:
    fix = did_you_mean(name, known) if known else "there is none"
    return refused(HTTPStatus.NOT_FOUND, f"no {kind} {name}; {fix}", wire.UNKNOWN_NAME)


def _name(route: Any) -> str:
    """Operation ids that generated clients can have as their methods' names."""
    return str(route.name)
