"""One request at one pair of workers: bring the prompt's blocks to decode, pass the answer on.

    begin    `orders` calls both engines; ends with the first of the answer. Nothing has been sent
             from this pair yet: it can be cut off anywhere
    flow     `answer` passes the rest on; it can be cut off between two pieces

When a worker lets go of its requests (`leaving`), the attempts at it are told. From a drained one
an attempt leaves only if its request can go on somewhere else: what has begun and cannot be
continued truthfully, or has nowhere to go, stays as long as the engine answers. From a worker that
hangs or is gone everything leaves. Called by: gateway.exchange.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import orjson

from cluster.errors import EngineFailed, KvMismatch, PeerGone
from cluster.gateway import bodies, recovery
from cluster.gateway.answer import Answer, HandedBack
from cluster.gateway.course import Course, Way
from cluster.gateway.errors import EngineLeft, Rejected
from cluster.gateway.leaving import Why
from cluster.gateway.orders import KINDS, DecodeCall, Passage, PrefillCall
from cluster.gateway.parts import Parts
from cluster.gateway.plan import Flow
from cluster.gateway.recovery import Cause, Ended, Stage, Tries
from cluster.gateway.requests import GatewayRequest
from cluster.gateway.route import Route
from cluster.gateway.tally import PairCounts
from cluster.gateway.trace_context import Trace
from cluster.identity import WorkerId
from cluster.kv.dialects import ORDERS, Fields, Order
from cluster.kv.lease import Failure
from cluster.request_records import AttemptRecord
from cluster.snapshot import WorkerView

T = TypeVar("T")
# Prompts of one request that are prefilled and pulled at the same time.
_STAGED_AT_ONCE = 4
_CAUSES = {
    Why.DRAINED: Cause.DRAINED,
    Why.STOPPED: Cause.DRAINED,
    Why.HUNG: Cause.HUNG,
    Why.GONE: Cause.FAILED,
}
_SAID = {
    Why.DRAINED: "it drains, and its time is over",
    Why.STOPPED: "it was ended on request",
    Why.HUNG: "it hangs",
    Why.GONE: "it has ended or was replaced",
}


@dataclass(frozen=True, slots=True)
class Ask:
    """What all attempts at a request have in common."""

    request: GatewayRequest
    course: Course
    answer: Answer
    flow: Flow
    deadline_at: float  # in the loop's clock
    trace: Trace
    now_s: Callable[[], float]  # since the request arrived


class Attempt:
    """`await run()` once; `let_go` may come at any time. Cancel: closes the calls to both engines
    and gives the lease back."""

    def __init__(
        self,
        parts: Parts,
        ask: Ask,
        route: Route,
        prompts: list[list[int]],
        number: int,
        attempt_id: str,
        record: AttemptRecord,
        tries: Tries,
        has_elsewhere: Callable[[WorkerId], bool],
    ) -> None:
        """`prompts`: token ids; none: the engines make them. `number`: 0 for the request's first.
        `record`: is filled with how long what takes. `tries`: before this one. `has_elsewhere`:
        whether the request could go on now without a worker."""
        self._parts = parts
        self._ask = ask
        self._route = route
        self._prompts = prompts
        self._number = number
        self._id = attempt_id
        self._record = record
        self._tries = tries
        self._has_elsewhere = has_elsewhere
        self._passage: Passage[None] | None = None
        self._beginning: asyncio.Timeout | None = None
        self._has_flowed = False
        self._left: tuple[WorkerId, Why] | None = None

    async def run(self, counts: PairCounts, answers: Callable[[], None]) -> None:
        """`answers`: told once the engines have begun to answer, beyond doubt.

        Raises: EngineFailed, KvMismatch, PeerGone: see `ended`; Rejected; NoCapacity."""
        fleet, ask, decode = self._parts.fleet, self._ask, self._route.decode.id
        failure = Failure.GIVEN_UP
        fleet.join(decode, self)
        try:
            await self._begin()
            self._has_flowed = ask.request.is_stream
            await ask.answer.pass_on(ask.course, counts, answers)
        except BaseException as error:
            failure = self._failure(error)
            raise
        finally:
            self._record.ended_s = ask.now_s()
            fleet.part(decode, self)
            # Forgotten here: its calls know this attempt, and a cycle would wait for the collector
            # with all its tokens.
            passage, self._passage = self._passage, None
            if passage is not None:
                await passage.close(ask.answer.close, failure)
            else:
                ask.answer.close()

    def let_go(self, worker: WorkerId, why: Why) -> None:
        """See fleet.AtWork."""
        if self._left is not None or (why is Why.DRAINED and not self._may_leave(worker)):
            return
        self._left = (worker, why)
        if self._beginning is not None:
            self._beginning.reschedule(asyncio.get_running_loop().time())
        else:
            self._ask.answer.break_off(_SAID[why])

    def ended(self, error: EngineFailed | KvMismatch | PeerGone) -> Ended:
        """What `run` raised, and which of the two engines it came from."""
        if isinstance(error, HandedBack):
            return Ended(Cause.RECOMPUTED, Stage.DECODE, error, has_flowed=True)
        cause = Cause.FAILED
        if self._left is not None:
            worker, why = self._left
            cause, error = _CAUSES[why], EngineLeft(worker.name, None, _SAID[why])
        failure, stage = _blame(error, self._route)
        return Ended(cause, stage, failure, self._has_flowed)

    def _failure(self, error: BaseException) -> Failure:
        """Why the prompt's blocks did not get to decode, where `error` came before them."""
        if isinstance(error, EngineFailed | KvMismatch | PeerGone):
            return recovery.transfer_failure(self.ended(error))
        return Failure.REFUSED if isinstance(error, Rejected) else Failure.GIVEN_UP

    def _may_leave(self, worker: WorkerId) -> bool:
        ask = self._ask
        has_begun = self._beginning is None
        if has_begun and not ask.course.may_leave(ask.answer.decode):
            return False
        return self._tries.may_move and self._has_elsewhere(worker)

    # Begin

    async def _begin(self) -> None:
        fleet, prefill = self._parts.fleet, self._route.prefill
        if prefill is not None:
            fleet.join(prefill.id, self)
        try:
            async with asyncio.timeout(None) as self._beginning:
                if self._tries.is_suspect:
                    async with self._turn():
                        await self._check_engines()
                        await self._call_engines()
                else:
                    await self._call_engines()
        except TimeoutError:
            if self._left is None:
                raise
        finally:
            self._beginning = None
            if prefill is not None:
                fleet.part(prefill.id, self)
        if self._left is not None:
            worker, why = self._left
            raise EngineLeft(worker.name, None, _SAID[why])

    def _turn(self) -> contextlib.AbstractAsyncContextManager[None]:
        prefill, decode = self._route.prefill, self._route.decode
        workers = (decode.id,) if prefill is None else (prefill.id, decode.id)
        return self._parts.quarantine.turn(workers)

    async def _check_engines(self) -> None:
        """An engine that is gone before a suspect comes to it says nothing against the suspect:
        hosts take all their engines along."""
        for worker in (self._route.prefill, self._route.decode):
            if worker is not None:
                await self._parts.engines.check_up(worker)

    async def _call_engines(self) -> None:
        route, ask = self._route, self._ask
        is_of_ids = ask.flow is Flow.DISAGGREGATE
        if route.prefill is not None and goes_together(route):
            if has_tokens_to_keep(ask.course):
                why = "its island takes no token ids, so it cannot go on with a broken answer"
                raise EngineFailed(route.decode.id.name, None, why)
            # Each engine makes the prompt's ids itself, and as many answers as are wanted.
            self._passage = self._passage_of_answer(None)
        elif route.prefill is not None and is_of_ids:
            self._passage = self._passage_of_answer(self._prompts[0])
        if self._passage is not None:
            await self._passage.begin()
            return
        if route.prefill is not None:
            await self._stage_prompts()
        request = self._request_to_decode()
        body = bodies.answering(request, self._prompts[0] if is_of_ids else None, {})
        await self._begin_answer(body)

    async def _begin_answer(self, body: Mapping[str, Any]) -> None:
        ask, record = self._ask, self._record
        record.decode_s = ask.now_s()
        trace = ask.trace.lines(self._number, Stage.DECODE)
        await ask.answer.begin(self._route.decode, body, self._id, trace)
        record.first_s = ask.now_s()

    def _passage_of_answer(self, prompt_ids: list[int] | None) -> Passage[None]:
        """Blocks from one engine, the answer to the client from the other."""
        engines, request = self._parts.engines, self._request_to_decode()
        prefill, record = self._route.prefill, self._record
        assert prefill is not None

        async def call_prefill(order: Order, fields: Fields) -> Mapping[str, Any]:
            trace = self._ask.trace.lines(self._number, Stage.PREFILL)
            record.prefill_s = self._ask.now_s()
            if order is Order.PREFILL_FIRST and prompt_ids is not None:
                answer = await engines.compute_prompt(
                    prefill, prompt_ids, fields, request.body, self._id, trace
                )
                record.prefilled_s = self._ask.now_s()
                return answer
            body = bodies.answering(request, prompt_ids, fields)
            if order is Order.DECODE_FIRST:
                body = bodies.prefilling(body)
            await engines.run(prefill, request.endpoint, orjson.dumps(body), self._id, trace)
            record.prefilled_s = self._ask.now_s()
            return {}

        async def call_decode(fields: Fields) -> None:
            record.transfer_s = self._ask.now_s()
            await self._begin_answer(bodies.answering(request, prompt_ids, fields))
            record.transferred_s = record.first_s

        return self._make_passage(prompt_ids or (), self._id, call_prefill, call_decode)

    def _request_to_decode(self) -> GatewayRequest:
        """The client's request, less what other engines have answered of it."""
        ask = self._ask
        return replace(ask.request, body=ask.course.body(self._route.decode))

    async def _stage_prompts(self) -> None:
        """Bring each prompt's blocks into the decode worker's prefix cache."""
        places = asyncio.Semaphore(_STAGED_AT_ONCE)

        async def stage(prompt_ids: list[int], request_id: str) -> None:
            async with places:
                passage = self._passage_of_prompt(prompt_ids, request_id)
                failure = Failure.GIVEN_UP
                try:
                    await passage.begin()
                except BaseException as error:
                    failure = self._failure(error)
                    raise
                finally:
                    await passage.close(_nothing_to_close, failure)

        try:
            async with asyncio.TaskGroup() as group:
                for index, prompt_ids in enumerate(self._prompts):
                    group.create_task(
                        stage(prompt_ids, f"{self._id}p{index}"), name=f"stage {self._id}"
                    )
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    def _passage_of_prompt(
        self, prompt_ids: list[int], request_id: str
    ) -> Passage[Mapping[str, Any]]:
        """Blocks from one engine to the other, and no answer."""
        engines, body = self._parts.engines, self._ask.request.body
        prefill, decode = self._route.prefill, self._route.decode
        now_s, record = self._ask.now_s, self._record
        assert prefill is not None

        def compute(worker: WorkerView, stage: Stage, fields: Fields) -> Awaitable[dict[str, Any]]:
            trace = self._ask.trace.lines(self._number, stage)
            return engines.compute_prompt(worker, prompt_ids, fields, body, request_id, trace)

        async def call_prefill(order: Order, fields: Fields) -> Mapping[str, Any]:
            if record.prefill_s is None:
                record.prefill_s = now_s()
            answer = await compute(prefill, Stage.PREFILL, fields)
            record.prefilled_s = now_s()  # the last of them
            return answer

        async def call_decode(fields: Fields) -> Mapping[str, Any]:
            if record.transfer_s is None:
                record.transfer_s = now_s()
            answer = await compute(decode, Stage.DECODE, fields)
            record.transferred_s = now_s()
            return answer

        return self._make_passage(prompt_ids, request_id, call_prefill, call_decode)

    def _make_passage(
        self,
        prompt_ids: Sequence[int],
        request_id: str,
        call_prefill: PrefillCall,
        call_decode: DecodeCall[T],
    ) -> Passage[T]:
        route, parts = self._route, self._parts
        assert route.prefill is not None
        assert route.link is not None
        transfer = parts.coordinator.begin(
            request_id, prompt_ids, route.prefill, route.decode, route.link
        )
        left_s = self._ask.deadline_at - asyncio.get_running_loop().time()
        budget_s = recovery.attempt_budget_s(left_s, self._tries)
        return KINDS[transfer.order](
            transfer, parts.fleet, parts.metaserver, budget_s, call_prefill, call_decode
        )


def goes_together(route: Route) -> bool:
    """Whether both engines get the client's own words: they cannot be given tokens."""
    return route.link is not None and ORDERS[route.link.connector] is Order.TOGETHER


def has_tokens_to_keep(course: Course) -> bool:
    """Whether the next engine must be given tokens that were sent."""
    return course.way is Way.CONTINUE and course.kept_tokens > 0


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
