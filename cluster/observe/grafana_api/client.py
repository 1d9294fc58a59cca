"""One Grafana, by its HTTP API. In: paths and JSON. Out: JSON, or an error that says what to do.

GrafanaError
├── Unreachable     nothing answers there, or not Grafana
├── TokenRefused    401
├── NotPermitted    403
└── Conflict        412: somebody else changed it meanwhile
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import aiohttp

from cluster.errors import Final

TIMEOUT_S = 30.0


class GrafanaError(Final):
    """Grafana does not do what it was asked. `url`: its root; `said`: in its own words."""

    def __init__(self, url: str, said: str) -> None:
        super().__init__(url, said)
        self.url = url
        self.said = said

    def __str__(self) -> str:
        return f"Grafana at {self.url}: {self.said}"


class Unreachable(GrafanaError):
    def __str__(self) -> str:
        return (
            f"{self.url} is not Grafana, or does not answer: {self.said}; give Grafana's root URL "
            "by --url, or as observability.grafana.url in the topology"
        )


class TokenRefused(GrafanaError):
    def __str__(self) -> str:
        return (
            f"Grafana at {self.url} does not know the token (401: {self.said}); make one for a "
            "service account of this organisation (Administration, Service accounts)"
        )


class NotPermitted(GrafanaError):
    def __str__(self) -> str:
        return (
            f"Grafana at {self.url} does not let this token do it (403: {self.said}); folders, "
            "dashboards and alert rules need the role Editor, data sources the role Admin"
        )


class Conflict(GrafanaError):
    def __str__(self) -> str:
        return (
            f"Grafana at {self.url}: {self.said}; somebody else is changing it: push again when "
            "they are done"
        )


_BY_STATUS = {401: TokenRefused, 403: NotPermitted, 412: Conflict}


class GrafanaClient:
    """Use as a context. The token goes out in a header, and is in no message of its errors.

    Every method raises GrafanaError; cancelling is safe, but a write may have been done.
    """

    def __init__(self, url: str, token: str) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> GrafanaClient:
        self._session = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self._token}", "Accept": "application/json"},
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._session is not None
        await self._session.close()

    async def get(self, path: str) -> Any | None:
        """JSON; None if there is no such thing (404)."""
        return await self._ask("GET", path, is_absent_fine=True)

    async def post(self, path: str, body: Any) -> Any:
        return await self._ask("POST", path, body)

    async def put(self, path: str, body: Any) -> Any:
        return await self._ask("PUT", path, body)

    async def version(self) -> str:
        """Grafana's. Raises: Unreachable: something else answers at this URL."""
        found = await self._ask("GET", "/api/health", is_absent_fine=True)
        if not isinstance(found, dict) or "database" not in found:
            raise Unreachable(self.url, "/api/health does not answer as Grafana's does")
        return str(found.get("version", "unknown"))

    async def health(self, source_uid: str) -> str:
        """What keeps Grafana from the data source; "" if nothing does."""
        assert self._session is not None
        path = f"/api/datasources/uid/{source_uid}/health"
        try:
            async with self._session.get(self.url + path) as answer:
                said = await _said(answer)
                return "" if answer.status == 200 else said
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable(self.url, _words(error)) from error

    async def _ask(
        self, method: str, path: str, body: Any = None, *, is_absent_fine: bool = False
    ) -> Any:
        assert self._session is not None
        try:
            async with self._session.request(
                method, self.url + path, json=body, allow_redirects=False
            ) as answer:
                status = answer.status
                if 300 <= status < 400:
                    target = answer.headers.get("Location", "")
                    raise Unreachable(self.url, f"{path} is redirected to {target}")
                if status < 400:
                    return await answer.json()
                if status == 404 and is_absent_fine:
                    return None
                said = await _said(answer)
        except (aiohttp.ContentTypeError, ValueError) as error:
            raise Unreachable(self.url, f"{path} does not answer in JSON") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unreachable(self.url, _words(error)) from error
        if status in _BY_STATUS:
            raise _BY_STATUS[status](self.url, said)
        raise GrafanaError(self.url, f"{method} {path} answered {status}: {said}")


async def _said(answer: aiohttp.ClientResponse) -> str:
    text = await answer.text()
    try:
        found = await answer.json(content_type=None)
    except ValueError:
        return text[:200]
    message = found.get("message") if isinstance(found, dict) else None
    return str(message or text[:200])


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__
