"""A client of the control API, for commands: standard library and no Ray, so that they answer at
once, on the head and from elsewhere.

Where the API is and which token it wants is for the caller to know (launcher.target).
"""

from __future__ import annotations

import http.client
import time
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from cluster.control import wire
from cluster.control.state import ClusterStatus, LogWindow
from cluster.errors import ClusterError, PeerGone
from cluster.identity import WorkerId
from cluster.transfers import TransferRecord

_CONNECT_BOUND_S = 5.0
_ANSWER_BOUND_S = 60.0
_RETRY_S = 0.2

T = TypeVar("T")


class ControlError(ClusterError):
    """The control API refused, or does not answer."""


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach one control API, and what to tell people when that fails.

    `patience_s`: how long a refused connection is tried again, for a controller that is just being
    restarted."""

    url: str
    token: str = field(repr=False)
    check: str = ""  # what to look at if nothing answers
    token_advice: str = ""  # what to do if the token is refused
    patience_s: float = 0.0


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

    def _get(self, path: str, **query: str) -> _Answer:
        target = path + ("?" + urllib.parse.urlencode(query) if query else "")
        give_up_s = time.monotonic() + self.access.patience_s
        while True:
            try:
                answer = self._send("GET", target)
                break
            except (ConnectionRefusedError, ConnectionResetError, http.client.HTTPException) as e:
                if time.monotonic() >= give_up_s:
                    raise self._silent(e) from e
                time.sleep(_RETRY_S)
            except OSError as error:
                raise self._silent(error) from error
        if answer.status == 200:
            return answer
        raise self._refusal(answer)

    def _send(self, method: str, target: str) -> _Answer:
        connection = connect(self.access.url, _CONNECT_BOUND_S, _ANSWER_BOUND_S)
        try:
            base = urllib.parse.urlsplit(self.access.url).path.rstrip("/")
            headers = {"authorization": f"Bearer {self.access.token}", "connection": "close"}
            connection.request(method, base + target, headers=headers)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        headers = {name.lower(): value for name, value in response.headers.items()}
        return _Answer(response.status, headers, body)

    def _silent(self, error: Exception) -> ControlError:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        why = why or type(error).__name__
        return ControlError(f"{self._at} does not answer ({why.lower()}); {self.access.check}")

    def _refusal(self, answer: _Answer) -> ClusterError:
        try:
            problem = wire.read_refusal(answer.body)
        except ValueError:
            problem = wire.Problem(answer.body.decode(errors="replace")[:300], "unknown")
        if answer.status == 401:
            return ControlError(f"{self._at} refuses the token; {self.access.token_advice}")
        if problem.type == "worker_gone":
            worker, _, why = problem.message.partition(" is gone: ")
            return PeerGone(worker, why)
        return ControlError(f"{self._at}: {answer.status} {problem.message}")

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
