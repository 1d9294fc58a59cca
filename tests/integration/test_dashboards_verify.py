"""Every query of every board against a real Prometheus that scrapes what the catalogue declares."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time

import aiohttp
import pytest
import synthetic_exporter
import yaml
from aiohttp.test_utils import TestServer
from ports import free_port

from cluster.cli.main import run
from cluster.control.past import look
from cluster.observe import rules
from cluster.observe.dashboards import promql
from cluster.observe.dashboards.files import BOARDS
from cluster.observe.verify import values, verify
from cluster.topology.observability import PrometheusSpec

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow]

WINDOW_S = 60.0
# Rules are evaluated every 5 s, and a rate wants two samples of a recorded series' source.
BOUND_S = 60.0


@pytest.fixture
def program():
    found = shutil.which("prometheus")
    if found is None:
        pytest.skip("prometheus is not there (Debian: prometheus)")
    return found


# From the rates of synthetic_exporter.
EXPECTED = {
    "Is every wanted replica ready?": 1.0,
    "Are requests answered?": 0.5,
    "What share of prompts does decode hold already?": 0.5,
    "What share of blocks need not move?": 0.5,
    "Do transfers end well?": 0.5,
    "Which links lose transfers?": 0.5,
    "How many tokens does a decode step give?": 2.5,
    "What share of drafted tokens is right?": 0.5,
    "How many tokens does a draft propose?": 3.0,
    "What share of decode steps is saved?": 0.6,
    "At which position do drafts stop being right?": 0.8,
    "Which pool is the bottleneck?": 0.4,
    "How many replicas are missing?": 0.0,
}


# What the page draws of the same rates.
PAST = {
    **{
        f"traffic.{what}_p{percent}_s": None
        for what in ("ttft", "tpot")
        for percent in (50, 95, 99)
    },
    "engines.prompt_tokens_per_s": 200.0,
    "engines.generation_tokens_per_s": 200.0,
    "engines.waiting": 2.0,
    "gateways.running": 1.0,
    "gateways.queued": 1.0,
    "pool.decode.acceptance_length": 2.5,
    "pool.prefill.bytes_per_s": 10.0,
    "pool.decode.bytes_per_s": 10.0,
    "pool.prefill.held_share": 0.5,
    "pool.decode.held_share": 0.5,
    "role.prefill.ready": 1.0,
    "role.decode.ready": 1.0,
    "role.prefill.desired": 1.0,
    "role.decode.desired": 1.0,
}


class Scraped:
    """A Prometheus that scrapes `address`."""

    def __init__(self, program, folder, address):
        for name, text in rules.files().items():
            (folder / name).write_text(text)
        config = folder / "prometheus.yml"
        config.write_text(
            yaml.safe_dump(
                {
                    "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
                    "rule_files": sorted(rules.files()),
                    "scrape_configs": synthetic_exporter.scrape_configs(address),
                }
            )
        )
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process = subprocess.Popen(
            [
                program,
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
                "--log.level=error",
            ],
            stdin=subprocess.DEVNULL,
        )

    async def failed(self):
        """Queries without data, once nothing more is to be expected."""
        deadline_s = time.monotonic() + BOUND_S
        before = None
        while True:
            await asyncio.sleep(2)
            assert self._process.poll() is None, "prometheus has ended"
            try:
                checked = await verify(self.url, BOARDS, time.time(), WINDOW_S)
            except Exception:
                if time.monotonic() > deadline_s:
                    raise
                continue
            failed = [one for one in checked if not one.has_data]
            speculative = [one for one in failed if one.needs == "speculation"]
            is_settled = len(failed) == len(speculative) and failed == before
            if not failed or is_settled or time.monotonic() > deadline_s:
                return checked, failed
            before = failed

    async def says(self, expected):
        """Whether panels have the values that follow from what is exported."""
        filled = values(WINDOW_S)
        async with aiohttp.ClientSession() as session:
            for asks, value in expected.items():
                found = [p for board in BOARDS for p in board.panels() if p.asks == asks]
                asked = {"query": promql.filled(found[0].queries[0].expr, filled)}
                async with session.post(f"{self.url}/api/v1/query", data=asked) as answer:
                    result = (await answer.json())["data"]["result"]
                assert float(result[0]["value"][1]) == pytest.approx(value, rel=0.02), asks

    async def remembers(self, expected):
        """Whether the page's charts come to these values, and there are no others."""
        spec = PrometheusSpec(mode="auto", port=self.port)
        deadline_s = time.monotonic() + BOUND_S
        # With a moment of every scrape, and with numbers of several made one.
        for span_s in (60.0, 3600.0):
            while True:
                past = await look("t", spec, span_s, time.time())
                assert past.why == ""
                assert past.columns.series.keys() == expected.keys()
                newest = {
                    name: [number for number in column if number is not None][-1]
                    for name, column in past.columns.series.items()
                }
                assert min(newest.values()) > 0
                wanted = {name: value or newest[name] for name, value in expected.items()}
                # A rate over a time that began before there was anything is too low.
                if newest == pytest.approx(wanted, rel=0.1):
                    break
                assert time.monotonic() < deadline_s, (span_s, newest, wanted)
                await asyncio.sleep(1)

    def end(self):
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


async def test_every_query_has_data_when_everything_is_exported(program, tmp_path, capsys):
    exporter = TestServer(synthetic_exporter.app(has_speculation=True), host="127.0.0.1")
    async with exporter:
        scraped = Scraped(program, tmp_path, f"127.0.0.1:{exporter.port}")
        try:
            checked, failed = await scraped.failed()
            assert [(one.board, one.panel, one.problem or one.expr) for one in failed] == []
            assert len(checked) > 60
            await scraped.says(EXPECTED)
            await scraped.remembers(PAST)
            words = ["dashboards", "verify", "--prometheus", scraped.url, "--window", "1m"]
            assert await asyncio.to_thread(run, [*words, "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["failed"] == 0
        finally:
            scraped.end()


async def test_only_speculative_panels_are_empty_without_speculation(program, tmp_path, capsys):
    exporter = TestServer(synthetic_exporter.app(has_speculation=False), host="127.0.0.1")
    async with exporter:
        scraped = Scraped(program, tmp_path, f"127.0.0.1:{exporter.port}")
        try:
            checked, failed = await scraped.failed()
            assert {one.needs for one in failed} == {"speculation"}
            assert len(failed) == sum(one.needs == "speculation" for one in checked)
            words = ["dashboards", "verify", "--prometheus", scraped.url, "--window", "1m"]
            assert await asyncio.to_thread(run, words) == 1
            assert "How many tokens does a decode step give?" in capsys.readouterr().out
            assert await asyncio.to_thread(run, [*words, "--allow-empty", "speculation"]) == 0
        finally:
            scraped.end()
