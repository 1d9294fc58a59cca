"""Join the answers of several engines into the one that the client asked for. Pure.

A later engine was given prompt + sent tokens as its prompt. Its events are rewritten so that they
read as the rest of the first engine's: same id and time, no second role, nothing said twice, and a
usage that counts each token once. Called by: gateway.course, gateway.replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from cluster.errors import EngineFailed
from cluster.gateway.tape import Sent

_DATA = b"data: "
_DONE = b"data: [DONE]"
_ERROR_EVENT = b'data: {"error"'
_PER_TOKEN = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class Diverged(Exception):
    """The later engine did not say again what had been said already."""


class Splice:
    """Rewrites the events of one later engine. `prompt_tokens`: of the client's own prompt."""

    def __init__(self, sent: Sent, prompt_tokens: int, worker: str) -> None:
        self._sent = sent
        self._prompt_tokens = prompt_tokens
        self._worker = worker
        self._skip_text = sent.skip_text
        self._skip_tokens = sent.skip_tokens

    def piece(self, piece: bytes) -> bytes:
        """Whole events in, what is left of them out. Raises: Diverged; EngineFailed: an error
        event."""
        events = [event for event in piece.split(b"\n\n") if event]
        return b"".join(self._event(event) for event in events)

    def _event(self, event: bytes) -> bytes:
        if event.startswith(_ERROR_EVENT):
            raise EngineFailed(self._worker, 500, event[len(_DATA) : 300].decode(errors="replace"))
        if self._sent.head is None or not event.startswith(_DATA) or event.startswith(_DONE):
            return event + b"\n\n"
        said: dict[str, Any] = orjson.loads(event[len(_DATA) :])
        for key in ("id", "created", "model"):
            if key in self._sent.head:
                said[key] = self._sent.head[key]
        if said.get("usage"):
            said["usage"] = usage_once(said["usage"], self._prompt_tokens, len(self._sent.kept_ids))
        choices = said.get("choices")
        if choices and not self._choice(choices[0]):
            return b""
        return _DATA + orjson.dumps(said) + b"\n\n"

    def _choice(self, choice: dict[str, Any]) -> bool:
        """Take out of `choice` what the client has; whether anything is left."""
        delta = choice.get("delta")
        was_role = isinstance(delta, dict) and delta.pop("role", None) is not None
        ends = bool(choice.get("finish_reason"))
        holder, key = (choice, "text") if delta is None else (delta, "content")
        text = holder.get(key) or ""
        if self._skip_text and text:
            said = min(len(text), len(self._skip_text))
            if text[:said] != self._skip_text[:said]:
                raise Diverged
            self._skip_text = self._skip_text[said:]
            text = holder[key] = text[said:]
        if ends and self._skip_text:
            raise Diverged
        if choice.get("prompt_token_ids"):
            choice["prompt_token_ids"] = None
        tokens = self._drop_tokens(choice)
        return bool(text or tokens or ends or not (was_role or holder.get(key) == ""))

    def _drop_tokens(self, choice: dict[str, Any]) -> int:
        """Drop what was reported of the first tokens; the number of tokens that stay."""
        dropped, left = drop_tokens(choice, self._skip_tokens)
        self._skip_tokens -= dropped
        offsets = (choice.get("logprobs") or {}).get("text_offset")
        if offsets:
            shift = self._sent.text_offset
            choice["logprobs"]["text_offset"] = [offset + shift for offset in offsets]
        return left


def drop_tokens(choice: dict[str, Any], most: int) -> tuple[int, int]:
    """Take the first tokens, at most `most`, out of what `choice` reports per token. How many that
    were, and how many stay."""
    ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
    per_token = logprobs or {}
    reported = len(ids or per_token.get("content") or per_token.get("tokens") or ())
    dropped = min(most, reported)
    if ids:
        choice["token_ids"] = ids[dropped:]
    for key in ("content", *_PER_TOKEN):
        if per_token.get(key):
            per_token[key] = per_token[key][dropped:]
    return dropped, reported - dropped


def usage_once(usage: dict[str, Any], prompt_tokens: int, sent_tokens: int) -> dict[str, Any]:
    """A later engine's usage, with the sent tokens counted as answer and not as prompt."""
    details = usage.get("prompt_tokens_details")
    changed = {
        **usage,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": usage.get("completion_tokens", 0) + sent_tokens,
    }
    changed["total_tokens"] = prompt_tokens + changed["completion_tokens"]
    if details and details.get("cached_tokens") is not None:
        cached = min(details["cached_tokens"], prompt_tokens)
        changed["prompt_tokens_details"] = {**details, "cached_tokens": cached}
    return changed


def end_of(sent: Sent, prompt_tokens: int, wants_usage: bool, is_cut: bool) -> bytes:
    """The end of a stream whose last token was sent. `is_cut`: and whose finish was not: it had
    reached the number of tokens asked for."""
    assert sent.head is not None
    events: list[dict[str, Any]] = []
    head = ("id", "object", "created", "model")
    base: dict[str, Any] = {key: sent.head[key] for key in head if key in sent.head}
    if is_cut:
        is_chat = "delta" in sent.head["choices"][0]
        said: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": "length"}
        events.append({**base, "choices": [choice]})
    if wants_usage:
        answer = len(sent.kept_ids)
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": answer,
            "total_tokens": prompt_tokens + answer,
        }
        events.append({**base, "choices": [], "usage": usage})
    body = b"".join(_DATA + orjson.dumps(event) + b"\n\n" for event in events)
    return body + _DONE + b"\n\n"


def join_answers(
    answers: Sequence[dict[str, Any]], prompt_tokens: int, keeps_ids: bool
) -> dict[str, Any]:
    """One answer out of those of an engine that stopped on the way and of those that went on, each
    cut to what the next one did not say again. At least one."""
    first, last = answers[0], answers[-1]
    choices = [answer["choices"][0] for answer in answers]
    whole = {**last, "id": first.get("id"), "created": first.get("created")}
    choice = dict(choices[-1])
    if "message" in choice:
        text = "".join(one["message"].get("content") or "" for one in choices)
        choice["message"] = {**choice["message"], "content": text}
    else:
        choice["text"] = "".join(one.get("text") or "" for one in choices)
    if choice.get("logprobs"):
        choice["logprobs"] = _join_logprobs([one.get("logprobs") or {} for one in choices])
    ids = [one for part in choices for one in part.get("token_ids") or ()]
    choice["token_ids"] = ids if keeps_ids else None
    if "prompt_token_ids" in choice:
        choice["prompt_token_ids"] = choices[0].get("prompt_token_ids") if keeps_ids else None
    if "prompt_token_ids" in whole:
        whole["prompt_token_ids"] = first.get("prompt_token_ids") if keeps_ids else None
    whole["choices"] = [choice]
    if last.get("usage"):
        said = len(last["choices"][0].get("token_ids") or ())
        whole["usage"] = usage_once(last["usage"], prompt_tokens, len(ids) - said)
    return whole


def _join_logprobs(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if "content" in parts[-1]:
        return {
            **parts[-1],
            "content": [entry for part in parts for entry in part.get("content") or ()],
        }
    joined: dict[str, Any] = {key: [] for key in _PER_TOKEN}
    for part in parts:
        tokens, offsets = joined["tokens"], joined["text_offset"]
        shift = offsets[-1] + len(tokens[-1]) if offsets else 0
        for key in _PER_TOKEN:
            found = part.get(key) or ()
            joined[key] += [one + shift for one in found] if key == "text_offset" else found
    return {**parts[-1], **joined}
