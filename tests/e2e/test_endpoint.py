"""The endpoint over real engines, as clients use it: through the official `openai` package."""

from __future__ import annotations

import json
import socket
import time
import urllib.parse
from typing import Any

import openai
import pytest
from e2e.harness import MODEL, Cluster, http_json, metric

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.parametrize("cluster", ["nixl"], indirect=True),
]

PARIS = [{"role": "user", "content": "What is the capital of France?"}]


def test_a_chat_gets_a_truthful_answer_through_both_workers(cluster: Cluster) -> None:
    raw = cluster.ask(PARIS)
    answer = raw.parse()
    assert "Paris" in answer.choices[0].message.content
    assert raw.headers["x-pdcluster-prefill"] == "prefill/0"
    assert raw.headers["x-pdcluster-decode"] == "decode/0"
    assert raw.headers["x-pdcluster-route"] == "disaggregated"
    assert raw.headers["x-request-id"] in answer.id


def test_a_stream_carries_the_same_text_and_the_usage_asked_for(cluster: Cluster) -> None:
    whole = cluster.ask(PARIS).parse().choices[0].message.content
    chunks = list(
        cluster.client.chat.completions.create(
            model=MODEL,
            messages=PARIS,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=32,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 0


def test_n_choices_come_from_one_prompt(cluster: Cluster) -> None:
    answer = cluster.client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Tell me something about the sea."}],
        n=3,
        temperature=1.0,
        seed=7,
        max_tokens=16,
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 3 * 16


def test_completions_take_several_prompts(cluster: Cluster) -> None:
    one = [
        cluster.client.completions.create(model=MODEL, prompt=p, temperature=0, max_tokens=8)
        for p in ("The capital of France is", "Two plus two is")
    ]
    both = cluster.client.completions.create(
        model=MODEL,
        prompt=["The capital of France is", "Two plus two is"],
        temperature=0,
        max_tokens=8,
    )
    assert [c.text for c in both.choices] == [a.choices[0].text for a in one]


def test_logprobs_and_stop_are_the_engines_own(cluster: Cluster) -> None:
    answer = cluster.client.chat.completions.create(
        model=MODEL,
        messages=PARIS,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=32,
        logprobs=True,
        top_logprobs=2,
        stop=["Paris"],
    )
    choice = answer.choices[0]
    assert choice.finish_reason == "stop"
    assert "Paris" not in (choice.message.content or "")
    assert choice.logprobs is not None
    assert choice.logprobs.content
    assert all(token.logprob <= 0 for token in choice.logprobs.content)
    assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_json_schema_output_is_json_of_that_schema(cluster: Cluster) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "big": {"type": "boolean"}},
        "required": ["city", "big"],
        "additionalProperties": False,
    }
    answer = cluster.client.chat.completions.create(
        model=MODEL,
        messages=PARIS,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=96,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "place", "schema": schema, "strict": True},
        },
    )
    parsed = json.loads(answer.choices[0].message.content or "")
    assert set(parsed) == {"city", "big"}
    assert isinstance(parsed["big"], bool)


def test_a_forced_tool_call_comes_back_as_the_engine_makes_it(cluster: Cluster) -> None:
    request: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "temperature": 0,
        "max_tokens": 96,
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "parameters": {
                        "type": "object",
                        "properties": {"city": {"type": "string"}},
                        "required": ["city"],
                    },
                },
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    }
    calls = cluster.client.chat.completions.create(**request).choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.name == "weather"
    json.loads(calls[0].function.arguments)
    alone = http_json(
        cluster.worker("decode/0")["url"] + "/v1/chat/completions", request, cluster.engine_key
    )
    own = alone["choices"][0]["message"]["tool_calls"][0]["function"]
    assert calls[0].function.model_dump(exclude_none=True) == own


def test_a_prompt_longer_than_the_context_is_refused_as_openai_does(cluster: Cluster) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        cluster.client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "word " * 9000}]
        )
    assert refused.value.code == "context_length_exceeded"


def test_an_engines_own_refusal_reaches_the_client(cluster: Cluster) -> None:
    with pytest.raises(openai.BadRequestError):
        cluster.client.chat.completions.create(
            model=MODEL,
            messages=PARIS,  # type: ignore[arg-type]
            top_p=3.0,
        )
    assert cluster.worker("decode/0")["state"] == "ready"


def test_tokens_survive_the_round_trip(cluster: Cluster) -> None:
    text = "Paris, 東京 🙂"
    asked = {"model": MODEL, "prompt": text}
    tokens = http_json(cluster.base_url + "/tokenize", asked, cluster.key)["tokens"]
    asked = {"model": MODEL, "tokens": tokens}
    assert http_json(cluster.base_url + "/detokenize", asked, cluster.key)["prompt"] == text


def test_a_client_that_disconnects_mid_stream_frees_both_engines(cluster: Cluster) -> None:
    address = urllib.parse.urlsplit(cluster.base_url)
    body = json.dumps(
        {
            "model": MODEL,
            "stream": True,
            "max_tokens": 2000,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": "Count for ever."}],
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {cluster.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection((address.hostname, address.port)) as client:
        client.sendall(head + body)
        seen = b""
        while seen.count(b"data:") < 3:
            received = client.recv(4096)
            assert received, seen
            seen += received
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        running = [
            metric(cluster.engine_metrics(worker), "vllm:num_requests_running")
            for worker in ("prefill/0", "decode/0")
        ]
        if running == [0, 0]:
            return
        time.sleep(0.2)
    raise AssertionError(f"still running after the client left: {running}")


def test_acceptance_length_shows_that_drafts_are_accepted(cluster: Cluster) -> None:
    cluster.ask(
        [{"role": "user", "content": "Repeat exactly: red green blue red green blue red green"}],
        max_tokens=64,
    )
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        length = cluster.worker("decode/0")["acceptance_length"]
        if length is not None:
            assert 1 < length <= 5
            return
        time.sleep(0.5)
    raise AssertionError("no draft was made")
