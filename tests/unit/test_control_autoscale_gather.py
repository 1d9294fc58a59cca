"""From reports to signals: what is measured, and that odd reports never become odd decisions."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scaled_cluster import desired, report, spread

from cluster.control.autoscale.decision import PolicyState
from cluster.control.autoscale.gather import Learnt, Speed, signals, within
from cluster.control.autoscale.policy import decide
from cluster.control.autoscale.samples import Sample, Work, plays, sample, since, traffic, work
from cluster.control.state import FailedSlot
from cluster.identity import Role, WorkerId, WorkerState
from cluster.snapshot import Load
from cluster.traffic import GatewayReport, PairTraffic
from cluster.workers.report import Counters

STATE = desired(prefill=(2, 1, 8), decode=(2, 1, 8))
P0, P1 = WorkerId("prefill", 0, 1), WorkerId("prefill", 1, 1)
D0, D1 = WorkerId("decode", 0, 1), WorkerId("decode", 1, 1)


def pair(arrived: int = 0, **more: object) -> PairTraffic:
    return PairTraffic("prefill", "decode", arrived=arrived, **more)


def gateway(*pairs: PairTraffic, name: str = "g", **more: int) -> GatewayReport:
    figures = {"running": 0, "queued": 0, **more}
    return GatewayReport(name, 0.0, 1, pairs=tuple(pairs), **figures)


def seen(at_s: float, *gateways: GatewayReport, workers: tuple = ()) -> Sample:
    return sample(at_s, STATE, workers, gateways)


def came(*samples: Sample) -> PairTraffic:
    return traffic(samples, STATE).pairs.get(("prefill", "decode"), pair())


# -- traffic ------------------------------------------------------------------------------------


def test_what_came_is_the_difference_over_all_gateways():
    before = seen(0, gateway(pair(10), name="a"), gateway(pair(100), name="b"))
    after = seen(30, gateway(pair(16), name="a"), gateway(pair(103), name="b"))
    assert came(before, after).arrived == 9


def test_a_report_that_was_lost_loses_nothing():
    one, two = gateway(pair(10)), gateway(pair(40))
    assert came(seen(0, one), seen(10), seen(20, two)).arrived == 30
    assert came(seen(0, one), seen(10, two), seen(20)).arrived == 30


def test_a_gateway_that_is_heard_of_for_the_first_time_brings_no_burst():
    old = gateway(pair(50_000), name="was cut off")
    assert came(seen(0), seen(10, old)).arrived == 0
    later = gateway(pair(50_007), name="was cut off")
    assert came(seen(0), seen(10, old), seen(20, later)).arrived == 7


def test_totals_that_became_smaller_belong_to_one_that_began_anew():
    assert came(seen(0, gateway(pair(100))), seen(10, gateway(pair(4)))).arrived == 4


def test_a_pair_that_a_gateway_had_not_seen_before_is_new_altogether():
    assert came(seen(0, gateway()), seen(10, gateway(pair(3)))).arrived == 3


def test_requests_that_found_no_room_are_load_too():
    first, last = gateway(pair(0)), gateway(pair(60), refused=20, queued=10)
    found, _ = signals(STATE, (seen(0, first), seen(30, last)), (), Learnt(), ())
    assert found.pool("prefill").load.requests_per_s == pytest.approx(3.0)


def test_spreads_of_a_pair_add_up_over_gateways():
    first = seen(0, gateway(pair(), name="a"), gateway(pair(), name="b"))
    last = seen(
        30,
        gateway(pair(30, finished=30, ttft_s=spread(30, 0.1)), name="a"),
        gateway(pair(30, finished=30, ttft_s=spread(30, 8.0)), name="b"),
    )
    found, _ = signals(STATE, (first, last), (), Learnt(), ())
    (measured,) = found.pairs
    assert measured.ttft_s == pytest.approx(8.0, rel=0.25)
    assert measured.requests == 0  # no stream told of its further tokens, which have a target too


def test_what_a_lent_worker_serves_counts_for_the_pool_whose_part_it_plays():
    lent = desired(roles={"decode/1": Role.PREFILL})
    assert plays("decode", Role.PREFILL, lent, lent.serving.scaling.targets) == "prefill"
    of_both = GatewayReport("g", 0, 1, 0, 0, pairs=(pair(5), PairTraffic("decode", "decode", 7)))
    empty = GatewayReport("g", 0, 1, 0, 0)
    found = traffic((Sample(0, (empty,), ()), Sample(9, (of_both,), ())), lent)
    assert found.pairs["prefill", "decode"].arrived == 12


# -- rates --------------------------------------------------------------------------------------


def test_rates_are_not_known_before_a_load_window_was_watched():
    samples = (seen(0, gateway(pair(0))), seen(20, gateway(pair(60))))
    found, _ = signals(STATE, samples, (), Learnt(), ())
    assert found.pool("prefill").load.requests_per_s is None


def test_no_gateway_is_not_no_load():
    found, _ = signals(STATE, (seen(0), seen(30)), (), Learnt(), ())
    assert found.pool("prefill").load.requests_per_s is None
    found, _ = signals(STATE, (seen(0, gateway()), seen(30, gateway())), (), Learnt(), ())
    assert found.pool("prefill").load.requests_per_s == 0.0


def test_lengths_are_remembered_while_nothing_finishes():
    done = pair(10, finished=10, prompt_tokens=20_000, answer_tokens=500)
    first = (seen(0, gateway(pair(0))), seen(30, gateway(done)))
    _, learnt = signals(STATE, first, (), Learnt(), ())
    later = (seen(60, gateway(done)), seen(90, gateway(replace(done, arrived=40))))
    found, _ = signals(STATE, later, (), learnt, ())
    assert found.pool("prefill").load.prompt_tokens == 2000
    assert found.pool("decode").load.answer_tokens == 50


def test_the_window_keeps_one_sample_from_before_it():
    samples = [seen(float(at_s)) for at_s in range(0, 100, 10)]
    assert [s.at_s for s in within(samples, 25.0)] == [60, 70, 80, 90]
    assert within([], 25.0) == ()


# -- workers ------------------------------------------------------------------------------------


def at(running: int, tokens: int = 0, worker: WorkerId = P0, **more: object):
    counters = Counters(prompt_tokens=tokens, generation_tokens=tokens)
    return report(worker, load=Load(running, 0, 0.1), counters=counters, **more)


def test_speed_is_tokens_over_busy_time():
    learnt = Learnt()
    for second in range(40):
        # Busy every other second; then 1,500 tokens are done.
        before = seen(second, workers=(at(second % 2, 1500 * second),))
        after = seen(second + 1, workers=(at((second + 1) % 2, 1500 * (second + 1)),))
        learnt = learnt.followed(before, after)
    assert learnt.speeds["prefill"].tokens_per_s == pytest.approx(3000)


def test_a_speed_seen_a_few_times_only_is_not_known():
    speed = Speed().followed(Work(busy_s=3.0, looks=3, prompt_tokens=9000))
    assert speed.tokens_per_s is None
    speed = speed.followed(Work(busy_s=3.0, looks=3, prompt_tokens=9000))
    assert speed.tokens_per_s == pytest.approx(3000)


def test_a_speed_follows_what_is_new():
    speed = Speed().followed(Work(busy_s=100, looks=100, prompt_tokens=100_000))
    for _ in range(40):
        speed = speed.followed(Work(busy_s=10, looks=10, prompt_tokens=50_000))
    assert speed.tokens_per_s == pytest.approx(5000, rel=0.05)


def test_step_time_is_what_clients_saw_times_tokens_per_step():
    def decode(second: int):
        counters = Counters(
            generation_tokens=100 * second, spec_drafts=50 * second, spec_accepted=50 * second
        )
        return report(D0, load=Load(4, 0, 0.1), counters=counters)

    def streams(second: int) -> GatewayReport:
        count = second // 2
        return gateway(pair(count, finished=count, tpot_s=spread(count, 0.03)))

    samples = [seen(s, streams(s), workers=(decode(s),)) for s in range(31)]
    load = signals(STATE, samples, (), Learnt(), ())[0].pool("decode").load
    assert load.acceptance_length == 2.0
    ((batch, step_s),) = load.steps
    assert batch == pytest.approx(4.0)
    assert step_s == pytest.approx(0.06)


def test_step_time_without_streams_follows_from_the_batch_and_the_tokens_made():
    samples = [seen(s, gateway(), workers=(at(4, 100 * s, D0),)) for s in range(31)]
    ((batch, step_s),) = signals(STATE, samples, (), Learnt(), ())[0].pool("decode").load.steps
    assert (batch, step_s) == (pytest.approx(4.0), pytest.approx(0.04))


def test_answers_that_are_over_before_anybody_looks_have_a_batch_too():
    def streams(second: int) -> GatewayReport:
        return gateway(pair(second, finished=second, tpot_s=spread(second, 0.002)))

    samples = [seen(s, streams(s), workers=(at(0, 100 * s, D0),)) for s in range(31)]
    ((batch, step_s),) = signals(STATE, samples, (), Learnt(), ())[0].pool("decode").load.steps
    assert batch == pytest.approx(1.2)  # 100 tokens/s of 2 ms each are 0.2 sequences
    assert step_s == pytest.approx(0.002)


def test_an_engine_that_began_anew_has_done_what_it_says_now():
    done = work((seen(0, workers=(at(1, 5000),)), seen(1, workers=(at(1, 30),))))
    assert done[P0, "prefill"].prompt_tokens == 30


def test_another_generation_is_another_worker():
    old, new = at(1, 5000), at(1, 5100, replace(P0, generation=2))
    assert work((seen(0, workers=(old,)), seen(1, workers=(new,)))) == {}


def test_time_in_which_a_worker_was_not_ready_is_not_its_time():
    loading = at(1, 10, state=WorkerState.LOADING)
    assert work((seen(0, workers=(loading,)), seen(1, workers=(at(1, 20),)))) == {}


def test_requests_that_wait_for_their_kv_do_not_wait_for_room():
    def waiting(usage: float, most: int | None = None, running: int = 3) -> float:
        pools = [
            pool.model_copy(update={"max_num_seqs": most}) if pool.name == "decode" else pool
            for pool in STATE.serving.pools
        ]
        state = STATE.model_copy(
            update={"serving": STATE.serving.model_copy(update={"pools": pools})}
        )
        workers = (report(D0, load=Load(running, 5, usage)),)
        found, _ = signals(state, (sample(0, state, workers, ()),), (), Learnt(), ())
        return found.pool("decode").load.waiting

    assert waiting(0.3) == 0
    assert waiting(math.nan) == 0
    assert waiting(0.9) == 5
    assert waiting(0.3, most=3) == 5


def names(state, workers: tuple, failed: tuple = ()) -> dict[str, bool]:
    found, _ = signals(state, (sample(0, state, workers, ()),), failed, Learnt(), ())
    return {str(worker.id): worker.is_ready for worker in found.workers}


def test_workers_that_are_wanted_and_not_there_yet_count_as_coming():
    found = names(STATE, (report(P0), report(D0), report(D1)))
    assert (len(found), sum(found.values())) == (4, 3)


def test_a_worker_that_drains_to_end_does_not_count():
    state = desired(prefill=(1, 1, 8), decode=(2, 1, 8))
    leaving = report(P1, state=WorkerState.DRAINING)
    assert set(names(state, (report(P0), leaving, report(D0), report(D1)))) == {
        "prefill/0#1",
        "decode/0#1",
        "decode/1#1",
    }


def test_a_place_whose_workers_fail_does_not_count_as_coming_until_one_is_ready():
    failed = (FailedSlot("prefill/1", 2, 3.0, "exit code 1"),)
    everyone = (report(P0), report(D0), report(D1))
    again = report(P1, state=WorkerState.LOADING)
    assert len(names(STATE, everyone, failed)) == 3
    assert len(names(STATE, (*everyone, again), failed)) == 3
    assert len(names(STATE, (*everyone, report(P1)), failed)) == 4


def test_of_two_generations_in_a_slot_one_counts_the_one_that_is_ready():
    new = report(replace(P0, generation=2), state=WorkerState.LOADING)
    found = names(STATE, (report(P0), new, report(P1), report(D0), report(D1)))
    assert found == {
        "prefill/0#1": True,
        "prefill/1#1": True,
        "decode/0#1": True,
        "decode/1#1": True,
    }


def test_a_worker_on_its_way_to_another_role_counts_where_it_goes_and_not_as_ready():
    state = desired(prefill=(2, 1, 8), decode=(1, 1, 8), roles={"prefill/1": Role.DECODE})
    changing = report(P1, state=WorkerState.CHANGING)
    found, _ = signals(
        state, (sample(0, state, (report(P0), changing, report(D0)), ()),), (), Learnt(), ()
    )
    assert {(w.id.name, w.serves, w.is_ready) for w in found.workers} == {
        ("prefill/0", "prefill", True),
        ("prefill/1", "decode", False),
        ("decode/0", "decode", True),
    }


# -- whatever is reported -----------------------------------------------------------------------

counts = st.integers(0, 10**9)
usages = st.one_of(st.floats(0, 1), st.sampled_from([math.nan, math.inf, -1.0, 1e300]))
pools = st.sampled_from(["prefill", "decode", "gone", ""])
spreads = st.builds(spread, st.integers(0, 10_000), st.floats(0.001, 600))
pairs = st.builds(
    PairTraffic, pools, pools, counts, counts, counts, counts, counts, spreads, spreads
)
gateways = st.builds(
    GatewayReport,
    st.sampled_from("abc"),
    st.floats(allow_nan=True),
    counts,
    counts,
    counts,
    counts,
    counts,
    st.lists(pairs, max_size=3, unique_by=lambda p: (p.prefill, p.decode)).map(tuple),
)
workers = st.builds(
    report,
    st.builds(
        WorkerId, st.sampled_from(["prefill", "decode", "gone"]), st.integers(0, 3), st.just(1)
    ),
    state=st.sampled_from(list(WorkerState)),
    load=st.builds(Load, counts, counts, usages),
    counters=st.builds(Counters, counts, counts, counts, counts, counts),
)
moments = st.tuples(
    st.lists(gateways, max_size=3, unique_by=lambda g: g.gateway),
    st.lists(workers, max_size=5, unique_by=lambda w: w.id),
)


@given(st.lists(moments, min_size=1, max_size=6), st.floats(0, 40))
def test_whatever_is_reported_signals_are_made_and_decisions_keep_the_bounds(told, gap_s):
    samples = [
        sample(gap_s * number, STATE, reports, heard)
        for number, (heard, reports) in enumerate(told)
    ]
    learnt = Learnt()
    for before, now in pairwise(samples):
        learnt = learnt.followed(before, now)
    found, learnt = signals(STATE, samples, (), learnt, [("prefill", "decode")])
    for pool in found.pools:
        per_s = pool.load.requests_per_s
        assert per_s is None or per_s >= 0
        assert pool.load.waiting >= 0
    decision, _ = decide(STATE.serving.scaling, found, PolicyState(), samples[-1].at_s)
    assert all(verdict.pool in ("prefill", "decode") for verdict in decision.verdicts)
    for verdict in decision.verdicts:
        assert verdict.need is None or 1 <= verdict.need <= 8


@given(pairs, pairs)
def test_nothing_that_came_since_is_below_zero(before, now):
    came_since = since(now, before)
    for name in ("arrived", "finished", "prompt_tokens", "held_tokens", "answer_tokens"):
        assert getattr(came_since, name) >= 0
