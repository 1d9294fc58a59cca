"""Streams as a client makes sense of them, and whether one that was disturbed says the same.

The simulated engine's next token depends on every token before it, so an answer that lost, doubled
or changed a single one differs from then on.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HEADERS = {"Authorization": "Bearer sk-test"}


def body(path: str, **more: Any) -> dict[str, Any]:
    text = "Tell me of the broken stream " * 6
    said = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    return {**said, "max_tokens": 60, "ignore_eos": True, "temperature": 0, **more}


@dataclass
class Told:
    """A stream as a client makes sense of it."""

    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finishes: list[str] = field(default_factory=list)
    roles: int = 0
    ids: set[str] = field(default_factory=set)
    usage: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    is_done: bool = False
    decode: str = ""

    def add(self, event: bytes) -> None:
        if event == b"data: [DONE]\n\n":
            self.is_done = True
            return
        assert b'token_ids":[' not in event
        said = json.loads(event.removeprefix(b"data: "))
        if "error" in said:
            self.error = said["error"]
            return
        self.ids.add(said["id"])
        self.usage = said.get("usage") or self.usage
        for choice in said["choices"]:
            delta = choice.get("delta") or {}
            self.roles += "role" in delta
            self.text += choice.get("text") or delta.get("content") or ""
            logprobs = choice.get("logprobs") or {}
            self.logprobs += [one["logprob"] for one in logprobs.get("content") or ()]
            self.logprobs += logprobs.get("token_logprobs") or ()
            self.offsets += logprobs.get("text_offset") or ()
            if choice.get("finish_reason"):
                self.finishes.append(choice["finish_reason"])


async def tell(gateway, path: str, request: dict[str, Any], at_event=None, deed=None) -> Told:
    """Read a stream to its end; do `deed(worker name)` before event number `at_event`."""
    told = Told()
    asked = {**request, "stream": True, "stream_options": {"include_usage": True}}
    async with gateway.session.post(path, json=asked, headers=HEADERS) as response:
        told.decode = response.headers["x-pdcluster-decode"]
        number = 0
        while not response.content.at_eof():
            if number == at_event:
                await deed(told.decode)
            event = await asyncio.wait_for(response.content.readuntil(b"\n\n"), 20)
            told.add(event)
            number += 1
            if told.is_done or told.error:
                break
    return told


def same(told: Told, undisturbed: Told) -> bool:
    usage, wanted = dict(told.usage or {}), dict(undisturbed.usage or {})
    # How much of a prompt was cached depends on who was asked before.
    for one in (usage, wanted):
        one.pop("prompt_tokens_details", None)
    assert told.error is None
    assert len(told.ids) == 1
    assert (told.text, told.logprobs, told.offsets) == (
        undisturbed.text,
        undisturbed.logprobs,
        undisturbed.offsets,
    )
    assert usage == wanted
    return (told.finishes, told.roles, told.is_done) == (
        undisturbed.finishes,
        undisturbed.roles,
        undisturbed.is_done,
    )
