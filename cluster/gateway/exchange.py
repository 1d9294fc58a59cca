"""One request, from validated body to last byte.

Render, route, have a pair of workers answer (`attempt`). When they do not, or not to the end, what
comes next is decided by `recovery`; in the middle of an answer another pair goes on where the rest
is certain to be what an undisturbed run would have said (`course`). Else the stream ends with an
error event, truthfully. There is one such loop, whatever ended an attempt: a failure, a hang, a
drain, an engine that gave the request back.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import replace

import orjson

from cluster.errors import EngineFailed, KvMismatch, NoCapacity, PeerGone
from cluster.gateway import errors, recovery
from cluster.gateway.answer import Answer
from cluster.gateway.attempt import Ask, Attempt, goes_together
from cluster.gateway.course import Course, Way
from cluster.gateway.parts import Parts
from cluster.gateway.plan import Flow, Plan, plan
from cluster.gateway.recovery import Cause, Ended, Stage, Tries
from cluster.gateway.render import CannotRender
from cluster.gateway.requests import GatewayRequest
from cluster.gateway.route import Facts, Route
from cluster.gateway.standing import Blame
from cluster.gateway.story import Story
from cluster.gateway.wire import Responder
from cluster.identity import WorkerId


class Exchange:
    """`await run()` once. Cancel: closes the calls to both engines and gives the lease back."""

    def __init__(
        self,
        parts: Parts,
        request: GatewayRequest,
        responder: Responder,
        story: Story,
        engine_request_id: str,
        began_at: float,
        deadline_at: float,
    ) -> None:
        """`began_at`: when the client's request had arrived; `deadline_at`: when its time is up.
        Both in the loop's clock."""
        self._parts = parts
        self._request = request
        self._out = responder
        self._story = story
        self._id = engine_request_id
        self._deadline_at = deadline_at
        skips = request.body.get("skip_special_tokens") is not False
        self._answer = Answer(
            parts.engines,
            request,
            responder,
            began_at,
            lambda ids: parts.renderer.decode(ids, skips),
        )
        self._plan: Plan = plan(request)
        self._tries = Tries(parts.config.prefill_attempts)
        self._revision: str | None = None  # of the model whose words were sent, or are kept
        self._route: Route | None = None  # the present one
        self._blames: list[Blame] = []  # of failed attempts, until it is known what came of it

    async def run(self) -> None:
        """Raises, with nothing or a part of a stream sent: EngineFailed, NoCapacity, Rejected,
        ApiError."""
        try:
            await self._run()
        except EngineFailed as failure:
            self._parts.tally.lost(failure.worker, failure.why, self._story.request_id)
            self._tell_failures(is_proven=False)
            raise
        except NoCapacity:
            self._tell_failures(is_proven=False)
            raise
        finally:
            record = self._story.record
            if record is not None and record.rendered_s is not None:
                record.answer_tokens = self._course.answer_tokens

    async def _run(self) -> None:
        parts = self._parts
        prompts = await self._render()
        prompt_tokens = sum(map(len, prompts))
        record = self._story.record
        self._course = Course(
            self._request,
            prompts[0] if self._plan.flow is Flow.DISAGGREGATE else None,
            parts.config.has_reasoning_parser,
        )
        if record is not None:
            record.rendered_s, record.prompt_tokens = self._story.now_s(), prompt_tokens
        ask = Ask(
            self._request,
            self._course,
            self._answer,
            self._plan.flow,
            self._deadline_at,
            self._story.trace,
            self._story.now_s,
        )
        self._facts = self._facts_of(prompts)
        failure: EngineFailed | None = None
        for number in itertools.count():
            asked_s = self._story.now_s()
            route, held_tokens = self._choose(prompts, failure)
            kept_tokens, table = self._course.kept_tokens, parts.fleet.table
            counts = parts.tally.pair(route)
            counts.arrived += not number
            attempt = Attempt(
                parts,
                ask,
                route,
                prompts,
                number,
                f"{self._id}.{number}",
                self._story.attempt(route, table, held_tokens, kept_tokens, asked_s),
                self._tries,
                self._has_elsewhere,
            )
            try:
                with parts.fleet.busy(route.decode.id):
                    await attempt.run(counts, self._is_answered)
            except (EngineFailed, KvMismatch, PeerGone) as error:
                ended = attempt.ended(error)
                failure = ended.error
                self._go_on(route, ended)
                if self._course.ending is not None:
                    await self._out.end(self._course.ending)
                else:
                    resumed = self._course.prompt_ids()
                    prompts = [resumed] if resumed is not None else prompts
                    self._facts = self._facts_of(prompts)
                    continue
            parts.metrics.finished(route.why)
            counts.finish(prompt_tokens, held_tokens, self._course.answer_tokens)
            return

    def _choose(self, prompts: list[list[int]], failure: EngineFailed | None) -> tuple[Route, int]:
        """The next pair, and the tokens that its decode worker is known to hold. `failure`: what
        ended the attempt before."""
        look_up = len(prompts) == 1 and self._request.cache_salt is None
        try:
            route, held_tokens = self._parts.fleet.choose(
                self._facts,
                prompts[0] if look_up else (),
                self._tries.excluded,
                self._tries.why,
                self._tries.may_prefill_elsewhere,
                self._tries.gave_back,
            )
        except NoCapacity as nobody:
            if failure is None or not self._out.is_started:
                raise
            why = f"{failure.why}; nobody else can go on with the answer: {nobody}"
            raise EngineFailed(failure.worker, failure.status, why) from failure
        self._name_route(route)
        self._route = route
        return route, held_tokens

    def _has_elsewhere(self, worker: WorkerId) -> bool:
        facts, is_started = self._facts, self._out.is_started
        if is_started and self._route is not None:
            facts = replace(facts, revision=self._route.decode.model_revision)
        route = self._parts.fleet.route_beside(facts, worker, self._tries.excluded)
        if route is None:
            return False
        must_take_tokens = is_started and self._course.way is Way.CONTINUE
        return not (must_take_tokens and goes_together(route))

    def _go_on(self, route: Route, ended: Ended) -> None:
        """Take note of how an attempt ended, and prepare for another pair.

        Raises: EngineFailed, ApiError: there may be no other."""
        course, failure = self._course, ended.error
        self._tries = recovery.after(self._tries, route, ended)
        self._note(route, ended)
        if self._tries.is_poisonous:
            names = tuple(worker.name for worker in self._tries.lost)
            self._parts.metrics.poisonous.inc()
            self._parts.tally.poisonous(names, self._story.request_id)
            raise errors.request_kills_engines(names)
        if self._out.is_started:
            why_not = course.interrupted(self._answer.decode)
            if why_not:
                why = f"{failure.why}; the answer cannot go on elsewhere: {why_not}"
                raise EngineFailed(failure.worker, failure.status, why)
        if course.ending is None and not self._tries.may_go_on:
            raise failure
        if self._out.is_started or course.kept_tokens:
            self._revision = route.decode.model_revision
            cause = ended.cause.value
            self._parts.metrics.recoveries.labels(course.way.value, cause).inc()
            self._parts.tally.continued(route.decode.id.name, cause, self._story.request_id)

    # Prompt

    async def _render(self) -> list[list[int]]:
        if self._plan.flow is Flow.ALONE:
            return []
        try:
            prompts = await self._parts.renderer.prompt_ids(
                self._request, self._id, self._story.trace.lines(0)
            )
        except CannotRender as reason:
            self._plan = Plan(Flow.ALONE, str(reason))
            return []
        longest = max(len(ids) for ids in prompts)
        answer_tokens = self._request.answer_tokens or 0
        limit = self._parts.fleet.table.longest_tokens
        if limit and longest + max(1, answer_tokens) > limit:
            raise errors.context_length_exceeded(
                limit, longest, answer_tokens, self._request.prompt_param
            )
        return prompts

    def _facts_of(self, prompts: list[list[int]]) -> Facts:
        return Facts(
            prompt_tokens=max((len(ids) for ids in prompts), default=0),
            answer_tokens=max(0, (self._request.answer_tokens or 0) - self._course.kept_tokens),
            alone=self._plan.why if self._plan.flow is Flow.ALONE else "",
            revision=self._revision,
        )

    # What is said of it

    def _name_route(self, route: Route) -> None:
        prefill = route.prefill.id.name if route.prefill is not None else "none"
        self._out.route_headers = [
            (b"x-pdcluster-prefill", prefill.encode("ascii")),
            (b"x-pdcluster-decode", route.decode.id.name.encode("ascii")),
            (b"x-pdcluster-route", route.why.encode("ascii")),
        ]

    def _note(self, route: Route, ended: Ended) -> None:
        is_prefill = ended.stage is Stage.PREFILL and route.prefill is not None
        worker = route.prefill.id if is_prefill and route.prefill is not None else route.decode.id
        self._story.left(worker.name, ended)
        is_failure = ended.cause in (Cause.FAILED, Cause.HUNG)
        found = self._parts.tally.standings.blame(route, ended)
        if found is not None:
            self._blames.append(found)
        if is_failure and errors.is_mark(ended.error):
            self._parts.fleet.suspect(worker)
            self._parts.metrics.engine_failures.labels(worker.pool, ended.stage.value).inc()
        if not self._out.is_started:
            why = self._tries.why if ended.cause is Cause.FAILED else ended.cause.value
            self._parts.metrics.retries.labels(why).inc()

    def _is_answered(self) -> None:
        if self._route is not None:
            self._parts.tally.standings.answered(self._route)
        self._tell_failures(is_proven=True)

    def _tell_failures(self, is_proven: bool) -> None:
        if self._blames:
            request = zlib.crc32(orjson.dumps(self._request.body))
            self._parts.tally.standings.failed(self._blames, request, is_proven)
            self._blames = []
