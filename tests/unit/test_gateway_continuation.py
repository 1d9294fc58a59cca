"""A stream that breaks anywhere and goes on elsewhere reads as one that never broke.

The engine here is a model of vLLM's: tokens are bytes and a few merged ones, text is held back
until characters are whole and, with stop strings, as many characters as the longest less one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.gateway.continuation import is_spent, remaining, why_not
from cluster.gateway.requests import Endpoint, parse
from cluster.gateway.splice import Diverged, Splice, end_of, join_answers
from cluster.gateway.tape import Sent, Tape, settle

PROMPT_TOKENS = 7


# Tokens above the bytes: several characters, and characters cut in the middle.
MERGED = (b"ab", b"the cat ", "éx".encode(), "日本".encode()[:4], "日本".encode()[4:])


def spell(ids: Sequence[int]) -> bytes:
    return b"".join(bytes([one]) if one < 256 else MERGED[one - 256] for one in ids)


def decode(ids: Sequence[int]) -> str:
    return spell(ids).decode("utf-8", errors="replace")


@dataclass
class Engine:
    """Says the tokens of `answer`, `per_event` of them per event."""

    is_chat: bool
    answer: Sequence[int]
    per_event: int = 1
    hold_back: int = 0
    has_logprobs: bool = False
    name: str = "a"
    prompt_tokens: int = PROMPT_TOKENS
    _said: int = field(default=0, init=False)

    def events(self) -> list[bytes]:
        events = []
        if self.is_chat:
            first = self._chunk({"delta": {"role": "assistant", "content": ""}})
            first["prompt_token_ids"] = list(range(self.prompt_tokens))
            events.append(first)
        shown = 0
        for start in range(0, len(self.answer), self.per_event):
            end = min(len(self.answer), start + self.per_event)
            is_last = end == len(self.answer)
            text = _whole_characters(self.answer[:end], is_last)
            text = text if is_last else text[: max(0, len(text) - self.hold_back)]
            text, shown = text[shown:], max(shown, len(text))
            ids = list(self.answer[start:end])
            said: dict[str, Any] = {"delta": {"content": text}} if self.is_chat else {"text": text}
            said["logprobs"] = self._logprobs(ids, start) if self.has_logprobs else None
            said["finish_reason"] = "stop" if is_last else None
            said["token_ids"] = ids
            events.append(self._chunk(said))
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": len(self.answer)}
        usage["total_tokens"] = sum(usage.values())
        events.append({**self._chunk({}), "choices": [], "usage": usage})
        lines = [b"data: " + json.dumps(e, separators=(",", ":")).encode() for e in events]
        return [line + b"\n\n" for line in [*lines, b"data: [DONE]"]]

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {"id": self.name, "created": 1, "model": "m", "choices": [{"index": 0, **choice}]}

    def _logprobs(self, ids: list[int], start: int) -> dict[str, Any]:
        if self.is_chat:
            return {"content": [{"token": str(one), "logprob": -float(one)} for one in ids]}
        return {
            "tokens": ["x"] * len(ids),
            "token_logprobs": [-float(one) for one in ids],
            "top_logprobs": [None] * len(ids),
            "text_offset": list(range(start, start + len(ids))),
        }


def _whole_characters(said: Sequence[int], is_last: bool) -> str:
    text = decode(said)
    return text if is_last else text.rstrip("\ufffd")


@dataclass
class Seen:
    """What a client makes of a stream."""

    text: str = ""
    tokens: list[float] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    roles: int = 0
    finishes: list[str] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    ids: set[str] = field(default_factory=set)
    is_done: bool = False


def read(data: bytes) -> Seen:
    seen = Seen()
    for event in data.split(b"\n\n"):
        if event == b"data: [DONE]":
            seen.is_done = True
        elif event:
            said = json.loads(event.removeprefix(b"data: "))
            seen.ids.add(said["id"])
            seen.usage = said.get("usage") or seen.usage
            for choice in said["choices"]:
                delta = choice.get("delta") or {}
                seen.roles += "role" in delta
                seen.text += choice.get("text") or delta.get("content") or ""
                logprobs = choice.get("logprobs") or {}
                seen.tokens += [entry["logprob"] for entry in logprobs.get("content") or ()]
                seen.tokens += logprobs.get("token_logprobs") or ()
                seen.offsets += logprobs.get("text_offset") or ()
                if choice.get("finish_reason"):
                    seen.finishes.append(choice["finish_reason"])
    return seen


@st.composite
def broken_streams(draw: st.DrawFn) -> tuple[Engine, int, int]:
    # A real answer never holds U+FFFD by itself: what decodes to it was cut.
    characters = st.characters(codec="utf-8", exclude_characters="\ufffd")
    words = st.one_of(
        st.text(characters, min_size=1, max_size=4).map(lambda text: list(text.encode())),
        st.sampled_from([[256], [257], [258], [259, 260]]),
    )
    answer = [one for word in draw(st.lists(words, min_size=1, max_size=12)) for one in word]
    engine = Engine(
        is_chat=draw(st.booleans()),
        answer=answer,
        per_event=draw(st.integers(1, 5)),
        hold_back=draw(st.sampled_from([0, 0, 3])),
        has_logprobs=draw(st.booleans()),
    )
    return engine, draw(st.integers(0, len(engine.events()))), draw(st.integers(1, 5))


@given(broken_streams())
def test_a_stream_broken_anywhere_reads_as_one_that_never_broke(
    case: tuple[Engine, int, int],
) -> None:
    engine, broken_at, per_event = case
    undisturbed = read(b"".join(engine.events()))
    tape = Tape(keeps_text=engine.hold_back > 0, keeps_ids=False)
    got = b"".join(tape.take(event) for event in engine.events()[:broken_at])
    sent = tape.sent(decode)
    assert sent is not None
    if sent.is_finished:
        if not read(got).is_done:
            has_usage = bool(read(got).usage)
            got += end_of(sent, PROMPT_TOKENS, wants_usage=not has_usage, is_cut=False)
    else:
        later = Engine(
            engine.is_chat,
            engine.answer[len(sent.kept_ids) :],
            per_event,
            engine.hold_back,
            engine.has_logprobs,
            name="b",
            prompt_tokens=PROMPT_TOKENS + len(sent.kept_ids),
        )
        splice = Splice(sent, PROMPT_TOKENS, "decode/1")
        got += b"".join(splice.piece(event) for event in later.events())
    seen = read(got)
    # Whoever has seen nothing of the first engine may see the second one's id.
    assert seen.ids == ({"b"} if sent.head is None else {"a"})
    assert replace(seen, ids=set()) == replace(undisturbed, ids=set())


@given(broken_streams())
def test_a_client_sees_no_ids_it_did_not_ask_for(case: tuple[Engine, int, int]) -> None:
    engine, _, _ = case
    tape = Tape(keeps_text=False, keeps_ids=False)
    got = b"".join(tape.take(event) for event in engine.events())
    assert b'token_ids":[' not in got.replace(b'\\"', b"")
    assert tape.ids() == list(engine.answer)
    asked = Tape(keeps_text=False, keeps_ids=True)
    assert b"".join(asked.take(event) for event in engine.events()) == b"".join(engine.events())


def test_text_that_looks_like_ids_stays() -> None:
    text = ',"token_ids":[1,2]'
    engine = Engine(is_chat=True, answer=text.encode(), per_event=100)
    tape = Tape(keeps_text=False, keeps_ids=False)
    got = b"".join(tape.take(event) for event in engine.events())
    assert read(got).text == text
    assert tape.ids() == list(text.encode())


def test_an_engine_that_says_something_else_is_noticed() -> None:
    sent = Sent((1, 2), skip_text="abc", head={"id": "a", "created": 1})
    later = Engine(is_chat=False, answer=b"abX", per_event=3, name="b")
    with pytest.raises(Diverged):
        Splice(sent, PROMPT_TOKENS, "decode/1").piece(b"".join(later.events()))


def test_settling_stops_at_the_last_token_whose_text_was_sent() -> None:
    ids = list("naïve".encode())
    assert settle(ids, "na", decode) == (2, "")
    assert settle(ids, "naï", decode) == (4, "")
    assert settle(ids, "xx", decode) is None


def _request(**body: Any) -> Any:
    chat = {"messages": [{"role": "user", "content": "hi"}], "stream": True, **body}
    return parse(Endpoint.CHAT, json.dumps(chat).encode(), "m")


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({}, ""),
        ({"tools": [{}]}, "it may call tools"),
        ({"tools": [{}], "tool_choice": "none"}, ""),
        ({"response_format": {"type": "json_object"}}, "it has a grammar"),
        ({"response_format": {"type": "text"}}, ""),
        ({"structured_outputs": {"regex": "a"}}, "it has a grammar"),
        ({"presence_penalty": 0.5}, "it is penalised by what it has said"),
        ({"repetition_penalty": 1.2}, ""),
        ({"n": 2}, "it has several answers"),
        ({"bad_words": ["no"]}, "it has bad_words"),
    ],
)
def test_only_what_tokens_alone_determine_is_continued(body: dict[str, Any], why: str) -> None:
    assert why_not(_request(**body), has_reasoning_parser=False) == why


def test_parsed_reasoning_is_not_continued() -> None:
    assert why_not(_request(), has_reasoning_parser=True) == "its reasoning is parsed"


def test_what_was_sent_is_taken_off_every_limit() -> None:
    left = remaining({"max_tokens": 10, "min_tokens": 2, "seed": 4}, 3)
    assert left == {"max_tokens": 7, "min_tokens": 0, "seed": 4}
    # The older name says nothing beside the newer one, and as a 0 it would be refused.
    left = remaining({"max_tokens": 3, "max_completion_tokens": 10}, 5)
    assert left == {"max_completion_tokens": 5}
    assert is_spent(_request(max_tokens=3), 3)
    assert not is_spent(_request(), 3)


def test_a_stream_cut_at_its_limit_is_ended_for_the_engine() -> None:
    head = {"id": "a", "created": 1, "model": "m", "choices": [{"delta": {"role": "assistant"}}]}
    seen = read(end_of(Sent((1, 2), head=head), PROMPT_TOKENS, wants_usage=True, is_cut=True))
    assert seen.finishes == ["length"]
    assert seen.usage == {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    assert seen.is_done


def test_whole_answers_are_joined_into_one() -> None:
    def answer(name: str, text: str, prompt: int, reason: str) -> dict[str, Any]:
        ids = list(text.encode())
        logprobs = {
            "tokens": list(text),
            "token_logprobs": [0.0] * len(ids),
            "top_logprobs": None,
            "text_offset": list(range(len(ids))),
        }
        usage = {"prompt_tokens": prompt, "completion_tokens": len(ids), "total_tokens": 0}
        choice = {"text": text, "logprobs": logprobs, "finish_reason": reason, "token_ids": ids}
        return {"id": name, "created": 1, "choices": [choice], "usage": usage}

    joined = join_answers(
        [answer("a", "ab", 7, "stop"), answer("b", "cde", 9, "length")], 7, keeps_ids=False
    )
    choice = joined["choices"][0]
    assert (joined["id"], choice["text"], choice["finish_reason"]) == ("a", "abcde", "length")
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]
    assert choice["token_ids"] is None
    assert joined["usage"]["completion_tokens"] == 5
    assert joined["usage"]["prompt_tokens"] == 7
