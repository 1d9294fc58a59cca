"""One request's answer over all the engines it meets: what is kept, and how the next one goes on.

    CONTINUE  the next engine prefills prompt + sent and decodes the rest        (`tape`, `splice`)
    REPEAT    the next engine says it all again; the client gets what is new     (`replay`)
    neither   once something was sent, a failure is the end of the answer

An engine's own stop to be recomputed elsewhere (`stop_reason` "recomputed", vLLM-Ascend's when it
runs out of KV blocks) is the same step, for whole answers too. Pure. Called by: gateway.exchange,
gateway.attempt.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import orjson

from cluster.gateway.continuation import TELLS_IDS, is_spent, remaining, why_not
from cluster.gateway.replay import Replay, Script, is_repeatable
from cluster.gateway.requests import GatewayRequest
from cluster.gateway.splice import Splice, end_of, join_answers
from cluster.gateway.tape import Decode, Sent, Tape, settle, strip_ids
from cluster.snapshot import WorkerView

RECOMPUTED = b'"stop_reason":"recomputed"'
_COMPLETION_TOKENS = b'"completion_tokens":'
_DONE = b"data: [DONE]\n\n"
_IDS = b'"token_ids":['
_USAGE_EVENT = b'"choices":[]'
# Engines that may hand a request back in the middle of its answer.
_MAY_RECOMPUTE = frozenset({"vllm_ascend", "simulated"})


class Way(enum.StrEnum):
    CONTINUE = "continue"
    REPEAT = "repeat"
    NONE = "none"


WAYS = (Way.CONTINUE.value, Way.REPEAT.value)  # metric labels


class Course:
    """Owned by one exchange. `prompt_ids` None: the gateway does not know them."""

    def __init__(
        self, request: GatewayRequest, prompt_ids: Sequence[int] | None, has_reasoning_parser: bool
    ) -> None:
        self._request = request
        self._prompt_ids = list(prompt_ids) if prompt_ids is not None else None
        self._keeps_ids = bool(request.body.get("return_token_ids"))
        self.why_not = why_not(request, has_reasoning_parser)
        if prompt_ids is None and not self.why_not:
            self.why_not = "its prompt is known to its engine only"
        self.way = self._choose()
        self._tape: Tape | Script | None = None
        self._join: Splice | Replay | None = None
        self._sent: Sent | None = None
        self._parts: list[dict[str, Any]] = []
        self._last = b""
        self._counts_events = False
        self._untold_tokens = 0  # of answers whose ids are not told: as far as can be seen
        self.ending: bytes | None = None  # what is missing of an answer that is all said

    def _choose(self) -> Way:
        if not self.why_not:
            return Way.CONTINUE
        request = self._request
        if request.is_stream and request.answers == 1 and is_repeatable(request.body):
            return Way.REPEAT
        return Way.NONE

    # What the next engine is asked

    @property
    def kept_tokens(self) -> int:
        return len(self._sent.kept_ids) if self._sent is not None else 0

    @property
    def answer_tokens(self) -> int:
        """How many the answer has so far, over all engines. Where an engine does not tell ids, a
        stream's events stand for tokens; 0: not known."""
        told = self._tape.tokens if self._tape is not None else 0
        return told or self._untold_tokens

    def prompt_ids(self) -> list[int] | None:
        """What the next engine's prompt is; None: it makes the ids itself."""
        if self._prompt_ids is None or self._sent is None or self.way is not Way.CONTINUE:
            return self._prompt_ids
        return [*self._prompt_ids, *self._sent.kept_ids]

    def body(self, worker: WorkerView) -> dict[str, Any]:
        """The client's body, with what is still to be said, for a decode call to `worker`."""
        body = self._request.body
        if self.way is Way.CONTINUE and self._sent is not None:
            body = remaining(body, self.kept_tokens)
        if self.way is not Way.NONE and self._tells(worker):
            body = {**body, "return_token_ids": True}
        return body

    def _tells(self, worker: WorkerView) -> bool:
        engine = worker.fingerprint.engine if worker.fingerprint is not None else ""
        return engine in (TELLS_IDS if self._request.is_stream else _MAY_RECOMPUTE)

    # A stream

    def start(self, worker: WorkerView) -> None:
        """The answer of `worker` begins."""
        if self._tape is None and self.way is Way.CONTINUE:
            self._tape = Tape(bool(self._request.body.get("stop")), self._keeps_ids)
        elif self._tape is None and self.way is Way.REPEAT:
            self._tape = Script(self._keeps_ids)
        elif isinstance(self._tape, Script):
            self._join = Replay(self._tape, worker.id.name)
        elif self._sent is not None and self._prompt_ids is not None:
            self._join = Splice(self._sent, len(self._prompt_ids), worker.id.name)
        self._counts_events = self._tape is None or not self._tells(worker)

    def take(self, piece: bytes) -> bytes:
        """What the client gets of a piece of whole events.

        Raises: Diverged; EngineFailed: an error event of an engine that goes on."""
        if self._join is not None:
            piece = self._join.piece(piece)
        if self._tape is not None:
            piece = self._tape.take(piece)
        if piece:
            self._last = piece
            if self._counts_events:
                self._untold_tokens += piece.count(b"\n\n")
        return piece

    def may_leave(self, decode: Decode) -> bool:
        """Whether another engine could go on now with what was begun to be sent."""
        if self._tape is None:
            return False
        return isinstance(self._tape, Script) or self._tape.sent(decode) is not None

    def interrupted(self, decode: Decode) -> str:
        """The stream broke: prepare for the next engine, or for `ending`. "" or why it cannot go
        on."""
        if self._tape is None:
            return self.why_not
        if isinstance(self._tape, Script):
            if self._tape.is_finished:
                self._end(Sent(tuple(self._tape.ids()), head=self._tape.head, is_finished=True))
            return ""
        sent = self._tape.sent(decode)
        if sent is None:
            return "what was sent of its text cannot be told for certain"
        self._sent = sent
        if sent.is_finished or (
            not sent.skip_text and is_spent(self._request, len(sent.kept_ids)) and sent.head
        ):
            self._end(sent)
        return ""

    def _end(self, sent: Sent) -> None:
        if self._last.endswith(_DONE):
            self.ending = b""
            return
        options = self._request.body.get("stream_options") or {}
        wants_usage = bool(options.get("include_usage")) and _USAGE_EVENT not in self._last
        self.ending = end_of(
            sent, len(self._prompt_ids or ()), wants_usage, is_cut=not sent.is_finished
        )

    # A whole answer

    def whole(self, answer: bytes, decode: Decode) -> bytes | None:
        """What the client gets of a whole answer; None: it was handed back, go on elsewhere."""
        is_handed_back = RECOMPUTED in answer
        self._untold_tokens += _number_after(_COMPLETION_TOKENS, answer)
        if not is_handed_back and not self._parts:
            is_told = not self._keeps_ids and _IDS in answer
            return strip_ids(answer)[0] if is_told else answer
        part: dict[str, Any] = orjson.loads(answer)
        if not is_handed_back:
            joined = join_answers(
                [*self._parts, part], len(self._prompt_ids or ()), self._keeps_ids
            )
            return orjson.dumps(joined)
        kept = _cut(part, decode) if self.way is Way.CONTINUE else None
        if kept is not None:  # else all of it is asked again: nothing was sent
            self._parts.append(part)
            before = self._sent.kept_ids if self._sent is not None else ()
            self._sent = Sent((*before, *kept))
        return None


def _number_after(key: bytes, answer: bytes) -> int:
    """The number that follows the last `key`; 0: there is none. Not worth parsing all of it."""
    rest = answer[answer.rfind(key) + len(key) :][:24].lstrip() if key in answer else b""
    digits = rest[: len(rest) - len(rest.lstrip(b"0123456789"))]
    return int(digits or 0)


def _cut(part: dict[str, Any], decode: Decode) -> tuple[int, ...] | None:
    """Cut a part of an answer to the tokens whose text is whole; these tokens, or None."""
    choice = part["choices"][0]
    holder, key = (choice, "text") if "text" in choice else (choice.get("message") or {}, "content")
    ids, text = choice.get("token_ids") or [], holder.get(key) or ""
    settled = settle(ids, text, decode)
    if settled is None:
        return None
    kept, beyond = settled
    holder[key] = text[: len(text) - len(beyond)]
    choice["token_ids"] = ids[:kept]
    logprobs = choice.get("logprobs") or {}
    for name, values in logprobs.items():
        if isinstance(values, list):
            logprobs[name] = values[:kept]
    return tuple(ids[:kept])
