"""OpenAI requests, parsed and checked as vLLM 0.32 does. Answers are in `answers`.

Pure. What vLLM refuses with 400 or 404 and a router can cause is refused here the same way;
what only changes sampling (temperature, tools, response_format) is accepted and ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import orjson

from cluster.engines.simulated.model import Vocabulary

DEFAULT_COMPLETION_TOKENS = 16


class Refused(Exception):
    """The request is wrong. Answered in OpenAI's error shape."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


def error_body(message: str, status: int, param: str | None = None) -> bytes:
    kind = {400: "BadRequestError", 404: "NotFoundError", 503: "ServiceUnavailableError"}
    return orjson.dumps(
        {
            "error": {
                "message": message,
                "type": kind.get(status, "InternalServerError"),
                "param": param,
                "code": status,
            }
        }
    )


@dataclass(frozen=True, slots=True)
class Ask:
    """A generation request, checked."""

    chat: bool
    prompts: tuple[list[int], ...]
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    max_tokens: int | None
    min_tokens: int
    ignore_eos: bool
    stop: tuple[str, ...]
    include_stop: bool
    stop_token_ids: frozenset[int]
    logprobs: int | None
    return_token_ids: bool
    kv_params: dict[str, Any]


def parse_body(raw: bytes) -> dict[str, Any]:
    """Raises: Refused."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Refused(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refused("the body is not a JSON object")
    return body


def parse_ask(
    body: dict[str, Any], chat: bool, model: str, vocabulary: Vocabulary, in_rooms: bool = False
) -> Ask:
    """`in_rooms`: SGLang's fields say where blocks are, and vLLM's are not known.

    Raises: Refused."""
    if body.get("model") not in (None, model):
        raise Refused(f"The model `{body['model']}` does not exist.", "model", 404)
    _check_sampling(body)
    if body.get("echo"):
        raise Refused("echo is not simulated", "echo")
    kv_params = _room(body) if in_rooms else body.get("kv_transfer_params") or {}
    if not isinstance(kv_params, dict):
        raise Refused("kv_transfer_params is not an object", "kv_transfer_params")
    stream = bool(body.get("stream"))
    options = body.get("stream_options") or {}
    if options and not stream:
        raise Refused("Stream options can only be defined when `stream=True`.", "stream_options")
    prompts: tuple[list[int], ...]
    if chat:
        prompts = (chat_prompt(body, kv_params, vocabulary),)
        max_tokens = body.get("max_completion_tokens") or body.get("max_tokens")
        logprobs = int(body.get("top_logprobs") or 0) if body.get("logprobs") else None
    else:
        prompts = completion_prompts(body, vocabulary)
        max_tokens = body.get("max_tokens")
        max_tokens = DEFAULT_COMPLETION_TOKENS if max_tokens is None else max_tokens
        logprobs = body.get("logprobs")
    stop = body.get("stop") or ()
    return Ask(
        chat=chat,
        prompts=prompts,
        n=body.get("n") or 1,
        stream=stream,
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("continuous_usage_stats")),
        max_tokens=max_tokens,
        min_tokens=body.get("min_tokens") or 0,
        ignore_eos=bool(body.get("ignore_eos")),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        include_stop=bool(body.get("include_stop_str_in_output")),
        stop_token_ids=frozenset(body.get("stop_token_ids") or ()),
        logprobs=logprobs,
        return_token_ids=bool(body.get("return_token_ids")),
        kv_params=kv_params,
    )


def _room(body: dict[str, Any]) -> dict[str, Any]:
    """Raises: Refused."""
    found = {key: body[key] for key in _ROOM if body.get(key) is not None}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, _ROOM[key]):
            raise Refused(f"{key} is not a {_ROOM[key].__name__}: {value!r}", key)
    return found


def params_of_prompt(params: dict[str, Any], at: int) -> dict[str, Any]:
    """Of the request's, those of its prompt number `at`: rooms are numbered on."""
    if "bootstrap_room" not in params:
        return dict(params)
    return {**params, "bootstrap_room": params["bootstrap_room"] + at}


_ROOM = {"bootstrap_host": str, "bootstrap_port": int, "bootstrap_room": int}
# field: (type, lowest, highest)
_RANGES: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0.0, math.inf),
    "top_p": (float, 1e-9, 1.0),
    "frequency_penalty": (float, -2.0, 2.0),
    "presence_penalty": (float, -2.0, 2.0),
    "n": (int, 1, 128),
    "max_tokens": (int, 1, math.inf),
    "max_completion_tokens": (int, 1, math.inf),
    "min_tokens": (int, 0, math.inf),
    "top_logprobs": (int, 0, 20),
}


def _check_sampling(body: dict[str, Any]) -> None:
    for name, (kind, low, high) in _RANGES.items():
        value = body.get(name)
        if value is None:
            continue
        whole = kind is int
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise Refused(f"{name} must be a number of type {kind.__name__}, got {value!r}", name)
        if not low <= value <= high:
            raise Refused(f"{name} must be in [{low}, {high}], got {value}", name)
    stop = body.get("stop")
    parts = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(parts, list) or not all(isinstance(p, str) and p for p in parts):
        raise Refused("stop must be a text or a list of texts, none empty", "stop")


def chat_prompt(
    body: dict[str, Any], kv_params: dict[str, Any], vocabulary: Vocabulary
) -> list[int]:
    """Ids handed over by a router, else the rendered messages. Raises: Refused."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise Refused("messages must be a list of objects", "messages")
    given = kv_params.get("prompt_token_ids")
    if given is not None:
        return _checked_ids(given, vocabulary, "kv_transfer_params.prompt_token_ids")
    if not messages:
        raise Refused("messages must not be empty", "messages")
    try:
        text = vocabulary.render(messages, body.get("add_generation_prompt", True))
    except Exception as error:  # whatever a template raises is the request's fault
        raise Refused(f"the chat template refused the messages: {error}", "messages") from error
    return vocabulary.encode(text, bool(body.get("add_special_tokens")))


def completion_prompts(body: dict[str, Any], vocabulary: Vocabulary) -> tuple[list[int], ...]:
    """Raises: Refused."""
    prompt = body.get("prompt")
    if prompt is None or prompt == "" or prompt == []:
        raise Refused("Either prompt or prompt_embeds must be provided and non-empty.", "prompt")
    if isinstance(prompt, str) or (isinstance(prompt, list) and isinstance(prompt[0], int)):
        prompt = [prompt]
    if not isinstance(prompt, list):
        raise Refused("prompt must be a text, token ids, or a list of either", "prompt")
    special = body.get("add_special_tokens", True)
    return tuple(
        vocabulary.encode(one, special)
        if isinstance(one, str)
        else _checked_ids(one, vocabulary, "prompt")
        for one in prompt
    )


def _checked_ids(ids: Any, vocabulary: Vocabulary, param: str) -> list[int]:
    if not isinstance(ids, list) or not ids or any(type(i) is not int or i < 0 for i in ids):
        raise Refused(f"{param} must be a non-empty list of non-negative integers.", param)
    if max(ids) >= vocabulary.size:
        raise Refused(f"Token id {max(ids)} is out of vocabulary", param)
    return ids


def check_length(ask: Ask, max_model_len_tokens: int) -> None:
    """Raises: Refused."""
    longest = max(len(ids) for ids in ask.prompts)
    if longest >= max_model_len_tokens:
        raise Refused(
            f"This model's maximum context length is {max_model_len_tokens} tokens. However, your "
            f"prompt contains {longest} input tokens, which leaves no room for an answer. Please "
            "reduce the length of the input prompt.",
            "input_tokens",
        )
    if ask.max_tokens is not None and ask.max_tokens > max_model_len_tokens:
        raise Refused(
            f"max_tokens={ask.max_tokens} is greater than the maximum context length of "
            f"{max_model_len_tokens} tokens.",
            "max_tokens",
        )
