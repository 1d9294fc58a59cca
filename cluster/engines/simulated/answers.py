"""Answers and stream chunks in the shapes of vLLM 0.32. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import orjson

from cluster.engines.simulated.model import Vocabulary
from cluster.engines.simulated.protocol import Ask


class Piece(NamedTuple):
    """New output of one choice. `finish`: None while there is more."""

    text: str
    ids: Sequence[int]
    finish: str | None = None
    stop_reason: int | str | None = None


def usage_of(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


# Stands for the ids of a chunk while its shape is looked for.
_MARK = 10**18


class FastChunk(NamedTuple):
    """An event around its text and, if there is an `after_ids`, its token ids."""

    before: bytes
    after_text: bytes
    after_ids: bytes | None

    def of(self, piece: Piece) -> bytes:
        text = orjson.dumps(piece.text)
        if self.after_ids is None:
            return self.before + text + self.after_text
        ids = ",".join(map(str, piece.ids)).encode()
        return self.before + text + self.after_text + ids + self.after_ids


class Told:
    """How much text of each choice was told, for the offsets of completions' logprobs."""

    __slots__ = ("characters",)

    def __init__(self) -> None:
        self.characters: dict[int, int] = {}


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What all chunks, or the one body, of an answer have in common."""

    ask: Ask
    id: str
    created_s: int
    model: str
    vocabulary: Vocabulary
    told: Told = field(default_factory=Told)

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created_s, "model": self.model}

    def fast_chunk(self) -> FastChunk | None:
        """How to write a plain middle chunk of a single choice; None if this request's chunks carry
        more than text and token ids."""
        ask = self.ask
        if ask.logprobs is not None or ask.continuous_usage or ask.n > 1 or len(ask.prompts) > 1:
            return None
        marked = self.chunk(0, Piece("\x00", (_MARK,)))
        before, _, after = marked.partition(b'"\\u0000"')
        if not ask.return_token_ids:
            return FastChunk(before, after, None)
        between, _, after = after.partition(str(_MARK).encode())
        return FastChunk(before, between, after)

    def opening(self) -> list[bytes]:
        """Chat streams begin with the role, once per choice."""
        if not self.ask.chat:
            return []
        given = list(self.ask.prompts[0]) if self.ask.return_token_ids else None
        return [
            self._event(
                "chat.completion.chunk",
                {
                    "index": index,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                },
                {"prompt_token_ids": given, "prompt_text": None},
            )
            for index in range(self.ask.n)
        ]

    def chunk(
        self,
        index: int,
        piece: Piece,
        prompt_ids: Sequence[int] | None = None,
        usage: dict[str, Any] | None = None,
    ) -> bytes:
        """One SSE event. `prompt_ids`: for the first chunk of a completion."""
        ids = list(piece.ids) if self.ask.return_token_ids else None
        choice: dict[str, Any] = {"index": index}
        if self.ask.chat:
            choice["delta"] = {"content": piece.text}
        else:
            choice["text"] = piece.text
        choice["logprobs"] = self.logprobs(piece.ids, index)
        choice["finish_reason"] = piece.finish
        if not self.ask.chat or piece.finish is not None:
            choice["stop_reason"] = piece.stop_reason
        if not self.ask.chat:
            choice["prompt_token_ids"] = list(prompt_ids) if prompt_ids is not None else None
        choice["token_ids"] = ids
        kind = "chat.completion.chunk" if self.ask.chat else "text_completion"
        return self._event(kind, choice, {} if usage is None else {"usage": usage})

    def usage_event(self, usage: dict[str, Any]) -> bytes:
        kind = "chat.completion.chunk" if self.ask.chat else "text_completion"
        body = {**self.head(kind), "choices": [], "usage": usage}
        return b"data: " + orjson.dumps(body) + b"\n\n"

    def _event(self, kind: str, choice: dict[str, Any], more: dict[str, Any]) -> bytes:
        body = {**self.head(kind), "choices": [choice], **more}
        return b"data: " + orjson.dumps(body) + b"\n\n"

    def whole(
        self,
        answers: Sequence[Piece],
        usage: dict[str, Any],
        kv_answer: dict[str, Any] | None,
    ) -> bytes:
        """The one JSON body: `answers` per choice, prompt by prompt."""
        ask = self.ask
        choices = []
        for index, piece in enumerate(answers):
            choice: dict[str, Any] = {"index": index}
            if ask.chat:
                choice["message"] = {
                    "role": "assistant",
                    "content": piece.text,
                    "refusal": None,
                    "tool_calls": [],
                    "reasoning": None,
                }
            else:
                choice["text"] = piece.text
            choice["logprobs"] = self.logprobs(piece.ids, index)
            choice["finish_reason"] = piece.finish
            choice["stop_reason"] = piece.stop_reason
            choice["token_ids"] = list(piece.ids) if ask.return_token_ids else None
            if not ask.chat:
                given = ask.prompts[index // ask.n]
                choice["prompt_token_ids"] = list(given) if ask.return_token_ids else None
            choices.append(choice)
        body = {
            **self.head("chat.completion" if ask.chat else "text_completion"),
            "choices": choices,
            "usage": usage,
            "system_fingerprint": None,
            "kv_transfer_params": kv_answer,
        }
        if ask.chat:
            body["prompt_token_ids"] = list(ask.prompts[0]) if ask.return_token_ids else None
        return orjson.dumps(body)

    def logprobs(self, ids: Sequence[int], index: int = 0) -> dict[str, Any] | None:
        """Made up but well-formed: the chosen token first, its neighbours after it."""
        top = self.ask.logprobs
        if top is None:
            return None
        says = self.vocabulary.says
        ranked = [
            [(self._word(token), -0.25 - token % 16 / 64)]
            + [(self._word(says[(token + k) % len(says)]), -2.0 - k) for k in range(1, top)]
            for token in ids
        ]
        if not self.ask.chat:
            words = [row[0][0] for row in ranked]
            begun = self.told.characters.get(index, 0)
            *offsets, self.told.characters[index] = accumulate(map(len, words), initial=begun)
            return {
                "text_offset": offsets,
                "token_logprobs": [row[0][1] for row in ranked],
                "tokens": words,
                "top_logprobs": [dict(row) for row in ranked],
            }
        return {
            "content": [
                {**_chat_entry(*row[0]), "top_logprobs": [_chat_entry(*e) for e in row[:top]]}
                for row in ranked
            ]
        }

    def _word(self, token: int) -> str:
        return self.vocabulary.text.get(token, "")


def _chat_entry(word: str, logprob: float) -> dict[str, Any]:
    return {"token": word, "logprob": logprob, "bytes": list(word.encode())}
