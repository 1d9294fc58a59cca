"""What engines are sent, made out of what the client sent."""

from __future__ import annotations

from typing import Any

import orjson

from cluster.gateway import bodies
from cluster.gateway.requests import Endpoint, GatewayRequest, parse

MESSAGES = [{"role": "user", "content": "hi"}]
PARAMS = {"kv_transfer_params": {"metaserver": "http://h/x"}}


def request(endpoint: Endpoint, **body: Any) -> GatewayRequest:
    return parse(endpoint, orjson.dumps(body), "m")


def test_ids_stand_in_place_of_what_they_were_made_from() -> None:
    chat = request(Endpoint.CHAT, messages=MESSAGES, top_k=3)
    assert bodies.answering(chat, [1, 2], PARAMS) == {
        "messages": MESSAGES,
        "top_k": 3,
        "kv_transfer_params": {"metaserver": "http://h/x", "prompt_token_ids": [1, 2]},
    }
    completion = request(Endpoint.COMPLETIONS, prompt="hi")
    assert bodies.answering(completion, [1, 2], {}) == {"prompt": [1, 2]}


def test_without_ids_the_request_is_the_clients_own_and_fields() -> None:
    room = {"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 7}
    chat = request(Endpoint.CHAT, messages=MESSAGES, n=2)
    assert bodies.answering(chat, None, room) == {"messages": MESSAGES, "n": 2, **room}


def test_clients_cannot_say_where_blocks_are() -> None:
    stolen = {"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 7, **PARAMS}
    chat = request(Endpoint.CHAT, messages=MESSAGES, **stolen)
    assert bodies.answering(chat, None, {}) == {"messages": MESSAGES}


def test_for_its_prompt_only_a_request_makes_one_token_and_streams_nothing() -> None:
    body = {
        "messages": MESSAGES,
        "max_tokens": 50,
        "max_completion_tokens": 60,
        "min_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert bodies.prefilling(body) == {
        "messages": MESSAGES,
        "max_tokens": 1,
        "max_completion_tokens": 1,
        "min_tokens": 1,
        "stream": False,
    }
    assert "max_completion_tokens" not in bodies.prefilling({"prompt": "x"})
    assert body["stream"] is True  # the client's own is not touched


def test_a_throw_away_token_keeps_the_clients_salt_and_priority_only() -> None:
    client = {"cache_salt": "s", "priority": 0, "temperature": 1.5, "n": 4}
    body = bodies.one_token("m", [1], PARAMS, client)
    assert (body["cache_salt"], body["priority"]) == ("s", 0)
    assert (body["temperature"], body["max_tokens"], body["prompt"]) == (0, 1, [1])
    assert body["kv_transfer_params"] == PARAMS["kv_transfer_params"]
    assert "n" not in body
