"""What the page draws of a longer time: what Prometheus is asked, what is made of its answer."""

from __future__ import annotations

import asyncio
import math
import re

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from fastapi.testclient import TestClient
from ports import free_port
from watched_cluster import WatchedCluster

from cluster.control.api import Bearer, create_app
from cluster.control.past import QUERIES, address, look, step_s
from cluster.control.points import Columns
from cluster.topology.observability import PrometheusSpec

NOW_S = 1_790_000_003.0
EVERY_S = 5
LAST_S = 1_790_000_000


class Prometheus:
    """Has `series` for a query that contains their key, labels and values by moment."""

    def __init__(self):
        self.asked = []
        self.series = {}
        self.status, self.said = 200, None

    def app(self):
        app = web.Application()
        app.router.add_post("/api/v1/query_range", self._query)
        return app

    async def _query(self, request):
        asked = dict(await request.post())
        self.asked.append(asked)
        if self.said is not None:
            return web.json_response(self.said, status=self.status)
        found = [
            {"metric": labels, "values": [[at_s, str(value)] for at_s, value in points.items()]}
            for part, several in self.series.items()
            if part in asked["query"]
            for labels, points in several
        ]
        return web.json_response({"status": "success", "data": {"result": found}})


@pytest.fixture
def prometheus():
    return Prometheus()


@pytest.fixture
async def spec(prometheus):
    async with TestServer(prometheus.app(), host="127.0.0.1") as server:
        yield PrometheusSpec(mode="auto", port=server.port)


async def test_columns_stand_on_one_grid_under_the_names_that_live_has(prometheus, spec):
    prometheus.series = {
        "pdcluster_worker_kv_bytes_pulled_total": [
            ({"pool": "a"}, {LAST_S - 10: 1.0, LAST_S - 5: 2.0}),
            ({"pool": "b"}, {LAST_S - 5: 7.0, LAST_S: math.inf}),
        ],
        "histogram_quantile(0.5, sum by (le) (rate(pdcluster_gateway_ttft": [
            ({}, {LAST_S - 10: math.nan, LAST_S - 5: 0.123456})
        ],
    }
    past = await look("c", spec, 60.0, NOW_S)
    assert (past.source, past.why, past.step_s) == ("prometheus", "", EVERY_S)
    assert past.columns == Columns(
        # From the first number to the last: what the newest moments lack, others have.
        (LAST_S - 10, LAST_S - 5),
        {
            "traffic.ttft_p50_s": (None, 0.1235),
            "pool.a.bytes_per_s": (1.0, 2.0),
            "pool.b.bytes_per_s": (None, 7.0),
        },
    )


async def test_every_query_is_of_this_cluster_and_of_moments_that_stay_the_same(prometheus, spec):
    await look("c", spec, 60.0, NOW_S)
    await look("c", spec, 60.0, NOW_S + 1)
    assert len(prometheus.asked) == 2 * len(QUERIES)
    for asked in prometheus.asked:
        assert 'cluster=~"c"' in asked["query"]
        assert "$" not in asked["query"]
        assert asked["step"] == "5.000"
        assert (asked["start"], asked["end"]) == (f"{LAST_S - 60}.000", f"{LAST_S}.000")


async def test_no_moment_between_two_of_a_long_span_is_left_out(prometheus, spec):
    await look("c", spec, 86_400.0, NOW_S)
    assert {asked["step"] for asked in prometheus.asked} == {"360.000"}
    for asked in prometheus.asked:
        assert "[360s" in asked["query"]
    ready = [a["query"] for a in prometheus.asked if "replicas_ready" in a["query"]]
    assert ready == [
        'min_over_time((sum by (role) (pdcluster_pool_replicas_ready{cluster=~"c"}))[360s:30s])'
    ]


async def test_anothers_prometheus_may_scrape_seldom(prometheus, spec):
    for mode, windows in (("auto", {"15s", "30s"}), ("external", {"60s"})):
        prometheus.asked.clear()
        url = f"http://127.0.0.1:{spec.port}" if mode == "external" else None
        await look("c", spec.model_copy(update={"mode": mode, "url": url}), 60.0, NOW_S)
        asked = " ".join(asked["query"] for asked in prometheus.asked)
        assert set(re.findall(r"\[(\d+s)\]", asked)) == windows


@pytest.mark.parametrize(
    ("span_s", "every_s"), [(60, 5), (900, 5), (1200, 5), (1201, 10), (3600, 15), (86_400, 360)]
)
def test_a_span_has_whole_scrapes_and_no_more_moments_than_a_chart_shows(span_s, every_s):
    assert step_s(span_s) == every_s


async def test_who_does_not_answer_is_named_with_the_reason(prometheus, spec):
    nobody = PrometheusSpec(mode="auto", port=free_port())
    past = await look("c", nobody, 60.0, NOW_S)
    assert (past.source, past.columns) == ("", Columns())
    assert f"http://127.0.0.1:{nobody.port} does not answer" in past.why
    prometheus.status, prometheus.said = 404, {"anything": 1}
    assert "does not answer" in (await look("c", spec, 60.0, NOW_S)).why
    prometheus.status, prometheus.said = 400, {"status": "error", "error": "parse error"}
    assert "refuses what is asked: parse error" in (await look("c", spec, 60.0, NOW_S)).why


async def test_one_that_hangs_does_not_keep_the_page_waiting(monkeypatch):
    async def hang(request):
        await asyncio.Event().wait()

    monkeypatch.setattr("cluster.control.past._TIMEOUT_S", 0.2)
    app = web.Application()
    app.router.add_post("/api/v1/query_range", hang)
    async with TestServer(app, host="127.0.0.1") as server:
        spec = PrometheusSpec(mode="auto", port=server.port)
        past = await look("c", spec, 60.0, NOW_S)
        assert past.source == ""
        assert past.why


async def test_somebody_elses_prometheus_knows_nothing_of_this_cluster(spec):
    past = await look("c", spec, 60.0, NOW_S)
    assert (past.source, past.why) == (
        "",
        f"http://127.0.0.1:{spec.port} has nothing of cluster c",
    )


async def test_without_one_nobody_is_asked():
    off = PrometheusSpec(mode="off")
    assert "mode is off" in (await look("c", off, 60.0, NOW_S)).why
    assert "nothing is served" in (await look("c", None, 60.0, NOW_S)).why


def test_whom_to_ask_follows_from_the_file():
    assert address(PrometheusSpec()) == "http://127.0.0.1:9090"
    external = PrometheusSpec(mode="external", url="http://prometheus:9090/at/")
    assert address(external) == "http://prometheus:9090/at/"
    assert address(PrometheusSpec(mode="off")) == ""


def test_the_control_api_tells_it_behind_the_token():
    http = TestClient(create_app(WatchedCluster(), Bearer("t")))
    assert http.get("/v1/past?span_s=60").status_code == 401
    token = {"authorization": "Bearer t"}
    told = http.get("/v1/past?span_s=3600", headers=token).json()
    assert (told["source"], told["span_s"]) == ("", 3600.0)
    assert told["columns"] == {"at_s": [], "series": {}}
    for wrong in ("", "?span_s=59", "?span_s=1e9", "?span_s=nan"):
        answer = http.get(f"/v1/past{wrong}", headers=token)
        assert answer.status_code == 400
        assert "span_s" in answer.json()["error"]["message"]
