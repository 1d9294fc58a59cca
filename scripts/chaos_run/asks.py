"""What clients ask: mixed, and a pure function of seed, client and turn.

A conversation's next turn contains the answer before it, which is why a client is a generator
that is told each answer. Left out is what is not promised to go on in mid-stream: streams of
several answers, and tools.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from random import Random
from typing import Any

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_WORDS = ("river", "stone", "window", "market", "signal", "copper", "garden", "winter", "letter")
_LONGEST_TALK = 3


@dataclass(frozen=True, slots=True)
class Ask:
    """One request. `name` says of which client and turn."""

    name: str
    path: str
    body: dict[str, Any]
    is_stream: bool

    def sent(self) -> dict[str, Any]:
        """The body as a client sends it."""
        if not self.is_stream:
            return self.body
        options = {"stream_options": {"include_usage": True}}
        return {**self.body, "stream": True, **options}


Client = Generator[Ask, str, None]


def client(model: str, seed: int, number: int, is_greedy_only: bool = False) -> Client:
    """Asks for ever. `send` it the text of the last answer.

    `is_greedy_only`: for engines that really sample, and are slow: short and without seeds."""
    rng = Random(f"{seed}/{number}")
    turn = 0
    while True:
        talk: list[dict[str, str]] = []
        if rng.random() < 0.5:
            # One of three: its blocks are in many caches.
            subject = Random(f"{seed}/{rng.randrange(3)}")
            talk = [{"role": "system", "content": _text(subject, 400)}]
        for _ in range(rng.randint(1, _LONGEST_TALK)):
            turn += 1
            ask = _ask(rng, f"c{number}.{turn}", model, talk, is_greedy_only)
            said = yield ask
            if ask.path == COMPLETIONS:
                break
            talk = [*ask.body["messages"], {"role": "assistant", "content": said}]


def _ask(
    rng: Random, name: str, model: str, talk: list[dict[str, str]], is_greedy_only: bool
) -> Ask:
    is_chat = bool(talk) or rng.random() < 0.6
    is_stream = rng.random() < 0.7
    length = rng.randint(20, 200)
    if rng.random() < 0.15:
        length = rng.randint(300, 600) if is_greedy_only else rng.randint(2_000, 6_000)
    text = _text(rng, length)
    most = 40 if is_greedy_only else 120
    body: dict[str, Any] = {"model": model, "max_tokens": rng.randint(8, most)}
    if is_chat:
        body["messages"] = [*talk, {"role": "user", "content": text}]
    else:
        body["prompt"] = text
    if rng.random() < 0.5:
        body["ignore_eos"] = True
    if rng.random() < 0.3:
        body["return_token_ids"] = True
    if rng.random() < 0.3:
        body |= {"logprobs": True, "top_logprobs": 2} if is_chat else {"logprobs": 2}
    if rng.random() < 0.25:
        # Letters are all that a simulated engine says.
        body["stop"] = [" and", "."] if is_greedy_only else ["zq", rng.choice("xyjv")]
    if is_greedy_only or rng.random() < 0.6:
        body["temperature"] = 0
        if is_chat and rng.random() < 0.1 and not is_greedy_only:
            body["response_format"] = {"type": "json_object"}
    else:
        body |= {"temperature": 0.7, "seed": rng.randrange(1 << 16)}
    if not is_stream and not is_greedy_only and rng.random() < 0.1:
        body["n"] = 2
    return Ask(name, CHAT if is_chat else COMPLETIONS, body, is_stream)


def _text(rng: Random, length: int) -> str:
    words: list[str] = []
    size = 0
    while size < length:
        words.append(rng.choice(_WORDS))
        size += len(words[-1]) + 1
    return " ".join(words)[:length]
