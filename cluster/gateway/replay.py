"""Say a broken answer again from its beginning, and send on what the client has not had. Pure.

For answers that tokens alone do not determine (`continuation.why_not`): tool calls, reasoning,
grammars. Another engine, asked for the same again, is in the same state at every token, provided
that it chooses the same tokens: greedily or from the client's seed. That is checked token by token;
an engine that chooses otherwise ends the answer with an error, never with text of two minds.
Called by: gateway.course.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import orjson

from cluster.errors import EngineFailed
from cluster.gateway.splice import Diverged, drop_tokens
from cluster.gateway.tape import count_ids, strip_ids

_DATA = b"data: "
_DONE = b"data: [DONE]"
_ERROR_EVENT = b'data: {"error"'
_NOT_TEXT = frozenset({"role"})


def is_repeatable(body: dict[str, Any]) -> bool:
    """Whether an engine asked twice chooses the same tokens. Without `temperature` it is the
    model's own default that counts, which is seldom 0."""
    return body.get("temperature") == 0 or body.get("seed") is not None


class Script:
    """What was said in one stream, by channel: content, reasoning, each tool call's arguments.

    Only lengths are kept: the tokens decide whether a repetition is one."""

    __slots__ = ("_chunks", "_keeps_ids", "head", "is_finished", "lengths")

    def __init__(self, keeps_ids: bool) -> None:
        """`keeps_ids`: the client asked for token ids, so they stay in what it gets."""
        self._chunks: list[bytes] = []
        self._keeps_ids = keeps_ids
        self.head: dict[str, Any] | None = None
        self.lengths: defaultdict[Hashable, int] = defaultdict(int)
        self.is_finished = False

    def take(self, piece: bytes) -> bytes:
        """Remember a piece of whole events; what of it the client gets."""
        cleaned, ids = strip_ids(piece)
        self._chunks += ids
        for event in _events(cleaned):
            if self.head is None:
                self.head = event
            for choice in event.get("choices") or ():
                self.is_finished = self.is_finished or bool(choice.get("finish_reason"))
                for channel, text in _channels(choice):
                    self.lengths[channel] += len(text)
        return piece if self._keeps_ids else cleaned

    def ids(self) -> list[int]:
        """Every output token reported so far."""
        return [int(one) for chunk in self._chunks for one in chunk.split(b",")]

    @property
    def tokens(self) -> int:
        """How many those are."""
        return count_ids(self._chunks)


class Replay:
    """Rewrites the events of an engine that says it all again."""

    def __init__(self, script: Script, worker: str) -> None:
        self._head = script.head or {}
        self._ids = script.ids()
        self._left = dict(script.lengths)
        self._seen_tokens = 0
        self._worker = worker

    def piece(self, piece: bytes) -> bytes:
        """Whole events in, what the client has not had out.

        Raises: Diverged; EngineFailed: an error event."""
        return b"".join(self._event(event) for event in piece.split(b"\n\n") if event)

    def _event(self, event: bytes) -> bytes:
        if event.startswith(_ERROR_EVENT):
            raise EngineFailed(self._worker, 500, event[len(_DATA) : 300].decode(errors="replace"))
        if not event.startswith(_DATA) or event.startswith(_DONE) or not self._head:
            return event + b"\n\n"
        said: dict[str, Any] = orjson.loads(event[len(_DATA) :])
        for key in ("id", "created", "model"):
            if key in self._head:
                said[key] = self._head[key]
        choices = said.get("choices")
        if choices and not self._choice(choices[0]):
            return b""
        return _DATA + orjson.dumps(said) + b"\n\n"

    def _choice(self, choice: dict[str, Any]) -> bool:
        """Take out of `choice` what the client has; whether anything is left."""
        ids = choice.get("token_ids") or []
        known = self._ids[self._seen_tokens : self._seen_tokens + len(ids)]
        if ids[: len(known)] != known:
            raise Diverged
        self._seen_tokens += len(ids)
        is_new = len(ids) > len(known) or bool(choice.get("finish_reason"))
        drop_tokens(choice, len(known))
        if choice.get("prompt_token_ids"):
            choice["prompt_token_ids"] = None
        has_text = self._cut(choice)
        return is_new or has_text

    def _cut(self, choice: dict[str, Any]) -> bool:
        """Cut each channel by what the client has of it; whether any text is left."""
        is_left = False
        holder = choice.get("delta")
        if holder is None:
            holder = choice
        elif self._left.get("role"):
            holder.pop("role", None)
        for key, text in _texts(holder):
            holder[key] = self._rest(key, text)
            is_left = is_left or bool(holder[key])
        calls = holder.get("tool_calls") or []
        for call in calls:
            function, index = call.get("function") or {}, call.get("index", 0)
            if self._left.get(("head", index)):
                for key in ("id", "type"):
                    call.pop(key, None)
                function.pop("name", None)
            if function.get("arguments"):
                function["arguments"] = self._rest(("arguments", index), function["arguments"])
            is_left = is_left or bool(function.get("arguments") or function.get("name"))
        return is_left

    def _rest(self, channel: Hashable, text: str) -> str:
        had = min(self._left.get(channel, 0), len(text))
        if had:
            self._left[channel] -= had
        return text[had:]


def _channels(choice: dict[str, Any]) -> list[tuple[Hashable, str]]:
    """Every piece of text in one choice, by channel."""
    delta = choice.get("delta")
    holder = choice if delta is None else delta
    found: list[tuple[Hashable, str]] = list(_texts(holder))
    if holder.get("role"):
        found.append(("role", "r"))
    for call in holder.get("tool_calls") or ():
        function, index = call.get("function") or {}, call.get("index", 0)
        if function.get("name"):
            found.append((("head", index), "h"))
        if function.get("arguments"):
            found.append((("arguments", index), function["arguments"]))
    return found


def _texts(holder: dict[str, Any]) -> list[tuple[str, str]]:
    if "text" in holder:
        return [("text", holder["text"] or "")]
    return [
        (key, value)
        for key, value in holder.items()
        if isinstance(value, str) and key not in _NOT_TEXT
    ]


def _events(piece: bytes) -> list[dict[str, Any]]:
    return [
        orjson.loads(event[len(_DATA) :])
        for event in piece.split(b"\n\n")
        if event.startswith(_DATA) and not event.startswith(_DONE)
    ]
