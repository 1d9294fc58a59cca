"""The page on the control port in headless Chromium, over a made-up cluster: what it shows, and how
it behaves when it is refused, lost, small or dark. A real one: control/test_page_changes.py."""

from __future__ import annotations

import asyncio
import time

import pytest
from chromium import EXECUTABLE, Chromium
from ports import free_port
from served_api import InPlaceOf, Served
from watched_cluster import POOLS, Clock, WatchedCluster

from cluster.control.changes import ChangeRole, DrainWorker, Scale
from cluster.control.past import Past
from cluster.control.points import Columns
from cluster.identity import Role

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(EXECUTABLE is None, reason="needs Debian's chromium"),
]
TOKEN = "pdctl-a-token"
PANELS = ("ttft", "tpot", "tokens", "requests", "accepted", "bytes", "held", "replicas")


@pytest.fixture(scope="module")
def served():
    in_place = InPlaceOf()
    found = Served(in_place, free_port(), TOKEN)
    found.in_place = in_place
    in_place.controller = WatchedCluster()
    found.wait_until(lambda: not found.server.problem)
    yield found
    found.end()


@pytest.fixture
def cluster(served):
    """Its time passes when a test says so."""
    found = WatchedCluster(clock=Clock(time.time() - 300))
    found.pass_time(300)
    served.in_place.controller = found

    def pass_time(seconds):
        async def go():
            WatchedCluster.pass_time(found, seconds)

        asyncio.run_coroutine_threadsafe(go(), served.loop).result(10)

    found.pass_time = pass_time
    return found


@pytest.fixture(scope="module")
def chromium():
    with Chromium() as browser:
        yield browser


@pytest.fixture
def browser(chromium, served, cluster):
    """At the page, with the token, as a desktop in daylight."""
    chromium.resize(1280, 900)
    chromium.prefer("light")
    url = f"http://127.0.0.1:{served.server._port}/"
    chromium.open(url)
    chromium.js("sessionStorage.clear()")
    chromium.open(url)
    chromium.problems.clear()
    return chromium


@pytest.fixture
def page(browser):
    enter(browser)
    yield browser
    assert browser.problems == []


def enter(browser, token=TOKEN):
    browser.wait_for("document.activeElement.id === 'token'")
    browser.type(token)
    browser.press("Enter")
    if token == TOKEN:
        browser.wait_for("document.querySelectorAll('.worker').length === 12")


def count(browser, selector):
    return browser.js(f"document.querySelectorAll({selector!r}).length")


def test_it_shows_figures_charts_the_cluster_as_a_picture_and_events(page, cluster):
    assert page.text("#cluster-name") == "rack-1"
    assert page.text("#tile-ready .big") == "12/12"
    assert count(page, ".island") == 2
    assert count(page, ".pool") == len(POOLS)
    assert count(page, ".link.is-moving") == 2
    assert "MiB/s" in page.text(".link-bytes")
    assert page.text("[data-pool=decode-atlas] output") == "4/4"
    for panel in PANELS:
        assert count(page, f"#chart-{panel}:not(.empty) canvas") == 1
        assert page.js(f"/\\d/.test(document.querySelector('#chart-{panel} b').textContent)")
    asyncio.run(cluster.ask(Scale("decode-h200", 2), "ada", "quiet hours"))
    page.wait_for("document.querySelector('#events').textContent.includes('quiet hours')")


def test_without_prometheus_the_charts_are_the_clusters_own_and_say_why(page):
    page.wait_for("document.querySelector('#source').textContent.includes('own samples')")
    assert "http://127.0.0.1:9090 does not answer" in page.text("#source")
    assert count(page, "[data-past]:disabled") == 3
    page.js("document.querySelector('#charts-title').focus()")
    page.press("4")
    assert page.js("document.querySelector('[data-span][aria-pressed=true]').dataset.span") == "300"


def test_with_prometheus_the_charts_are_its_and_go_on_with_the_clusters_own(page, cluster):
    now_s = cluster.clock.wall_s()
    # Of a time before the cluster's own samples, of which nobody else can know.
    at_s = tuple(now_s - 3600 + 15 * number for number in range(200))
    columns = Columns(at_s, {"traffic.ttft_p50_s": (123.0,) * 200})
    cluster.remembered = Past("prometheus", "", 3600.0, 15.0, columns)
    page.press("1")
    page.wait_for("document.querySelector('#source').textContent.startsWith('From Prometheus')")
    assert count(page, "[data-past]:disabled") == 0
    assert "123" not in page.text("#chart-ttft")
    page.press("4")
    page.wait_for(
        "document.querySelector('[data-span][aria-pressed=true]').dataset.span === '3600'"
    )
    page.hover("#chart-ttft .u-over", 0.25)
    page.wait_for("document.querySelector('#chart-ttft b').textContent === '123 s'")
    # What it had not, and what came later, is the cluster's own.
    page.hover("#charts-title")
    page.wait_for("document.querySelector('#chart-ttft b').textContent !== '123 s'")
    assert page.js("/\\d/.test(document.querySelector('#chart-tokens b').textContent)")
    before = page.js("document.querySelector('#chart-ttft canvas').toDataURL()")
    cluster.pass_time(20)
    page.wait_for(f"document.querySelector('#chart-ttft canvas').toDataURL() !== {before!r}")


def test_prometheus_is_asked_again_once_a_refused_token_was_entered_anew(page, cluster):
    page.js(
        "window.stock = fetch; window.fetch = (path, more) => path.startsWith('v1/past') ?"
        " Promise.resolve(new Response('{}', {status: 401})) : stock(path, more); 0"
    )
    page.press("2")
    page.wait_for("!document.querySelector('#door').hidden")
    page.js("window.fetch = stock; 0")
    now_s = cluster.clock.wall_s()
    columns = Columns((now_s - 10, now_s - 5), {"traffic.ttft_p50_s": (0.1, 0.2)})
    cluster.remembered = Past("prometheus", "", 300.0, 5.0, columns)
    enter(page)
    page.wait_for("document.querySelector('#source').textContent.startsWith('From Prometheus')")


def test_charts_are_drawn_and_move_on(page, cluster):
    inked = "document.querySelector('#chart-ttft canvas').toDataURL()"
    before = page.js(inked)
    cluster.pass_time(20)
    page.wait_for(f"{inked} !== {before!r}")


def test_numbers_follow_the_cluster(page, cluster):
    before = page.text("#tile-requests .big")
    cluster.rate = 4.0
    cluster.pass_time(20)
    page.wait_for(f"document.querySelector('#tile-requests .big').textContent !== {before!r}")


def test_a_wrong_token_is_asked_for_again_and_not_kept(browser):
    enter(browser, "wrong")
    browser.wait_for("document.querySelector('#door-problem').textContent.includes('token')")
    assert browser.js("sessionStorage.length") == 0
    assert count(browser, ".worker") == 0
    # A refused request is in the browser's own log.
    assert all("401" in problem for problem in browser.problems)
    enter(browser)


def test_the_token_is_in_no_address_and_survives_a_reload_of_the_tab_only(page):
    addresses = page.js("performance.getEntriesByType('resource').map((one) => one.name).join()")
    assert "/v1/live" in addresses
    assert TOKEN not in addresses + page.js("location.href + document.cookie")
    page.reload()
    page.wait_for("document.querySelectorAll('.worker').length === 12")
    page.leaving("document.querySelector('#forget').click()")
    page.wait_for("!document.querySelector('#door').hidden")
    assert page.js("sessionStorage.length + localStorage.length") == 0


def test_it_loads_nothing_from_elsewhere(page):
    origins = page.js(
        "[...new Set(performance.getEntriesByType('resource')"
        ".map((one) => new URL(one.name).origin))]"
    )
    assert origins == [page.js("location.origin")]


def test_a_pool_is_scaled_after_a_confirmation_and_the_change_is_followed(page, cluster):
    page.click("[data-pool=decode-h200] .steps button:last-child")
    page.wait_for("document.querySelector('#ask').open")
    assert page.text("#ask-go") == "Scale from 3 to 4"
    assert cluster.asked == []
    page.js("document.querySelector('#ask-why').focus()")
    page.type("a busy hour")
    page.click("#ask-go")
    page.wait_for("document.querySelector('.change.is-running')")
    assert cluster.asked == [Scale("decode-h200", 4, 60.0)]
    page.wait_for("document.querySelector('[data-pool=decode-h200] output').textContent === '3/4'")
    cluster.pass_time(10)
    page.wait_for("document.querySelector('.change.is-done')")
    page.wait_for("document.querySelector('[data-pool=decode-h200] output').textContent === '4/4'")
    page.wait_for("document.querySelectorAll('.worker').length === 13")


def test_nothing_is_asked_if_it_is_not_confirmed(page, cluster):
    page.click("[data-pool=decode-h200] .steps button:first-child")
    page.wait_for("document.querySelector('#ask').open")
    page.press("Escape")
    page.wait_for("!document.querySelector('#ask').open")
    assert cluster.asked == []


def test_what_the_controller_refuses_is_said_where_it_was_asked(page, cluster):
    cluster.refuses = "pool decode-h200: replicas: found 99; at most 64"
    page.click("[data-pool=decode-h200] .steps button:last-child")
    page.wait_for("document.querySelector('#ask').open")
    page.click("#ask-go")
    page.wait_for("document.querySelector('#ask-problem').textContent.includes('at most 64')")
    assert page.js("document.querySelector('#ask').open")
    assert any("400" in problem for problem in page.problems)
    page.problems.clear()


def test_a_workers_role_is_changed_and_a_worker_drained_from_its_card(page, cluster):
    page.click("[data-worker='decode-h200/1']")
    page.wait_for("document.querySelector('#worker').open")
    assert "decode-h200/1" in page.text("#worker-title")
    page.click("#worker-role")
    page.wait_for("document.querySelector('#ask').open")
    page.click("#ask-restart")
    page.click("#ask-go")
    page.wait_for("document.querySelector('.change.is-running')")
    assert cluster.asked == [ChangeRole("decode-h200/1", Role.PREFILL, 60.0, may_restart=True)]
    cluster.pass_time(10)
    page.wait_for("document.querySelector(\"[data-worker='decode-h200/1'].prefill.is-ready\")")
    page.click("[data-worker='prefill-atlas/0']")
    page.wait_for("document.querySelector('#worker').open")
    page.click("#worker-drain")
    page.wait_for("document.querySelector('#ask').open")
    page.click("#ask-go")
    page.wait_for("!document.querySelector('#ask').open")
    cluster.pass_time(2)
    page.wait_for("document.querySelector(\"[data-worker='prefill-atlas/0'].is-draining\")")
    assert cluster.asked[1:] == [DrainWorker("prefill-atlas/0", 60.0)]


def test_it_can_be_used_with_the_keyboard_alone(page, cluster):
    page.js("document.activeElement.blur()")
    page.press("c")
    first = page.wait_for("document.activeElement.closest('.worker')?.dataset.worker")
    page.press("ArrowRight")
    second = page.js("document.activeElement.dataset.worker")
    assert (first, second) == ("prefill-h200/0", "prefill-h200/1")
    ring = "getComputedStyle(document.activeElement.querySelector('.frame')).strokeWidth"
    assert page.js(ring) == "3.5px"
    page.press("Enter")
    page.wait_for("document.querySelector('#worker').open")
    page.press("Escape")
    page.press("p")
    assert "prefill-h200" in page.js("document.activeElement.getAttribute('aria-label')")
    page.press("Enter")
    page.wait_for("document.querySelector('#ask').open")
    page.press("Enter")
    page.wait_for("document.querySelector('.change')")
    assert cluster.asked == [Scale("prefill-h200", 1, 60.0)]
    page.press("?", shift=True)
    page.wait_for("document.querySelector('#keys').open")
    page.press("Escape")
    page.press("3")
    assert (
        page.js("document.querySelector('[data-span=\"900\"]').getAttribute('aria-pressed')")
        == "true"
    )


def test_every_stop_of_the_tab_key_is_seen_and_named(page):
    page.js("document.activeElement.blur(); scrollTo(0, 0)")
    seen = []
    for _ in range(40):
        page.press("Tab")
        name, outline, is_worker = page.js(
            "(() => { const e = document.activeElement; const s = getComputedStyle(e);"
            "return [e.getAttribute('aria-label') || e.textContent.trim(), s.outlineStyle,"
            "Boolean(e.closest('.worker'))] })()"
        )
        if page.js("document.activeElement === document.body"):
            break
        seen.append(name)
        assert name
        assert outline != "none" or is_worker  # a worker's frame is its own
    # One stop for all workers.
    assert sum("running" in name for name in seen) == 1
    assert "More replicas of decode-atlas" in seen


def test_pause_stops_asking_and_going_on_shows_the_present(page, cluster):
    page.js("document.activeElement.blur()")
    page.press(" ")
    page.wait_for("document.querySelector('#pulse').dataset.state === 'paused'")
    time.sleep(1.5)
    asked = page.js("performance.getEntriesByType('resource').length")
    cluster.pass_time(4)
    time.sleep(1.5)
    assert page.js("performance.getEntriesByType('resource').length") == asked
    page.press(" ")
    page.wait_for("document.querySelector('#pulse').dataset.state === 'live'")
    page.wait_for(f"performance.getEntriesByType('resource').length > {asked}")


@pytest.mark.parametrize("width", [360, 768, 1280, 1680])
def test_no_width_scrolls_sideways_or_cuts_a_pools_name(page, width):
    page.resize(width, 800, is_phone=width < 700)
    page.wait_for(f"document.querySelector('.cluster').getBoundingClientRect().width < {width}")
    page.wait_for("document.documentElement.scrollWidth <= innerWidth")
    sticking_out = page.js(
        "[...document.querySelectorAll('main *')].filter((e) => !e.closest('.uplot, dialog')"
        " && e.getBoundingClientRect().right > innerWidth + 0.5)"
        ".map((e) => e.outerHTML.slice(0, 90))"
    )
    assert sticking_out == []
    overlaps = page.js(
        "[...document.querySelectorAll('.pool')].filter((pool) => {"
        "const [a, b] = ['.pool-name', '.pool-count'].map((s) => pool.querySelector(s)"
        ".getBoundingClientRect()); return a.right > b.left }).length"
    )
    assert overlaps == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_by_day_and_by_night(page, scheme):
    """WCAG's contrast: 4.5 for text."""
    page.prefer(scheme)
    ground = page.js("getComputedStyle(document.body).backgroundColor")
    assert (brightness(ground) < 0.2) == (scheme == "dark")
    card = page.js("getComputedStyle(document.querySelector('.tile')).backgroundColor")
    for selector in (".tile .big", ".tile .small", ".facts", ".badge.prefill", ".badge.decode"):
        text = page.js(f"getComputedStyle(document.querySelector({selector!r})).color")
        assert contrast(text, card) >= 4.5, (selector, text, card)
    button = page.js(
        "(() => { const s = getComputedStyle(document.querySelector('#ask-go'));"
        "return [s.color, s.backgroundColor] })()"
    )
    assert contrast(*button) >= 4.5


def test_a_controller_that_does_not_answer_is_said_and_found_again(page, served, monkeypatch):
    async def silent(since, events_after):
        raise OSError("no store")

    cluster = served.in_place.controller
    monkeypatch.setattr(cluster, "live", silent)
    page.wait_for("document.querySelector('#pulse').dataset.state === 'silent'")
    assert "trying again" in page.text("#problem")
    monkeypatch.undo()
    page.wait_for("document.querySelector('#pulse').dataset.state === 'live'")
    assert page.js("document.querySelector('#problem').hidden")
    assert all("500" in problem for problem in page.problems)
    page.problems.clear()


def brightness(colour):
    """WCAG's relative luminance."""
    parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    low, high = sorted((brightness(one), brightness(other)))
    return (high + 0.05) / (low + 0.05)
