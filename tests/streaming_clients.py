"""Clients that stream from a cluster's endpoint while a test does something to it."""

from __future__ import annotations

import http.client
import json
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Stream:
    """One streamed chat answer. `fault`: what went wrong, in words."""

    prompt: str
    text: str = ""
    finish_reason: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    chunks: int = 0


class Clients:
    """`streams`: in the order of `prompts`. Each is one request of `max_tokens` tokens, greedy.

    with Clients(...) as clients: all have begun; at its end all have ended, and `whole` says what
    is wrong with any."""

    def __init__(
        self, endpoint: str, key: str, model: str, prompts: list[str], max_tokens: int
    ) -> None:
        self._at = urlsplit(endpoint)
        self._key, self._model, self._max_tokens = key, model, max_tokens
        self.streams = [Stream(prompt) for prompt in prompts]
        self._begun = [threading.Event() for _ in prompts]
        self._threads = [
            threading.Thread(target=self._run, args=pair, daemon=True)
            for pair in zip(self.streams, self._begun, strict=True)
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        for begun in self._begun:
            assert begun.wait(30), "a stream has not begun"
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join(120)

    @property
    def still_running(self) -> int:
        return sum(thread.is_alive() for thread in self._threads)

    def faults(self) -> list[str]:
        """What is wrong with any of them."""
        found = [stream.fault for stream in self.streams if stream.fault]
        for stream in self.streams:
            made = stream.usage.get("completion_tokens")
            if not stream.fault and (stream.finish_reason, made) != ("length", self._max_tokens):
                found.append(f"{stream.prompt[:20]}: {stream.finish_reason} after {made} tokens")
        return found

    def _run(self, stream: Stream, begun: threading.Event) -> None:
        try:
            self._stream(stream, begun)
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            stream.fault = f"{type(error).__name__}: {error}"
        begun.set()

    def _stream(self, stream: Stream, begun: threading.Event) -> None:
        connection = http.client.HTTPConnection(self._at.hostname or "", self._at.port, timeout=90)
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": stream.prompt}],
            "max_tokens": self._max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        headers = {"authorization": f"Bearer {self._key}", "content-type": "application/json"}
        path = f"{self._at.path.rstrip('/')}/v1/chat/completions"
        connection.request("POST", path, json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            stream.fault = f"{answer.status} {answer.read().decode(errors='replace')[:300]}"
            return
        is_done = False
        for line in answer:
            data = line.decode().removeprefix("data: ").strip()
            if not data:
                continue
            if data == "[DONE]":
                is_done = True
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                stream.fault = str(chunk["error"])
                return
            stream.usage = chunk.get("usage") or stream.usage
            for choice in chunk["choices"]:
                stream.text += choice["delta"].get("content") or ""
                stream.finish_reason = choice.get("finish_reason") or stream.finish_reason
                stream.chunks += 1
                begun.set()
        connection.close()
        if not is_done:
            stream.fault = "the stream broke off"
