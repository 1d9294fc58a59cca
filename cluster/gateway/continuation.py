"""May a request be continued on another pair, and what is asked of it then. Pure.

A request is (prompt tokens, tokens sent so far, what remains). To go on means to prefill
prompt + sent and to decode what remains. That gives the text of an undisturbed run only where the
engine keeps nothing of the answer but its tokens: a parser in the middle of a tool call or of
reasoning, a grammar, a count of words used so far are lost with the engine. Called by:
gateway.exchange.
"""

from __future__ import annotations

from typing import Any

from cluster.gateway.requests import Endpoint, GatewayRequest

# Engines that understand `return_token_ids` and prompts of token ids in both endpoints.
TELLS_IDS = frozenset({"vllm", "vllm_ascend", "simulated"})
_LIMITS = ("max_tokens", "max_completion_tokens", "min_tokens")
_PENALTIES = ("presence_penalty", "frequency_penalty")
_GRAMMARS = (
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)


def why_not(request: GatewayRequest, has_reasoning_parser: bool) -> str:
    """Why a stream of `request` cannot be continued once it has begun; "" if it can."""
    body = request.body
    if request.answers > 1 or len(request.prompts) > 1 or body.get("use_beam_search"):
        return "it has several answers"
    if request.endpoint is Endpoint.CHAT and body.get("tools") and _may_call(body):
        return "it may call tools"
    if request.endpoint is Endpoint.CHAT and has_reasoning_parser:
        return "its reasoning is parsed"
    if any(body.get(key) is not None for key in _GRAMMARS) or _has_format(body):
        return "it has a grammar"
    if any(body.get(key) for key in _PENALTIES):
        return "it is penalised by what it has said"
    if body.get("bad_words"):
        return "it has bad_words"
    return ""


def remaining(body: dict[str, Any], sent_tokens: int) -> dict[str, Any]:
    """`body` with what is still to be said. A limit that is reached becomes 0."""
    less = {
        key: max(0, body[key] - sent_tokens) for key in _LIMITS if isinstance(body.get(key), int)
    }
    rest = {**body, **less}
    if "max_completion_tokens" in less:
        # Nobody heeds the older name beside it, but as a 0 it is refused.
        rest.pop("max_tokens", None)
    return rest


def is_spent(request: GatewayRequest, sent_tokens: int) -> bool:
    """Whether as many tokens as asked for were sent."""
    return request.answer_tokens is not None and sent_tokens >= request.answer_tokens


def _may_call(body: dict[str, Any]) -> bool:
    return bool(body.get("tool_choice", "auto") != "none")


def _has_format(body: dict[str, Any]) -> bool:
    wanted = body.get("response_format")
    return isinstance(wanted, dict) and wanted.get("type", "text") != "text"
