"""Prompt to token ids, once per request.

Local when it can be (`templates`), else by the engine's own render endpoint, whose answer is the
truth. Before the local path is trusted it must agree with an engine on a set of canary requests,
separately for plain messages, content parts and tools; until then, and for ever after a
disagreement, the engine is asked. Each ask counts its reason.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.gateway.errors import ApiError, Rejected
from cluster.gateway.requests import Endpoint, GatewayRequest
from cluster.gateway.templates import ContentFormat, ModelTemplates, NotCovered

log = logging.getLogger(__name__)

# About 1.5 ms of tokenising: longer texts go to a thread, so that streams do not stutter.
_THREAD_ABOVE_CHARACTERS = 4096


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Look <up> the weather & more.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
_CALL = {
    "id": "call_0",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"days": 2, "city": "Zürich"}'},
}
_CHAT_CANARIES: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "What is 2+2?  <b>&amp;</b> naïve 日本 🙂\n"}]},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": " Hi! "},
            {"role": "user", "content": ""},
        ]
    },
    {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False},
)
_PARTS_CANARIES: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": [_text("a"), _text("b")]}]},
)
# Models whose template knows no tools may refuse these; then both sides must refuse.
_TOOL_CANARIES: tuple[dict[str, Any], ...] = (
    {
        "messages": [{"role": "user", "content": "Weather?"}],
        "tools": [_TOOL],
        # An engine without a tool parser renders tools, but refuses to let the model choose.
        "tool_choice": "none",
    },
    {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "call_0", "content": '{"sky": "clear"}'},
        ],
        "tools": [_TOOL],
        "tool_choice": "none",
    },
)
_TEXT_CANARIES = ("Once upon  a time, naïve 日本 🙂\n\t", "x")


class CannotRender(Exception):
    """Neither this replica nor the engines turn this request into ids; `str` is the reason."""


class EngineRenderer(Protocol):
    """Asks an engine to render; implemented by `engines.Engines`."""

    async def render(
        self, endpoint: Endpoint, body: dict[str, Any], request_id: str, trace: str = ""
    ) -> list[list[int]]:
        """Token ids per prompt. `trace`: header lines.

        Raises: EngineFailed, NoCapacity; Rejected with the engine's own 4xx; CannotRender if
        engines of this kind have no such endpoint."""
        ...


class Trust(enum.StrEnum):
    """Whether local rendering may be used."""

    UNCHECKED = "unchecked"
    TRUSTED = "trusted"
    REFUTED = "refuted"  # an engine renders differently, or there is nothing local


class Renderer:
    """`await prompt_ids(request)`; trust is gained in the background by `check`."""

    def __init__(
        self, model_path: str, engine: EngineRenderer, count_ask: Callable[[str], None]
    ) -> None:
        self._engine = engine
        self._count_ask = count_ask
        self._format: ContentFormat = "string"
        self._local: ModelTemplates | None = None
        self.trust = Trust.UNCHECKED
        self._parts_trusted = False
        self._tools_trusted = False
        self._refuted_because = ""
        try:
            self._local = ModelTemplates.load(Path(model_path))
        except NotCovered as reason:
            self.trust = Trust.REFUTED
            self._refuted_because = str(reason)

    async def prompt_ids(
        self, request: GatewayRequest, request_id: str, trace: str = ""
    ) -> list[list[int]]:
        """Token ids of each prompt of the request, none of them empty. `request_id`, and `trace` as
        header lines: what an engine is told if it must be asked.

        Raises: ApiError 400; EngineFailed, NoCapacity, Rejected, CannotRender.
        """
        try:
            return await self._local_ids(request)
        except NotCovered as reason:
            self._count_ask(str(reason))
        return await self._engine.render(request.endpoint, request.body, request_id, trace)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of an answer's ids; "" for all of them where there is no tokenizer here."""
        return "" if self._local is None else self._local.decode(ids, skip_special_tokens)

    async def check(self) -> None:
        """Compare with an engine; sets `trust`. Raises: EngineFailed, NoCapacity: ask later."""
        if self.trust is not Trust.UNCHECKED or self._local is None:
            return
        try:
            await self._compare()
        except CannotRender:
            self.trust = Trust.TRUSTED
            log.warning("local rendering trusted unchecked why=engines-have-no-render-endpoint")

    async def _compare(self) -> None:
        formats: tuple[ContentFormat, ...] = ("string", "parts")
        wanted = [await self._engine_ids(Endpoint.CHAT, body) for body in _CHAT_CANARIES]
        agreeing = [
            form
            for form in formats
            if [self._canary_ids(body, form) for body in _CHAT_CANARIES] == wanted
        ]
        if not agreeing or not await self._texts_agree():
            self.trust = Trust.REFUTED
            self._refuted_because = "differs-from-engine"
            log.warning("local rendering refuted why=%s", self._refuted_because)
            return
        self._format = agreeing[0]
        self._parts_trusted = await self._agree_on(_PARTS_CANARIES)
        self._tools_trusted = await self._agree_on(_TOOL_CANARIES)
        self.trust = Trust.TRUSTED
        log.info(
            "local rendering trusted content=%s parts=%s tools=%s",
            self._format,
            self._parts_trusted,
            self._tools_trusted,
        )

    async def _agree_on(self, canaries: tuple[dict[str, Any], ...]) -> bool:
        wanted = [await self._engine_ids(Endpoint.CHAT, body) for body in canaries]
        return wanted == [self._canary_ids(body, self._format) for body in canaries]

    async def _local_ids(self, request: GatewayRequest) -> list[list[int]]:
        if request.prompts and all(isinstance(prompt, list) for prompt in request.prompts):
            if request.body.get("truncate_prompt_tokens") is not None:
                raise NotCovered("truncate-prompt-tokens")
            return [prompt for prompt in request.prompts if isinstance(prompt, list)]
        if self.trust is not Trust.TRUSTED or self._local is None:
            raise NotCovered(
                self._refuted_because if self.trust is Trust.REFUTED else self.trust.value
            )
        body = request.body
        if request.endpoint is Endpoint.CHAT:
            if not self._tools_trusted and _has_tools(body):
                raise NotCovered("tools")
            if not self._parts_trusted and _has_parts(body):
                raise NotCovered("content-parts")
            texts = [self._local.chat_text(body, self._format)]
            add_special_tokens = bool(body.get("add_special_tokens"))
        else:
            if body.get("truncate_prompt_tokens") is not None:
                raise NotCovered("truncate-prompt-tokens")
            texts = [prompt for prompt in request.prompts if isinstance(prompt, str)]
            add_special_tokens = body.get("add_special_tokens") is not False
        # A salted prompt wants no trace of itself where others could time it.
        may_remember = request.cache_salt is None
        ids = [await self._encode(text, add_special_tokens, may_remember) for text in texts]
        if not all(ids):
            raise NotCovered("empty-prompt")
        return ids

    async def _encode(self, text: str, add_special_tokens: bool, may_remember: bool) -> list[int]:
        assert self._local is not None
        if len(text) <= _THREAD_ABOVE_CHARACTERS:
            return self._local.encode(text, add_special_tokens, may_remember)
        return await asyncio.to_thread(self._local.encode, text, add_special_tokens, may_remember)

    def _canary_ids(self, body: dict[str, Any], form: ContentFormat) -> list[int] | None:
        assert self._local is not None
        try:
            return self._local.encode(self._local.chat_text(body, form), False)
        except (ApiError, NotCovered):
            return None

    async def _engine_ids(self, endpoint: Endpoint, body: dict[str, Any]) -> list[int] | None:
        try:
            return (await self._engine.render(endpoint, body, "check-rendering"))[0]
        except Rejected:
            return None

    async def _texts_agree(self) -> bool:
        assert self._local is not None
        for text in _TEXT_CANARIES:
            if await self._engine_ids(Endpoint.COMPLETIONS, {"prompt": text}) != self._local.encode(
                text, True
            ):
                return False
        return True


def _has_tools(body: dict[str, Any]) -> bool:
    return bool(body.get("tools")) or any(
        message.get("tool_calls") or message.get("role") == "tool" for message in body["messages"]
    )


def _has_parts(body: dict[str, Any]) -> bool:
    return any(isinstance(message.get("content"), list) for message in body["messages"])
