from __future__ import annotations

import orjson
import pytest

from cluster.gateway.plan import MAX_STAGED_PROMPTS, Flow, plan
from cluster.gateway.requests import Endpoint, parse

IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}
TEXT = {"type": "text", "text": "a"}


def planned(endpoint: Endpoint, **body):
    return plan(parse(endpoint, orjson.dumps(body), "m"))


@pytest.mark.parametrize(
    ("more", "flow", "why"),
    [
        ({}, Flow.DISAGGREGATE, ""),
        ({"stream": True, "logprobs": True, "tools": [{}]}, Flow.DISAGGREGATE, ""),
        ({"n": 1}, Flow.DISAGGREGATE, ""),
        ({"n": 2}, Flow.STAGE, ""),
        ({"use_beam_search": True}, Flow.STAGE, ""),
        ({"return_prompt_text": True}, Flow.STAGE, ""),
        ({"echo": True}, Flow.ALONE, "echo"),
        ({"prompt_logprobs": 0}, Flow.ALONE, "prompt-logprobs"),
        ({"messages": [{"role": "user", "content": [TEXT, IMAGE]}]}, Flow.ALONE, "multimodal"),
        ({"messages": [{"role": "user", "content": [TEXT, "b"]}]}, Flow.DISAGGREGATE, ""),
    ],
)
def test_chat(more, flow, why):
    found = planned(Endpoint.CHAT, **{"messages": [{"role": "user", "content": "a"}], **more})
    assert (found.flow, found.why) == (flow, why)


@pytest.mark.parametrize(
    ("more", "flow", "why"),
    [
        ({"prompt": "a"}, Flow.DISAGGREGATE, ""),
        ({"prompt": [1, 2]}, Flow.DISAGGREGATE, ""),
        ({"prompt": ["a"]}, Flow.DISAGGREGATE, ""),
        ({"prompt": "a", "logprobs": 3}, Flow.DISAGGREGATE, ""),
        ({"prompt": ["a", "b"]}, Flow.STAGE, ""),
        ({"prompt": [[1], [2]]}, Flow.STAGE, ""),
        ({"prompt": "a", "best_of": 2}, Flow.STAGE, ""),
        ({"prompt": "a", "echo": True}, Flow.STAGE, ""),
        ({"prompt": "a", "echo": True, "logprobs": 0}, Flow.ALONE, "prompt-logprobs"),
        ({"prompt": "a", "suffix": "b"}, Flow.ALONE, "suffix"),
        ({"prompt_embeds": "x"}, Flow.ALONE, "prompt-embeds"),
        ({"prompt": ["a"] * (MAX_STAGED_PROMPTS + 1)}, Flow.ALONE, "many-prompts"),
    ],
)
def test_completions(more, flow, why):
    found = planned(Endpoint.COMPLETIONS, **more)
    assert (found.flow, found.why) == (flow, why)
