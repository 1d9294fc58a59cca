"""The autoscaler at work against a fake controller: what it asks for, and when it keeps still."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from scaled_cluster import Offered, ScaledCluster, desired

from cluster.control.changes import Change, ChangeRole, ChangeState, Scale
from cluster.control.events import AutoscalerDecided
from cluster.identity import Role

BUSY = Offered(per_s=12.0)  # 24,000 prompt tokens/s at 10,000 per replica


def asked(cluster: ScaledCluster) -> list[object]:
    return [ask for ask, _, _ in cluster.asked]


async def test_a_short_side_grows_to_what_the_load_needs_and_then_everything_rests():
    cluster = ScaledCluster(desired(), BUSY)
    await cluster.second(240)
    assert cluster.serving(Role.PREFILL) >= 3
    assert cluster.serving(Role.DECODE) == 1
    before = list(cluster.asked)
    await cluster.second(600)
    assert cluster.asked == before
    assert {who for _, who, _ in before} == {"autoscaler"}
    assert all("prompts/s of 2,000 tokens" in why for _, _, why in before)


@pytest.mark.parametrize("per_s", [0.3, 2.5, 4.3, 12.0, 23.0])
async def test_a_steady_load_comes_to_rest_although_looks_say_only_busy_or_not(per_s):
    cluster = ScaledCluster(desired(prefill=(1, 1, 16)), Offered(per_s=per_s))
    await cluster.second(500)
    before = list(cluster.asked)
    await cluster.second(900)
    assert cluster.asked == before
    assert cluster.serving(Role.PREFILL) >= per_s * 2000 / cluster.prefill_tokens_per_s


async def test_without_load_pools_go_down_to_their_minimum_and_no_further():
    cluster = ScaledCluster(desired(prefill=(4, 2, 8)), BUSY)
    await cluster.second(120)
    cluster.offered = Offered(per_s=0.0)
    await cluster.second(600)
    assert cluster.serving(Role.PREFILL) == 2
    assert cluster.serving(Role.DECODE) == 1


async def test_no_more_than_the_maximum_is_asked_for():
    cluster = ScaledCluster(desired(prefill=(1, 1, 2)), BUSY)
    await cluster.second(300)
    assert cluster.serving(Role.PREFILL) == 2
    (prefill, _) = cluster.autoscaler.scaling().pools
    assert "needs more than 2" in prefill.why


async def test_mode_manual_asks_for_nothing_and_says_so():
    cluster = ScaledCluster(desired(mode="manual", targets=[]), BUSY)
    await cluster.second(120)
    assert cluster.asked == []
    scaling = cluster.autoscaler.scaling()
    assert (scaling.mode, scaling.decided_at_s, scaling.pools) == ("manual", None, ())


async def test_a_dry_run_changes_nothing_and_says_once_what_it_would_do():
    cluster = ScaledCluster(desired(dry_run=True), BUSY)
    await cluster.second(300)
    assert cluster.asked == []
    assert cluster.serving(Role.PREFILL) == 1
    assert all(isinstance(event, AutoscalerDecided) for event in cluster.events)
    assert {(event.pool, event.outcome) for event in cluster.events} == {("prefill", "would")}
    words = [event.action for event in cluster.events]
    assert words[0].startswith("scale prefill from 1 to ")
    assert len(words) == len(set(words))  # each once, as the queue grows up to the maximum
    assert words[-1] == "scale prefill from 1 to 8"
    scaling = cluster.autoscaler.scaling()
    (action,) = scaling.actions
    assert (action.outcome, action.change) == ("would", None)
    assert scaling.dry_run


async def test_with_a_role_to_spare_a_worker_changes_its_role_in_place_of_a_start():
    wanted = desired(decode=(4, 1, 8), engine="simulated", down_window_s=300)
    cluster = ScaledCluster(wanted, Offered(per_s=2.0, answer_tokens=50))
    await cluster.second(100)
    assert cluster.asked == []
    cluster.offered.per_s = 8.0
    await cluster.second(100)
    assert {(type(ask), ask.role) for ask in asked(cluster)} == {(ChangeRole, Role.PREFILL)}
    assert cluster.serving(Role.PREFILL) >= 2
    assert [who for who in cluster.wanted.roles if not who.startswith("decode/")] == []
    cluster.offered.per_s = 2.0
    await cluster.second(450)
    assert cluster.serving(Role.PREFILL) == 1
    assert any(isinstance(ask, ChangeRole) and ask.role is Role.DECODE for ask in asked(cluster))


async def test_engines_that_must_be_started_anew_for_another_role_are_not_lent():
    wanted = desired(decode=(4, 1, 8), engine="sglang", down_window_s=300)
    cluster = ScaledCluster(wanted, Offered(per_s=2.0, answer_tokens=50))
    await cluster.second(100)
    cluster.offered.per_s = 8.0
    await cluster.second(100)
    assert {(type(ask), ask.pool) for ask in asked(cluster)} == {(Scale, "prefill")}


@pytest.mark.parametrize("pools", [("prefill",), ()])
async def test_a_pool_is_left_alone_while_an_operators_change_of_it_runs(pools):
    cluster = ScaledCluster(desired(), BUSY)
    operators = Change(90, "scale", "scale prefill from 1 to 2", "ada@ops", 0.0, pools=pools)
    cluster.log.append(operators)
    await cluster.second(200)
    assert cluster.asked == []
    (action,) = cluster.autoscaler.scaling().actions
    assert action.outcome == "held"
    assert "ada@ops goes first" in action.problem
    cluster.log[0] = replace(operators, state=ChangeState.DONE)
    await cluster.second(10)
    assert cluster.serving(Role.PREFILL) > 1


async def test_a_change_of_another_pool_holds_nothing_up():
    cluster = ScaledCluster(desired(), BUSY)
    cluster.log.append(Change(90, "scale", "scale decode", "ada@ops", 0.0, pools=("decode",)))
    await cluster.second(100)
    assert cluster.serving(Role.PREFILL) > 1


async def test_a_refusal_is_said_once_and_tried_again_after_a_pause():
    cluster = ScaledCluster(desired(), BUSY, refuses="no such luck")
    await cluster.second(60)
    (said,) = cluster.events
    assert (said.outcome, said.why) == ("refused", "no such luck")
    cluster.refuses = ""
    await cluster.second(80)
    assert cluster.serving(Role.PREFILL) > 1


async def test_after_a_failed_change_the_pool_is_left_alone_for_a_minute():
    cluster = ScaledCluster(desired(), BUSY, ends_as=ChangeState.FAILED)
    while not cluster.asked:
        await cluster.second()
    await cluster.second(55)
    assert len(cluster.asked) == 1
    await cluster.second(15)
    assert len(cluster.asked) == 2


async def test_workers_that_fail_are_not_counted_as_coming():
    cluster = ScaledCluster(desired(prefill=(3, 1, 8)), Offered(per_s=9.0))
    await cluster.second(40)
    assert cluster.asked == []
    cluster.lose("prefill/2")
    await cluster.second(40)
    scales = [ask for ask in asked(cluster) if isinstance(ask, Scale)]
    assert scales
    assert scales[0].replicas > 3  # one more than is wanted, for one of those does not work


async def test_without_gateways_nothing_is_known_and_nothing_done():
    cluster = ScaledCluster(desired(prefill=(4, 1, 8)), BUSY, is_silent=True)
    await cluster.second(600)
    assert cluster.asked == []
    (prefill, decode) = cluster.autoscaler.scaling().pools
    assert (prefill.need, decode.need) == (None, None)
    assert "not known" in prefill.why


async def test_other_engine_arguments_begin_with_a_new_memory():
    cluster = ScaledCluster(desired(), BUSY)
    await cluster.second(60)
    assert cluster.autoscaler.scaling().pools[0].need is not None
    pool = cluster.wanted.serving.pools[0].model_copy(update={"max_num_seqs": 8})
    pools = [pool, cluster.wanted.serving.pools[1]]
    serving = cluster.wanted.serving.model_copy(update={"pools": pools})
    cluster.wanted = cluster.wanted.model_copy(update={"serving": serving})
    await cluster.second(1)
    assert cluster.autoscaler.scaling().pools[0].need is None


async def test_a_controller_that_does_not_answer_ends_nothing():
    cluster = ScaledCluster(desired(), BUSY)

    async def broken():
        raise RuntimeError("the store is away")

    good, cluster.desired = cluster.desired, broken
    running = asyncio.create_task(cluster.autoscaler.run())
    await asyncio.sleep(0.01)
    assert not running.done()
    assert "the store is away" in cluster.autoscaler.scaling().problem
    running.cancel()
    cluster.desired = good
    await cluster.second(60)
    assert cluster.asked
