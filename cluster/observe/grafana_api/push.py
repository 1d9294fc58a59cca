"""Bring one Grafana to hold what is wanted. Pure: `holds`. Thin: one method per kind of thing.

What is found is compared with what is wanted, and written only if it differs: a second push writes
nothing. Keys that Grafana adds by itself do not count as a difference.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cluster.observe.grafana_api.client import Conflict, GrafanaClient, GrafanaError


class Outcome(enum.StrEnum):
    CREATED = "created"
    UPDATED = "updated"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing: what was done, or in a dry run what would be."""

    kind: str
    name: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Wanted:
    """JSON as the API takes it. Folder, data source and dashboards have a `uid` of their own."""

    folder: dict[str, Any]
    source: dict[str, Any]
    boards: Sequence[dict[str, Any]]
    rule_groups: Sequence[dict[str, Any]]


def holds(found: Any, wanted: Any) -> bool:
    """Whether `found` says all that `wanted` says; it may say more in mappings, not in lists."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(
            key in found and holds(found[key], value) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(found, list)
            and len(found) == len(wanted)
            and all(holds(one, other) for one, other in zip(found, wanted, strict=True))
        )
    return bool(found == wanted)


class Pusher:
    """`is_dry`: read and compare, write nothing."""

    def __init__(self, client: GrafanaClient, *, is_dry: bool = False) -> None:
        self._client = client
        self._is_dry = is_dry

    async def push(self, wanted: Wanted) -> list[Step]:
        """Everything, in the order in which one thing needs the other. Raises: GrafanaError: what
        was written before it stays; pushing again goes on from there."""
        steps = [await self._folder(wanted.folder), await self._source(wanted.source)]
        steps += [await self._board(board, wanted.folder["uid"]) for board in wanted.boards]
        steps += [await self._rules(group, wanted.folder["uid"]) for group in wanted.rule_groups]
        return steps

    async def _folder(self, wanted: dict[str, Any]) -> Step:
        path = f"/api/folders/{wanted['uid']}"
        found = await self._client.get(path)
        outcome = _outcome(found, wanted)
        if outcome is Outcome.CREATED and not self._is_dry:
            await self._client.post("/api/folders", wanted)
        elif outcome is Outcome.UPDATED and not self._is_dry:
            assert found is not None
            await self._client.put(path, {**wanted, "version": found["version"]})
        return Step("folder", wanted["title"], outcome)

    async def _source(self, wanted: dict[str, Any]) -> Step:
        path = f"/api/datasources/uid/{wanted['uid']}"
        found = await self._client.get(path)
        outcome = _outcome(found, wanted)
        if outcome is Outcome.UPDATED and found is not None and found.get("readOnly"):
            raise GrafanaError(
                self._client.url,
                f"the data source {wanted['name']} comes from a provisioning file and cannot be "
                "written; change the file",
            )
        if outcome is Outcome.CREATED and not self._is_dry:
            await self._client.post("/api/datasources", wanted)
        elif outcome is Outcome.UPDATED and not self._is_dry:
            assert found is not None
            # What is left out is reset: credentials that somebody gave it are to stay.
            kept = {**found, **wanted, "jsonData": {**found["jsonData"], **wanted["jsonData"]}}
            await self._client.put(path, kept)
        return Step("data source", wanted["name"], outcome)

    async def _board(self, wanted: dict[str, Any], folder_uid: str) -> Step:
        try:
            outcome = await self._put_board(wanted, folder_uid)
        except Conflict:
            # Saved by somebody between our reading and our writing.
            outcome = await self._put_board(wanted, folder_uid)
        return Step("dashboard", wanted["title"], outcome)

    async def _put_board(self, wanted: dict[str, Any], folder_uid: str) -> Outcome:
        found = await self._client.get(f"/api/dashboards/uid/{wanted['uid']}")
        there: dict[str, Any] = found["dashboard"] if found is not None else {}
        meta: dict[str, Any] = found["meta"] if found is not None else {}
        outcome = _outcome(there or None, _comparable(there, wanted))
        if outcome is Outcome.UNCHANGED and meta.get("folderUid") != folder_uid:
            outcome = Outcome.UPDATED
        if outcome is Outcome.UNCHANGED or self._is_dry:
            return outcome
        if meta.get("provisioned"):
            raise GrafanaError(
                self._client.url,
                f"the dashboard {wanted['title']} comes from a provisioning file and cannot be "
                "written; change the file, or take it out of provisioning",
            )
        body = {
            "dashboard": {**wanted, "id": there.get("id"), "version": there.get("version", 0)},
            "folderUid": folder_uid,
            "message": "pdcluster dashboards push",
            "overwrite": False,
        }
        await self._client.post("/api/dashboards/db", body)
        return outcome

    async def _rules(self, wanted: dict[str, Any], folder_uid: str) -> Step:
        path = f"/api/v1/provisioning/folder/{folder_uid}/rule-groups/{wanted['title']}"
        outcome = _outcome(await self._client.get(path), wanted)
        if outcome is not Outcome.UNCHANGED and not self._is_dry:
            await self._client.put(path, wanted)
        return Step("alert rules", wanted["title"], outcome)


def _outcome(found: Any | None, wanted: dict[str, Any]) -> Outcome:
    if found is None:
        return Outcome.CREATED
    return Outcome.UNCHANGED if holds(found, wanted) else Outcome.UPDATED


def _comparable(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Without the schema's version if Grafana has migrated the dashboard to a newer one."""
    if found.get("schemaVersion", 0) > wanted["schemaVersion"]:
        return {key: value for key, value in wanted.items() if key != "schemaVersion"}
    return wanted
