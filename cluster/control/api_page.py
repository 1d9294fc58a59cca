"""The page on the control port: its files, for whoever asks. They hold nothing of the cluster.

    GET /            page/index.html
    GET /ui/...      what it loads: scripts, style, the charting library

The page asks for the control token and then is a client of the API like any other, so these files
stand in front of the token's check. It may load and reach nothing but this port: a script that
somebody had got into it could not carry the token away. Called by: control.api.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

FOLDER = Path(__file__).parent / "page"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    # A browser asks each time whether it is still the same: a page of yesterday's version must not
    # talk to today's API.
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class File:
    content: bytes
    headers: Mapping[str, str]


def files(folder: Path = FOLDER) -> dict[str, File]:
    """What is served, by path."""
    found = {
        f"/ui/{path.relative_to(folder).as_posix()}": _file(path)
        for path in sorted(folder.rglob("*"))
        if path.suffix in _TYPES
    }
    found["/"] = found.pop("/ui/index.html")
    return found


class Page:
    """Answers for the page's files, and leaves everything else to `app`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._files = files()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = None
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            found = self._files.get(scope["path"])
        if found is None:
            await self._app(scope, receive, send)
            return
        known = dict(scope["headers"]).get(b"if-none-match", b"").decode("latin-1")
        is_known = found.headers["etag"] in known
        # Starlette leaves the body of a HEAD's answer to whoever makes it.
        content = b"" if is_known or scope["method"] == "HEAD" else found.content
        headers = dict(found.headers)
        if scope["method"] == "HEAD":
            headers["content-length"] = str(len(found.content))
        await Response(content, 304 if is_known else 200, headers)(scope, receive, send)


def _file(path: Path) -> File:
    content = path.read_bytes()
    tag = hashlib.sha256(content).hexdigest()[:20]
    return File(content, {**_HEADERS, "content-type": _TYPES[path.suffix], "etag": f'"{tag}"'})
