"""An answer as a client makes sense of it, and how it differs from another one. Pure.

Streams and whole answers become the same value, so that one can be held against the other.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

# A batch of another size changes the last bits of a real engine's logits. Rounding both to two
# digits would allow as much, but call 0.0149 and 0.0151 different.
_LOGPROB_TOLERANCE = 0.01
_COUNTED = ("prompt_tokens", "completion_tokens", "total_tokens")


class NotAnAnswer(Exception):
    """What came is none that an OpenAI client understands."""


@dataclass
class Choice:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    # Per token: chat's entries, or completions' (token, logprob, top, offset).
    logprobs: list[Any] = field(default_factory=list)
    finishes: list[tuple[str, Any]] = field(default_factory=list)  # reason, stop_reason


@dataclass
class Answer:
    """All that was said. `tokens_at_s`: when events with text came, monotonic."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, int] | None = None
    ids: set[str] = field(default_factory=set)
    roles: int = 0
    is_done: bool = False
    error: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        return self.choices[0].text if 0 in self.choices else ""

    def add_event(self, event: bytes) -> bool:
        """One event of a stream; whether it brought a part of the answer. Raises: NotAnAnswer."""
        data = event.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            self.is_done = True
            return False
        said = _json(data)
        if "error" in said:
            self.error = said["error"]
            return False
        for one in said["choices"]:
            delta = one.get("delta") or {}
            self.roles += "role" in delta
            self._add(one, one.get("text") or delta.get("content") or "")
        self._count(said)
        return bool(said["choices"])

    def add_whole(self, body: bytes) -> None:
        """Raises: NotAnAnswer."""
        said = _json(body)
        for one in said["choices"]:
            message = one.get("message") or {}
            self._add(one, one.get("text") or message.get("content") or "")
        self._count(said)
        self.is_done = True

    def _count(self, said: dict[str, Any]) -> None:
        self.ids.add(said["id"])
        if said.get("usage"):
            self.usage = {key: said["usage"].get(key, 0) for key in _COUNTED}

    def _add(self, one: dict[str, Any], text: str) -> None:
        choice = self.choices.setdefault(one["index"], Choice())
        choice.text += text
        choice.token_ids += one.get("token_ids") or ()
        told = one.get("logprobs") or {}
        if told.get("content") is not None:
            choice.logprobs += told["content"]
        elif told.get("tokens") is not None:
            kinds = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
            choice.logprobs += zip(*(told[kind] for kind in kinds), strict=True)
        if one.get("finish_reason"):
            choice.finishes.append((one["finish_reason"], one.get("stop_reason")))


def _json(data: bytes) -> dict[str, Any]:
    try:
        said = json.loads(data)
    except ValueError as error:
        raise NotAnAnswer(f"not JSON: {data[:200]!r}") from error
    if not isinstance(said, dict) or not ("error" in said or "choices" in said):
        raise NotAnAnswer(f"neither an answer nor an error: {data[:200]!r}")
    return said


def differences(answer: Answer, wanted: Answer, is_chat_stream: bool) -> list[str]:
    """What an answer that has ended well has otherwise than `wanted`; [] if it is right."""
    found = []
    if not answer.is_done:
        found.append("it does not end with [DONE]")
    if len(answer.ids) != 1:
        found.append(f"it has {len(answer.ids)} ids")
    if is_chat_stream and answer.roles != len(wanted.choices):
        found.append(f"the role is said {answer.roles} times")
    if answer.choices.keys() != wanted.choices.keys():
        found.append(f"choices {sorted(answer.choices)}, not {sorted(wanted.choices)}")
    for index in sorted(answer.choices.keys() & wanted.choices.keys()):
        got, want = answer.choices[index], wanted.choices[index]
        if got.text != want.text:
            at = _common(got.text, want.text)
            found.append(
                f"text from character {at} of {len(want.text)}: "
                f"{got.text[at : at + 20]!r}, not {want.text[at : at + 20]!r}"
            )
        if got.token_ids != want.token_ids:
            at = _common(got.token_ids, want.token_ids)
            found.append(f"token ids from {at} of {len(want.token_ids)} (has {len(got.token_ids)})")
        if not _alike(got.logprobs, want.logprobs):
            pairs = list(zip(got.logprobs, want.logprobs, strict=False))
            at = next((i for i, pair in enumerate(pairs) if not _alike(*pair)), len(pairs))
            found.append(
                f"logprobs from {at} of {len(want.logprobs)} (has {len(got.logprobs)}): "
                f"{got.logprobs[at : at + 1]}, not {want.logprobs[at : at + 1]}"
            )
        if got.finishes != want.finishes:
            found.append(f"finish {got.finishes}, not {want.finishes}")
    if answer.usage is not None and answer.usage != wanted.usage:
        found.append(f"usage {answer.usage}, not {wanted.usage}")
    return found


def _common(one: Any, other: Any) -> int:
    """How far two sequences are alike."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def _alike(one: Any, other: Any) -> bool:
    """Equal, but for the last bits of a float."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=_LOGPROB_TOLERANCE)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other)
