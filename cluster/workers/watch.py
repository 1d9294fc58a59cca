"""Look at a running engine for as long as it lives: its figures, and whether it makes progress.

    EngineWatch.verdicts   one verdict per look, about every second, rarer at rest
    EngineWatch.ask        one look at its metrics, at any time
    EngineWatch.probe      one real token

What a look means is judged in workers.health, which also states how soon a hung engine is found.
Called by: workers.worker.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from cluster.engines.base import MetricNames
from cluster.engines.client import EngineClient, EngineSample
from cluster.errors import EngineFailed
from cluster.workers import health

_REST_AFTER_LOOKS = 10


class EngineWatch:
    """`model`: the name clients use; `hung_after_s`: as the topology's HealthSpec has it."""

    def __init__(
        self, client: EngineClient, metrics: MetricNames, model: str, hung_after_s: float
    ) -> None:
        self.sample: EngineSample | None = None  # the last answer of its metrics
        self._client = client
        self._metrics = metrics
        self._model = model
        self._hung_after_s = hung_after_s
        # A token asked of an engine that says it has no work, and whether one is still owed.
        self._trial: asyncio.Task[float | None] | None = None
        self._owes_token = False

    async def verdicts(self) -> AsyncGenerator[health.Verdict, None]:
        """Look until closed, and yield what each look shows.

        Raises: EngineFailed: the engine says that it is dead. Cancel or aclose: safe."""
        now_s = self._now_s()
        verdict: health.Verdict = health.Healthy(health.Progress(None, now_s, now_s))
        quiet_looks = 0
        try:
            while True:
                was, was_tried = self.sample, self._owes_token
                verdict = await self._look(verdict)
                yield verdict
                moved = self.sample != was and not was_tried
                is_quiet = isinstance(verdict, health.Healthy) and not self.in_flight and not moved
                quiet_looks = quiet_looks + 1 if is_quiet else 0
                is_resting = quiet_looks >= _REST_AFTER_LOOKS
                now_s = self._now_s()
                pause_s = health.pause_s(verdict.progress, is_resting, now_s, self._hung_after_s)
                await asyncio.sleep(pause_s)
        finally:
            if self._trial is not None:
                self._trial.cancel()
                await asyncio.gather(self._trial, return_exceptions=True)

    @property
    def in_flight(self) -> int:
        """Requests that the engine had in hand when it last answered."""
        return 0 if self.sample is None else self.sample.running + self.sample.waiting

    async def ask(self) -> EngineSample | None:
        """The engine's metrics, or None if they do not answer in time."""
        try:
            async with asyncio.timeout(health.look_bound_s(self._hung_after_s)):
                self.sample = await self._client.sample(self._metrics)
        except (EngineFailed, TimeoutError):
            return None
        return self.sample

    async def probe(self, bound_s: float | None) -> str:
        """Ask for a real generation of one token. "" if it came, else why it did not."""
        try:
            async with asyncio.timeout(bound_s):
                await self._client.generate_one(self._model)
        except EngineFailed as error:
            return str(error)
        except TimeoutError:
            return f"a generation of one token took more than {bound_s:.1f} s"
        return ""

    def _now_s(self) -> float:
        # The loop's clock: timeouts go by it, and tests make it jump.
        return asyncio.get_running_loop().time()

    async def _look(self, before: health.Verdict) -> health.Verdict:
        look_until_s = self._now_s() + health.look_bound_s(self._hung_after_s)
        sample = await self.ask()
        progress = self._settled(before.progress)
        now_s = self._now_s()
        in_flight = self.in_flight or int(self._owes_token)
        verdict = health.judge(progress, sample, in_flight, now_s)
        if verdict.progress.mark != progress.mark:
            self._owes_token = False
        elif sample is not None:
            await self._check_alive(look_until_s - now_s)
        if isinstance(before, health.Hung):
            return await self._confirm(before)
        if isinstance(verdict, health.Suspect):
            if health.is_doubtful(verdict, self._hung_after_s):
                return await self._confirm(verdict)
        elif not self._owes_token and health.is_untried(progress, now_s, self._hung_after_s):
            self._owes_token = True
            self._trial = asyncio.create_task(self._try(), name="idle trial")
        return verdict

    async def _try(self) -> float | None:
        """When the token came; None: it did not."""
        why_not = await self.probe(self._hung_after_s)
        return None if why_not else self._now_s()

    def _settled(self, progress: health.Progress) -> health.Progress:
        """`progress`, with the trial's token if it has come. One that failed is still owed."""
        if self._trial is None or not self._trial.done():
            return progress
        came_s = self._trial.result()
        self._trial = None
        if came_s is None:
            return progress
        self._owes_token = False
        return health.progressed(progress, came_s).progress

    async def _check_alive(self, bound_s: float) -> None:
        """Raises: EngineFailed: the engine says that it is dead."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(bound_s):
                await self._client.check_alive()

    async def _confirm(self, doubted: health.Suspect | health.Hung) -> health.Verdict:
        progress = doubted.progress
        bound_s = health.probe_bound_s(progress, self._now_s(), self._hung_after_s)
        why_not = await self.probe(bound_s)
        if not why_not:
            self._owes_token = False
            return health.progressed(progress, self._now_s())
        sample = await self.ask()
        now_s = self._now_s()
        was_hung = isinstance(doubted, health.Hung)
        done = f"nothing got done for {now_s - progress.since_s:.0f} s"
        limit = f"(hung_after_s {self._hung_after_s:g})"
        why = doubted.why if was_hung else f"{doubted.why}; {done} {limit}; {why_not}"
        return health.after_failed_probe(progress, sample, now_s, self._hung_after_s, why)
