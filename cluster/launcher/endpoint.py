"""A small client of a cluster's endpoint: is it ready, and one chat. Standard library only, for a
command that answers at once must not first import an SDK.

Called by: launcher.up, launcher.demo, cli.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.control.client import connect, reason
from cluster.errors import ClusterError

_TIMEOUT_S = 600.0
_CONNECT_BOUND_S = 5.0


class EndpointError(ClusterError):
    """The endpoint refused, or does not answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole chat answer, and which way it took."""

    text: str
    request_id: str
    prefill: str
    decode: str
    route: str
    usage: Mapping[str, Any]


class Endpoint:
    """One endpoint at `url` (http://host:port). `key`: None if it asks for none. `key_advice`: what
    to do if it is refused."""

    def __init__(self, url: str, key: str | None, key_advice: str = "") -> None:
        self.url = url
        self._key = key
        self._key_advice = key_advice

    def why_not_ready(self) -> str:
        """ "" if it can serve, else what it or the network says."""
        try:
            response = self._send("GET", "/ready", None, timeout_s=5.0)
            body = response.read().decode(errors="replace")
        except OSError as error:
            return str(error)
        return "" if response.status == 200 else f"{response.status}: {body[:300]}"

    def why_silent(self) -> str:
        """ "" if a gateway answers, with workers or without, else what the network says."""
        try:
            response = self._send("GET", "/health", None, timeout_s=5.0)
            response.read()
        except OSError as error:
            return str(error)
        return "" if response.status == 200 else f"{response.status}"

    def model(self) -> str:
        """The name of the model that is served. Raises: EndpointError."""
        try:
            response = self._send("GET", "/v1/models", None, timeout_s=5.0)
            body = response.read()
        except OSError as error:
            raise self._silent(error) from error
        if response.status != 200:
            raise self._refusal(response.status, body)
        return str(json.loads(body)["data"][0]["id"])

    def metrics(self) -> str:
        """The gateway's own Prometheus text. Raises: EndpointError."""
        try:
            response = self._send("GET", "/metrics", None, timeout_s=5.0)
            return response.read().decode()
        except OSError as error:
            raise EndpointError(f"{self.url}: {error}") from error

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **options: Any) -> Answer:
        """One answer, not streamed. Raises: EndpointError."""
        response = self._chat({"model": model, "messages": list(messages), **options})
        parsed = json.loads(response.read())
        header = response.headers.get
        return Answer(
            text=parsed["choices"][0]["message"]["content"] or "",
            request_id=header("x-request-id", ""),
            prefill=header("x-pdcluster-prefill", "none"),
            decode=header("x-pdcluster-decode", "none"),
            route=header("x-pdcluster-route", ""),
            usage=parsed.get("usage") or {},
        )

    def chat_stream(
        self, model: str, messages: Sequence[Mapping[str, str]], **options: Any
    ) -> Generator[str, None, None]:
        """Pieces of one answer as they arrive. Closing the iterator ends the request.

        Raises: EndpointError, also in mid-stream."""
        response = self._chat(
            {"model": model, "messages": list(messages), "stream": True, **options}
        )
        try:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise EndpointError(str(event["error"].get("message", event["error"])))
                for choice in event.get("choices") or ():
                    yield (choice.get("delta") or {}).get("content") or ""
        except (OSError, http.client.HTTPException) as error:
            raise EndpointError(f"{self.url}: the answer broke off ({error})") from error
        finally:
            response.close()

    def _chat(self, body: Mapping[str, Any]) -> http.client.HTTPResponse:
        try:
            response = self._send("POST", "/v1/chat/completions", body, _TIMEOUT_S)
        except OSError as error:
            raise self._silent(error) from error
        if response.status != 200:
            raise self._refusal(response.status, response.read())
        return response

    def _silent(self, error: OSError) -> EndpointError:
        return EndpointError(f"{self.url} does not answer ({reason(error)}); see: pdcluster status")

    def _refusal(self, status: int, body: bytes) -> EndpointError:
        said = f"{self.url}: {status} {_message(body) or http.client.responses.get(status, '')}"
        is_advised = status == http.client.UNAUTHORIZED and self._key_advice
        return EndpointError(f"{said} {self._key_advice}" if is_advised else said)

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float
    ) -> http.client.HTTPResponse:
        headers = {"content-type": "application/json", "connection": "close"}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            connection = connect(self.url, _CONNECT_BOUND_S, timeout_s)
            connection.request(method, path, data, headers)
            return connection.getresponse()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error) or type(error).__name__) from error


def curl_line(url: str, model: str, key_file: str | None, key_env: str | None) -> str:
    """A line to paste into a shell. The key itself is never in it."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    key = f"$(cat {key_file})" if key_file else f"${{{key_env}%%,*}}" if key_env else ""
    auth = f' -H "Authorization: Bearer {key}"' if key else ""
    return f"curl {url}/v1/chat/completions{auth} -H 'Content-Type: application/json' -d '{body}'"


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:300]
