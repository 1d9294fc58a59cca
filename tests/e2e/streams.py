"""Several unlike greedy requests at once, as clients see them: what was said token by token, when
each piece came, and where the connection goes. For comparing a disturbed run with an undisturbed
one.

    asks()                     the requests
    with Crowd(...) as crowd   sends them all at once, each with a connection of its own
    crowd.streaming(WORKER)    waits until some of its answers are in the middle
    crowd.busiest(WORKERS)     waits for any of them, and names the one that has most
    crowd.told()               what came back; `unlike` compares all that a client sees

Every crowd has a salt of its own, so that no engine's prefix cache knows its prompts.
"""

from __future__ import annotations

import http.client
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from e2e.harness import MODEL, filler

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
BEGUN_PIECES, BEGUN_WITHIN_S, ANSWERED_WITHIN_S = 4, 90.0, 240.0
# Batches of other shapes sum in another order: the last bits of a log-probability, no token.
LOGPROB_TOLERANCE = 2e-3
TOOLS = [{"type": "function", "function": {"name": "none", "parameters": {"type": "object"}}}]

Connect = Callable[[], socket.socket]


@dataclass(frozen=True)
class Ask:
    """One request. `body` says all but the model and what keeps it apart from others' caches."""

    path: str
    body: dict[str, Any]

    @property
    def is_stream(self) -> bool:
        return bool(self.body.get("stream"))

    def named(self, salt: str) -> dict[str, Any]:
        return {**self.body, "model": MODEL, "cache_salt": salt}


def asks(words: int = 40, tokens: int = 64) -> list[Ask]:
    """Ten requests: eight streams and two whole answers, in both endpoints, with and without
    log-probabilities and token ids; one with `stop`, one that may call tools."""
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    ids = {"return_token_ids": True}
    chats: list[dict[str, Any]] = [
        {**usage, **ids},
        {**usage, **ids, "logprobs": True, "top_logprobs": 2},
        usage,
        {**usage, "stop": ["\u2603"]},
        {**usage, "tools": TOOLS},
        {**ids, "logprobs": True},
    ]
    completions: list[dict[str, Any]] = [
        {**usage, **ids},
        {**usage, **ids, "logprobs": 1},
        usage,
        {**ids, "logprobs": 1},
    ]
    greedy = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True}
    found = []
    for number, more in enumerate(chats):
        text = f"{filler(words, number)} Tell a story about it."
        said = {"messages": [{"role": "user", "content": text}]}
        found.append(Ask(CHAT, {**said, **greedy, **more}))
    for number, more in enumerate(completions, start=len(chats)):
        found.append(Ask(COMPLETIONS, {"prompt": filler(words, number), **greedy, **more}))
    return found


@dataclass(eq=False)
class Told:
    """An answer as a client makes sense of it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finishes: list[str] = field(default_factory=list)
    roles: int = 0
    ids: set[str] = field(default_factory=set)
    usages: list[tuple[int, int, int]] = field(default_factory=list)
    is_done: bool = False
    failure: str = ""
    # Not compared: how it came.
    prefill: str = ""
    decode: str = ""
    route: str = ""
    sent_s: float = 0.0
    came_s: list[float] = field(default_factory=list)

    def unlike(self, other: Told) -> str:
        """What differs from `other`, in words; "" if a client could not tell them apart."""
        if self.failure:
            return self.failure
        for name in ("text", "token_ids", "offsets", "finishes", "roles", "usages", "is_done"):
            mine, wanted = getattr(self, name), getattr(other, name)
            if mine != wanted:
                return f"{name}: {mine!r} instead of {wanted!r}"
        if len(self.logprobs) != len(other.logprobs):
            return f"{len(self.logprobs)} log-probabilities instead of {len(other.logprobs)}"
        off = max(
            (abs(a - b) for a, b in zip(self.logprobs, other.logprobs, strict=True)), default=0
        )
        if off > LOGPROB_TOLERANCE:
            return f"a log-probability is off by {off}"
        return "" if len(self.ids) == 1 else f"ids {self.ids}"

    def longest_gap_s(self) -> float:
        """Between two pieces."""
        pairs = zip(self.came_s, self.came_s[1:], strict=False)
        return max((after - before for before, after in pairs), default=0.0)

    def add(self, said: dict[str, Any]) -> None:
        if "error" in said:
            self.failure = f"error: {said['error']}"
            return
        self.ids.add(said["id"])
        if usage := said.get("usage"):
            names = ("prompt_tokens", "completion_tokens", "total_tokens")
            self.usages.append((usage[names[0]], usage[names[1]], usage[names[2]]))
        for choice in said["choices"]:
            spoken = choice.get("delta") or choice.get("message") or {}
            self.roles += bool(spoken.get("role"))
            self.text += choice.get("text") or spoken.get("content") or ""
            self.token_ids += choice.get("token_ids") or ()
            logprobs = choice.get("logprobs") or {}
            self.logprobs += [one["logprob"] for one in logprobs.get("content") or ()]
            self.logprobs += logprobs.get("token_logprobs") or ()
            self.offsets += logprobs.get("text_offset") or ()
            if choice.get("finish_reason"):
                self.finishes.append(choice["finish_reason"])


class Crowd:
    """Requests under way, each in a thread with a connection of its own."""

    def __init__(self, connect: Connect, key: str, asked: Sequence[Ask], salt: str) -> None:
        self.asked = list(asked)
        self._told = [Told() for _ in asked]
        self._key = key
        self._connect = connect
        self._salt = salt
        # By request: this end's port of its connection.
        self.ports = [0] * len(self.asked)
        self._threads = [
            threading.Thread(target=self._run, args=(index,), daemon=True)
            for index in range(len(self.asked))
        ]

    def __enter__(self) -> Crowd:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        deadline_s = time.monotonic() + ANSWERED_WITHIN_S
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    @property
    def live(self) -> list[Told]:
        """What has come so far, request by request."""
        return self._told

    def request_id(self, index: int) -> str:
        """The id that a request was sent with."""
        return f"{self._salt}-{index}"

    def begun(self) -> None:
        """Wait until every stream has begun or has ended."""

        def silent() -> list[int]:
            return [
                index
                for index, told in enumerate(self._told)
                if self.asked[index].is_stream and not told.came_s and not told.failure
            ]

        self._until(lambda: not silent(), "every stream has begun")

    def streaming(self, decode: str, at_least: int = 2) -> list[Told]:
        """Wait until so many streams of a decode worker are in the middle; these streams."""
        self._until(
            lambda: len(self._in_the_middle(decode)) >= at_least,
            f"{at_least} streams come from {decode}",
        )
        return self._in_the_middle(decode)

    def busiest(self, *decodes: str) -> str:
        """Wait until two streams of one of these workers are in the middle; the worker with most.
        Which one gets how many is a matter of load, and of what its gateway knows of it."""

        def found() -> str:
            return max(decodes, key=lambda name: len(self._in_the_middle(name)))

        self._until(lambda: len(self._in_the_middle(found())) >= 2, f"two come from {decodes}")
        return found()

    def _in_the_middle(self, decode: str) -> list[Told]:
        return [
            told
            for told, asked in zip(self._told, self.asked, strict=True)
            if asked.is_stream and told.decode == decode
            if len(told.came_s) >= BEGUN_PIECES and not told.finishes
        ]

    def _until(self, holds: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + BEGUN_WITHIN_S
        while not holds():
            if time.monotonic() > deadline_s:
                raise AssertionError(f"{what}: not within {BEGUN_WITHIN_S:g} s: {self._told}")
            time.sleep(0.02)

    def told(self) -> list[Told]:
        """All answers, once they are there."""
        self.__exit__()
        for told, thread in zip(self._told, self._threads, strict=True):
            if thread.is_alive():
                told.failure = f"no end within {ANSWERED_WITHIN_S:g} s"
        return self._told

    def _run(self, index: int) -> None:
        told, asked = self._told[index], self.asked[index]
        try:
            self._exchange(told, asked, index)
        except (OSError, http.client.HTTPException, ValueError) as error:
            told.failure = f"{type(error).__name__}: {error}"

    def _exchange(self, told: Told, asked: Ask, index: int) -> None:
        link = http.client.HTTPConnection("endpoint", timeout=ANSWERED_WITHIN_S)
        link.sock = self._connect()
        self.ports[index] = link.sock.getsockname()[1]
        told.sent_s = time.monotonic()
        headers = {"content-type": "application/json", "authorization": f"Bearer {self._key}"}
        headers["x-request-id"] = self.request_id(index)
        link.request("POST", asked.path, json.dumps(asked.named(self._salt)), headers)
        answer = link.getresponse()
        told.prefill = answer.headers.get("x-pdcluster-prefill", "")
        told.route = answer.headers.get("x-pdcluster-route", "")
        told.decode = answer.headers.get("x-pdcluster-decode", "")
        if answer.status != 200:
            told.failure = f"HTTP {answer.status}: {answer.read()[:500]!r}"
        elif asked.is_stream:
            self._follow(told, answer)
        else:
            told.add(json.loads(answer.read()))
            told.came_s.append(time.monotonic())
            told.is_done = True
        link.close()

    def _follow(self, told: Told, answer: http.client.HTTPResponse) -> None:
        while line := answer.readline():
            if line == b"data: [DONE]\n":
                told.is_done = True
            elif line.startswith(b"data: "):
                told.came_s.append(time.monotonic())
                told.add(json.loads(line[6:]))
        if not told.is_done and not told.failure:
            told.failure = "its stream has no end"


def compare(crowd: Crowd, undisturbed: Sequence[Told]) -> list[Told]:
    """The answers, every one as it was undisturbed. `undisturbed` may be of more requests."""
    told = crowd.told()
    unlike = {
        crowd.request_id(index): difference
        for index, (one, wanted) in enumerate(zip(told, undisturbed, strict=False))
        if (difference := one.unlike(wanted))
    }
    assert not unlike, unlike
    return told


def gap_s(told: Told, fault_s: float) -> float:
    """From a fault to the next piece of a stream."""
    return next((at_s for at_s in told.came_s if at_s > fault_s), fault_s) - fault_s


def pauses(crowd: Crowd, broken: Sequence[Told], fault_s: float) -> str:
    """How long a fault held up the streams that it broke, and the others, in words."""
    mine = [gap_s(told, fault_s) for told in broken]
    others = [
        max(after - max(before, fault_s) for before, after in itertools.pairwise(told.came_s))
        for told in crowd.live
        if told not in broken and len(told.came_s) > 1 and told.came_s[-1] > fault_s
    ]
    waits = ", ".join(f"{gap:.2f}" for gap in sorted(mine))
    return (
        f"{len(mine)} broken streams went on after {waits} s; others paused for at most "
        f"{max(others, default=0.0):.2f} s"
    )


def to_port(port: int, host: str = "127.0.0.1") -> Connect:
    return lambda: socket.create_connection((host, port), timeout=ANSWERED_WITHIN_S)
