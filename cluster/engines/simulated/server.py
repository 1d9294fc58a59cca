"""The HTTP face of a simulated engine: vLLM's routes, authentication and error answers."""

from __future__ import annotations

import asyncio
import hmac
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from aiohttp import web
from pydantic import ValidationError

from cluster.engines.simulated.answers import AnswerShape, Piece, usage_of
from cluster.engines.simulated.config import SimulatedConfig, meets_in_rooms
from cluster.engines.simulated.engine import Engine, RequestFailed
from cluster.engines.simulated.model import Vocabulary
from cluster.engines.simulated.protocol import (
    Ask,
    Refused,
    chat_prompt,
    check_length,
    completion_prompts,
    error_body,
    params_of_prompt,
    parse_ask,
    parse_body,
)
from cluster.engines.simulated.request import Request
from cluster.engines.simulated.stops import StopScanner

# The release whose API this is; what /version answers.
VERSION = "0.32.0+simulated"
MAX_BODY_BYTES = 256 * 2**20
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def json_answer(body: bytes, status: int = 200) -> web.Response:
    return web.Response(body=body, status=status, content_type="application/json")


def error_answer(message: str, status: int, param: str | None = None) -> web.Response:
    return json_answer(error_body(message, status, param), status)


async def together(parts: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of all parts. The first failure cancels the others. Raises: RequestFailed."""
    if len(parts) == 1:
        return [await parts[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(part) for part in parts]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    return [task.result() for task in tasks]


class Server:
    """Routes over one `Engine`. `api_key`: empty for an open port."""

    def __init__(self, engine: Engine, api_key: str) -> None:
        self._engine = engine
        self._config: SimulatedConfig = engine.config
        self._vocabulary: Vocabulary = engine.vocabulary
        self._api_key = api_key.encode()
        self._created_s = int(time.time())
        kv = self._config.kv
        self._in_rooms = kv is not None and meets_in_rooms(kv.dialect)

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._guard])
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions/render", self._render_completion)
        app.router.add_post("/v1/chat/completions/render", self._render_chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        app.router.add_get("/health", self._health)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        if self._config.fault_endpoint:
            app.router.add_post("/simulate/fault", self._fault)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if self._api_key and request.path.startswith("/v1") and not self._knows(request):
            return json_answer(b'{"error":"Unauthorized"}', 401)
        try:
            return await handler(request)
        except Refused as error:
            return error_answer(str(error), error.status, error.param)
        except web.HTTPException as error:
            return error_answer(error.reason, error.status)

    def _knows(self, request: web.Request) -> bool:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(token.encode(), self._api_key)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=False)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._generate(request, chat=True)

    async def _generate(self, request: web.Request, chat: bool) -> web.StreamResponse:
        body = parse_body(await request.read())
        try:
            ask = parse_ask(
                body, chat, self._config.served_model_name, self._vocabulary, self._in_rooms
            )
            check_length(ask, self._config.max_model_len_tokens)
        except Refused:
            kv_params = body.get("kv_transfer_params")
            if isinstance(kv_params, dict):
                self._engine.handover.decline(kv_params)
            raise
        faults, handover = self._engine.faults, self._engine.handover
        if handover.lacks_room(ask.kv_params):
            return error_answer("a disaggregated engine needs a bootstrap room id", 400)
        if faults.take_failure(ask.prompts):
            return error_answer("simulated server error", 500)
        if faults.spec.refuse_prefill and handover.prefills_for_peer(ask.kv_params):
            return error_answer("simulated refusal of prefill", 503)
        base = request.headers.get("X-Request-Id") or body.get("request_id") or uuid.uuid4().hex
        name = f"{'chatcmpl' if chat else 'cmpl'}-{base}"
        shape = AnswerShape(
            ask, name, int(time.time()), self._config.served_model_name, self._vocabulary
        )
        runs = [self._request(ask, name, at) for at in range(len(ask.prompts))]
        if ask.stream:
            return await self._stream(request, shape, runs)
        return await self._whole(shape, runs)

    def _request(self, ask: Ask, name: str, at: int) -> Request:
        ids = ask.prompts[at]
        room = self._config.max_model_len_tokens - len(ids)
        # The engine's own id is the API's with a random end, as in vLLM: ids stay unique even if
        # a router sends the same one twice.
        number = "" if ask.chat else f"-{at}"
        return Request(
            request_id=f"{name}{number}-{uuid.uuid4().hex[:8]}",
            prompt_ids=ids,
            max_tokens=room if ask.max_tokens is None else min(room, ask.max_tokens),
            min_tokens=ask.min_tokens,
            ignore_eos=ask.ignore_eos,
            stop_token_ids=ask.stop_token_ids,
            kv_params=params_of_prompt(ask.kv_params, at),
            copies=ask.n,
        )

    async def _speak(self, ask: Ask, run: Request) -> AsyncGenerator[Piece, None]:
        """Steps of the engine as text, cut at stop strings. Raises: RequestFailed."""
        text_of = self._vocabulary.text
        scanner = StopScanner(ask.stop, ask.include_stop)
        made = 0
        async with aclosing(self._engine.generate(run)) as steps:
            async for step in steps:
                made += len(step.ids)
                text = "".join([text_of.get(token, "") for token in step.ids])
                if made > run.min_tokens:
                    text, stop = scanner.push(text)
                    if stop is not None:
                        yield Piece(text, step.ids, "stop", stop)
                        return
                if step.finish is not None:
                    yield Piece(text + scanner.rest(), step.ids, step.finish, step.stop_reason)
                    return
                yield Piece(text, step.ids)

    async def _collect(self, ask: Ask, run: Request) -> Piece:
        texts: list[str] = []
        ids: list[int] = []
        async with aclosing(self._speak(ask, run)) as pieces:
            async for piece in pieces:
                texts.append(piece.text)
                ids += piece.ids
        return Piece("".join(texts), ids, piece.finish, piece.stop_reason)

    async def _whole(self, shape: AnswerShape, runs: Sequence[Request]) -> web.Response:
        ask = shape.ask
        try:
            pieces = await together([self._collect(ask, run) for run in runs])
        except RequestFailed as error:
            print(f"{shape.id} failed: {error}", flush=True)
            return error_answer("Internal server error", 500)
        usage = usage_of(
            sum(len(run.prompt_ids) for run in runs),
            sum(len(piece.ids) for piece in pieces) * ask.n,
            runs[-1].cached_tokens,
        )
        answers = [piece for piece in pieces for _ in range(ask.n)]
        return json_answer(shape.whole(answers, usage, runs[0].kv_answer))

    async def _stream(
        self, request: web.Request, shape: AnswerShape, runs: Sequence[Request]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        try:
            made = await together(
                [self._stream_one(response, shape, run, at) for at, run in enumerate(runs)]
            )
        except RequestFailed as error:
            print(f"{shape.id} failed: {error}", flush=True)
            await response.write(
                b"data: " + error_body("Internal server error", 500) + b"\n\n" + DONE
            )
            return response
        if shape.ask.include_usage:
            prompt_tokens = sum(len(run.prompt_ids) for run in runs)
            usage = usage_of(prompt_tokens, sum(made), runs[0].cached_tokens)
            await response.write(shape.usage_event(usage))
        await response.write(DONE)
        return response

    async def _stream_one(
        self, response: web.StreamResponse, shape: AnswerShape, run: Request, at: int
    ) -> int:
        """Chunks of one prompt's choices. Returns the number of output tokens of all of them."""
        ask = shape.ask
        fast = shape.fast_chunk()
        prompt_tokens = len(run.prompt_ids)
        made = 0
        async with aclosing(self._speak(ask, run)) as pieces:
            async for piece in pieces:
                first, made = made == 0, made + len(piece.ids)
                if first:
                    for event in shape.opening():
                        await response.write(event)
                # The first chunk of a completion may carry the prompt's ids.
                if fast is not None and piece.finish is None and not first:
                    await response.write(fast.of(piece))
                    continue
                given = run.prompt_ids if first and ask.return_token_ids else None
                usage = None
                if ask.continuous_usage:
                    usage = usage_of(prompt_tokens, made, run.cached_tokens)
                for copy in range(ask.n):
                    await response.write(shape.chunk(at * ask.n + copy, piece, given, usage))
        return made * ask.n

    async def _render_chat(self, request: web.Request) -> web.Response:
        body = parse_body(await request.read())
        ids = chat_prompt(body, body.get("kv_transfer_params") or {}, self._vocabulary)
        return json_answer(orjson.dumps(self._rendered(body, ids)))

    async def _render_completion(self, request: web.Request) -> web.Response:
        body = parse_body(await request.read())
        prompts = completion_prompts(body, self._vocabulary)
        return json_answer(orjson.dumps([self._rendered(body, ids) for ids in prompts]))

    def _rendered(self, body: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        return {
            "request_id": uuid.uuid4().hex,
            "token_ids": ids,
            "token_offsets": None,
            "features": None,
            "content_parts": None,
            "sampling_params": {"max_tokens": body.get("max_tokens"), "n": body.get("n") or 1},
            "model": self._config.served_model_name,
            "stream": bool(body.get("stream")),
            "stream_options": body.get("stream_options"),
            "kv_transfer_params": body.get("kv_transfer_params"),
        }

    async def _models(self, request: web.Request) -> web.Response:
        card = {
            "id": self._config.served_model_name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "vllm",
            "root": self._config.model_path,
            "parent": None,
            "max_model_len": self._config.max_model_len_tokens,
            "permission": [],
        }
        return json_answer(orjson.dumps({"object": "list", "data": [card]}))

    async def _tokenize(self, request: web.Request) -> web.Response:
        body = parse_body(await request.read())
        if "messages" in body:
            ids = chat_prompt(body, {}, self._vocabulary)
        else:
            ids = completion_prompts(body, self._vocabulary)[0]
        strings = [self._vocabulary.tokenizer.id_to_token(token) for token in ids]
        answer = {
            "count": len(ids),
            "max_model_len": self._config.max_model_len_tokens,
            "tokens": ids,
            "token_strs": strings if body.get("return_token_strs") else None,
        }
        return json_answer(orjson.dumps(answer))

    async def _detokenize(self, request: web.Request) -> web.Response:
        tokens = parse_body(await request.read()).get("tokens")
        if not isinstance(tokens, list) or any(type(t) is not int or t < 0 for t in tokens):
            raise Refused("tokens must be a list of non-negative integers", "tokens")
        return json_answer(orjson.dumps({"prompt": self._vocabulary.decode(tokens)}))

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=503 if self._engine.faults.is_dead else 200)

    async def _version(self, request: web.Request) -> web.Response:
        return json_answer(orjson.dumps({"version": VERSION}))

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self._engine.metrics.render(), content_type="text/plain")

    async def _fault(self, request: web.Request) -> web.Response:
        try:
            spec = self._engine.faults.change(parse_body(await request.read()))
        except ValidationError as error:
            raise Refused(f"not a fault: {error}") from error
        return json_answer(orjson.dumps(spec.model_dump()))
