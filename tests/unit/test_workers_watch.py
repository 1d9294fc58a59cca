"""EngineWatch over minutes of virtual time, against an engine that stops at any moment."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jumping_loop import run_jumping

from cluster.engines.client import EngineSample
from cluster.engines.registry import adapter
from cluster.errors import EngineFailed
from cluster.workers import health
from cluster.workers.watch import EngineWatch

NAMES = adapter("vllm").metrics
IDLE = EngineSample(
    running=0,
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
BUSY = replace(IDLE, running=8)


class FakeEngine:
    """An EngineClient. `step_s`: a busy one gets something done so often."""

    def __init__(self, sample=IDLE, step_s=None, answer_s=0.01):
        self._sample = sample
        self._step_s = step_s
        self._answer_s = answer_s
        self.front_stops_s = float("inf")
        self.core_stops_s = float("inf")
        self.failure = None  # of generations
        self.dies_s = float("inf")
        self.asked = 0
        self._made = 0
        self._began_s = now_s()

    async def sample(self, _names):
        await self._answered(self.front_stops_s)
        steps = self._made
        if self._step_s is not None:
            until_s = min(now_s(), self.core_stops_s, self.front_stops_s)
            steps += int((until_s - self._began_s) / self._step_s)
        return replace(self._sample, steps=steps, generation_tokens=self._made)

    async def generate_one(self, _model):
        self.asked += 1
        if self.failure is not None:
            raise EngineFailed("here", 500, self.failure)
        await self._answered(min(self.front_stops_s, self.core_stops_s))
        self._made += 1

    async def check_alive(self):
        if now_s() >= self.dies_s:
            raise EngineFailed("here", 503, "dead")

    async def _answered(self, stops_s):
        await asyncio.sleep(self._answer_s)
        if now_s() >= stops_s:
            await asyncio.sleep(1e6)


def now_s():
    return asyncio.get_running_loop().time()


async def hung_at(engine, hung_after_s, until_s):
    """When the engine is found hung, or None by `until_s`."""
    watch = EngineWatch(engine, NAMES, "m", hung_after_s)
    async for verdict in watch.verdicts():
        if isinstance(verdict, health.Hung):
            return now_s()
        if now_s() > until_s:
            return None
    raise AssertionError


# (hung_after_s, how long a look takes, when it stops)
MOMENTS = st.tuples(st.sampled_from([1.5, 10.0, 60.0]), st.floats(0.0, 0.5), st.floats(5.0, 200.0))


@given(MOMENTS, st.booleans(), st.booleans())
def test_an_engine_that_stops_is_hung_within_the_stated_bound(moment, is_busy, fails_at_once):
    hung_after_s, answer_s, after_s = moment

    async def found():
        sample = BUSY if is_busy else IDLE
        engine = FakeEngine(sample, step_s=0.1 if is_busy else None, answer_s=answer_s)
        stops_s = engine.front_stops_s = now_s() + after_s

        def stop():
            engine.failure = "refused" if fails_at_once else None

        asyncio.get_running_loop().call_at(stops_s, stop)
        found_s = await hung_at(engine, hung_after_s, stops_s + 500)
        assert found_s is not None
        return found_s - stops_s

    took_s = run_jumping(found())
    # What it did last may show up to one look later than it was done.
    assert took_s <= health.detection_bound_s(hung_after_s) + answer_s


@given(MOMENTS, st.booleans(), st.booleans())
def test_a_core_that_stops_behind_a_server_that_answers_is_found_too(
    moment, is_busy, fails_at_once
):
    hung_after_s, answer_s, after_s = moment

    async def found():
        sample = BUSY if is_busy else IDLE
        engine = FakeEngine(sample, step_s=0.1 if is_busy else None, answer_s=answer_s)
        stops_s = engine.core_stops_s = now_s() + after_s

        def stop():
            engine.failure = "poisoned" if fails_at_once else None

        asyncio.get_running_loop().call_at(stops_s, stop)
        found_s = await hung_at(engine, hung_after_s, stops_s + 500)
        assert found_s is not None
        return found_s - stops_s

    bound_s = health.detection_bound_s if is_busy else health.idle_detection_bound_s
    assert run_jumping(found()) <= bound_s(hung_after_s) + answer_s


@given(st.sampled_from([1.5, 10.0, 60.0]), st.floats(0.1, 1.0))
def test_a_slow_engine_whose_queue_no_probe_gets_through_is_never_hung(hung_after_s, part):
    async def found():
        step_s = (hung_after_s - health.look_bound_s(hung_after_s)) * part
        engine = FakeEngine(replace(BUSY, waiting=99), step_s=step_s)
        engine.core_stops_s = now_s() + 1e5  # steps go on
        never = asyncio.Event()

        async def waits_in_the_queue(_model):
            await never.wait()

        engine.generate_one = waits_in_the_queue
        return await hung_at(engine, hung_after_s, now_s() + 20 * hung_after_s)

    assert run_jumping(found()) is None


def test_an_idle_engine_makes_a_token_about_once_in_hung_after_s_and_is_looked_at_rarely():
    async def asked():
        engine = FakeEngine()
        looks = 0
        watch = EngineWatch(engine, NAMES, "m", 60.0)
        end_s = now_s() + 600
        async for verdict in watch.verdicts():
            assert isinstance(verdict, health.Healthy)
            looks += 1
            if now_s() > end_s:
                return engine.asked, looks
        raise AssertionError

    tokens, looks = run_jumping(asked())
    assert 8 <= tokens <= 10
    assert looks < 10 + 600 / health.REST_PERIOD_S + 3 * tokens


def test_a_hung_engine_that_goes_on_is_healthy_again():
    async def follow():
        engine = FakeEngine()
        engine.front_stops_s = now_s() + 5
        seen = []
        async for verdict in EngineWatch(engine, NAMES, "m", 10.0).verdicts():
            if isinstance(verdict, health.Hung):
                engine.front_stops_s = float("inf")
            if not seen or type(verdict) is not seen[-1]:
                seen.append(type(verdict))
            if seen[-2:] == [health.Hung, health.Healthy]:
                return seen
        raise AssertionError

    assert run_jumping(follow()) == [health.Healthy, health.Suspect, health.Hung, health.Healthy]


@pytest.mark.parametrize(("sample", "within_s"), [(BUSY, 2.0), (IDLE, 6.0)])
def test_an_engine_that_says_it_is_dead_is_believed_at_once(sample, within_s):
    async def died():
        engine = FakeEngine(sample, step_s=0.1 if sample.running else None)
        dies_s = engine.dies_s = engine.core_stops_s = now_s() + 40.03
        with pytest.raises(EngineFailed, match="503"):
            async for _ in EngineWatch(engine, NAMES, "m", 60.0).verdicts():
                pass
        return now_s() - dies_s

    assert run_jumping(died()) < within_s
