"""The page over a real cluster of simulated engines: a request moves its numbers, and what is asked
of it there is done."""

from __future__ import annotations

import pytest
from chromium import EXECUTABLE, Chromium
from streaming_clients import Clients

pytestmark = [
    pytest.mark.integration,
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(EXECUTABLE is None, reason="needs Debian's chromium"),
]


@pytest.fixture
def page(cluster):
    with Chromium() as browser:
        cluster.open_page(browser)
        browser.wait_for("document.querySelectorAll('.worker.is-ready').length === 2")
        yield browser
        assert browser.problems == []


def scale_decode(page, sign):
    page.click(f"[data-pool=decode] .steps button[aria-label^={sign}]")
    page.wait_for("document.querySelector('#ask').open")
    page.js("document.querySelector('#ask-grace').value = '5'")
    page.click("#ask-go")


def change_role(page, worker):
    page.click(f"[data-worker='{worker}']")
    page.wait_for("document.querySelector('#worker').open")
    page.click("#worker-role")
    page.wait_for("document.querySelector('#ask').open")
    page.click("#ask-go")


def test_requests_are_seen_and_a_scale_and_a_role_change_from_the_page_are_real(cluster, page):
    assert page.text("#cluster-name") == cluster.name
    key = (cluster.home.state(cluster.name) / "api-key").read_text().strip()
    status = cluster.status()
    prompts = [f"{n} " + " ".join(f"word{n}x{k}" for k in range(400)) for n in range(3)]
    with Clients(status["endpoint"], key, status["model"], prompts, 300) as clients:
        pass
    assert clients.faults() == []
    page.wait_for("/^[1-9]/.test(document.querySelector('#tile-bytes .big').textContent)")
    page.wait_for("/^[1-9].* m?s$/.test(document.querySelector('#tile-ttft .big').textContent)")
    page.wait_for("Number(document.querySelector('#tile-accepted .big').textContent) > 1")
    page.wait_for("!document.querySelector('#chart-ttft').classList.contains('empty')")

    scale_decode(page, "More")
    page.wait_for("document.querySelectorAll('.worker.decode.is-ready').length === 2", 60)
    ready = [w["name"] for w in cluster.status()["workers"] if w["state"] == "ready"]
    assert sorted(ready) == ["decode/0", "decode/1", "prefill/0"]

    change_role(page, "decode/1")
    page.wait_for("document.querySelector(\"[data-worker='decode/1'].prefill.is-ready\")", 60)
    assert cluster.worker("decode/1")["role"] == "prefill"
    page.wait_for("document.querySelector('#events [data-kind=RoleChanged]')")
    # A worker that is lent is not the one that ends.
    change_role(page, "decode/1")
    page.wait_for("document.querySelector(\"[data-worker='decode/1'].decode.is-ready\")", 60)

    scale_decode(page, "Fewer")
    page.wait_for("document.querySelectorAll('.worker').length === 2", 60)
    page.wait_for("document.querySelectorAll('.change.is-done').length >= 4", 60)
    changes = cluster.home.json("changes", "--cluster", cluster.name)
    assert [change["asked_by"] for change in changes][-4:] == ["page"] * 4
    cluster.wait_for(lambda status: len(status["workers"]) == 2)
