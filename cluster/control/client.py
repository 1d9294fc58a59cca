"""A client of the control API, for commands: standard library and no Ray, so that they answer at
once, on the head and from elsewhere.

Where the API is and which token it wants is for the caller to know (launcher.target).
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.parse
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cluster.control import wire
from cluster.control.autoscale.view import Scaling
from cluster.control.changes import Ask, Change, Plan
from cluster.control.events import Told
from cluster.control.requests import Explained, UnknownRequest
from cluster.control.state import ClusterStatus, LogWindow
from cluster.errors import ClusterError, InvalidInput, PeerGone
from cluster.identity import WorkerId
from cluster.topology.schema import ServingSpec
from cluster.transfers import TransferRecord

_CONNECT_BOUND_S = 5.0
_ANSWER_BOUND_S = 60.0
_RETRY_S = 0.2

T = TypeVar("T")


class ControlError(ClusterError):
    """The control API refused, or does not answer."""


class UnknownName(InvalidInput):
    """There is no pool, worker or change of that name."""


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach one control API, and what to tell people when that fails.

    `patience_s`: how long a lost connection is tried again, for a controller that is just being
    restarted. `asked_by`: who changes something, in printable ASCII."""

    url: str
    token: str = field(repr=False)
    check: str = ""  # what to look at if nothing answers
    token_advice: str = ""  # what to do if the token is refused
    patience_s: float = 0.0
    asked_by: str = "unknown"


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class ControlClient:
    """Blocking calls. Every method raises ControlError with the address and what to do."""

    def __init__(self, access: Access) -> None:
        self.access = access
        self._at = f"the control API at {access.url}"

    def status(self) -> ClusterStatus:
        return self._understood(wire.read_status, self._get("/v1/status").body)

    def transfers(self, request_id: str) -> tuple[TransferRecord, ...]:
        """The transfers of one request, by time."""
        answer = self._get("/v1/transfers", request_id=request_id)
        return self._understood(wire.read_transfers, answer.body)

    def explain(self, request_id: str) -> Explained:
        """What became of a request that has ended. Raises: UnknownRequest."""
        answer = self._get(f"/v1/requests/{urllib.parse.quote(request_id, safe='')}")
        return self._understood(wire.read_explained, answer.body)

    def read_log(self, worker: WorkerId, offset: int, limit_bytes: int, rank: int = 0) -> LogWindow:
        """Up to `limit_bytes` of the log of the worker's present engine from `offset`; a negative
        one counts from the end. `rank`: the node, of a replica that spans several.

        Raises: PeerGone: there is no such worker now."""
        answer = self._get(
            f"/v1/workers/{worker.pool}/{worker.index}/log",
            offset=str(offset),
            limit_bytes=str(min(limit_bytes, wire.MOST_LOG_BYTES)),
            rank=str(rank),
        )
        return LogWindow(
            answer.body,
            int(answer.headers[wire.NEXT_OFFSET_HEADER]),
            int(answer.headers[wire.GENERATION_HEADER]),
        )

    def ask(self, ask: Ask, why: str = "") -> Change:
        """Have the cluster changed; returns when that has begun. `why`: for people, one line.

        Sent again after a lost connection, under one key, so that it is done once (but see
        control.api_changes: a controller that was restarted has forgotten its keys).

        Raises: UnknownName; InvalidInput: refused, nothing is done."""
        path, body = wire.posted(ask)
        return self._understood(wire.read_change, self._post(path, {**body, "why": why}).body)

    def plan(self, serving: ServingSpec) -> Plan:
        """What an Apply of `serving` would do. Raises: InvalidInput."""
        answer = self._post("/v1/plan", wire.serving_body(serving))
        return self._understood(wire.read_plan, answer.body)

    def change(self, id: int) -> Change:
        """Raises: UnknownName: it is not known, or not any more."""
        return self._understood(wire.read_change, self._get(f"/v1/changes/{id}").body)

    def changes(self) -> tuple[Change, ...]:
        """The latest, newest last."""
        return self._understood(wire.read_changes, self._get("/v1/changes").body)

    def events(self, after_seq: int = 0, wait_s: float = 0.0) -> tuple[Told, ...]:
        """Those that are kept and came after `after_seq`, oldest first; if there is none, the first
        to come within `wait_s` (at most wire.LONGEST_WAIT_S)."""
        answer = self._get("/v1/events", after=str(after_seq), wait_s=f"{wait_s:g}")
        return self._understood(wire.read_events, answer.body)

    def scaling(self) -> Scaling:
        """What the autoscaler decided last."""
        return self._understood(wire.read_scaling, self._get("/v1/scaling").body)

    def live(self, since: int = 0, events_after: int = 0) -> wire.Looked:
        """What is new after the point numbered `since` (0: all that is kept), the newest events
        numbered above `events_after`, and what the autoscaler decided last."""
        answer = self._get("/v1/live", since=str(since), events_after=str(events_after))
        return self._understood(wire.read_looked, answer.body)

    def _get(self, path: str, **query: str) -> _Answer:
        return self._answered(
            "GET", path + ("?" + urllib.parse.urlencode(query) if query else ""), {}, None
        )

    def _post(self, path: str, body: dict[str, Any]) -> _Answer:
        headers = {
            "content-type": "application/json",
            wire.ASKED_BY_HEADER: self.access.asked_by,
            wire.KEY_HEADER: str(uuid.uuid4()),
        }
        return self._answered("POST", path, headers, json.dumps(body, allow_nan=False).encode())

    def _answered(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | None
    ) -> _Answer:
        give_up_s: float | None = None
        while True:
            try:
                answer = self._send(method, target, headers, body)
                break
            except (ConnectionError, http.client.HTTPException) as error:
                # From the first loss on: an answer may have been waited for long before that.
                now_s = time.monotonic()
                give_up_s = now_s + self.access.patience_s if give_up_s is None else give_up_s
                if now_s >= give_up_s:
                    raise self._silent(error) from error
                time.sleep(_RETRY_S)
            except OSError as error:
                raise self._silent(error) from error
        if answer.status in (200, 202):
            return answer
        raise self._refusal(answer)

    def _send(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes | None
    ) -> _Answer:
        connection = connect(self.access.url, _CONNECT_BOUND_S, _ANSWER_BOUND_S)
        try:
            base = urllib.parse.urlsplit(self.access.url).path.rstrip("/")
            sent = {"authorization": f"Bearer {self.access.token}", "connection": "close"}
            connection.request(method, base + target, body=body, headers={**sent, **headers})
            response = connection.getresponse()
            answered = response.read()
        finally:
            connection.close()
        found = {name.lower(): value for name, value in response.headers.items()}
        return _Answer(response.status, found, answered)

    def _silent(self, error: Exception) -> ControlError:
        return ControlError(f"{self._at} does not answer ({reason(error)}); {self.access.check}")

    def _refusal(self, answer: _Answer) -> ClusterError:
        try:
            problem = wire.read_refusal(answer.body)
        except ValueError:
            problem = wire.Problem(answer.body.decode(errors="replace")[:300], "unknown")
        if answer.status == 401:
            return ControlError(f"{self._at} refuses the token; {self.access.token_advice}")
        if problem.type == wire.WORKER_GONE:
            worker, _, why = problem.message.partition(" is gone: ")
            return PeerGone(worker, why)
        if problem.type == wire.UNKNOWN_NAME:
            return UnknownName(problem.message)
        if problem.type == wire.UNKNOWN_REQUEST:
            return UnknownRequest(problem.message)
        if problem.type == wire.REFUSED:
            return InvalidInput(problem.message)
        if problem.type == wire.INVALID:
            return InvalidInput(f"{self._at} does not take it: {problem.message}")
        said = f"{self._at}: {answer.status} {problem.message}"
        if answer.status == 404:
            said += f"; is that a control API, and of this version? {self.access.check}"
        return ControlError(said)

    def _understood(self, read: Callable[[bytes], T], body: bytes) -> T:
        try:
            return read(body)
        except ValueError as error:
            raise ControlError(
                f"{self._at}: what answers there is none that this pdcluster knows (another "
                "version on the head?)"
            ) from error


def connect(url: str, connect_s: float, answer_s: float) -> http.client.HTTPConnection:
    """A connection to the server of `url` (http or https), made within `connect_s`; each later wait
    for it is at most `answer_s`. Raises: OSError."""
    address = urllib.parse.urlsplit(url)
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = kind(address.hostname or "", address.port, timeout=connect_s)
    connection.connect()
    connection.sock.settimeout(answer_s)
    return connection


def reason(error: Exception) -> str:
    """Why a connection failed, in few words."""
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return (said or type(error).__name__).lower()
