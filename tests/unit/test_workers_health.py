from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.engines.client import EngineSample
from cluster.workers.health import (
    Healthy,
    Hung,
    Progress,
    Suspect,
    after_failed_probe,
    judge,
    progressed,
)

SAMPLE = EngineSample(
    running=1,
    waiting=0,
    kv_usage=0.1,
    prompt_tokens=10,
    generation_tokens=5,
    external_tokens=0,
    spec_drafts=0,
    spec_accepted=0,
    steps=7,
    block_size_tokens=16,
    cache_dtype="auto",
)
STILL = Progress((10, 0, 5, 7), 100.0)


def test_an_idle_engine_is_healthy_however_long_it_is_idle():
    assert judge(STILL, SAMPLE, 0, 9_999.0, 60.0) == Healthy(Progress(STILL.mark, 9_999.0))


def test_work_in_hand_without_progress_is_suspect_and_then_hung():
    assert judge(STILL, SAMPLE, 2, 159.0, 60.0) == Suspect(STILL, 59.0)
    verdict = judge(STILL, SAMPLE, 2, 160.0, 60.0)
    assert isinstance(verdict, Hung)
    assert "2 requests in hand" in verdict.why


def test_one_step_in_a_long_while_is_progress():
    sample = replace(SAMPLE, steps=8)
    assert judge(STILL, sample, 300, 159.9, 60.0) == Healthy(Progress((10, 0, 5, 8), 159.9))


def test_progress_since_the_last_sample_counts_even_if_that_was_too_long_ago():
    # The worker itself may have slept; the engine did not.
    sample = replace(SAMPLE, prompt_tokens=11)
    assert isinstance(judge(STILL, sample, 1, 500.0, 60.0), Healthy)


def test_metrics_that_do_not_answer_are_no_progress_but_hung_only_after_the_bound():
    assert judge(STILL, None, 0, 130.0, 60.0) == Suspect(STILL, 30.0)
    verdict = judge(STILL, None, 0, 161.0, 60.0)
    assert isinstance(verdict, Hung)
    assert "metrics do not answer" in verdict.why


def test_a_generation_that_came_back_starts_the_clock_anew():
    after = progressed(STILL, 160.0)
    assert judge(after, SAMPLE, 2, 219.0, 60.0) == Suspect(after, 59.0)


def test_a_failed_probe_is_hung_even_if_its_own_prompt_was_read_and_clients_gave_up():
    sample = replace(SAMPLE, prompt_tokens=11, running=0)
    verdict = after_failed_probe(STILL, sample, 170.0, "stuck")
    assert verdict == Hung(Progress((11, 0, 5, 7), 100.0), "stuck")
    # The probe's prompt is not taken for progress at the next look either.
    assert isinstance(judge(verdict.progress, sample, 1, 171.0, 60.0), Hung)
    assert after_failed_probe(STILL, None, 170.0, "stuck") == Hung(STILL, "stuck")


def test_a_failed_probe_is_forgiven_if_others_got_tokens_meanwhile():
    sample = replace(SAMPLE, generation_tokens=6)
    assert isinstance(after_failed_probe(STILL, sample, 170.0, "stuck"), Healthy)


def test_the_first_sample_of_an_engine_is_progress():
    assert isinstance(judge(Progress(None, 0.0), SAMPLE, 4, 1_000.0, 60.0), Healthy)


@given(
    st.lists(st.tuples(st.floats(0.1, 59.0), st.integers(1, 50)), min_size=1, max_size=50),
)
def test_a_slow_engine_that_makes_a_step_within_every_bound_is_never_hung(looks):
    now_s, progress, sample = 100.0, STILL, SAMPLE
    for pause_s, steps in looks:
        now_s += pause_s
        sample = replace(sample, steps=sample.steps + steps)
        verdict = judge(progress, sample, 99, now_s, 60.0)
        assert isinstance(verdict, Healthy)
        progress = verdict.progress


@given(st.lists(st.one_of(st.none(), st.just(SAMPLE)), min_size=61, max_size=80))
def test_an_engine_that_stands_still_with_work_is_hung_after_the_bound(samples):
    progress = STILL
    for second, sample in enumerate(samples, start=1):
        verdict = judge(progress, sample, 1, STILL.since_s + second, 60.0)
        assert isinstance(verdict, Hung) is (second >= 60)
        progress = verdict.progress
