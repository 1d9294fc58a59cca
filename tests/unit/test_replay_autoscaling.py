"""scripts/replay_autoscaling: virtual time, the same figures every time, and what it writes."""

from __future__ import annotations

import asyncio
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from autoscaling_replay import compare, plot, report, virtual_time  # noqa: E402
from autoscaling_replay.compare import Result, fixed_ways, scaling_ways  # noqa: E402
from autoscaling_replay.replay import Moment, run  # noqa: E402
from autoscaling_replay.scalers import Fixed, Utilisation  # noqa: E402
from autoscaling_replay.trace import READER, SHAPES, WRITER, Day  # noqa: E402

from cluster.engines.simulated.model import Vocabulary  # noqa: E402
from cluster.identity import Role  # noqa: E402
from cluster.models import store  # noqa: E402
from cluster.topology.schema import ModelSpec  # noqa: E402


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(store.resolve(ModelSpec(id="simulated"), lambda what, fraction: None).path)


def test_an_hour_of_virtual_time_takes_no_time():
    async def sleep() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    begun_s = time.monotonic()
    assert virtual_time.run(sleep()) == pytest.approx(3600)
    assert time.monotonic() - begun_s < 60


def test_a_wait_for_nothing_is_an_error_not_a_standstill():
    async def stuck() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="every task waits"):
        virtual_time.run(stuck())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_day_turns_from_reading_to_writing_and_its_bursts_are_of_one_kind(shape):
    day = Day(1, shape=shape)
    morning, evening = day.rates(0.3 * day.length_s), day.rates(0.7 * day.length_s)
    assert morning[READER] > 2 * morning[WRITER]
    assert evening[WRITER] > 2 * evening[READER]
    burst = day.bursts[0]
    other = WRITER if burst.kind is READER else READER
    begun_s = burst.begins_s + burst.build_up_s
    before, within = day.rates(burst.begins_s - 0.01), day.rates(begun_s)
    added = within[burst.kind] - before[burst.kind], within[other] - before[other]
    assert added == pytest.approx((burst.per_s, 0.0), abs=0.3)


def test_arrivals_come_at_the_rate_of_the_day():
    day = Day(seed=3, length_s=1200.0)
    expected = sum(sum(day.rates(t + 0.5).values()) for t in range(1200))
    assert len(list(day.arrivals(3))) == pytest.approx(expected, rel=0.1)


def test_one_seed_gives_one_outcome_and_every_request_ends(vocabulary):
    slo = next(way for way in scaling_ways() if way.series == compare.SLO)
    first, second = (run("slo", slo.scaler(), slo.begin, 1, vocabulary, 150.0) for _ in range(2))
    assert first == second
    assert len(first.served) == len(list(Day(1, 150.0).arrivals(1)))
    assert all(s.arrival.at_s < s.prefilled_s < s.first_s < s.last_s for s in first.served)


def test_more_workers_keep_more_and_cost_their_hours(vocabulary):
    few, many = (run("", Fixed(), begin, 1, vocabulary, 150.0) for begin in ((1, 1), (6, 6)))
    assert few.kept() < many.kept()
    assert many.kept() > 0.95
    assert many.worker_hours == pytest.approx(12 * 150 / 3600, rel=0.01)
    assert many.most == (6, 6)


def test_utilisation_scaling_follows_kubernetes_rule():
    class Fleet:
        def of(self, role):
            return [type("R", (), {"is_ready": True})] * 4

    def wants(ratio, times=1, scaler=None):
        scaler = scaler or Utilisation(0.5, 0.5, False, most=12)
        for number in range(times):
            actions = scaler._pool(Role.PREFILL, ratio, Fleet(), 5.0 * number)
        return [(type(action).__name__, action.by) for action in actions]

    assert wants(1.09) == []
    assert wants(1.2) == [("ScaleUp", 1)]
    assert wants(9.0) == [("ScaleUp", 4)]  # no more than the double at once
    busy_before = Utilisation(0.5, 0.5, False, most=12)
    assert wants(1.0, 1, busy_before) == []
    assert wants(0.5, 60, busy_before) == []  # four were wanted less than five minutes ago
    assert wants(0.5, 62, busy_before) == [("ScaleDown", 2)]


def result(series: str = compare.SLO, setting: str = "headroom 0.15", **more) -> Result:
    moments = (Moment(5.0, 3, 2, 0), Moment(10.0, 4, 2, 1))
    figures = Result(
        series, setting, 12.5, 0.91, 0.95, 0.96, 1.9, 0.05, 1000, 4, 2, 3, 1, 2, moments
    )
    return replace(figures, **more)


def test_fixed_splits_have_the_average_number_two_more_and_the_peak():
    ways = fixed_ways(6.2, (7, 5))
    assert {way.begin for way in ways} >= {(3, 3), (2, 4), (4, 2), (4, 4), (7, 5)}
    assert {sum(way.begin) for way in ways} == {6, 8, 12}


def test_the_plot_is_an_svg_with_every_series_and_dark_colours():
    results = [result(), result(compare.FIXED, "4 + 4", worker_hours=16.0, kept=0.99)]
    text = plot.draw(results, seed=1, length_s=600.0, shape="peaks")
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert "prefers-color-scheme: dark" in text
    assert all(series in text for series in plot.SERIES)


def test_the_table_goes_between_its_marks_and_nowhere_else():
    begin = report.begin("level")
    page = f"before\n{begin}\nold\n{report.END}\nafter\n"
    written = report.with_table(page, [result()], "level")
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    assert "| SLO, headroom 0.15 | 12.50 | 91.0% |" in written
    assert "old" not in written
    assert report.with_table(written, [result()], "level") == written
    with pytest.raises(ValueError, match="put them back"):
        report.with_table(page, [result()], "peaks")


@pytest.mark.parametrize("shape", SHAPES)
def test_the_page_has_a_row_for_every_way_and_the_plot_of_the_day(shape):
    page = (ROOT / "docs/autoscaling.md").read_text(encoding="utf-8")
    table = page.partition(report.begin(shape))[2].partition(report.END)[0]
    rows = {line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")}
    assert {way.name for way in scaling_ways()} <= rows
    assert any(row.startswith(compare.FIXED) for row in rows)
    assert f"images/autoscaling-{shape}.svg" in page
    assert (ROOT / f"docs/images/autoscaling-{shape}.svg").exists()
