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
    detection_bound_s,
    idle_detection_bound_s,
    is_doubtful,
    is_untried,
    judge,
    pause_s,
    probe_bound_s,
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
    kv_usage_sum=0.1,
)
MARK = (10, 0, 5, 7, 0.1)
STILL = Progress(MARK, 100.0, 100.0)


def test_an_idle_engine_is_healthy_however_long_it_is_idle_but_is_to_show_something_at_times():
    assert judge(STILL, SAMPLE, 0, 9_999.0) == Healthy(replace(STILL, since_s=9_999.0))
    assert not is_untried(STILL, 159.0, 60.0)
    assert is_untried(STILL, 160.0, 60.0)


def test_work_in_hand_without_progress_is_suspect_then_doubtful_and_hung_if_nothing_comes():
    early = judge(STILL, SAMPLE, 2, 149.0)
    assert isinstance(early, Suspect)
    assert early.idle_s == 49.0
    assert "2 requests in hand" in early.why
    assert not is_doubtful(early, 60.0)
    late = judge(STILL, SAMPLE, 2, 150.0)
    assert isinstance(late, Suspect)
    assert is_doubtful(late, 60.0)
    assert after_failed_probe(STILL, SAMPLE, 160.0, 60.0, "stuck") == Hung(STILL, "stuck")


def test_a_probe_that_fails_at_once_is_no_verdict_before_the_time_is_over():
    verdict = after_failed_probe(STILL, SAMPLE, 151.0, 60.0, "answered 500")
    assert verdict == Suspect(STILL, 51.0, "answered 500")


def test_one_step_in_a_long_while_is_progress():
    sample = replace(SAMPLE, steps=8)
    assert judge(STILL, sample, 300, 159.9) == Healthy(Progress((10, 0, 5, 8, 0.1), 159.9, 159.9))


def test_a_prefill_that_takes_blocks_and_makes_no_token_is_progress():
    sample = replace(SAMPLE, kv_usage_sum=0.11)
    assert isinstance(judge(STILL, sample, 1, 500.0), Healthy)
    assert isinstance(after_failed_probe(STILL, sample, 500.0, 60.0, "slow"), Healthy)


def test_progress_since_the_last_sample_counts_even_if_that_was_too_long_ago():
    # The worker itself may have slept; the engine did not.
    sample = replace(SAMPLE, prompt_tokens=11)
    assert isinstance(judge(STILL, sample, 1, 500.0), Healthy)


def test_metrics_that_do_not_answer_are_no_progress_whether_or_not_there_is_work():
    verdict = judge(STILL, None, 0, 161.0)
    assert isinstance(verdict, Suspect)
    assert verdict.progress == STILL
    assert "metrics do not answer" in verdict.why
    assert isinstance(after_failed_probe(STILL, None, 161.0, 60.0, "stuck"), Hung)


def test_a_generation_that_came_back_starts_the_clock_anew():
    after = progressed(STILL, 160.0).progress
    verdict = judge(after, SAMPLE, 2, 219.0)
    assert isinstance(verdict, Suspect)
    assert verdict.idle_s == 59.0


def test_a_failed_probe_is_hung_even_if_its_own_prompt_was_read_and_clients_gave_up():
    sample = replace(SAMPLE, prompt_tokens=11, running=0)
    verdict = after_failed_probe(STILL, sample, 170.0, 60.0, "stuck")
    assert verdict == Hung(Progress((11, 0, 5, 7, 0.1), 100.0, 100.0), "stuck")
    # The probe's prompt is not taken for progress at the next look either.
    assert isinstance(judge(verdict.progress, sample, 1, 171.0), Suspect)


def test_a_failed_probe_is_forgiven_if_others_got_tokens_meanwhile():
    sample = replace(SAMPLE, generation_tokens=6)
    assert isinstance(after_failed_probe(STILL, sample, 170.0, 60.0, "stuck"), Healthy)


def test_the_first_sample_of_an_engine_is_progress():
    assert isinstance(judge(Progress(None, 0.0, 0.0), SAMPLE, 4, 1_000.0), Healthy)


def test_looks_are_rare_at_rest_and_never_later_than_doubt_and_the_end():
    assert pause_s(STILL, False, 100.0, 60.0) == 1.0
    assert pause_s(STILL, True, 100.0, 60.0) == 5.0
    assert pause_s(STILL, True, 148.0, 60.0) == 2.0
    assert pause_s(STILL, False, 159.5, 60.0) == 0.5
    assert pause_s(STILL, True, 100.0, 1.5) == 0.75


def test_a_probe_may_take_until_the_time_is_over_and_as_long_as_a_look_beyond():
    assert probe_bound_s(STILL, 150.0, 60.0) == 10.0
    assert probe_bound_s(STILL, 159.5, 60.0) == 2.0
    assert probe_bound_s(STILL, 900.0, 60.0) == 2.0


def test_the_bounds_are_those_that_the_documents_name():
    assert detection_bound_s(60.0) == 66.0
    assert idle_detection_bound_s(60.0) == 133.0


@given(
    st.lists(st.tuples(st.floats(0.1, 59.0), st.integers(1, 50)), min_size=1, max_size=50),
)
def test_a_slow_engine_that_makes_a_step_within_every_bound_is_never_suspect(looks):
    now_s, progress, sample = 100.0, STILL, SAMPLE
    for wait_s, steps in looks:
        now_s += wait_s
        sample = replace(sample, steps=sample.steps + steps)
        verdict = judge(progress, sample, 99, now_s)
        assert isinstance(verdict, Healthy)
        progress = verdict.progress
