"""A real Prometheus beside a cluster of simulated engines: started, sent to its targets, ended."""

from __future__ import annotations

import shutil
import signal
import time
import urllib.error
import urllib.request

import psutil
import pytest
import yaml
from chromium import EXECUTABLE, Chromium
from live_prometheus import Prometheus
from ports import free_port
from processes import cmdline, environ

from cluster.settings import OWNER_ENV

pytestmark = [
    pytest.mark.integration,
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("prometheus") is None,
        reason="the program prometheus is not installed (Debian's package: prometheus)",
    ),
]

SEEN_WITHIN_S = 15.0


@pytest.fixture(scope="module")
def watched(home):
    def edit(serving):
        for pool in serving["pools"]:
            pool["placement"] = {"resources": {"CPU": 0.3}}
        serving["gateway"]["replicas"] = 2
        serving["observability"] = {"prometheus": {"port": free_port()}}

    cluster = home.bring_up("it-metrics", edit)
    yield cluster
    home.run("down", "--cluster", cluster.name)


@pytest.fixture
def prometheus(watched):
    return Prometheus(watched.status()["prometheus"])


def of(job, targets):
    return [target for target in targets if target["job"] == f"pdcluster-{job}"]


def wait_until(is_so, within_s):
    deadline_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_every_engine_replica_and_the_controller_are_scraped_under_their_names(watched, prometheus):
    wait_until(lambda: len(prometheus.targets()) == 5, SEEN_WITHIN_S)
    wait_until(lambda: all(t["health"] == "up" for t in prometheus.targets()), SEEN_WITHIN_S)
    targets = prometheus.targets()
    labels = ("pool", "role", "worker", "node", "island", "model", "engine", "cluster")
    assert sorted(tuple(t[label] for label in labels) for t in of("engine", targets)) == [
        (role, role, f"{role}/0", "127.0.0.1", "simulated", "simulated", "simulated", "it-metrics")
        for role in ("decode", "prefill")
    ]
    # Two replicas share the endpoint's port; each is scraped at its own.
    gateways = of("gateway", targets)
    assert len({t["gateway"] for t in gateways}) == 2
    assert len({t["instance"] for t in gateways}) == 2
    assert len(of("controller", targets)) == 1
    assert watched.home.run("up", str(watched.topology)).stdout.count("nothing changed") == 1


def test_traffic_is_seen_in_gateways_engines_and_what_is_recorded_of_them(watched, prometheus):
    text = " ".join(f"word{n}" for n in range(60))
    for number in range(12):
        watched.home.run("chat", f"{text} {number}", "--max-tokens", "20")
    for percent in (50, 95, 99):
        # Of two pairs: decode holds the beginning of most chats, and takes them without prefill.
        found = prometheus.wait_for(f'pdcluster:ttft_seconds:p{percent}{{decode_pool="decode"}}')
        assert all(0 < value < 5 for _, value in found)
    assert prometheus.wait_for("sum(pdcluster_gateway_pair_requests_total) >= 12")
    (acceptance,) = prometheus.wait_for("pdcluster:engine_acceptance_length:rate5m")
    assert acceptance[0]["pool"] == "decode"
    assert 1 < acceptance[1] <= 5
    positions = prometheus.wait_for("pdcluster:engine_accepted_per_pos:rate5m")
    shares = [share for _, share in sorted(positions, key=lambda found: found[0]["position"])]
    assert len(shares) == 4
    assert 1 >= shares[0] >= shares[-1] >= 0
    for series in (
        *("running", "waiting", "kv_usage_ratio"),
        *("prompt_tokens:rate1m", "generation_tokens:rate1m"),
        *("ttft_seconds_bucket:rate5m", "itl_seconds_bucket:rate5m"),
    ):
        found = prometheus.wait_for(f"pdcluster:engine_{series}")
        assert {labels["worker"] for labels, _ in found} <= {"prefill/0", "decode/0"}
    pulled = prometheus.wait_for('pdcluster_worker_kv_bytes_pulled_total{pool="decode"} > 0')
    assert pulled[0][0]["worker"] == "decode/0"
    assert not prometheus.query('ALERTS{alertstate="firing"}')


def test_a_worker_that_comes_and_one_that_changes_its_role_appear_within_15_s(watched, prometheus):
    def roles():
        return {t["worker"]: t["role"] for t in of("engine", prometheus.targets())}

    watched.home.run("scale", "decode", "2")
    wait_until(lambda: "decode/1" in roles(), SEEN_WITHIN_S)
    wait_until(lambda: prometheus.query('up{worker="decode/1"} == 1'), SEEN_WITHIN_S)
    watched.home.run("role", "decode/1", "prefill")
    wait_until(lambda: roles()["decode/1"] == "prefill", SEEN_WITHIN_S)
    ready = 'sum by (role) (pdcluster_pool_replicas_ready{pool="decode"})'
    wait_until(
        lambda: {s["role"]: v for s, v in prometheus.query(ready)} == {"decode": 1, "prefill": 1},
        SEEN_WITHIN_S,
    )


@pytest.mark.skipif(EXECUTABLE is None, reason="needs Debian's chromium")
def test_the_page_draws_from_it_what_was_before_the_controller_was_killed(watched, prometheus):
    (controller,) = watched.home.actor(watched.name, "ControllerActor")
    before_s = watched.status()["controller_up_for_s"]
    controller.kill()
    controller.wait(10)
    watched.wait_for(lambda status: status["controller_up_for_s"] < before_s)
    with Chromium() as browser:
        watched.open_page(browser)
        browser.wait_for("document.querySelector('#source').textContent.startsWith('From Prom')")
        # Nobody has asked for anything since: this controller knows of no first token.
        for chart in ("ttft", "tpot", "accepted", "held", "bytes", "tokens", "replicas"):
            assert not browser.js(f"document.querySelector('#chart-{chart}.empty')"), chart
        browser.press("4")
        browser.wait_for("document.querySelector('[data-span=\"3600\"]').ariaPressed === 'true'")
        browser.wait_for("!document.querySelector('#chart-ttft.empty')")
        assert browser.problems == []


def test_the_control_token_is_shown_nowhere_and_goes_to_no_engine(watched, prometheus):
    state = watched.home.state(watched.name)
    token = (state / "control-token").read_text().strip()
    kept = state / "prometheus" / "control-token"
    assert kept.stat().st_mode & 0o077 == 0
    config = (state / "prometheus" / "prometheus.yml").read_text()
    assert token not in config
    with_token = [
        job["job_name"]
        for job in yaml.safe_load(config)["scrape_configs"]
        if "authorization" in job
    ]
    assert with_token == ["pdcluster-controller"]
    for process in watched.home.processes(watched.name):
        assert token not in cmdline(process)


def test_up_starts_a_prometheus_again_that_was_killed(watched, prometheus):
    ours = [
        process
        for process in watched.home.processes(watched.name)
        if environ(process).get(OWNER_ENV) == f"{watched.name}/prometheus"
    ]
    (engine,) = [process for process in ours if process.name() == "prometheus"]
    engine.send_signal(signal.SIGKILL)
    psutil.wait_procs(ours, 10)  # its supervisor ends with it
    assert "nothing changed" in watched.home.run("up", str(watched.topology)).stdout
    assert Prometheus(watched.status()["prometheus"]).query("vector(1)")


def test_down_ends_it_and_leaves_nothing_of_it(watched, prometheus):
    url = prometheus.url
    watched.home.run("down", "--cluster", watched.name)
    assert watched.home.leftovers(watched.name) == []
    assert not (watched.home.state(watched.name) / "prometheus").exists()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=2)


def test_up_goes_on_where_prometheus_cannot_be_started(home):
    def edit(serving):
        for pool in serving["pools"]:
            pool["placement"] = {"resources": {"CPU": 0.3}}
        serving["observability"] = {"prometheus": {"port": serving["control"]["port"]}}

    cluster = home.bring_up("it-no-metrics", edit)
    try:
        assert "cannot listen on 127.0.0.1" in cluster.up.stderr
        assert "observability.prometheus.port" in cluster.up.stderr
        assert cluster.status()["prometheus"] is None
        assert cluster.ask()["text"]
        assert not any(p.name() == "prometheus" for p in home.processes(cluster.name))
    finally:
        home.run("down", "--cluster", cluster.name)
