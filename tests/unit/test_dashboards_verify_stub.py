"""`dashboards verify` and `build`: what is asked, what counts as data, what is said."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from cluster.cli.main import run
from cluster.observe.dashboards import files
from cluster.observe.prometheus import PrometheusError
from cluster.observe.verify import verify


class Prometheus:
    """Answers every query alike, but those that contain a key of `special`."""

    def __init__(self):
        self.asked = []
        self.points = [[1, "1"]]
        self.special = {}

    def app(self):
        app = web.Application()
        app.router.add_post("/api/v1/{kind:query|query_range}", self._query)
        return app

    async def _query(self, request):
        asked = dict(await request.post())
        self.asked.append((request.match_info["kind"], asked))
        for part, (status, said) in self.special.items():
            if part in asked["query"]:
                return web.json_response(said, status=status)
        is_range = request.match_info["kind"] == "query_range"
        series = {"values": self.points} if is_range else {"value": (self.points or [None])[-1]}
        result = [{"metric": {}, **series}] if self.points else []
        return web.json_response({"status": "success", "data": {"result": result}})


@pytest.fixture
def prometheus():
    return Prometheus()


@pytest.fixture
async def url(prometheus):
    async with TestServer(prometheus.app(), host="127.0.0.1") as server:
        yield str(server.make_url("/"))


def empty():
    return 200, {"status": "success", "data": {"result": []}}


async def test_every_query_of_every_panel_is_asked_with_its_variables_filled(prometheus, url):
    checked = await verify(url, files.BOARDS, now_s=1000.0, window_s=60.0)
    queries = [q for board in files.BOARDS for p in board.panels() for q in p.queries]
    assert len([one for one in checked if one.board != "annotations"]) == len(queries)
    assert len(prometheus.asked) == len(checked)
    assert all("$" not in asked["query"] for _, asked in prometheus.asked)
    assert all(one.has_data for one in checked)


async def test_panels_over_time_are_asked_for_the_whole_window_and_others_for_now(prometheus, url):
    await verify(url, files.BOARDS, now_s=1000.0, window_s=60.0)
    kinds = {kind for kind, _ in prometheus.asked}
    assert kinds == {"query", "query_range"}
    for kind, asked in prometheus.asked:
        if kind == "query":
            assert asked["time"] == "1000.000"
        else:
            assert (asked["start"], asked["end"]) == ("940.000", "1000.000")


@pytest.mark.parametrize("points", [[], [[1, "NaN"]], [[1, "NaN"], [2, "+Inf"]]])
async def test_series_without_a_number_are_no_data(prometheus, url, points):
    prometheus.points = points
    checked = await verify(url, files.BOARDS, now_s=1000.0, window_s=60.0)
    assert not any(one.has_data for one in checked if one.board != "annotations")


async def test_one_number_in_the_window_is_data(prometheus, url):
    prometheus.points = [[1, "NaN"], [2, "3"]]
    checked = await verify(url, files.BOARDS, now_s=1000.0, window_s=60.0)
    assert all(one.has_data for one in checked)


async def test_the_smallest_and_the_largest_number_of_each_query_are_told(prometheus, url):
    prometheus.points = [[1, "NaN"], [2, "3"], [3, "-1.5"], [4, "2"]]
    checked = await verify(url, files.BOARDS, now_s=1000.0, window_s=60.0)
    # Others are asked for now alone.
    assert {(one.least, one.most) for one in checked} == {(-1.5, 3.0), (2.0, 2.0)}
    prometheus.points = []
    checked = await verify(url, files.BOARDS, now_s=1000.0, window_s=60.0)
    assert {(one.least, one.most) for one in checked} == {(None, None)}


async def test_events_need_no_data_but_must_be_understood(prometheus, url):
    prometheus.special["delta("] = empty()
    checked = await verify(url, files.BOARDS, now_s=1000.0, window_s=60.0)
    assert all(one.has_data for one in checked)
    prometheus.special["delta("] = 400, {"status": "error", "error": "parse error"}
    checked = await verify(url, files.BOARDS, now_s=1000.0, window_s=60.0)
    assert [one.panel for one in checked if one.problem] == ["Scale"]


async def test_something_else_at_the_url_is_said():
    async def page(request):
        return web.Response(text="<html></html>", content_type="text/html")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", page)
    async with TestServer(app, host="127.0.0.1") as server:
        with pytest.raises(PrometheusError, match="is not Prometheus"):
            await verify(str(server.make_url("/")), files.BOARDS, 1000.0, 60.0)


async def run_command(*words):
    return await asyncio.to_thread(run, ["dashboards", *words])


async def test_the_command_lists_the_panels_without_data_and_fails(prometheus, url, capsys):
    prometheus.special["pdcluster_worker_rss_bytes"] = empty()
    assert await run_command("verify", "--prometheus", url) == 1
    said = capsys.readouterr()
    assert "Scaling and events: Does a worker's memory grow?" in said.out
    assert said.out.count("no data") == 1
    assert "1 of" in said.err


@pytest.mark.parametrize(
    "allowed", ["Does a worker's memory grow?", "pdcluster / Scaling and events"]
)
async def test_what_may_be_empty_is_not_listed(prometheus, url, capsys, allowed):
    prometheus.special["pdcluster_worker_rss_bytes"] = empty()
    assert await run_command("verify", "--prometheus", url, "--allow-empty", allowed) == 0
    assert "no data" not in capsys.readouterr().out


async def test_a_refused_query_fails_even_where_no_data_is_fine(prometheus, url, capsys):
    prometheus.special["spec_decode"] = 400, {"status": "error", "error": "bad_data: parse error"}
    words = ("verify", "--prometheus", url, "--allow-empty", "speculation")
    assert await run_command(*words) == 1
    assert "bad_data: parse error" in capsys.readouterr().out


async def test_a_misspelt_allowance_is_refused(url, capsys):
    assert await run_command("verify", "--prometheus", url, "--allow-empty", "speculaton") == 2
    assert "found speculaton" in capsys.readouterr().err


async def test_json_has_every_query(prometheus, url, capsys):
    prometheus.special["pdcluster_worker_rss_bytes"] = empty()
    assert await run_command("verify", "--prometheus", url, "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["failed"] == 1
    assert sum(not query["has_data"] for query in said["queries"]) == 1


def test_build_writes_all_and_then_has_nothing_to_change(tmp_path, capsys):
    assert run(["dashboards", "build", str(tmp_path), "--json"]) == 0
    changed = json.loads(capsys.readouterr().out)["changed"]
    assert set(changed) == set(files.generated())
    assert {"overview.json", "compose.yaml", "prometheus/alerts.yml"} <= set(changed)
    assert run(["dashboards", "build", str(tmp_path), "--check"]) == 0
    assert "nothing to change" in capsys.readouterr().out


def test_check_names_what_differs_and_writes_nothing(tmp_path, capsys):
    assert run(["dashboards", "build", str(tmp_path)]) == 0
    board = tmp_path / "overview.json"
    board.write_text(board.read_text().replace("Overview", "Overwiew"))
    (tmp_path / "scaling.json").unlink()
    before = board.read_text()
    capsys.readouterr()
    assert run(["dashboards", "build", str(tmp_path), "--check"]) == 1
    said = capsys.readouterr()
    assert said.out.count("would change") == 2
    assert "overview.json" in said.out
    assert "run `pdcluster dashboards build" in said.err
    assert board.read_text() == before
    assert not (tmp_path / "scaling.json").exists()
