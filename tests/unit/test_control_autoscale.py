"""cluster.control.autoscale.policy: what it does, when, and what it says about it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from autoscale_world import DECODE, POLICY, PREFILL, World, settle, signals, workers

from cluster.control.autoscale.decision import ChangeRole, PolicyState, ScaleDown, ScaleUp
from cluster.control.autoscale.policy import decide
from cluster.control.autoscale.signals import Signals, WorkerSignals
from cluster.identity import Role, WorkerId
from cluster.topology.scaling import ScalingSpec, SloTargetSpec

BUSY = replace(PREFILL, requests_per_s=30.0)
IDLE = replace(PREFILL, requests_per_s=0.5)
NO_DECODE = replace(DECODE, requests_per_s=0.5)


def policy(**target):
    target = {"prefill": "prefill", "decode": "decode", **target}
    return POLICY.model_copy(update={"targets": [SloTargetSpec(**target)]})


def test_manual_mode_leaves_everything_alone():
    decision = settle(signals(BUSY, have=(1, 1)), ScalingSpec())
    assert decision.actions == ()
    assert decision.verdicts == ()


def test_a_pool_of_the_right_size_is_left_alone():
    decision = settle(signals(have=(3, 3)))
    assert decision.actions == ()
    assert [verdict.held for verdict in decision.verdicts] == ["", ""]


def test_a_shortage_is_answered_with_all_that_is_missing_and_says_why_in_numbers():
    (up,) = settle(signals(BUSY, have=(3, 3))).actions
    assert isinstance(up, ScaleUp)
    assert up.pool == "prefill"
    assert up.by == 6
    for figure in (
        "has 3, should have 9",
        "30 prompts/s of 2,000 tokens",
        "10,000 tokens/s",
        "TTFT p95 2 s",
    ):
        assert figure in up.why


def test_a_blip_shorter_than_the_window_changes_nothing():
    state = PolicyState()
    for now_s in range(0, 60, 5):
        load = BUSY if now_s in (30, 35) else PREFILL
        decision, state = decide(POLICY, signals(load, have=(3, 3)), state, float(now_s))
        assert decision.actions == ()
    assert decision.verdicts[0].held == ""


def test_a_shortage_that_has_not_lasted_says_so():
    decision, _ = decide(POLICY, signals(BUSY), PolicyState(), 0.0)
    assert decision.verdicts[0].held == "not yet for 15 s"


def test_replicas_that_are_starting_count_as_coming():
    assert settle(signals(BUSY, have=(10, 3), ready=(3, None))).actions == ()


def test_what_was_spare_for_the_whole_window_stops_a_part_at_a_time():
    given = signals(IDLE, have=(12, 3))
    assert settle(given, for_s=290.0).actions == ()
    (down,) = settle(given, for_s=300.0).actions
    assert (down.pool, down.by) == ("prefill", 3)
    assert isinstance(down, ScaleDown)


def test_a_moment_of_need_begins_the_window_anew():
    state = PolicyState()
    for now_s in range(0, 600, 5):
        load = PREFILL if now_s == 200 else IDLE
        decision, state = decide(POLICY, signals(load, have=(3, 3)), state, float(now_s))
        assert (decision.actions != ()) == (now_s >= 505)
        if decision.actions:
            break


def test_a_side_that_is_short_takes_from_the_other_before_it_grows():
    given = signals(IDLE, replace(DECODE, requests_per_s=30.0), have=(4, 3), exchangeable=True)
    first, *more = settle(given, for_s=60.0).actions
    assert isinstance(first, ChangeRole)
    assert (first.source, first.target, first.role) == ("prefill", "decode", Role.DECODE)
    assert "decode has 3" in first.why
    assert "prefill can spare it: with 15% headroom 0.575 prompts/s" in first.why
    assert {type(action) for action in more} == {ChangeRole, ScaleUp}


def test_roles_that_cannot_be_exchanged_are_not():
    given = signals(IDLE, replace(DECODE, requests_per_s=30.0), have=(6, 3))
    assert {type(action) for action in settle(given, for_s=60.0).actions} == {ScaleUp}


def test_the_worker_with_least_to_finish_changes_its_role():
    given = signals(IDLE, replace(DECODE, requests_per_s=14.0), have=(0, 3), exchangeable=True)
    busy = tuple(
        WorkerSignals(WorkerId("prefill", i, 1), "prefill", requests=r)
        for i, r in enumerate((4, 0, 2, 9))
    )
    changes = [
        action
        for action in settle(replace(given, workers=(*given.workers, *busy)), for_s=60.0).actions
        if isinstance(action, ChangeRole)
    ]
    assert changes[0].worker == WorkerId("prefill", 1, 1)


def test_a_worker_that_is_lent_goes_home_when_it_is_no_longer_needed():
    lent = WorkerSignals(WorkerId("decode", 7, 1), "prefill")
    given = signals(replace(PREFILL, requests_per_s=4.0), have=(2, 4), exchangeable=True)
    (back,) = settle(replace(given, workers=(*given.workers, lent))).actions
    assert isinstance(back, ChangeRole)
    assert (back.worker, back.target) == (lent.id, "decode")


def test_a_lent_worker_counts_against_the_maximum_of_its_pool():
    lent = WorkerSignals(WorkerId("prefill", 9, 1), "decode")
    short = replace(DECODE, answer_tokens=160.0)
    given = signals(BUSY, short, have=(3, 3), bounds=((1, 4), (1, 16)), exchangeable=True)
    decision = settle(replace(given, workers=(*given.workers, lent)))
    assert decision.actions == ()
    assert decision.verdicts[0].held == "it is at its maximum of 4, 1 of them lent"


def test_the_last_ready_worker_stays_even_with_a_minimum_of_zero():
    given = signals(IDLE, NO_DECODE, have=(3, 1), ready=(1, 1), bounds=((0, 9), (0, 9)))
    decision = settle(given)
    assert decision.actions == ()
    assert decision.verdicts[0].held == "2 to spare, but of 3 only 1 are ready"


@pytest.mark.parametrize(
    ("load", "why"),
    [
        (replace(PREFILL, requests_per_s=None), "its load is not known yet"),
        (replace(PREFILL, requests_per_s=math.nan), "its load is not known yet"),
        (replace(PREFILL, requests_per_s=0.0), "no request has come yet"),
        (
            replace(PREFILL, tokens_per_s_per_replica=None),
            "the speed of one replica is not measured",
        ),
        (
            replace(PREFILL, tokens_per_s_per_replica=0.0),
            "the speed of one replica is not measured",
        ),
    ],
)
def test_what_is_not_known_leads_to_no_action_and_is_said(load, why):
    decision = settle(signals(load, have=(9, 3)))
    assert decision.actions == ()
    verdict = decision.verdicts[0]
    assert (verdict.need, verdict.why, verdict.held) == (None, why, "nothing is done")


@pytest.mark.parametrize(
    ("load", "why"),
    [
        (replace(DECODE, steps=()), "step times are not measured"),
        (replace(DECODE, steps=((math.nan, 0.1), (3.0, math.inf))), "step times are not measured"),
        (replace(DECODE, answer_tokens=None), "its load is not known yet"),
    ],
)
def test_unknown_decode_signals_lead_to_no_action(load, why):
    decision = settle(signals(decode=load, have=(3, 3)))
    assert decision.actions == ()
    assert decision.verdicts[1].why == why


def test_without_traffic_any_more_a_pool_falls_to_one_or_its_minimum():
    _, state = decide(POLICY, signals(have=(4, 4)), PolicyState(), 0.0)
    silent = (replace(PREFILL, requests_per_s=0.0, prompt_tokens=None), NO_DECODE)
    given = signals(*silent, have=(3, 3), bounds=((2, 9), (1, 9)))
    decision = settle(given, state=state)
    assert decision.verdicts[0].need == 2
    assert {(a.pool, a.by) for a in decision.actions} == {("prefill", 1), ("decode", 1)}


def test_a_pool_waits_out_its_cooldowns():
    _, state = decide(POLICY, signals(BUSY), PolicyState(), 0.0)
    gains = []
    for now_s in range(5, 100, 5):
        decision, state = decide(POLICY, signals(BUSY), state, float(now_s))
        gains += [now_s] * len(decision.actions)
    assert gains == [15, 45, 75]


def test_a_target_out_of_reach_is_said_and_utilisation_is_bounded():
    slow = replace(PREFILL, prompt_tokens=30_000.0, requests_per_s=0.5)  # 3 s each, target 2 s
    decision = settle(signals(slow, have=(3, 3)))
    verdict = decision.verdicts[0]
    assert "TTFT p95 2 s is out of reach of any number: reading takes 3 s on average" in verdict.why
    assert verdict.need == math.ceil(0.5 * 3 / 0.7)
    far = replace(DECODE, steps=((1.0, 0.06), (20.0, 0.08)))
    verdict = settle(signals(decode=far)).verdicts[1]
    assert (
        "TPOT p95 50 ms is out of reach of any number: a sequence alone takes 60 ms" in verdict.why
    )
    assert verdict.need < 16


def test_a_miss_that_cannot_be_helped_buys_nothing():
    slow = replace(PREFILL, prompt_tokens=30_000.0, requests_per_s=0.5)
    given = signals(slow, have=(3, 3), ttft_s=9.0, requests=100)
    assert settle(given, for_s=3600.0).verdicts[0].need == 3


def test_more_than_the_maximum_is_said():
    decision = settle(signals(replace(PREFILL, requests_per_s=300.0), have=(16, 3)))
    assert decision.actions == ()
    assert decision.verdicts[0].why.endswith("TTFT p95 2 s needs more than 16")


def test_without_a_latency_target_utilisation_is_bounded():
    only_tpot = settle(signals(have=(3, 3)), policy(tpot_s=0.05)).verdicts[0]
    assert only_tpot.need == math.ceil(2.0 / 0.85)
    assert "no TTFT target" in only_tpot.why
    only_ttft = settle(signals(have=(3, 3)), policy(ttft_s=2.0)).verdicts[1]
    assert "no TPOT target" in only_ttft.why
    assert only_ttft.need >= 1


def test_the_strictest_target_of_a_pool_counts():
    lax, strict = policy(ttft_s=60.0, tpot_s=0.2), policy(ttft_s=0.6, tpot_s=0.03)
    both = POLICY.model_copy(update={"targets": [*lax.targets, *strict.targets]})
    of = {
        name: settle(signals(), p).verdicts
        for name, p in {"lax": lax, "strict": strict, "both": both}.items()
    }
    for side in (0, 1):
        assert of["lax"][side].need < of["strict"][side].need == of["both"][side].need


def test_acceptance_length_divides_the_steps():
    drafting = replace(DECODE, acceptance_length=2.5, requests_per_s=40.0)
    plain = replace(drafting, acceptance_length=None)
    given = {"have": (4, 3)}
    assert (
        settle(signals(decode=drafting, **given)).verdicts[1].need
        < settle(signals(decode=plain, **given)).verdicts[1].need
    )


def test_kv_memory_bounds_the_batch():
    full = replace(DECODE, kv_usage=0.9, batch=5.0)
    verdict = settle(signals(decode=full)).verdicts[1]
    assert "KV memory allows a batch of 5" in verdict.why
    assert verdict.need > settle(signals()).verdicts[1].need


def test_the_engines_batch_limit_bounds_the_batch():
    verdict = settle(signals(decode=replace(DECODE, max_batch=8))).verdicts[1]
    assert "the engine's batch limit allows a batch of 8" in verdict.why


def test_prefix_hits_are_no_load():
    cached = replace(PREFILL, prompt_tokens=200.0)
    assert settle(signals(cached)).verdicts[0].need < settle(signals()).verdicts[0].need


def test_a_queue_left_over_from_a_shortage_is_worked_off_by_more_replicas():
    queue = replace(PREFILL, waiting=400.0)
    (up,) = settle(signals(queue, have=(3, 3)), for_s=20.0).actions
    assert up.pool == "prefill"


def test_a_miss_that_the_load_does_not_explain_adds_within_a_bound():
    given = signals(have=(5, 3), ttft_s=9.0, requests=200)
    quiet = settle(signals(have=(5, 3)), for_s=3600.0).verdicts[0].need
    missed = settle(given, for_s=3600.0).verdicts[0]
    assert quiet < missed.need <= math.ceil(1.5 * 2.0 / 0.85) + 1
    few = settle(signals(have=(5, 3), ttft_s=9.0, requests=3), for_s=3600.0).verdicts[0]
    assert few.need == quiet


def test_a_late_first_token_is_decodes_if_requests_wait_before_full_batches():
    waiting = replace(DECODE, waiting=1.0)
    given = signals(decode=waiting, have=(3, 3), ttft_s=9.0, requests=200)
    at_ease = settle(signals(have=(3, 3))).verdicts
    blamed = settle(given, for_s=120.0).verdicts
    assert blamed[0].need == at_ease[0].need
    assert settle(given, for_s=3600.0).verdicts[1].need > at_ease[1].need


def test_a_pool_that_misses_its_target_gives_nothing_away():
    given = signals(IDLE, have=(9, 3), ttft_s=9.0, requests=200)
    decision = settle(given, for_s=400.0)
    assert decision.actions == ()
    assert "but TTFT p95 is 9 s of 2" in decision.verdicts[0].held


def test_a_correction_is_forgotten_at_a_much_smaller_load():
    world = World(ttft_s=9.0, ttft_needs=4)
    world.start("prefill", 3)
    world.start("decode", 3)
    for _ in range(400):
        world.tick()
    assert world.count("prefill") == 4
    assert world.state.of("prefill").correction > 1
    world.per_s = 4.0
    world.tick()
    assert world.state.of("prefill").correction == 1


def test_a_pause_between_decisions_begins_the_windows_anew():
    _, state = decide(POLICY, signals(BUSY), PolicyState(), 0.0)
    decision, _ = decide(POLICY, signals(BUSY), state, 1000.0)
    assert decision.actions == ()


def test_pools_without_a_target_are_left_alone():
    given = signals(BUSY, have=(1, 1))
    elsewhere = policy(ttft_s=1.0, prefill="other", decode="elsewhere")
    assert settle(given, elsewhere).verdicts == ()


def test_lines_are_fit_for_a_dry_run():
    lines = settle(signals(BUSY, have=(3, 3))).lines()
    assert lines[0].startswith("prefill +")
    assert lines[1].startswith("prefill has 3, needs ")
    assert lines[2].startswith("decode has 3, needs ")
    given = Signals((), (), workers("prefill", 1))
    assert settle(given).lines() == ()


def test_the_dry_run_in_the_docs_is_what_is_printed():
    given = signals(
        replace(PREFILL, requests_per_s=3.0),
        replace(DECODE, requests_per_s=30.0, kv_usage=0.2, acceptance_length=1.6),
        have=(4, 3),
        exchangeable=True,
    )
    page = (Path(__file__).resolve().parents[2] / "docs/autoscaling.md").read_text(encoding="utf-8")
    assert "\n".join(settle(given, for_s=60.0).lines()) in page
