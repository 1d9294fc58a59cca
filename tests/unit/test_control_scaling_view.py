"""What the autoscaler decided, on its way to whoever asks: route, wire, terminal."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from cluster.cli.scaling import draw
from cluster.control import wire
from cluster.control.api import Bearer, create_app
from cluster.control.autoscale.decision import Decision, PoolVerdict
from cluster.control.autoscale.signals import PairSignals, PoolSignals, PrefillLoad, Signals
from cluster.control.autoscale.view import Scaling, ScalingAction, scaling
from cluster.topology.scaling import ScalingSpec, SloTargetSpec

POLICY = ScalingSpec(
    mode="slo",
    dry_run=True,
    targets=[SloTargetSpec(prefill="p", decode="d", ttft_s=2, tpot_s=0.05)],
)
SIGNALS = Signals(
    pools=(PoolSignals("p", 1, 8, PrefillLoad()),),
    pairs=(PairSignals("p", "d", ttft_s=3.0, tpot_s=float("nan"), requests=50),),
    workers=(),
)
DECISION = Decision(verdicts=(PoolVerdict("p", 1, 1, 2, 3, "busy [2.1]", "not yet for 10 s"),))
ACTIONS = (
    ScalingAction("scale p from 1 to 2", "would", "busy"),
    ScalingAction("scale d from 1 to 2", "asked", "busy", change=7),
    ScalingAction("scale d from 1 to 2", "held", "busy", problem="ada@ops goes first"),
)
FOUND = scaling(POLICY, SIGNALS, DECISION, ACTIONS, {}, 100.0)


def test_what_holds_a_pool_up_from_outside_goes_before_what_the_policy_says():
    for held in ({"p": "ada@ops goes first"}, {"": "ada@ops goes first"}):
        (pool,) = scaling(POLICY, SIGNALS, DECISION, (), held, 100.0).pools
        assert pool.held == "ada@ops goes first"
    assert FOUND.pools[0].held == "not yet for 10 s"


def test_a_figure_that_is_no_number_is_not_known():
    (target,) = FOUND.targets
    assert (target.ttft_s, target.tpot_s, target.requests) == (3.0, None, 50)


def test_it_survives_the_wire():
    assert wire.read_scaling(wire.scaling_json(FOUND)) == FOUND


def test_the_route_answers_with_the_last_decision_to_whoever_has_the_token():
    class Controls:
        async def scaling(self) -> Scaling:
            return FOUND

    http = TestClient(create_app(Controls(), Bearer("t")))
    assert http.get("/v1/scaling").status_code == 401
    answer = http.get("/v1/scaling", headers={"authorization": "Bearer t"})
    assert wire.read_scaling(answer.content) == FOUND
    document = http.get("/openapi.json", headers={"authorization": "Bearer t"}).json()
    assert "/v1/scaling" in document["paths"]


def test_the_terminal_shows_actions_needs_reasons_and_targets(capsys):
    draw(FOUND, 104.0)
    said = capsys.readouterr().out
    assert "dry run" in said
    assert "decided 4.0 s ago" in said
    assert "would scale p from 1 to 2: busy" in said
    assert "asked scale d from 1 to 2 as change 7" in said
    assert "held scale d from 1 to 2 (ada@ops goes first)" in said
    assert "p: busy [2.1] (not yet for 10 s)" in said
    assert "TTFT p95 3 s, target 2 s" in said
    assert "TPOT p95 not measured yet, target 50 ms" in said


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Scaling("manual", False, 5.0), "scaling.mode is manual"),
        (Scaling("slo", False, 5.0), "nothing is decided yet"),
        (Scaling("slo", False, 5.0, problem="the store is away"), "the store is away"),
    ],
)
def test_the_terminal_says_why_there_is_no_decision(capsys, found, words):
    draw(found, 104.0)
    assert words in capsys.readouterr().out
