"""One request, from validated body to last byte.

Render, route, prefill, decode, pass bytes on. Until the first byte has gone to the client any
failure of an engine leads to another pair (`recovery`); after it, the stream ends with an error
event, truthfully. Bytes of a stream are not parsed: only cut at event boundaries, so that what
follows a broken event is still readable.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from cluster.errors import EngineFailed, KvMismatch, PeerGone
from cluster.gateway import errors, recovery
from cluster.gateway.config import GatewayConfig
from cluster.gateway.engines import Engines, excerpt, next_piece, read
from cluster.gateway.fleet import Fleet
from cluster.gateway.plan import Flow, Plan, plan
from cluster.gateway.recovery import Stage, Tries
from cluster.gateway.render import CannotRender, Renderer
from cluster.gateway.requests import Endpoint, GatewayRequest
from cluster.gateway.route import Facts, Route
from cluster.gateway.upstream import UpstreamResponse
from cluster.gateway.wire import Responder
from cluster.kv.coordinator import Coordinator, Transfer
from cluster.observe.gateway_metrics import GatewayMetrics

log = logging.getLogger(__name__)

_ERROR_EVENT = b'data: {"error"'
# Prompts of one request that are prefilled and pulled at the same time.
_STAGED_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Parts:
    """What requests share within one gateway replica."""

    config: GatewayConfig
    fleet: Fleet
    renderer: Renderer
    engines: Engines
    coordinator: Coordinator
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
        self._began_at = asyncio.get_running_loop().time()
        self._plan: Plan = plan(request)
        self._tries = Tries(parts.config.prefill_attempts)

    async def run(self) -> None:
        """Raises, with nothing or a part of a stream sent: EngineFailed, NoCapacity, Rejected,
        ApiError."""
        prompts = await self._render()
        facts = self._facts(prompts)
        fleet = self._parts.fleet
        look_up = prompts[0] if len(prompts) == 1 and self._request.cache_salt is None else ()
        number = 0
        while True:
            route, held_tokens = fleet.choose(
                facts,
                look_up,
                self._tries.excluded,
                self._tries.why,
                self._tries.may_prefill_elsewhere,
            )
            self._name_route(route)
            try:
                with fleet.busy(route.decode.id):
                    await self._attempt(route, prompts, f"{self._id}.{number}")
                self._parts.metrics.finished(route.why, facts.prompt_tokens, held_tokens)
                return
            except (EngineFailed, KvMismatch, PeerGone) as error:
                failure, stage = _blame(error, route)
                self._mark(route, stage)
                if self._out.is_started:
                    raise failure from error
                self._tries = recovery.after(self._tries, route, stage, failure)
                self._parts.metrics.retries.labels(self._tries.why).inc()
                log.warning("%s failed over why=%s: %s", self._id, self._tries.why, failure)
                if not self._tries.may_go_on:
                    raise failure from error
            number += 1

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
            answer_tokens=self._request.answer_tokens or 0,
            alone=self._plan.why if self._plan.flow is Flow.ALONE else "",
        )

    # One pair

    async def _attempt(self, route: Route, prompts: list[list[int]], attempt_id: str) -> None:
        if route.prefill is None:
            await self._decode(route, self._decode_body(prompts, {}), attempt_id, None)
        elif self._plan.flow is Flow.STAGE:
            await self._stage_prompts(route, prompts, attempt_id)
            await self._decode(route, orjson.dumps(self._request.body), attempt_id, None)
        else:
            transfer = await self._prefill(route, prompts[0], attempt_id)
            try:
                body = self._decode_body(prompts, await transfer.decode_params())
                await self._decode(route, body, attempt_id, transfer)
            finally:
                transfer.abandon("the decode call ended before its first byte")

    async def _prefill(self, route: Route, prompt_ids: list[int], request_id: str) -> Transfer:
        """Compute the prompt on `route.prefill`. Whoever gets the transfer must end it."""
        assert route.prefill is not None
        assert route.link is not None
        prefill = route.prefill
        transfer = self._parts.coordinator.begin(
            request_id, prompt_ids, prefill, route.decode, route.link
        )
        left_s = self._deadline_at - asyncio.get_running_loop().time()
        budget_s = recovery.attempt_budget_s(left_s, self._tries)
        try:
            async with asyncio.timeout(budget_s):
                with self._parts.fleet.busy(prefill.id):
                    answer = await self._parts.engines.compute_prompt(
                        prefill,
                        prompt_ids,
                        await transfer.prefill_params(),
                        self._request.body,
                        request_id,
                    )
            transfer.prefilled(answer)
        except TimeoutError:
            transfer.abandon("prefill timed out")
            raise EngineFailed(
                prefill.id.name, None, f"prefill took longer than {budget_s:.1f} s"
            ) from None
        except BaseException as error:
            transfer.abandon(f"prefill ended with {type(error).__name__}")
            raise
        return transfer

    async def _stage_prompts(self, route: Route, prompts: list[list[int]], attempt_id: str) -> None:
        """Bring each prompt's blocks into the decode worker's prefix cache."""
        places = asyncio.Semaphore(_STAGED_AT_ONCE)

        async def stage(prompt_ids: list[int], request_id: str) -> None:
            async with places:
                transfer = await self._prefill(route, prompt_ids, request_id)
                try:
                    await self._parts.engines.compute_prompt(
                        route.decode,
                        prompt_ids,
                        await transfer.decode_params(),
                        self._request.body,
                        request_id,
                    )
                    transfer.finish()
                finally:
                    transfer.abandon("the pull ended without an answer")

        try:
            async with asyncio.TaskGroup() as group:
                for index, prompt_ids in enumerate(prompts):
                    group.create_task(
                        stage(prompt_ids, f"{attempt_id}p{index}"), name=f"stage {attempt_id}"
                    )
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    def _decode_body(self, prompts: list[list[int]], params: Mapping[str, Any]) -> bytes:
        """The client's own request, with ids in place of what they were made from."""
        body = self._request.body
        if self._plan.flow is not Flow.DISAGGREGATE:
            return orjson.dumps(body)
        if self._request.endpoint is Endpoint.CHAT:
            return orjson.dumps(
                {**body, "kv_transfer_params": {**params, "prompt_token_ids": prompts[0]}}
            )
        changed = {**body, "prompt": prompts[0]}
        if params:
            changed["kv_transfer_params"] = params
        return orjson.dumps(changed)

    # Answer

    async def _decode(
        self, route: Route, body: bytes, request_id: str, transfer: Transfer | None
    ) -> None:
        response = await self._parts.engines.open(
            route.decode, self._request.endpoint, body, request_id
        )
        async with response:
            content_type = response.headers.get(b"content-type", b"application/json")
            headers = [(b"content-type", content_type)]
            if self._request.is_stream:
                await self._stream(route, response, headers, transfer)
                return
            answer = await read(route.decode, response)
            if transfer is not None:
                transfer.finish()
            await self._out.whole(200, answer, headers)

    async def _stream(
        self,
        route: Route,
        response: UpstreamResponse,
        headers: errors.Headers,
        transfer: Transfer | None,
    ) -> None:
        decode = route.decode
        piece = await next_piece(decode, response)
        if not piece:
            raise EngineFailed(decode.id.name, None, "its stream ended before the first token")
        if piece.startswith(_ERROR_EVENT):
            _raise_early_error(decode.id.name, piece)
        if transfer is not None:
            transfer.finish()
        clock = asyncio.get_running_loop().time
        first_at = clock()
        self._parts.metrics.ttft_s.observe(first_at - self._began_at)
        await self._out.begin_events(200, headers)
        rest = b""
        gaps = 0
        while piece:
            if rest or not piece.endswith(b"\n\n"):
                piece, rest = _whole_events(rest + piece)
            if piece:
                await self._out.piece(piece)
            piece = await next_piece(decode, response)
            gaps += 1
        if gaps > 1:
            self._parts.metrics.itl_s.observe((clock() - first_at) / gaps)
        await self._out.end(rest)

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


def _whole_events(data: bytes) -> tuple[bytes, bytes]:
    cut = data.rfind(b"\n\n") + 2
    return (b"", data) if cut == 1 else (data[:cut], data[cut:])


def _raise_early_error(worker: str, piece: bytes) -> None:
    """An engine reports an error as the first event of a stream: nothing was sent yet, so it can
    still be told, or made good, the right way. Raises: EngineFailed, Rejected."""
    event = piece.partition(b"\n\n")[0].removeprefix(b"data: ")
    try:
        status = int(orjson.loads(event)["error"]["code"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        status = 500
    if 400 <= status < 500:
        raise errors.Rejected(status, event, b"application/json")
    raise EngineFailed(worker, status, excerpt(event))


def _blame(error: EngineFailed | KvMismatch | PeerGone, route: Route) -> tuple[EngineFailed, Stage]:
    """The failure, and which of the two engines it came from."""
    prefill = route.prefill
    if not isinstance(error, EngineFailed):
        source = prefill if prefill is not None else route.decode
        return EngineFailed(source.id.name, None, str(error)), Stage.PREFILL
    is_prefill = prefill is not None and error.worker in (prefill.id.name, str(prefill.id))
    return error, Stage.PREFILL if is_prefill else Stage.DECODE
