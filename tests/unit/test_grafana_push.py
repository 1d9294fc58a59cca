"""`dashboards push` against a Grafana that answers as its documentation says."""

from __future__ import annotations

import asyncio
import copy
import json

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from grafana_stub import ADMIN, EDITOR, GrafanaStub
from topology_text import BASE

from cluster.cli import dashboards as command
from cluster.cli.main import run
from cluster.observe.dashboards.beside import FOLDER_UID, SOURCE_UID
from cluster.observe.grafana_api import alerts
from cluster.observe.grafana_api.client import (
    Conflict,
    GrafanaClient,
    GrafanaError,
    NotPermitted,
    TokenRefused,
    Unreachable,
)
from cluster.observe.grafana_api.push import Outcome, Pusher, holds
from cluster.observe.rules_alerts import ALERTS

PROMETHEUS = "http://127.0.0.1:9090"
WANTED = command._wanted("pdcluster", PROMETHEUS)


@pytest.fixture
def stub():
    return GrafanaStub()


@pytest.fixture
async def grafana(stub):
    async with TestServer(stub.app(), host="127.0.0.1") as server:
        yield str(server.make_url("/"))


async def push(url, wanted=WANTED, token=ADMIN, is_dry=False):
    async with GrafanaClient(url, token) as client:
        return await Pusher(client, is_dry=is_dry).push(wanted)


def outcomes(steps):
    return {step.outcome for step in steps}


async def test_an_empty_grafana_gets_folder_source_boards_and_rules(stub, grafana):
    steps = await push(grafana)
    assert outcomes(steps) == {Outcome.CREATED}
    assert stub.folders[FOLDER_UID]["title"] == "pdcluster"
    assert stub.sources[SOURCE_UID]["url"] == PROMETHEUS
    assert len(stub.boards) == len(WANTED.boards) == 5
    assert {board["meta"]["folderUid"] for board in stub.boards.values()} == {FOLDER_UID}
    rules = stub.groups[FOLDER_UID, alerts.GROUP]["rules"]
    assert [rule["title"] for rule in rules] == [alert.name for alert in ALERTS]
    for rule, alert in zip(rules, ALERTS, strict=True):
        assert rule["data"][0]["model"]["expr"] == alert.expr
        assert rule["data"][0]["datasourceUid"] == SOURCE_UID
        assert rule["annotations"]["do"] == alert.do


async def test_a_second_push_writes_nothing(stub, grafana):
    await push(grafana)
    stub.asked.clear()
    steps = await push(grafana)
    assert outcomes(steps) == {Outcome.UNCHANGED}
    assert stub.writes == []


async def test_a_second_push_writes_nothing_where_grafana_has_migrated_the_schema(stub, grafana):
    await push(grafana)
    stub.schema_version = 42
    stub.asked.clear()
    assert outcomes(await push(grafana)) == {Outcome.UNCHANGED}
    assert stub.writes == []


async def test_only_what_differs_is_written(stub, grafana):
    await push(grafana)
    edited = stub.boards["pdcluster-overview"]["dashboard"]
    edited["panels"][1]["title"] = "Renamed by hand?"
    edited["version"] = 7
    stub.asked.clear()
    steps = await push(grafana)
    changed = [step.name for step in steps if step.outcome is Outcome.UPDATED]
    assert changed == ["pdcluster / Overview"]
    assert [asked.path for asked in stub.writes] == ["/api/dashboards/db"]
    assert stub.boards["pdcluster-overview"]["dashboard"]["version"] == 8
    assert holds(stub.boards["pdcluster-overview"]["dashboard"], WANTED.boards[0])


async def test_a_board_that_was_moved_comes_back_to_its_folder(stub, grafana):
    await push(grafana)
    stub.boards["pdcluster-scaling"]["meta"]["folderUid"] = ""
    steps = await push(grafana)
    assert [s.name for s in steps if s.outcome is Outcome.UPDATED] == [
        "pdcluster / Scaling and events"
    ]
    assert stub.boards["pdcluster-scaling"]["meta"]["folderUid"] == FOLDER_UID


async def test_a_folder_is_renamed_and_keeps_its_boards(stub, grafana):
    await push(grafana)
    steps = await push(grafana, command._wanted("Serving", PROMETHEUS))
    assert [s.kind for s in steps if s.outcome is Outcome.UPDATED] == ["folder"]
    assert stub.folders[FOLDER_UID]["title"] == "Serving"


async def test_another_prometheus_is_told_and_credentials_stay(stub, grafana):
    await push(grafana)
    stub.sources[SOURCE_UID] |= {"basicAuth": True, "basicAuthUser": "reader"}
    stub.sources[SOURCE_UID]["jsonData"]["tlsSkipVerify"] = True
    steps = await push(grafana, command._wanted("pdcluster", "http://prometheus:9090"))
    assert [s.kind for s in steps if s.outcome is Outcome.UPDATED] == ["data source"]
    source = stub.sources[SOURCE_UID]
    assert source["url"] == "http://prometheus:9090"
    assert source["basicAuthUser"] == "reader"
    assert source["jsonData"]["tlsSkipVerify"] is True


async def test_a_rule_that_was_taken_out_goes(stub, grafana):
    await push(grafana)
    fewer = copy.deepcopy(WANTED.rule_groups[0])
    stub.groups[FOLDER_UID, alerts.GROUP]["rules"].append(
        {**fewer["rules"][0], "uid": "old", "title": "Old"}
    )
    steps = await push(grafana)
    assert [s.kind for s in steps if s.outcome is Outcome.UPDATED] == ["alert rules"]
    assert len(stub.groups[FOLDER_UID, alerts.GROUP]["rules"]) == len(ALERTS)


async def test_a_dry_run_writes_nothing_and_says_what_it_would(stub, grafana):
    steps = await push(grafana, is_dry=True)
    assert outcomes(steps) == {Outcome.CREATED}
    assert stub.writes == []
    assert stub.folders == {}


async def test_a_board_saved_meanwhile_is_read_again_and_written(stub, grafana):
    await push(grafana)
    board = stub.boards["pdcluster-overview"]["dashboard"]
    board["title"] = "Edited"

    def saved_by_somebody():
        stub.before_save = None
        board["version"] += 1

    stub.before_save = saved_by_somebody
    steps = await push(grafana)
    assert [s.outcome for s in steps if s.name == "pdcluster / Overview"] == [Outcome.UPDATED]
    assert stub.boards["pdcluster-overview"]["dashboard"]["title"] == "pdcluster / Overview"


async def test_a_board_saved_again_and_again_is_a_conflict(stub, grafana):
    await push(grafana)
    board = stub.boards["pdcluster-overview"]["dashboard"]
    board["title"] = "Edited"

    def saved_by_somebody():
        board["version"] += 1

    stub.before_save = saved_by_somebody
    with pytest.raises(Conflict, match=r"changed by someone else.*push again"):
        await push(grafana)


async def test_a_wrong_token_is_said_and_not_shown(grafana):
    with pytest.raises(TokenRefused, match="401") as caught:
        await push(grafana, token="glsa_wrong")
    assert "glsa_wrong" not in str(caught.value)
    assert "glsa_wrong" not in repr(caught.value)


async def test_an_editor_may_not_make_the_data_source(stub, grafana):
    with pytest.raises(NotPermitted, match=r"datasources:create.*role Admin"):
        await push(grafana, token=EDITOR)
    assert stub.boards == {}


async def test_an_editor_may_push_where_the_data_source_is_there(stub, grafana):
    await push(grafana)
    stub.boards.clear()
    assert Outcome.CREATED in outcomes(await push(grafana, token=EDITOR))
    assert len(stub.boards) == 5


async def test_what_comes_from_files_is_left_alone(stub, grafana):
    await push(grafana)
    stub.sources[SOURCE_UID] |= {"readOnly": True, "url": "http://elsewhere"}
    with pytest.raises(GrafanaError, match="provisioning file"):
        await push(grafana)
    stub.sources[SOURCE_UID]["url"] = PROMETHEUS
    stub.boards["pdcluster-overview"]["meta"]["provisioned"] = True
    assert outcomes(await push(grafana)) == {Outcome.UNCHANGED}
    stub.boards["pdcluster-overview"]["dashboard"]["title"] = "Other"
    with pytest.raises(GrafanaError, match="provisioning file"):
        await push(grafana)


async def test_a_name_that_is_taken_is_said_in_grafanas_words(stub, grafana):
    stub.sources["theirs"] = {"uid": "theirs", "name": "pdcluster Prometheus"}
    with pytest.raises(GrafanaError, match="409: data source with the same name"):
        await push(grafana)


async def test_another_server_at_the_url_is_told_apart_from_grafana():
    async def page(request):
        return web.Response(text="<html>hello</html>", content_type="text/html")

    async def login(request):
        raise web.HTTPFound("/login")

    for handler in (page, login):
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        async with (
            TestServer(app, host="127.0.0.1") as server,
            GrafanaClient(str(server.make_url("/")), ADMIN) as client,
        ):
            with pytest.raises(Unreachable, match="root URL"):
                await client.version()


async def test_nobody_at_the_url_is_said():
    async with TestServer(web.Application(), host="127.0.0.1") as server:
        url = str(server.make_url("/"))
    async with GrafanaClient(url, ADMIN) as client:
        with pytest.raises(Unreachable, match="does not answer"):
            await client.version()


async def test_health_of_the_data_source_is_told(stub, grafana):
    async with GrafanaClient(grafana, ADMIN) as client:
        assert await client.version() == "13.2.3"
        assert await client.health(SOURCE_UID) == ""
        stub.health = (400, "connection refused")
        assert await client.health(SOURCE_UID) == "connection refused"


def test_rules_have_names_that_grafana_takes_and_that_differ():
    uids = [alerts.uid(alert) for alert in ALERTS]
    assert len(set(uids)) == len(uids)
    assert all(0 < len(uid) <= 40 for uid in uids)


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0s"), (30, "30s"), (60, "1m"), (90, "1m30s"), (3600, "1h")]
)
def test_a_duration_is_said_as_grafana_says_it(seconds, said):
    assert alerts.duration(seconds) == said


def test_a_list_that_is_longer_is_another_list():
    assert holds({"a": 1, "b": [{"c": 2, "d": 3}]}, {"b": [{"c": 2}]})
    assert not holds({"b": [1, 2]}, {"b": [1]})
    assert not holds({"a": 1}, {"a": 1, "b": None})
    assert not holds(None, {"a": 1})


async def run_command(*words):
    return await asyncio.to_thread(run, ["dashboards", *words])


@pytest.fixture(autouse=True)
def _no_cluster_here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("GRAFANA_TOKEN", ADMIN)


async def test_the_command_pushes_twice_and_the_second_time_changes_nothing(grafana, capsys):
    for created, unchanged in ((8, 0), (0, 8)):
        assert await run_command("push", "--url", grafana, "--json") == 0
        steps = json.loads(capsys.readouterr().out)["steps"]
        assert sum(step["outcome"] == "created" for step in steps) == created
        assert sum(step["outcome"] == "unchanged" for step in steps) == unchanged


async def test_the_command_warns_where_grafana_cannot_reach_prometheus(stub, grafana, capsys):
    stub.health = (400, "connection refused")
    assert await run_command("push", "--url", grafana) == 0
    assert "cannot ask Prometheus" in capsys.readouterr().err


async def test_the_command_fails_where_the_plugin_is_missing(stub, grafana, capsys):
    stub.health = (404, "Plugin not found")
    assert await run_command("push", "--url", grafana) == 1
    assert "lacks the data source plugin prometheus" in capsys.readouterr().err


async def test_the_command_names_the_variable_that_is_not_set(grafana, capsys, monkeypatch):
    monkeypatch.delenv("GRAFANA_TOKEN")
    assert await run_command("push", "--url", grafana) == 2
    assert "GRAFANA_TOKEN is not set" in capsys.readouterr().err


async def test_the_command_asks_for_a_url(capsys):
    assert await run_command("push") == 2
    assert "observability.grafana.url" in capsys.readouterr().err


async def test_url_token_and_folder_come_from_the_topology(
    stub, grafana, capsys, monkeypatch, tmp_path
):
    file = tmp_path / "t.yaml"
    file.write_text(
        f"{BASE}    observability:\n"
        "      prometheus: {mode: external, url: 'http://prometheus:9090'}\n"
        f"      grafana: {{url: '{grafana}', token_env: OUR_TOKEN, folder: Serving}}\n"
    )
    monkeypatch.setenv("GRAFANA_TOKEN", "glsa_wrong")
    monkeypatch.setenv("OUR_TOKEN", ADMIN)
    assert await run_command("push", "--topology", str(file)) == 0, capsys.readouterr().err
    assert stub.folders[FOLDER_UID]["title"] == "Serving"
    assert stub.sources[SOURCE_UID]["url"] == "http://prometheus:9090"
