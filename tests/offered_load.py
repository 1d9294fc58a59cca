"""Streams that come at a rate, for as long as a test likes. Standard library, in threads."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
import urllib.parse


class OfferedLoad:
    """`with OfferedLoad(...)`: `per_s` requests per second of `prompt_words` unlike words each,
    until it is left; leaving waits for those that run. `faults` says what went wrong."""

    def __init__(
        self, endpoint: str, key: str, model: str, per_s: float, prompt_words: int, max_tokens: int
    ) -> None:
        self._address = urllib.parse.urlsplit(endpoint)
        self._key, self._model = key, model
        self._per_s, self._words, self._max_tokens = per_s, prompt_words, max_tokens
        self._ended = threading.Event()
        self._streams: list[threading.Thread] = []
        self._caller = threading.Thread(target=self._call, name="offered load")
        self.faults: list[str] = []
        self.answered = 0

    def __enter__(self) -> OfferedLoad:
        self._caller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._caller.join()
        for stream in self._streams:
            stream.join()

    def _call(self) -> None:
        begun_s = time.monotonic()
        for number in itertools.count():
            pause_s = begun_s + number / self._per_s - time.monotonic()
            if self._ended.wait(max(0.0, pause_s)):
                return
            stream = threading.Thread(target=self._stream, args=(number,))
            self._streams.append(stream)
            stream.start()

    def _stream(self, number: int) -> None:
        connection = http.client.HTTPConnection(
            self._address.hostname or "", self._address.port, timeout=120
        )
        body = {
            "model": self._model,
            "prompt": " ".join(f"w{number}x{word}" for word in range(self._words)),
            "max_tokens": self._max_tokens,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"authorization": f"Bearer {self._key}", "content-type": "application/json"}
        try:
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            said = response.read()
            if response.status != 200 or b'"error"' in said or b"[DONE]" not in said:
                self.faults.append(f"{response.status} {said[-300:]!r}")
            else:
                self.answered += 1
        except OSError as error:
            self.faults.append(repr(error))
        finally:
            connection.close()
