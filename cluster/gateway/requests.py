"""The edge: bytes in, a validated request out.

Only fields that the gateway itself acts on are checked, and numbers that an engine's own parser
would let through as NaN. Everything else goes to the engine as the client wrote it, and what is
wrong with it the engine says.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cluster.gateway import errors

Prompt = str | list[int]


class Endpoint(enum.StrEnum):
    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


# Only gateways may say where KV blocks are: a client that could would read other clients' prompts.
_OURS_TO_SAY = (
    "kv_transfer_params",
    "ec_transfer_params",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
)

_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    role: str


class _Known(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    model: str | None = None
    stream: bool | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[_Finite, Field(ge=0)] | None = None
    top_p: _Finite | None = None
    min_p: _Finite | None = None
    presence_penalty: _Finite | None = None
    frequency_penalty: _Finite | None = None
    repetition_penalty: _Finite | None = None
    length_penalty: _Finite | None = None
    logit_bias: dict[str, _Finite] | None = None
    cache_salt: str | None = None
    stop: str | list[str] | None = None


class _Chat(_Known):
    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None


_TokenId = Annotated[int, Field(ge=0)]


class _Completion(_Known):
    prompt: (
        Annotated[list[_TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[_TokenId], Field(min_length=1)]], Field(min_length=1)]
        | str
        | Annotated[list[str], Field(min_length=1)]
        | None
    ) = None
    prompt_embeds: Any = None


_CHAT = TypeAdapter(_Chat)
_COMPLETION = TypeAdapter(_Completion)


@dataclass(frozen=True, slots=True)
class GatewayRequest:
    """A client's request, checked as far as the gateway depends on it."""

    endpoint: Endpoint
    body: dict[str, Any]  # as the client wrote it, minus what only gateways may say
    is_stream: bool
    answer_tokens: int | None  # as asked for; None: the engine decides
    answers: int  # n or best_of, whichever is more
    prompts: tuple[Prompt, ...] = ()  # /v1/completions only
    cache_salt: str | None = None

    @property
    def prompt_param(self) -> str:
        return "messages" if self.endpoint is Endpoint.CHAT else "prompt"


def load_json(body: bytes) -> dict[str, Any]:
    """Raises: ApiError 400, also for NaN, Infinity and invalid UTF-8."""
    try:
        loaded = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise errors.bad_request(
            f"The request body is not valid JSON: {error}.", code="invalid_json"
        ) from None
    if not isinstance(loaded, dict):
        raise errors.bad_request("The request body is not a JSON object.", code="invalid_json")
    return loaded


def check_model(body: dict[str, Any], model: str) -> None:
    """Raises: ApiError 400 or 404."""
    asked = body.get("model")
    if asked is None or asked == model:
        return
    if not isinstance(asked, str):
        raise errors.bad_request("`model` is not a string.", param="model")
    raise errors.unknown_model(asked, model)


def parse(endpoint: Endpoint, raw: bytes, model: str) -> GatewayRequest:
    """Raises: ApiError 400 or 404."""
    body = load_json(raw)
    check_model(body, model)
    for field in _OURS_TO_SAY:
        body.pop(field, None)
    known: _Known
    try:
        if endpoint is Endpoint.CHAT:
            known = chat = _CHAT.validate_python(body)
            answer_tokens = chat.max_completion_tokens
            if answer_tokens is None:
                answer_tokens = chat.max_tokens
            prompts: tuple[Prompt, ...] = ()
        else:
            known = completion = _COMPLETION.validate_python(body)
            answer_tokens = completion.max_tokens
            prompts = _prompts(completion)
    except ValidationError as error:
        raise _as_bad_request(error, body) from None
    return GatewayRequest(
        endpoint=endpoint,
        body=body,
        is_stream=bool(known.stream),
        answer_tokens=answer_tokens,
        answers=max(known.n or 1, known.best_of or 1),
        prompts=prompts,
        cache_salt=known.cache_salt,
    )


def _prompts(completion: _Completion) -> tuple[Prompt, ...]:
    prompt = completion.prompt
    if prompt is None:
        if completion.prompt_embeds is None:
            raise errors.bad_request("`prompt` is missing.", param="prompt")
        return ()
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt[0], int):
        return (prompt,)
    return tuple(prompt)


def _as_bad_request(error: ValidationError, body: dict[str, Any]) -> errors.ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    location = first["loc"]
    param = str(location[0]) if location else None
    if param == "prompt":
        message = (
            "`prompt` is not a string, a list of strings, a list of token ids, or a list of such "
            "lists (none of them empty)."
        )
    elif param is not None and param not in body:
        message = f"`{param}` is missing."
    else:
        path = ".".join(str(part) for part in location)
        message = f"`{path}` is not valid: {first['msg']}."
    return errors.bad_request(message, param=param)
