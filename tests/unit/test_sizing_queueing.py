"""cluster.sizing.queueing against exact results and simulations."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.sizing.queueing import (
    Lengths,
    StepModel,
    batch_at,
    fit_steps,
    late_share,
    longer_than,
    waits_longer,
)


def test_one_server_with_exponential_times_is_exact():
    # M/M/1: P(W > t) = rho exp(-(1 - rho) t / s)
    assert waits_longer(1, 0.8, 1.0, 3.0) == pytest.approx(0.8 * math.exp(-0.2 * 3.0))


@pytest.mark.parametrize(("servers", "utilisation"), [(2, 0.5), (4, 0.7), (10, 0.9), (32, 0.95)])
def test_the_chance_of_waiting_is_close_to_erlangs(servers, utilisation):
    load, blocked = servers * utilisation, 1.0
    for count in range(1, servers + 1):
        blocked = load * blocked / (count + load * blocked)
    erlang_c = blocked / (1 - utilisation * (1 - blocked))
    assert waits_longer(servers, load, 1.0, 0.0) == pytest.approx(erlang_c, abs=0.05)


def test_too_few_servers_leave_everybody_waiting():
    assert waits_longer(2, 2.0, 1.0, 100.0) == 1.0
    assert waits_longer(3, 0.0, 1.0, 0.0) == 0.0
    assert late_share(1, 0.5, Lengths(1.0), limit_s=-1.0) == 1.0


@given(st.floats(0.001, 1e5), st.floats(0, 20))
def test_quantiles_keep_the_mean(mean, squared_cv):
    points = Lengths(mean, squared_cv).quantiles()
    assert sum(points) / len(points) == pytest.approx(mean)
    assert list(points) == sorted(points)


def test_a_tail_is_longer_with_more_spread():
    assert longer_than(Lengths(1.0, 0.0), 1.5) == 0.0
    assert longer_than(Lengths(1.0, 0.25), 2.5) < longer_than(Lengths(1.0, 2.0), 2.5)


@given(st.integers(1, 30), st.floats(0.01, 50), st.floats(0.001, 5), st.floats(0, 10))
def test_more_servers_make_fewer_wait(servers, per_s, service_s, wait_s):
    fewer = waits_longer(servers, per_s, service_s, wait_s)
    assert waits_longer(servers + 1, per_s, service_s, wait_s) <= fewer + 1e-12


def test_a_line_of_step_times_is_found_again():
    points = [(b, 0.02 + 0.001 * b) for b in (1.0, 7.0, 30.0)]
    fitted = fit_steps(points)
    assert fitted is not None
    assert fitted.base_s == pytest.approx(0.02)
    assert fitted.per_sequence_s == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("points", "model"),
    [
        ([], None),
        ([(0.0, 0.1), (math.nan, 0.1), (2.0, -1.0), (3.0, math.inf)], None),
        ([(4.0, 0.1), (4.0, 0.3)], StepModel(0.2, 0.0)),
        ([(1.0, 0.3), (2.0, 0.1)], StepModel(0.2, 0.0)),  # faster with more: noise
        ([(1.0, 0.1), (1.2, 0.12)], StepModel(0.11, 0.0)),  # too near each other to tell
        ([(1.0, 0.0), (1.0, 0.1), (3.0, 0.4)], None),
    ],
)
def test_points_that_give_no_line_give_no_nonsense(points, model):
    fitted = fit_steps(points)
    if model is None and len(points) == 3:  # a line below 0 at the origin goes through it instead
        assert fitted is not None
        assert fitted.base_s == 0
        assert 0.1 <= fitted.per_sequence_s <= 0.4 / 3
    elif model is None:
        assert fitted is None
    else:
        assert fitted is not None
        assert fitted.base_s == pytest.approx(model.base_s)
        assert fitted.per_sequence_s == pytest.approx(model.per_sequence_s)


@pytest.mark.parametrize("fixed_lengths", [True, False])
def test_the_number_in_a_batch_is_that_of_shared_processing(fixed_lengths):
    """One replica with steps of 20 ms + 2 ms x batch, 60 steps an answer, 5 answers a second.

    Without spread of lengths and with much of it: the number present is the same."""
    rng, base_s, each_s, answer, per_s = random.Random(3), 0.02, 0.002, 60.0, 5.0
    left: list[float] = []
    now_s, next_s, area, squares = 0.0, 0.0, 0.0, 0.0
    while now_s < 4000:
        step_s = base_s + each_s * len(left)
        ends_s = now_s + min(left) * step_s if left else math.inf
        until_s = min(ends_s, next_s)
        area += len(left) * (until_s - now_s)
        squares += len(left) ** 2 * (until_s - now_s)
        left = [work - (until_s - now_s) / step_s for work in left]
        now_s = until_s
        if ends_s <= next_s:
            left.remove(min(left))
        else:
            left.append(answer if fixed_lengths else rng.expovariate(1 / answer))
            next_s = now_s + rng.expovariate(per_s)
    mean = area / now_s
    deviation = math.sqrt(squares / now_s - mean**2)
    steps = StepModel(base_s, each_s)
    assert batch_at(1, per_s * answer, 1.0, steps, 0.5) - 1 == pytest.approx(mean, rel=0.1)
    upper = batch_at(1, per_s * answer, 1.0, steps, 0.8413) - 1  # one deviation above
    assert upper - mean == pytest.approx(deviation, rel=0.15)


def test_a_batch_without_end_is_infinite():
    assert math.isinf(batch_at(1, 1000.0, 1.0, StepModel(0.01, 0.001), 0.95))
    assert batch_at(1, 1000.0, 2.0, StepModel(0.01, 0.001), 0.95) < math.inf
