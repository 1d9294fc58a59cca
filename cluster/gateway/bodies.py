"""What engines are sent, made out of what the client sent. Pure.

Called by: gateway.attempt, gateway.engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.gateway.requests import Endpoint, GatewayRequest

# What a request for a single throw-away token carries over from the client's request.
_SHARED_FIELDS = ("cache_salt", "priority")


def answering(
    request: GatewayRequest, prompt_ids: Sequence[int] | None, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The client's own request with `fields`, and with ids in place of what they were made from.

    `prompt_ids` None: the engine makes them itself."""
    body = {**request.body, **fields}
    if prompt_ids is None:
        return body
    if request.endpoint is Endpoint.CHAT:
        params = fields.get("kv_transfer_params") or {}
        body["kv_transfer_params"] = {**params, "prompt_token_ids": prompt_ids}
    else:
        body["prompt"] = prompt_ids
    return body


def prefilling(body: Mapping[str, Any]) -> dict[str, Any]:
    """The same request at the same endpoint, for the sake of its prompt only."""
    changed = {**body, "stream": False, "max_tokens": 1, "min_tokens": 1}
    changed.pop("stream_options", None)
    if "max_completion_tokens" in changed:
        changed["max_completion_tokens"] = 1
    return changed


def one_token(
    model: str, prompt_ids: Sequence[int], fields: Mapping[str, Any], client_body: Mapping[str, Any]
) -> dict[str, Any]:
    """A completion of one token that nobody reads: the engine computes or takes the prompt."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt_ids,
        "max_tokens": 1,
        # A request that ends before its length limit keeps no blocks for a peer.
        "min_tokens": 1,
        "ignore_eos": True,
        "temperature": 0,
        "stream": False,
        **fields,
    }
    for field in _SHARED_FIELDS:
        if client_body.get(field) is not None:
            body[field] = client_body[field]
    return body
