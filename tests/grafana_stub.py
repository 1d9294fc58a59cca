"""A Grafana as its HTTP API's documentation describes it, as far as `dashboards push` asks.

What is documented and what push relies on: uids, versions and 412, the folder that a dashboard
goes to, 409 for names that are taken, what the provisioning API of alerting wants of a rule, the
fields that Grafana adds by itself, roles of service accounts. It keeps every request.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

ADMIN, EDITOR = "glsa_admin", "glsa_editor"
BASE_INTERVAL_S = 10
NO_DATA = {"Alerting", "NoData", "OK"}
ON_ERROR = {"OK", "Alerting", "Error"}
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


@dataclass
class Asked:
    method: str
    path: str
    body: Any

    @property
    def is_write(self) -> bool:
        return self.method != "GET"


@dataclass
class GrafanaStub:
    """`health`: what the data source's health check answers. `before_save`: called before a
    dashboard is saved, for what somebody else does meanwhile."""

    folders: dict[str, dict[str, Any]] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    boards: dict[str, dict[str, Any]] = field(default_factory=dict)
    groups: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    health: tuple[int, str] = (200, "Successfully queried the Prometheus API.")
    before_save: Callable[[], None] | None = None
    schema_version: int | None = None  # to which it migrates dashboards as they are read

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        app.add_routes(
            [
                web.get("/api/health", self._health),
                web.get("/api/folders/{uid}", self._get_folder),
                web.post("/api/folders", self._post_folder),
                web.put("/api/folders/{uid}", self._put_folder),
                web.get("/api/datasources/uid/{uid}", self._get_source),
                web.get("/api/datasources/uid/{uid}/health", self._source_health),
                web.post("/api/datasources", self._post_source),
                web.put("/api/datasources/uid/{uid}", self._put_source),
                web.get("/api/dashboards/uid/{uid}", self._get_board),
                web.post("/api/dashboards/db", self._post_board),
                web.get("/api/v1/provisioning/folder/{uid}/rule-groups/{group}", self._get_group),
                web.put("/api/v1/provisioning/folder/{uid}/rule-groups/{group}", self._put_group),
            ]
        )
        return app

    @property
    def writes(self) -> list[Asked]:
        return [asked for asked in self.asked if asked.is_write]

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.asked.append(Asked(request.method, request.path, body))
        if request.path == "/api/health":
            return await handler(request)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in (ADMIN, EDITOR):
            return _said(401, "Invalid API key")
        wants_admin = request.path.startswith("/api/datasources") and request.method != "GET"
        if wants_admin and token != ADMIN:
            return _said(
                403,
                "You'll need additional permissions to perform this action. "
                "Permissions needed: datasources:create",
            )
        return await handler(request)

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"commit": "a1b2c3d", "database": "ok", "version": "13.2.3"})

    async def _get_folder(self, request: web.Request) -> web.Response:
        return _found(self.folders.get(request.match_info["uid"]), "folder not found")

    async def _post_folder(self, request: web.Request) -> web.Response:
        body = await request.json()
        if body["uid"] in self.folders:
            return _said(409, "a folder with that uid already exists")
        self.folders[body["uid"]] = {"id": len(self.folders) + 1, "version": 1, **body}
        return web.json_response(self.folders[body["uid"]])

    async def _put_folder(self, request: web.Request) -> web.Response:
        body, folder = await request.json(), self.folders[request.match_info["uid"]]
        if not body.get("overwrite") and body.get("version") != folder["version"]:
            return _conflict("The folder has been changed by someone else")
        folder |= {"title": body["title"], "version": folder["version"] + 1}
        return web.json_response(folder)

    async def _get_source(self, request: web.Request) -> web.Response:
        return _found(self.sources.get(request.match_info["uid"]), "Data source not found")

    async def _source_health(self, request: web.Request) -> web.Response:
        status, message = self.health
        said = {"message": message, "status": "OK" if status == 200 else "ERROR"}
        return web.json_response(said, status=status)

    async def _post_source(self, request: web.Request) -> web.Response:
        body = await request.json()
        if any(source["name"] == body["name"] for source in self.sources.values()):
            return _said(409, "data source with the same name already exists")
        number = len(self.sources) + 1
        added = {"id": number, "orgId": 1, "version": 1, "readOnly": False, "basicAuth": False}
        self.sources[body["uid"]] = {**added, "secureJsonFields": {}, **body}
        answer = {"id": number, "message": "Datasource added", "name": body["name"]}
        return web.json_response({**answer, "datasource": self.sources[body["uid"]]})

    async def _put_source(self, request: web.Request) -> web.Response:
        body, uid = await request.json(), request.match_info["uid"]
        before = self.sources[uid]
        if before["readOnly"]:
            return _said(403, "Cannot update read-only data source")
        # All of it is replaced by what was sent.
        kept = {"id": before["id"], "orgId": 1, "readOnly": False, "basicAuth": False}
        self.sources[uid] = {**kept, **body, "version": before["version"] + 1}
        return web.json_response({"message": "Datasource updated", "name": body["name"]})

    async def _get_board(self, request: web.Request) -> web.Response:
        found = self.boards.get(request.match_info["uid"])
        if found is None:
            return _said(404, "Dashboard not found")
        found = copy.deepcopy(found)
        if self.schema_version is not None:
            found["dashboard"]["schemaVersion"] = self.schema_version
        return web.json_response(found)

    async def _post_board(self, request: web.Request) -> web.Response:
        if self.before_save is not None:
            self.before_save()
        body = await request.json()
        wanted, folder = body["dashboard"], body.get("folderUid", "")
        if folder and folder not in self.folders:
            return _said(400, "folder not found")
        if not wanted.get("title"):
            return _said(400, "Dashboard title cannot be empty")
        there = self.boards.get(wanted["uid"])
        if there is not None and there["meta"].get("provisioned"):
            return _said(400, "Cannot save provisioned dashboard")
        if there is None and wanted.get("id") is not None:
            return _said(404, "Dashboard not found")
        version = there["dashboard"]["version"] if there is not None else 0
        if there is not None and not body.get("overwrite") and wanted.get("version") != version:
            return _conflict("The dashboard has been changed by someone else")
        number = there["dashboard"]["id"] if there is not None else len(self.boards) + 1
        saved = {**wanted, "id": number, "version": version + 1}
        meta = {"folderUid": folder, "isStarred": False, "version": version + 1}
        self.boards[wanted["uid"]] = {"dashboard": saved, "meta": meta}
        answer = {"id": number, "uid": wanted["uid"], "status": "success", "version": version + 1}
        return web.json_response(answer)

    async def _get_group(self, request: web.Request) -> web.Response:
        key = (request.match_info["uid"], request.match_info["group"])
        return _found(self.groups.get(key), "")

    async def _put_group(self, request: web.Request) -> web.Response:
        body = await request.json()
        folder, title = request.match_info["uid"], request.match_info["group"]
        if folder not in self.folders:
            return _said(404, "folder does not exist")
        if body["interval"] % BASE_INTERVAL_S:
            return _said(400, f"interval must be a multiple of {BASE_INTERVAL_S}s")
        rules = []
        for rule in body["rules"]:
            if fault := _fault(rule):
                return _said(400, f"invalid alert rule: {fault}")
            rules.append(_stored(rule, len(rules) + 1, folder, title))
        if len({rule["title"] for rule in rules}) < len(rules):
            return _said(409, "a conflicting alert rule is found: rule title under the same folder")
        said = {"title": title, "folderUid": folder, "interval": body["interval"], "rules": rules}
        self.groups[folder, title] = said
        return web.json_response(said)


def _fault(rule: dict[str, Any]) -> str:
    """What the provisioning API has against it; "" if nothing."""
    steps = {step["refId"]: step for step in rule.get("data", ())}
    if not rule.get("title") or len(rule["title"]) > 190:
        return "title must be 1 to 190 characters"
    if not re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", rule.get("uid", "")):
        return "uid must be 1 to 40 characters of a-z, A-Z, 0-9, - and _"
    if rule.get("condition") not in steps:
        return f"condition {rule.get('condition')} does not exist"
    if rule.get("noDataState") not in NO_DATA or rule.get("execErrState") not in ON_ERROR:
        return "unknown state"
    for name, step in steps.items():
        if step["model"]["refId"] != name:
            return f"model of {name} has another refId"
        # An expression asks others by name: they must be there.
        if step["datasourceUid"] == "__expr__":
            asked = re.findall(r"\$?\b([A-Z])\b", step["model"]["expression"])
            if not asked or not set(asked) <= steps.keys() - {name}:
                return f"{name} asks for {asked}"
    return ""


def _stored(rule: dict[str, Any], number: int, folder: str, title: str) -> dict[str, Any]:
    """As it is told back: with what Grafana adds, and durations in its own words."""
    stored = copy.deepcopy(rule)
    hours, minutes, seconds = (int(part or 0) for part in _DURATION.fullmatch(rule["for"]).groups())
    total = 3600 * hours + 60 * minutes + seconds
    parts = ((total // 3600, "h"), (total % 3600 // 60, "m"), (total % 60, "s"))
    stored["for"] = "".join(f"{count}{unit}" for count, unit in parts if count) or "0s"
    for step in stored["data"]:
        step["model"] |= {"intervalMs": 1000, "maxDataPoints": 43200}
    added = {"id": number, "orgID": 1, "provenance": "api", "updated": "2026-01-01T00:00:00Z"}
    return {**stored, **added, "folderUID": folder, "ruleGroup": title}


def _found(what: dict[str, Any] | None, otherwise: str) -> web.Response:
    return _said(404, otherwise) if what is None else web.json_response(what)


def _said(status: int, message: str) -> web.Response:
    return web.json_response({"message": message}, status=status)


def _conflict(message: str) -> web.Response:
    return web.json_response({"message": message, "status": "version-mismatch"}, status=412)
