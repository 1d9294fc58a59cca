"""Rules as code: the files are current, Prometheus takes them, and they do what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.engines.base import MetricNames
from cluster.engines.registry import adapter
from cluster.observe import catalogue, rules, scraping
from cluster.observe import rules_recording as recording
from cluster.observe.rules_alerts import ALERTS

FOLDER = Path(__file__).resolve().parents[2] / "dashboards" / "prometheus"
RULES = (*recording.ENGINES, *recording.GATEWAYS)
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (Debian's package: prometheus)",
)


@pytest.mark.parametrize("name", rules.files())
def test_the_rule_files_are_current(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert text == rules.files()[name], "run pdcluster dashboards build"


def promtool(*args):
    done = subprocess.run(
        ["promtool", *args], cwd=FOLDER, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


@needs_promtool
def test_promtool_finds_no_fault_in_the_rules():
    code, said = promtool("check", "rules", *rules.files())
    assert code == 0, said


@needs_promtool
@pytest.mark.parametrize("name", [name.replace(".yml", "_test.yml") for name in rules.files()])
def test_the_rules_do_what_their_tests_say(name):
    code, said = promtool("test", "rules", name)
    assert code == 0, said


@needs_promtool
def test_promtool_finds_no_fault_in_the_configuration(tmp_path):
    for name, text in rules.files().items():
        (tmp_path / name).write_text(text)
    token = tmp_path / "token"
    token.write_text("t")
    config = tmp_path / "prometheus.yml"
    said = scraping.config("http://127.0.0.1:8001", str(token), list(rules.files()))
    config.write_text(yaml.safe_dump(said))
    code, output = promtool("check", "config", str(config))
    assert code == 0, output


def test_every_rule_is_tested():
    tested = "".join(path.read_text() for path in FOLDER.glob("*_test.yml"))
    untested = {rule.name for rule in RULES if rule.name not in tested}
    assert untested == {
        # As ttft_seconds and the rates of other series beside them.
        *(f"pdcluster:tpot_seconds:p{percent}" for percent in recording.QUANTILES),
        "pdcluster:ttft_seconds:p95",
        "pdcluster:engine_ttft_seconds_bucket:rate5m",
        "pdcluster:engine_itl_seconds_bucket:rate5m",
    }
    assert [alert.name for alert in ALERTS if alert.name not in tested] == []


def test_every_alert_has_a_runbook():
    for alert in ALERTS:
        assert min(map(len, (alert.summary, alert.means, alert.look_at, alert.do))) > 15, alert
        assert alert.severity in ("critical", "warning", "info")
    assert len({alert.name for alert in ALERTS}) == len(ALERTS)


def test_rules_name_only_series_that_somebody_exports():
    declared = {name for part in catalogue.PARTS for m in part.metrics for name in m.series}
    recorded = {rule.name for rule in RULES}
    named = {
        name
        for rule in (*RULES, *ALERTS)
        for name in re.findall(r"\bpdcluster[_:][a-z0-9_:]+", rule.expr)
    }
    assert named <= declared | recorded | {"pdcluster_"}


@pytest.mark.parametrize("name", ["vllm", "vllm_ascend", "sglang", "ktransformers", "xllm"])
def test_what_is_recorded_of_an_engine_is_what_its_adapter_reads(name):
    metrics: MetricNames = adapter(name).metrics
    for found, names in (
        (metrics.running, recording.RUNNING),
        (metrics.waiting, recording.WAITING),
        (metrics.kv_usage, recording.KV_USAGE),
        (metrics.prompt_tokens, recording.PROMPT_TOKENS),
        (metrics.generation_tokens, recording.GENERATION_TOKENS),
    ):
        assert found in (names.vllm, names.sglang, names.xllm)
    for found, expected in (
        (metrics.spec_drafts, recording.DRAFTS),
        (metrics.spec_accepted, recording.ACCEPTED),
        (metrics.spec_accepted_per_position, recording.ACCEPTED_PER_POSITION),
    ):
        assert found in ("", expected)


def test_the_control_token_goes_to_the_discovery_and_the_controller_alone():
    engines, controller = scraping.jobs("http://head:8001", "/token")
    assert "authorization" not in engines
    assert controller["authorization"] == {"type": "Bearer", "credentials_file": "/token"}
    for job in (engines, controller):
        (discovery,) = job["http_sd_configs"]
        assert discovery["url"] == "http://head:8001/v1/discovery/prometheus"
        assert discovery["authorization"] == controller["authorization"]
    kept = {job["job_name"]: job["relabel_configs"][0]["action"] for job in (engines, controller)}
    assert kept == {"pdcluster": "drop", "pdcluster-controller": "keep"}
