"""What a controller remembers of the last quarter of an hour, and what it tells of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from control_world import World, desired
from hypothesis import given
from hypothesis import strategies as st
from watched_cluster import Clock, WatchedCluster

from cluster.cli.live_feed import Feed
from cluster.control import wire
from cluster.control.changes import ChangeRole, DrainWorker, Scale
from cluster.control.points import RATE_OVER_S, columns
from cluster.control.recent import EVERY_S, KEPT_S, Recent
from cluster.identity import Role, WorkerId, WorkerState
from cluster.snapshot import Load
from cluster.traffic import GatewayReport, PairTraffic, SpreadCounter
from cluster.workers.report import Counters, WorkerReport

POOLS = (("p", Role.PREFILL, "i", 1), ("d", Role.DECODE, "i", 1))
WANTED = WatchedCluster(POOLS).wanted
D0 = WorkerId("d", 0, 1)


def worker(clock, counters=None, id=D0, age_s=-1.0, **more):
    """`age_s`: how long before the first look it was started; below 0: after it."""
    return WorkerReport(
        id=id,
        role=more.pop("role", Role.DECODE),
        state=more.pop("state", WorkerState.READY),
        message="",
        node_ip="",
        url="",
        started_at_s=Clock().wall_s() - age_s,
        counters=counters or Counters(),
        **more,
    )


def traffic(*ttft_s, arrived=0, refused=0, recoveries=0, gateway="g"):
    spread = SpreadCounter()
    for seconds in ttft_s:
        spread.add(seconds)
    pair = PairTraffic("p", "d", arrived=arrived or len(ttft_s), ttft_s=spread.spread())
    pair = replace(pair, finished=len(ttft_s))
    return GatewayReport(gateway, 0.0, 1, 2, 1, refused, recoveries, (pair,))


class Looks:
    """A Recent, looked at every `step_s`."""

    def __init__(self, step_s=EVERY_S):
        self.clock = Clock()
        self.recent = Recent(self.clock)
        self.step_s = step_s

    def at(self, *reports, gateways=()):
        self.recent.take(WANTED, reports, gateways)
        self.clock.time_s += self.step_s
        return self.recent.after(0)[-1]


def test_there_is_a_point_every_two_seconds_for_a_quarter_of_an_hour():
    looks = Looks(step_s=0.5)
    for _ in range(4 * 1000):
        looks.at()
    points = looks.recent.after(0)
    assert len(points) == KEPT_S / EVERY_S
    assert points[-1].at_s - points[0].at_s == pytest.approx(KEPT_S, abs=2 * EVERY_S)
    assert looks.recent.after(points[-2].seq) == (points[-1],)


def test_rates_are_of_the_last_ten_seconds():
    looks = Looks()
    for second in range(0, 20, 2):
        looks.at(worker(looks.clock, Counters(generation_tokens=100 * second)))
    for _ in range(3):
        point = looks.at(worker(looks.clock, Counters(generation_tokens=1800)))
    # 18 s to 8 s ago 1800 were made, then none for 6 s: of the last ten, four had work.
    assert point.pools["d"].generation_tokens_per_s == pytest.approx(100 * 4 / 10)


def test_what_engines_count_becomes_load_acceptance_and_transfer_figures():
    looks = Looks()
    looks.at(worker(looks.clock))
    done = Counters(
        prompt_tokens=40,
        generation_tokens=80,
        spec_drafts=20,
        spec_accepted=30,
        transfers=4,
        bytes_pulled=8000,
        tokens_held=75,
        tokens_pulled=25,
        transfer_failures=2,
    )
    found = looks.at(worker(looks.clock, done, load=Load(3, 2, 0.5))).pools["d"]
    assert (found.desired, found.ready, found.running, found.waiting) == (1, 1, 3, 2)
    assert (found.kv_usage, found.acceptance_length, found.held_share) == (0.5, 2.5, 0.75)
    assert (found.prompt_tokens_per_s, found.generation_tokens_per_s) == (20, 40)
    assert (found.transfers_per_s, found.bytes_per_s) == (2, 4000)
    assert found.transfer_failures_per_s == 1


def test_nothing_done_is_not_known_rather_than_nought():
    looks = Looks()
    looks.at()
    found = looks.at()
    assert found.pools["d"].acceptance_length is None
    assert found.pools["d"].held_share is None
    assert found.pools["d"].kv_usage is None
    assert found.traffic.ttft_p95_s is None


def test_a_worker_that_ran_before_the_controller_is_counted_from_its_first_report_on():
    looks = Looks()
    long_ago = Counters(generation_tokens=10**9)
    looks.at(worker(looks.clock, long_ago, age_s=3600))
    found = looks.at(
        worker(looks.clock, replace(long_ago, generation_tokens=10**9 + 10), age_s=3600)
    )
    assert found.pools["d"].generation_tokens_per_s == 5


def test_an_adopted_worker_that_answers_late_makes_no_jump():
    looks = Looks()
    # Until its actor answers, a report of the controller's own stands in, as if just started.
    looks.at(worker(looks.clock, age_s=0.0))
    found = looks.at(worker(looks.clock, Counters(generation_tokens=10**9), age_s=3600))
    assert found.pools["d"].generation_tokens_per_s == 0


def test_a_worker_that_starts_later_is_counted_from_nought():
    looks = Looks()
    looks.at()
    found = looks.at(worker(looks.clock, Counters(generation_tokens=10), age_s=-1.0))
    assert found.pools["d"].generation_tokens_per_s == 5


def test_percentiles_are_of_what_came_in_the_last_half_minute():
    looks = Looks()
    slow, quick = [5.0] * 50, [0.1] * 50
    looks.at(gateways=[traffic(*slow)])
    looks.at(gateways=[traffic(*slow)])
    found = looks.at(gateways=[traffic(*slow, *quick)])
    assert found.traffic.ttft_p99_s < 0.2
    assert found.pairs["p", "d"].ttft_p50_s < 0.2
    for _ in range(20):
        found = looks.at(gateways=[traffic(*slow, *quick)])
    assert found.traffic.ttft_p99_s is None


def test_gateways_are_added_up_and_a_new_one_counts_from_nought():
    looks = Looks()
    looks.at(gateways=[traffic(0.1, arrived=1000, refused=5)])
    for _ in range(6):
        looks.at(gateways=[traffic(0.1, arrived=1000, refused=5)])
    found = looks.at(
        gateways=[
            traffic(0.1, arrived=1010, refused=7, recoveries=1),
            traffic(0.1, arrived=10, gateway="later"),
        ]
    )
    assert (found.gateways.replicas, found.gateways.running, found.gateways.queued) == (2, 4, 2)
    assert found.traffic.requests_per_s == 20 / RATE_OVER_S
    assert found.gateways.refused_per_s == 2 / RATE_OVER_S
    assert found.gateways.recoveries_per_s == 1 / RATE_OVER_S


def test_roles_count_those_that_serve_in_them():
    wanted = WANTED.model_copy(update={"roles": {"d/0": Role.PREFILL}})
    looks = Looks()
    looks.recent.take(wanted, [worker(looks.clock, role=Role.PREFILL)], ())
    roles = looks.recent.after(0)[-1].roles
    assert (roles[Role.PREFILL].desired, roles[Role.PREFILL].ready) == (2, 1)
    assert (roles[Role.DECODE].desired, roles[Role.DECODE].ready) == (0, 0)


COURSE = st.lists(
    st.tuples(
        st.sampled_from(["work", "work", "restart", "set back"]),
        st.integers(0, 10**9),
        st.booleans(),
    ),
    max_size=40,
)


@given(COURSE)
def test_totals_hold_all_that_was_done_whatever_starts_anew(course):
    """New generations, engines that begin again in one, looks that are left out."""
    looks = Looks()
    looks.at()
    generation, counters, done, before = 1, Counters(), 0, Counters()

    def look():
        nonlocal before
        looks.at(worker(looks.clock, counters, id=WorkerId("d", 0, generation)))
        now = looks.recent.lately()[0].pools["d"]
        assert now.generation_tokens >= before.generation_tokens
        before = now

    for kind, tokens, is_looked_at in course:
        if kind == "work":
            done += tokens
            counters = replace(counters, generation_tokens=counters.generation_tokens + tokens)
            if is_looked_at:
                look()
            continue
        look()
        generation += kind == "restart"
        counters = Counters()
        look()
    look()
    assert before.generation_tokens == done


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 50)), min_size=1, max_size=30))
def test_requests_of_gateways_that_are_replaced_are_all_counted(course):
    looks = Looks()
    looks.at(gateways=[traffic(gateway="g0")])
    looks.clock.time_s += 60
    replica, arrived, done = 0, 0, 0
    for is_replaced, requests in course:
        if is_replaced:
            replica, arrived = replica + 1, 0
        arrived, done = arrived + requests, done + requests
        looks.at(gateways=[traffic(arrived=arrived, gateway=f"g{replica}")])
    assert looks.recent.lately()[0].pairs["p", "d"].arrived == done


# What is told of it


@pytest.fixture
def cluster():
    found = WatchedCluster()
    found.pass_time(60)
    return found


def live(cluster, since=0, events_after=0):
    return asyncio.run(cluster.live(since, events_after))


def ask(cluster, ask):
    asyncio.run(cluster.ask(ask, "ada"))


def test_whoever_asks_first_is_told_all_and_then_only_what_is_new(cluster):
    first = live(cluster)
    assert first.is_whole
    assert len(first.columns.at_s) == 30
    assert len(first.workers) == 12
    assert all(len(column) == 30 for column in first.columns.series.values())
    again = live(cluster, first.seq)
    assert (again.is_whole, again.columns.at_s, again.workers) == (False, (), ())
    cluster.rate = 0.0
    cluster.pass_time(60)
    quiet = live(cluster)
    cluster.pass_time(4)
    after = live(cluster, quiet.seq)
    assert len(after.columns.at_s) == 2
    assert after.workers == ()  # nothing of them has changed


def test_an_answer_to_somebody_who_polls_is_short(cluster):
    first = live(cluster)
    cluster.pass_time(2)
    scaling = asyncio.run(cluster.scaling())
    size = {
        name: len(wire.looked_json(wire.Looked(live(cluster, since), scaling)))
        for name, since in (("idle", live(cluster).seq), ("busy", first.seq), ("first", 0))
    }
    assert size["idle"] < 3_000
    assert size["busy"] < 15_000 < size["first"]


def test_whoever_was_away_for_longer_than_is_kept_is_told_all_again(cluster):
    first = live(cluster)
    cluster.pass_time(KEPT_S + 10)
    assert live(cluster, first.seq).is_whole


def test_a_number_of_another_controllers_is_answered_with_all_there_is(cluster):
    assert live(cluster, since=12345).is_whole


def test_workers_that_have_gone_are_named(cluster):
    first = live(cluster)
    ask(cluster, Scale("decode-h200", 2))
    cluster.pass_time(2)
    told = live(cluster, first.seq)
    assert told.gone == ("decode-h200/2#1",)
    assert "decode-h200/2#1" not in {worker.id for worker in told.workers}


def test_the_picture_has_islands_pools_links_and_nodes(cluster):
    told = live(cluster)
    assert [island.name for island in told.islands] == ["h200", "atlas"]
    assert {pool.name: (pool.island, pool.ready, pool.desired) for pool in told.pools} == {
        "prefill-h200": ("h200", 2, 2),
        "decode-h200": ("h200", 3, 3),
        "prefill-atlas": ("atlas", 3, 3),
        "decode-atlas": ("atlas", 4, 4),
    }
    assert [(link.prefill, link.decode) for link in told.links] == [
        ("prefill-h200", "decode-h200"),
        ("prefill-atlas", "decode-atlas"),
    ]
    assert all(link.bytes_per_s > 0 and link.requests_per_s > 0 for link in told.links)
    assert sum(node.workers for node in told.nodes) == 12


def test_bytes_of_a_pool_that_two_pools_feed_are_shared_out_by_tokens():
    pools = (
        ("a", Role.PREFILL, "i", 1),
        ("b", Role.PREFILL, "i", 1),
        ("d", Role.DECODE, "i", 1),
    )
    cluster = WatchedCluster(pools)
    cluster.pass_time(60)
    told = live(cluster)
    moved = {(link.prefill, link.decode): link.bytes_per_s for link in told.links}
    column = told.columns.series["pool.d.bytes_per_s"]
    assert moved["a", "d"] == pytest.approx(moved["b", "d"])
    assert sum(moved.values()) == pytest.approx(column[-1], rel=0.01)


def test_running_changes_are_all_told_and_of_ended_ones_the_last():
    cluster = WatchedCluster()
    for count in range(15):
        ask(cluster, Scale("decode-h200", 3 + count % 2))
        cluster.pass_time(10)
    ask(cluster, DrainWorker("decode-atlas/0"))
    changes = live(cluster).changes
    assert len(changes) == 11
    assert changes[-1].state == "running"
    assert [change.id for change in changes] == sorted(change.id for change in changes)


def test_an_answer_survives_the_way_over_the_wire(cluster):
    ask(cluster, ChangeRole("decode-h200/0", Role.PREFILL))
    cluster.pass_time(2)
    looked = wire.Looked(live(cluster), asyncio.run(cluster.scaling()))
    assert wire.read_looked(wire.looked_json(looked)) == looked


def test_columns_of_a_pool_that_came_later_begin_with_nothing():
    looks = Looks()
    looks.at()
    more = WatchedCluster((*POOLS, ("new", Role.DECODE, "j", 1))).wanted
    looks.recent.take(more, (), ())
    found = columns(looks.recent.after(0))
    assert found.series["pool.new.desired"] == (None, 1)
    assert found.series["pool.d.desired"] == (1, 1)


async def test_a_controllers_own_loop_makes_the_points():
    world = World()
    await world.controller.apply(desired(prefill=1, decode=2))
    await world.steps(20)
    await world.controller.gateway_report(traffic(0.1, 0.2))
    await world.steps(8)
    told = await world.controller.live(0, 0)
    assert len(told.columns.at_s) == 7  # 14 s
    assert told.columns.series["pool.d.ready"][-1] == 2
    assert told.columns.series["gateways.running"][-1] == 2
    assert {worker.name for worker in told.workers} == {"p/0", "d/0", "d/1"}
    assert {pool.name: (pool.ready, pool.desired) for pool in told.pools} == {
        "p": (1, 1),
        "d": (2, 2),
    }
    known = told.events[-1].seq
    assert [event.kind for event in told.events][:2] == ["ControllerStarted", "DesiredChanged"]
    await world.controller.ask(Scale("d", 3), "ada")
    await world.steps(6)
    after = await world.controller.live(told.seq, known)
    assert not after.is_whole
    assert after.events[0].kind == "ChangeAsked"
    assert "d/2" in {worker.name for worker in after.workers}
    assert [change.what for change in after.changes] == ["scale d from 2 to 3"]


# What whoever watches makes of it


def test_a_feed_of_small_answers_is_the_same_as_one_whole_answer(cluster):
    feed, scaling = Feed(), asyncio.run(cluster.scaling())
    for step in range(40):
        if step == 10:
            ask(cluster, Scale("decode-h200", 1))
        cluster.pass_time(step % 4)
        feed.take(wire.Looked(live(cluster, feed.since, feed.events_after), scaling))
    whole = Feed()
    whole.take(wire.Looked(live(cluster), scaling))
    assert feed.at_s == whole.at_s
    assert feed.workers == whole.workers
    assert feed.events == whole.events
    assert all(
        list(feed.column(name)) == list(whole.column(name)) for name in live(cluster).columns.series
    )


def test_a_feed_goes_on_after_the_controller_was_restarted(cluster):
    feed, scaling = Feed(), asyncio.run(cluster.scaling())
    feed.take(wire.Looked(live(cluster), scaling))
    had = len(feed.at_s)
    later = WatchedCluster(clock=Clock(cluster.clock.wall_s() + 5))
    later.pass_time(10)
    feed.take(wire.Looked(live(later, feed.since, feed.events_after), scaling))
    assert len(feed.at_s) == had + 5
    assert feed.at_s == sorted(feed.at_s)


def test_a_feed_forgets_what_is_older_than_a_quarter_of_an_hour(cluster):
    feed, scaling = Feed(), asyncio.run(cluster.scaling())
    for _ in range(100):
        cluster.pass_time(20)
        feed.take(wire.Looked(live(cluster, feed.since, feed.events_after), scaling))
    assert feed.at_s[-1] - feed.at_s[0] <= KEPT_S
    assert len(feed.column("traffic.ttft_p95_s")) == len(feed.at_s)
