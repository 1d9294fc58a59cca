"""GET /v1/live, and the page's files: who gets what, and under which policy."""

from __future__ import annotations

import hashlib
import re
import tomllib

import pytest
from fastapi.testclient import TestClient
from watched_cluster import WatchedCluster

from cluster.control import wire
from cluster.control.api import Bearer, create_app
from cluster.control.api_page import FOLDER, files

TOKEN = "pdctl-a-token"
TEXTS = {path: path.read_text() for path in FOLDER.rglob("*") if path.is_file()}
OWN = {path: text for path, text in TEXTS.items() if "vendor" not in path.parts}


@pytest.fixture(scope="module")
def cluster():
    found = WatchedCluster()
    found.pass_time(20)
    return found


@pytest.fixture(scope="module")
def http(cluster):
    return TestClient(create_app(cluster, Bearer(TOKEN)))


def with_token(token=TOKEN):
    return {"authorization": f"Bearer {token}"}


def test_live_needs_the_token(http):
    assert http.get("/v1/live").status_code == 401
    assert http.get("/v1/live", headers=with_token("wrong")).status_code == 401
    assert http.get("/v1/live", headers=with_token()).status_code == 200


def test_live_tells_what_is_new_after_a_number(http, cluster):
    first = wire.read_looked(http.get("/v1/live", headers=with_token()).content).live
    asked = {"since": first.seq, "events_after": 0}
    again = wire.read_looked(http.get("/v1/live", params=asked, headers=with_token()).content).live
    assert (len(first.columns.at_s), again.columns.at_s) == (10, ())
    assert first.seq == again.seq == cluster.recent.seq


@pytest.mark.parametrize("query", ["since=-1", "since=x", "events_after=-1"])
def test_live_says_what_is_wrong_with_a_question(http, query):
    answer = http.get(f"/v1/live?{query}", headers=with_token())
    assert answer.status_code == 400
    assert query.partition("=")[0] in answer.json()["error"]["message"]


def test_the_page_loads_without_a_token_and_tells_nothing_of_the_cluster(http, cluster):
    for path, file in files().items():
        answer = http.get(path)
        assert answer.status_code == 200
        assert answer.content == file.content
        for secret in (TOKEN, "rack-1", "decode-h200"):
            assert secret not in answer.text


def test_nothing_else_of_its_folder_is_served(http):
    for path in ("/ui/", "/ui", "/ui/index.html", "/ui/vendor/README.md", "/ui/../api.py"):
        assert http.get(path).status_code == 401
    assert http.post("/").status_code == 401


@pytest.mark.parametrize("path", sorted(files()))
def test_the_page_may_load_and_reach_nothing_but_this_port(http, path):
    headers = http.get(path).headers
    policy = dict(
        part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";")
    )
    assert policy.pop("default-src") == "'none'"
    assert set(policy.values()) <= {"'self'", "'none'"}
    for name in ("base-uri", "form-action", "frame-ancestors"):
        assert policy[name] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_a_browser_that_has_a_file_is_told_that_it_is_the_same(http):
    first = http.get("/ui/app.js")
    again = http.get("/ui/app.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert first.headers["cache-control"] == "no-cache"


def test_a_head_is_a_get_without_a_body(http):
    answer = http.head("/")
    assert (answer.status_code, answer.content) == (200, b"")
    assert int(answer.headers["content-length"]) == len(http.get("/").content)


@pytest.mark.parametrize("path", sorted(OWN), ids=lambda path: path.name)
def test_what_the_page_is_made_of_names_no_other_host(path):
    for found in re.findall(r"https?://[^\s\"'<>)`]+", OWN[path]):
        assert found == "http://www.w3.org/2000/svg" or path.suffix == ".md"


def test_whatever_the_page_loads_is_served():
    served = files()
    for path, text in OWN.items():
        if path.suffix == ".html":
            loads = re.findall(r"(?:src|href)=\"(?!#)([^\"]+)\"", text)
            assert loads
            assert all(f"/{name}" in served for name in loads), loads
        if path.suffix == ".js":
            for name in re.findall(r"from \"\./([^\"]+)\"", text):
                assert f"/ui/{name}" in served, (path.name, name)


def test_the_page_asks_for_paths_that_the_api_has(http):
    document = http.get("/openapi.json", headers=with_token()).json()
    known = [re.sub(r"\{[^}]+\}", "X", path) for path in document["paths"]]
    script = TEXTS[FOLDER / "controls.js"]
    asked = re.findall(r"`(v1/[^`]+)`", script)
    assert len(asked) == 2
    for path in asked:
        plain = path.replace("${worker.name}", "X/X").replace("${kind}", "drain")
        assert "/" + re.sub(r"\$\{[^}]+\}", "X", plain) in known, path


def test_the_page_draws_columns_that_there_are(http):
    columns = http.get("/v1/live", headers=with_token()).json()["live"]["columns"]["series"]
    asked = set()
    for name in ("charts.js", "lists.js"):
        asked |= set(re.findall(r"\"((?:traffic|gateways|engines)\.\w+)\"", TEXTS[FOLDER / name]))
    # These two are drawn as their percentiles.
    asked = {f"{name}_p99_s" if name.endswith(("ttft", "tpot")) else name for name in asked}
    assert len(asked) > 15
    assert asked <= columns.keys()
    fields = set(re.findall(r"perPool\(\"(\w+)\"\)", TEXTS[FOLDER / "charts.js"]))
    fields |= set(re.findall(r"last\(\"(\w+)\"\)", TEXTS[FOLDER / "lists.js"]))
    assert len(fields) > 4
    assert {f"pool.decode-h200.{field}" for field in fields} <= columns.keys()


def test_the_charting_library_is_the_one_that_is_noted_with_its_licence():
    folder = FOLDER / "vendor" / "uplot"
    note = (FOLDER / "vendor" / "README.md").read_text()
    version = re.search(r"uPlot \(v([\d.]+)\)", (folder / "uPlot.iife.min.js").read_text())
    assert version is not None
    assert f"| {version[1]} | MIT" in note
    assert f"uplot-{version[1]}.tgz" in note
    assert "Permission is hereby granted" in (folder / "LICENSE").read_text()
    for name in ("uPlot.iife.min.js", "uPlot.min.css"):
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() in note


def test_an_installed_package_has_the_page():
    root = FOLDER.parents[2]
    data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    assert "control/page/**/*" in data["cluster"]
