"""Requests to a simulated engine: what is taken, what is refused, how answers look."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.engines.simulated.answers import AnswerShape, Piece
from cluster.engines.simulated.model import Vocabulary
from cluster.engines.simulated.protocol import (
    Ask,
    Refused,
    check_length,
    params_of_prompt,
    parse_ask,
    parse_body,
)
from cluster.models import store
from cluster.topology.schema import ModelSpec


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    path = store.resolve(ModelSpec(id="simulated"), lambda what, fraction: None).path
    return Vocabulary(path)


def ask(vocabulary: Vocabulary, chat: bool = False, **body: Any) -> Ask:
    more: dict[str, Any] = (
        {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    )
    return parse_ask({"model": "m", **more, **body}, chat, "m", vocabulary)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", [[107, 108]]),
        ([107, 108], [[107, 108]]),
        (["h", "i"], [[107], [108]]),
        ([[107], [108]], [[107], [108]]),
    ],
)
def test_prompts_are_text_ids_or_lists_of_either(
    vocabulary: Vocabulary, prompt: Any, prompts: list[list[int]]
):
    assert list(ask(vocabulary, prompt=prompt).prompts) == prompts


def test_completions_default_to_16_tokens_and_chat_to_all_there_is_room_for(
    vocabulary: Vocabulary,
):
    assert ask(vocabulary).max_tokens == 16
    assert ask(vocabulary, chat=True).max_tokens is None
    assert ask(vocabulary, chat=True, max_completion_tokens=5, max_tokens=9).max_tokens == 5


def test_handed_over_ids_replace_the_messages(vocabulary: Vocabulary):
    given = ask(vocabulary, chat=True, kv_transfer_params={"prompt_token_ids": [5, 6]})
    assert list(given.prompts) == [[5, 6]]


@pytest.mark.parametrize(
    ("body", "param", "status"),
    [
        ({"model": "x"}, "model", 404),
        ({"prompt": ""}, "prompt", 400),
        ({"prompt": []}, "prompt", 400),
        ({"prompt": 3}, "prompt", 400),
        ({"prompt": [1, -1]}, "prompt", 400),
        ({"prompt": [1, 259]}, "prompt", 400),
        ({"temperature": -0.1}, "temperature", 400),
        ({"temperature": "hot"}, "temperature", 400),
        ({"top_p": 0}, "top_p", 400),
        ({"n": 0}, "n", 400),
        ({"n": True}, "n", 400),
        ({"max_tokens": 0}, "max_tokens", 400),
        ({"max_tokens": 1.5}, "max_tokens", 400),
        ({"stop": ["a", ""]}, "stop", 400),
        ({"stop": 5}, "stop", 400),
        ({"stream_options": {"include_usage": True}}, "stream_options", 400),
        ({"kv_transfer_params": [1]}, "kv_transfer_params", 400),
        ({"echo": True}, "echo", 400),
    ],
)
def test_refused_requests_name_the_parameter(
    vocabulary: Vocabulary, body: dict[str, Any], param: str, status: int
):
    with pytest.raises(Refused) as caught:
        ask(vocabulary, **body)
    assert caught.value.param == param
    assert caught.value.status == status


@pytest.mark.parametrize("raw", [b"", b"{", b"[1]", b'{"temperature": NaN}', b"\xff"])
def test_bodies_that_are_no_json_object_are_refused(raw: bytes):
    with pytest.raises(Refused):
        parse_body(raw)


@pytest.mark.parametrize(("prompt_tokens", "max_tokens"), [(8, 1), (9, 1), (2, 9)])
def test_what_does_not_fit_the_context_is_refused(
    vocabulary: Vocabulary, prompt_tokens: int, max_tokens: int
):
    too_much = ask(vocabulary, prompt=[5] * prompt_tokens, max_tokens=max_tokens)
    with pytest.raises(Refused):
        check_length(too_much, 8)
    check_length(ask(vocabulary, prompt=[5] * 7, max_tokens=8), 8)


def shape(vocabulary: Vocabulary, **body: Any) -> AnswerShape:
    return AnswerShape(ask(vocabulary, **body), "cmpl-1", 0, "m", vocabulary)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
def test_fast_chunks_are_the_same_as_slow_ones(vocabulary: Vocabulary, chat: bool, with_ids: bool):
    plain = shape(vocabulary, chat=chat, return_token_ids=with_ids)
    fast = plain.fast_chunk()
    assert fast is not None
    piece = Piece('x"', (123, 4))
    assert fast.of(piece) == plain.chunk(0, piece)


@pytest.mark.parametrize("body", [{"logprobs": 1}, {"n": 2}, {"prompt": ["a", "b"]}])
def test_chunks_that_carry_more_than_text_are_not_fast(
    vocabulary: Vocabulary, body: dict[str, Any]
):
    assert shape(vocabulary, **body).fast_chunk() is None


def test_offsets_go_on_from_chunk_to_chunk(vocabulary: Vocabulary):
    stream = shape(vocabulary, logprobs=1)
    chunks = [stream.chunk(0, Piece("hi", (107, 108))), stream.chunk(0, Piece("j", (109,)))]
    offsets = [
        json.loads(chunk.removeprefix(b"data: "))["choices"][0]["logprobs"]["text_offset"]
        for chunk in chunks
    ]
    assert offsets == [[0, 1], [2]]


def test_completion_logprobs_line_up_with_the_tokens(vocabulary: Vocabulary):
    found = shape(vocabulary, logprobs=2).logprobs([107, 108, 109])
    assert found is not None
    assert found["tokens"] == ["h", "i", "j"]
    assert found["text_offset"] == [0, 1, 2]
    assert [len(row) for row in found["top_logprobs"]] == [2, 2, 2]


def test_chat_logprobs_have_as_many_alternatives_as_asked(vocabulary: Vocabulary):
    found = shape(vocabulary, chat=True, logprobs=True, top_logprobs=3).logprobs([107])
    assert found is not None
    assert found["content"][0]["bytes"] == [104]
    assert len(found["content"][0]["top_logprobs"]) == 3
    assert shape(vocabulary, chat=True).logprobs([107]) is None


def test_choices_of_several_prompts_are_numbered_through(vocabulary: Vocabulary):
    asked = shape(vocabulary, prompt=["a", "b"], n=2, return_token_ids=True)
    body = json.loads(asked.whole([Piece("x", [5], "length")] * 4, {}, None))
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [[100]] * 2 + [[101]] * 2


def test_engines_that_meet_in_rooms_read_sglangs_fields_and_not_vllms(vocabulary: Vocabulary):
    room = {"bootstrap_host": "h", "bootstrap_port": 1, "bootstrap_room": 7}
    body = {"prompt": ["h", "i"], **room, "kv_transfer_params": {"do_remote_prefill": True}}
    asked = parse_ask(body, False, "m", vocabulary, in_rooms=True)
    assert asked.kv_params == room
    assert [params_of_prompt(asked.kv_params, at)["bootstrap_room"] for at in (0, 1)] == [7, 8]
    given = {"prompt_token_ids": [5]}
    chat = {"messages": [{"role": "user", "content": "hi"}], "kv_transfer_params": given}
    assert parse_ask(chat, True, "m", vocabulary, in_rooms=True).prompts != ([5],)
    assert ask(vocabulary, **room).kv_params == {}


@pytest.mark.parametrize("field", ["bootstrap_host", "bootstrap_port", "bootstrap_room"])
def test_a_room_that_is_none_is_refused(vocabulary: Vocabulary, field: str):
    with pytest.raises(Refused, match=field):
        parse_ask({"prompt": "hi", field: [1]}, False, "m", vocabulary, in_rooms=True)
