"""One request, from validated body to last byte.

Render, route, bring the prompt's blocks to decode (`orders`), pass its answer on (`answer`). A
failure of an engine leads to another pair (`recovery`), also in the middle of an answer where the
rest is certain to be what an undisturbed run would have said (`course`). Else the stream ends with
an error event, truthfully.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import orjson

from cluster.errors import EngineFailed, KvMismatch, NoCapacity, PeerGone
from cluster.gateway import bodies, errors, recovery
from cluster.gateway.answer import Answer, HandedBack
from cluster.gateway.config import GatewayConfig
from cluster.gateway.course import Course, Way
from cluster.gateway.engines import Engines
from cluster.gateway.fleet import Fleet
from cluster.gateway.metaserver import Metaserver
from cluster.gateway.orders import KINDS, DecodeCall, Passage, PrefillCall
from cluster.gateway.plan import Flow, Plan, plan
from cluster.gateway.recovery import Stage, Tries
from cluster.gateway.render import CannotRender, Renderer
from cluster.gateway.requests import GatewayRequest
from cluster.gateway.route import Facts, Route
from cluster.gateway.wire import Responder
from cluster.kv.coordinator import Coordinator
from cluster.kv.dialects import ORDERS, Fields, Order
from cluster.observe.gateway_metrics import GatewayMetrics
from cluster.snapshot import WorkerView

log = logging.getLogger(__name__)

T = TypeVar("T")
# Prompts of one request that are prefilled and pulled at the same time.
_STAGED_AT_ONCE = 4
# An engine that is short of KV blocks may give a request back again and again.
_MOST_HANDED_BACK = 8


@dataclass(frozen=True, slots=True)
class Parts:
    """What requests share within one gateway replica."""

    config: GatewayConfig
    fleet: Fleet
    renderer: Renderer
    engines: Engines
    coordinator: Coordinator
    metaserver: Metaserver
    metrics: GatewayMetrics


class Exchange:
    """`await run()` once. Cancel: closes the calls to both engines and gives the lease back."""

    def __init__(
        self,
        parts: Parts,
        request: GatewayRequest,
        responder: Responder,
        engine_request_id: str,
        deadline_at: float,
    ) -> None:
        self._parts = parts
        self._request = request
        self._out = responder
        self._id = engine_request_id
        self._deadline_at = deadline_at
        skips = request.body.get("skip_special_tokens") is not False
        self._answer = Answer(
            parts.engines,
            parts.metrics,
            request,
            responder,
            asyncio.get_running_loop().time(),
            lambda ids: parts.renderer.decode(ids, skips),
        )
        self._plan: Plan = plan(request)
        self._tries = Tries(parts.config.prefill_attempts)
        self._handed_back = 0

    async def run(self) -> None:
        """Raises, with nothing or a part of a stream sent: EngineFailed, NoCapacity, Rejected,
        ApiError."""
        prompts = await self._render()
        self._course = Course(
            self._request,
            prompts[0] if self._plan.flow is Flow.DISAGGREGATE else None,
            self._parts.config.has_reasoning_parser,
        )
        fleet = self._parts.fleet
        salted = self._request.cache_salt is not None
        facts = self._facts(prompts)
        failure: EngineFailed | None = None
        for number in itertools.count():
            look_up = prompts[0] if len(prompts) == 1 and not salted else ()
            try:
                route, held_tokens = fleet.choose(
                    facts,
                    look_up,
                    self._tries.excluded,
                    self._tries.why,
                    self._tries.may_prefill_elsewhere,
                )
            except NoCapacity as nobody:
                if failure is None or not self._out.is_started:
                    raise
                why = f"{failure.why}; nobody else can go on with the answer: {nobody}"
                raise EngineFailed(failure.worker, failure.status, why) from failure
            self._name_route(route)
            try:
                with fleet.busy(route.decode.id):
                    await self._attempt(route, prompts, f"{self._id}.{number}")
                self._parts.metrics.finished(route.why, facts.prompt_tokens, held_tokens)
                return
            except HandedBack as stop:
                self._handed_back += 1
                self._may_go_on(stop, "recomputed", self._handed_back < _MOST_HANDED_BACK)
            except (EngineFailed, KvMismatch, PeerGone) as error:
                failure, stage = _blame(error, route)
                self._mark(route, stage)
                self._tries = recovery.after(self._tries, route, stage, failure)
                self._parts.metrics.retries.labels(self._tries.why).inc()
                log.warning("%s failed over why=%s: %s", self._id, self._tries.why, failure)
                self._may_go_on(failure, "failed", self._tries.may_go_on)
            if self._course.ending is not None:
                await self._out.end(self._course.ending)
                return
            resumed = self._course.prompt_ids()
            if resumed is not None:
                prompts = [resumed]
                facts = self._facts(prompts)

    def _may_go_on(self, failure: EngineFailed, cause: str, is_in_bounds: bool) -> None:
        """Prepare the course for another engine. Raises: `failure`, if there may be none."""
        course = self._course
        if not is_in_bounds:
            raise failure
        if self._out.is_started:
            why_not = course.interrupted(self._answer.decode)
            if why_not:
                why = f"{failure.why}; the answer cannot go on elsewhere: {why_not}"
                raise EngineFailed(failure.worker, failure.status, why)
        if self._out.is_started or course.kept_tokens:
            self._parts.metrics.recoveries.labels(course.way.value, cause).inc()

    # Prompt

    async def _render(self) -> list[list[int]]:
        if self._plan.flow is Flow.ALONE:
            return []
        try:
            prompts = await self._parts.renderer.prompt_ids(self._request)
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

    def _facts(self, prompts: list[list[int]]) -> Facts:
        return Facts(
            prompt_tokens=max((len(ids) for ids in prompts), default=0),
            answer_tokens=max(0, (self._request.answer_tokens or 0) - self._course.kept_tokens),
            alone=self._plan.why if self._plan.flow is Flow.ALONE else "",
        )

    # One pair

    async def _attempt(self, route: Route, prompts: list[list[int]], attempt_id: str) -> None:
        passage: Passage[None] | None = None
        try:
            if route.prefill is not None and _goes_together(route):
                self._check_takes_text(route)
                # Each engine makes the prompt's ids itself, and as many answers as are wanted.
                passage = self._passage_of_answer(route, None, attempt_id)
            elif route.prefill is not None and self._plan.flow is Flow.DISAGGREGATE:
                passage = self._passage_of_answer(route, prompts[0], attempt_id)
            if passage is not None:
                await passage.begin()
            else:
                if route.prefill is not None:
                    await self._stage_prompts(route, prompts, attempt_id)
                prompt_ids = prompts[0] if self._plan.flow is Flow.DISAGGREGATE else None
                request = self._request_to(route.decode)
                body = bodies.answering(request, prompt_ids, {})
                await self._answer.begin(route.decode, body, attempt_id)
            await self._answer.pass_on(self._course)
        finally:
            if passage is not None:
                await passage.close(self._answer.close)
            else:
                self._answer.close()

    def _passage_of_answer(
        self, route: Route, prompt_ids: list[int] | None, attempt_id: str
    ) -> Passage[None]:
        """Blocks from one engine, the answer to the client from the other."""
        engines, request = self._parts.engines, self._request_to(route.decode)
        prefill = route.prefill
        assert prefill is not None

        async def call_prefill(order: Order, fields: Fields) -> Mapping[str, Any]:
            if order is Order.PREFILL_FIRST and prompt_ids is not None:
                return await engines.compute_prompt(
                    prefill, prompt_ids, fields, request.body, attempt_id
                )
            body = bodies.answering(request, prompt_ids, fields)
            if order is Order.DECODE_FIRST:
                body = bodies.prefilling(body)
            await engines.run(prefill, request.endpoint, orjson.dumps(body), attempt_id)
            return {}

        async def call_decode(fields: Fields) -> None:
            body = bodies.answering(request, prompt_ids, fields)
            await self._answer.begin(route.decode, body, attempt_id)

        return self._passage(route, prompt_ids or (), attempt_id, call_prefill, call_decode)

    def _request_to(self, decode: WorkerView) -> GatewayRequest:
        """The client's request, less what other engines have answered of it."""
        return replace(self._request, body=self._course.body(decode))

    def _check_takes_text(self, route: Route) -> None:
        """Raises: EngineFailed: these engines make ids of the client's prompt, and cannot be given
        the tokens that were sent."""
        if self._course.way is Way.CONTINUE and self._course.kept_tokens:
            why = "its island takes no token ids, so it cannot go on with a broken answer"
            raise EngineFailed(route.decode.id.name, None, why)

    async def _stage_prompts(self, route: Route, prompts: list[list[int]], attempt_id: str) -> None:
        """Bring each prompt's blocks into the decode worker's prefix cache."""
        places = asyncio.Semaphore(_STAGED_AT_ONCE)

        async def stage(prompt_ids: list[int], request_id: str) -> None:
            async with places:
                passage = self._passage_of_prompt(route, prompt_ids, request_id)
                try:
                    await passage.begin()
                finally:
                    await passage.close(_nothing_to_close)

        try:
            async with asyncio.TaskGroup() as group:
                for index, prompt_ids in enumerate(prompts):
                    group.create_task(
                        stage(prompt_ids, f"{attempt_id}p{index}"), name=f"stage {attempt_id}"
                    )
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    def _passage_of_prompt(
        self, route: Route, prompt_ids: list[int], request_id: str
    ) -> Passage[Mapping[str, Any]]:
        """Blocks from one engine to the other, and no answer."""
        engines, body = self._parts.engines, self._request.body
        prefill = route.prefill
        assert prefill is not None

        async def call_prefill(order: Order, fields: Fields) -> Mapping[str, Any]:
            return await engines.compute_prompt(prefill, prompt_ids, fields, body, request_id)

        async def call_decode(fields: Fields) -> Mapping[str, Any]:
            return await engines.compute_prompt(route.decode, prompt_ids, fields, body, request_id)

        return self._passage(route, prompt_ids, request_id, call_prefill, call_decode)

    def _passage(
        self,
        route: Route,
        prompt_ids: Sequence[int],
        request_id: str,
        call_prefill: PrefillCall,
        call_decode: DecodeCall[T],
    ) -> Passage[T]:
        assert route.prefill is not None
        assert route.link is not None
        parts = self._parts
        transfer = parts.coordinator.begin(
            request_id, prompt_ids, route.prefill, route.decode, route.link
        )
        left_s = self._deadline_at - asyncio.get_running_loop().time()
        budget_s = recovery.attempt_budget_s(left_s, self._tries)
        return KINDS[transfer.order](
            transfer, parts.fleet, parts.metaserver, budget_s, call_prefill, call_decode
        )

    # What is said of it

    def _name_route(self, route: Route) -> None:
        prefill = route.prefill.id.name if route.prefill is not None else "none"
        self._out.route_headers = [
            (b"x-pdcluster-prefill", prefill.encode("ascii")),
            (b"x-pdcluster-decode", route.decode.id.name.encode("ascii")),
            (b"x-pdcluster-route", route.why.encode("ascii")),
        ]

    def _mark(self, route: Route, stage: Stage) -> None:
        failed = route.decode
        if stage is Stage.PREFILL and route.prefill is not None:
            failed = route.prefill
        self._parts.fleet.suspect(failed.id)
        self._parts.metrics.engine_failures.labels(failed.id.pool, stage.value).inc()


def _goes_together(route: Route) -> bool:
    return route.link is not None and ORDERS[route.link.connector] is Order.TOGETHER


def _nothing_to_close() -> None:
    """A call for a single token closes itself."""


def _blame(error: EngineFailed | KvMismatch | PeerGone, route: Route) -> tuple[EngineFailed, Stage]:
    """The failure, and which of the two engines it came from."""
    prefill = route.prefill
    if not isinstance(error, EngineFailed):
        source = prefill if prefill is not None else route.decode
        return EngineFailed(source.id.name, None, str(error)), Stage.PREFILL
    is_prefill = prefill is not None and error.worker in (prefill.id.name, str(prefill.id))
    return error, Stage.PREFILL if is_prefill else Stage.DECODE
