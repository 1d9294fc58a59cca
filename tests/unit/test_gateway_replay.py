"""An answer with reasoning and tool calls, broken anywhere and said again, reads as one."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.replay import Replay, Script, is_repeatable
from cluster.gateway.splice import Diverged

# A token: (channel, text). The engine's parser holds markers back, so a token may have no text.
Token = tuple[str, str]
CHANNELS = ("reasoning", "content", "call 0", "call 1", "marker")
WORDS = ("a", "bc", " the ", "{}", "")


def events(tokens: Sequence[Token], sizes: Sequence[int], name: str) -> list[bytes]:
    """The stream of one engine, its tokens in events of `sizes`, over and over."""
    said = [chunk(name, {"role": "assistant", "content": ""}, [])]
    begun: set[str] = set()
    start = turn = 0
    while start < len(tokens):
        end = start + sizes[turn % len(sizes)]
        turn += 1
        delta: dict[str, Any] = {}
        for channel, text in tokens[start:end]:
            if channel.startswith("call"):
                index = int(channel[5:])
                call: dict[str, Any] = {"index": index, "function": {"arguments": text}}
                if channel not in begun:
                    begun.add(channel)
                    call |= {"id": f"{name}-{index}", "type": "function"}
                    call["function"]["name"] = f"tool{index}"
                delta.setdefault("tool_calls", []).append(call)
            elif channel != "marker":
                delta[channel] = delta.get(channel, "") + text
        ids = [code(token) for token in tokens[start:end]]
        said.append(chunk(name, delta, ids, "stop" if end >= len(tokens) else None))
        start = end
    return [*said, b"data: [DONE]\n\n"]


def code(token: Token) -> int:
    return CHANNELS.index(token[0]) * len(WORDS) + WORDS.index(token[1])


def chunk(name: str, delta: Any, ids: list[int], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "token_ids": ids}
    choice["logprobs"] = {"content": [{"token": str(one)} for one in ids]} if ids else None
    event = {"id": name, "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def read(data: bytes) -> dict[str, Any]:
    texts: defaultdict[str, str] = defaultdict(str)
    heads: list[tuple[int, str]] = []
    logprobs: list[str] = []
    finishes: list[str] = []
    roles = 0
    for event in data.split(b"\n\n"):
        if not event or event == b"data: [DONE]":
            continue
        said = json.loads(event.removeprefix(b"data: "))
        assert said["id"] == "a"
        choice = said["choices"][0]
        delta = choice["delta"]
        roles += "role" in delta
        for key in ("reasoning", "content"):
            texts[key] += delta.get(key) or ""
        for call in delta.get("tool_calls") or ():
            texts[f"call {call['index']}"] += call["function"].get("arguments") or ""
            if "name" in call["function"]:
                heads.append((call["index"], call["function"]["name"]))
        logprobs += [one["token"] for one in (choice["logprobs"] or {}).get("content") or ()]
        if choice["finish_reason"]:
            finishes.append(choice["finish_reason"])
    return {
        "texts": dict(texts),
        "heads": heads,
        "logprobs": logprobs,
        "finishes": finishes,
        "roles": roles,
    }


tokens = st.lists(st.tuples(st.sampled_from(CHANNELS), st.sampled_from(WORDS)), min_size=1)
sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(tokens, sizes, sizes, st.data())
def test_an_answer_said_again_reads_as_one(
    said: list[Token], first: list[int], second: list[int], data: st.DataObject
) -> None:
    whole = events(said, first, "a")
    broken_at = data.draw(st.integers(1, len(whole) - 2))
    script = Script(keeps_ids=False)
    got = b"".join(script.take(event) for event in whole[:broken_at])
    assert not script.is_finished
    replay = Replay(script, "decode/1")
    got += b"".join(replay.piece(event) for event in events(said, second, "b"))
    assert read(got) == read(b"".join(whole))


@given(tokens, sizes, st.data())
def test_an_engine_that_chooses_another_token_is_refused(
    said: list[Token], size: list[int], data: st.DataObject
) -> None:
    changed = data.draw(st.integers(0, len(said) - 1))
    other = data.draw(st.sampled_from([token for token in CHANNELS if token != said[changed][0]]))
    script = Script(keeps_ids=False)
    for event in events(said, [1], "a")[: changed + 2]:
        script.take(event)
    different = [*said[:changed], (other, said[changed][1]), *said[changed + 1 :]]
    replay = Replay(script, "decode/1")
    with pytest.raises(Diverged):
        list(map(replay.piece, events(different, size, "b")))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"temperature": 0}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 0.7, "seed": 3}, True),
        ({"temperature": 0.7}, False),
        ({}, False),
    ],
)
def test_only_greedy_or_seeded_answers_can_be_said_again(
    body: dict[str, Any], expected: bool
) -> None:
    assert is_repeatable(body) is expected
