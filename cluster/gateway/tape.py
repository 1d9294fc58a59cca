"""What a stream has sent so far, kept so that another engine can go on from there. Pure.

Engines are asked for `return_token_ids`. Each piece that passes is rid of the ids, unless the
client asked for them itself, and the ids are kept as the bytes they came in: parsing waits until a
stream breaks (measured: 1.1 us per chunk of one token). What a client sees is what it would see
without us, byte for byte.

Text may lag behind ids: an engine holds back half a character, and with `stop` as many characters
as the longest stop string might still match. `Tape.sent` finds the tokens whose text was sent.
Called by: gateway.course, gateway.replay.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

# In JSON a quote inside a string is escaped, so this matches keys only.
_IDS = re.compile(rb'"(prompt_token_ids|token_ids)":\[([\d,]*)\]')
_PROMPT_IDS = re.compile(rb'"prompt_token_ids":\[[\d,]*\]')
_DATA = b"data: "
_DONE = b"data: [DONE]"
# Held-back text spans a few tokens (the bytes of one character), far fewer events than this.
_RECENT_PIECES = 16
# Enough for any tokenizer to be past what the beginning of a window does to its text.
_WINDOW_TOKENS = 48
_HALF = "\ufffd"  # what half a character decodes to

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True)
class Sent:
    """Where a broken stream stands."""

    kept_ids: tuple[int, ...]  # output tokens whose text was sent; the next engine's prompt
    skip_text: str = ""  # sent beyond those: the next engine will say it again
    skip_tokens: int = 0  # tokens reported beyond those, with their log-probabilities
    text_offset: int = 0  # characters reported up to the last kept token (completions' logprobs)
    head: dict[str, Any] | None = None  # the first event; None: nothing was sent
    is_finished: bool = False  # its last token was sent; only the end is missing


class Tape:
    """Owned by one stream. `keeps_text`: the request has `stop` strings."""

    __slots__ = ("_chunks", "_first", "_keeps_ids", "_recent")

    def __init__(self, keeps_text: bool, keeps_ids: bool) -> None:
        """`keeps_ids`: the client asked for token ids, so they stay in what it gets."""
        self._chunks: list[bytes] = []
        self._recent: deque[bytes] = deque(maxlen=None if keeps_text else _RECENT_PIECES)
        self._first = b""
        self._keeps_ids = keeps_ids

    def take(self, piece: bytes) -> bytes:
        """Remember a piece of whole events; what of it the client gets."""
        cleaned, ids = strip_ids(piece)
        self._chunks += ids
        if not self._first:
            self._first = cleaned.partition(b"\n\n")[0]
        # Never the prompt's ids: of a long prompt they are megabytes.
        self._recent.append(_PROMPT_IDS.sub(b'"prompt_token_ids":null', piece) if ids else cleaned)
        return piece if self._keeps_ids else cleaned

    def ids(self) -> list[int]:
        """Every output token reported so far."""
        return [int(one) for chunk in self._chunks for one in chunk.split(b",")]

    @property
    def tokens(self) -> int:
        """How many those are."""
        return count_ids(self._chunks)

    def sent(self, decode: Decode) -> Sent | None:
        """Where the stream stands; None if that cannot be told for certain."""
        if not self._first:
            return Sent(())
        head = _parsed(self._first)
        events = [event for piece in self._recent for event in _events(piece)]
        if head is None or any(event is None for event in events):
            return None
        known = [event for event in events if event is not None]
        ids = self.ids()
        is_finished = any(_choice(event).get("finish_reason") for event in known)
        if is_finished:
            return Sent(tuple(ids), head=head, is_finished=True)
        settled = self._settle(ids, known, decode)
        if settled is None:
            return None
        kept, skip_text = settled
        return Sent(
            tuple(ids[:kept]),
            skip_text=skip_text,
            skip_tokens=len(ids) - kept,
            text_offset=_text_offset(known, len(ids) - kept),
            head=head,
        )

    def _settle(
        self, ids: list[int], events: list[dict[str, Any]], decode: Decode
    ) -> tuple[int, str] | None:
        if self._recent.maxlen is None:
            return settle(ids, "".join(map(_text, events)), decode)
        # Without `stop` text is sent as soon as its characters are whole: from a place where they
        # were, the events that are still known tell the rest.
        begun = len(ids) - sum(map(_reported, events))
        for index, event in enumerate(events):
            before = ids[max(0, begun - _WINDOW_TOKENS) : begun]
            told = decode(before)
            if not told.endswith(_HALF):
                text = "".join(map(_text, events[index:]))
                settled = settle([*before, *ids[begun:]], told + text, decode)
                if settled is None or settled[0] < len(before):
                    return None
                return begun + settled[0] - len(before), settled[1]
            begun += _reported(event)
        return None


def strip_ids(piece: bytes) -> tuple[bytes, list[bytes]]:
    """A piece of a stream without token ids, as if they had not been asked for, and the ids of its
    output tokens, as decimal numbers with commas."""
    parts = _IDS.split(piece)
    if len(parts) == 1:
        return piece, []
    cleaned, found = [parts[0]], []
    for index in range(1, len(parts), 3):
        name, ids, after = parts[index : index + 3]
        if ids and name == b"token_ids":
            found.append(ids)
        cleaned += (b'"', name, b'":null', after)
    return b"".join(cleaned), found


def count_ids(chunks: Sequence[bytes]) -> int:
    return sum(chunk.count(b",") for chunk in chunks) + len(chunks)


def settle(ids: Sequence[int], text: str, decode: Decode) -> tuple[int, str] | None:
    """How many of `ids` have all their text in `text`, and what of `text` lies beyond them.

    None if `text` is not what `ids` say."""
    if not decode(ids).startswith(text):
        return None
    low, high = 0, len(ids)
    while low < high:  # text grows with tokens, except for half characters, tried below
        middle = (low + high + 1) // 2
        if len(decode(ids[:middle])) <= len(text):
            low = middle
        else:
            high = middle - 1
    for kept in range(low, max(-1, low - _RECENT_PIECES), -1):
        told = decode(ids[:kept])
        if text.startswith(told):
            return kept, text[len(told) :]
    return None


def _events(piece: bytes) -> list[dict[str, Any] | None]:
    return [
        _parsed(event)
        for event in piece.split(b"\n\n")
        if event.startswith(_DATA) and not event.startswith(_DONE)
    ]


def _parsed(event: bytes) -> dict[str, Any] | None:
    try:
        found = orjson.loads(event.removeprefix(_DATA))
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _choice(event: dict[str, Any]) -> dict[str, Any]:
    choices = event.get("choices")
    return choices[0] if choices else {}


def _text(event: dict[str, Any]) -> str:
    choice = _choice(event)
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""


def _reported(event: dict[str, Any]) -> int:
    return len(_choice(event).get("token_ids") or ())


def _text_offset(events: list[dict[str, Any]], beyond: int) -> int:
    """The offset that completions' logprobs give the first token after those kept."""
    tokens: list[str] = []
    offsets: list[int] = []
    for event in events:
        logprobs = _choice(event).get("logprobs") or {}
        tokens += logprobs.get("tokens") or ()
        offsets += logprobs.get("text_offset") or ()
    if not offsets:
        return 0
    if 0 < beyond <= len(offsets):
        return offsets[-beyond]
    return offsets[-1] + len(tokens[-1])
