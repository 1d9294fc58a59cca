"""Which way a request goes through prefill and decode. Pure: looks at the request only.

The whole table of special cases is here. DISAGGREGATE hands the request's own prompt over as
token ids. STAGE is for answers that share one prompt, or prompts that share one request: each
prompt is prefilled and pulled into the decode worker's prefix cache first, then the untouched
request runs there. ALONE is for requests whose prompt the decode worker must compute itself.

STAGE works wherever prefill or decode goes first. A pair whose engines are called together
(`kv.dialects`, SGLang's) needs no plan: both get the untouched request whatever it asks for, and
carry as many prompts and answers as it has.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.gateway.requests import Endpoint, GatewayRequest

# More prompts than this in one request: batch work, for which staging only adds round trips.
MAX_STAGED_PROMPTS = 16

_TEXT_PARTS = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})


class Flow(enum.StrEnum):
    DISAGGREGATE = "disaggregate"
    STAGE = "stage"
    ALONE = "alone"


@dataclass(frozen=True, slots=True)
class Plan:
    flow: Flow
    why: str = ""  # for ALONE: part of the x-pdcluster-route header and a metric label


_DISAGGREGATE = Plan(Flow.DISAGGREGATE)
_STAGE = Plan(Flow.STAGE)


def plan(request: GatewayRequest) -> Plan:
    """One plan per request; a pair of workers is chosen later."""
    body = request.body
    if request.endpoint is Endpoint.CHAT:
        if not is_text(body):
            return Plan(Flow.ALONE, "multimodal")
        if body.get("echo"):
            return Plan(Flow.ALONE, "echo")
    else:
        if body.get("prompt_embeds") is not None:
            return Plan(Flow.ALONE, "prompt-embeds")
        if body.get("suffix") is not None:
            return Plan(Flow.ALONE, "suffix")
        if body.get("echo") and body.get("logprobs") is not None:
            return Plan(Flow.ALONE, "prompt-logprobs")
    # Log-probabilities of the prompt exist only where the prompt is computed.
    if body.get("prompt_logprobs") is not None:
        return Plan(Flow.ALONE, "prompt-logprobs")
    if len(request.prompts) > MAX_STAGED_PROMPTS:
        return Plan(Flow.ALONE, "many-prompts")
    if (
        request.answers > 1
        or len(request.prompts) > 1
        or body.get("use_beam_search")
        # The engine shows the prompt's text; with ids in its place it would show a re-spelling.
        or (request.endpoint is Endpoint.COMPLETIONS and body.get("echo"))
        or body.get("return_prompt_text")
    ):
        return _STAGE
    return _DISAGGREGATE


def is_text(body: Mapping[str, Any]) -> bool:
    """Whether every message's content is text, so that token ids say all there is to say."""
    for message in body.get("messages") or ():
        content = message.get("content")
        if isinstance(content, list) and not all(_is_text_part(part) for part in content):
            return False
    return True


def _is_text_part(part: Any) -> bool:
    if isinstance(part, str):
        return True
    return isinstance(part, dict) and part.get("type", "text") in _TEXT_PARTS
