"""Token ids and text of a model that is not there. Pure: no clock, no randomness, no I/O.

Output token i is a function of all ids before it, prompt included. So the same request gives the
same ids on every engine, streamed or not, and prompt + what was sent gives the rest. If the KV
blocks were computed for other ids (`foreign`), the function takes them in and the text differs:
wrong KV is as visible here as with a real model.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from cluster.errors import InvalidInput

# One token in this many ends the text: rare enough for short answers to reach max_tokens, common
# enough for a test to meet.
END_ODDS = 1024
MAX_OUTPUT_VOCABULARY = 2048
DIGEST_BYTES = 8


class Vocabulary:
    """Which ids the model can say, and their text. Built once from a tokenizer folder."""

    def __init__(self, folder: str) -> None:
        """Raises: InvalidInput if the folder has no readable tokenizer.json."""
        path = Path(folder) / "tokenizer.json"
        try:
            self.tokenizer: Any = Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers package raises bare Exception
            raise InvalidInput(
                f"{path}: {error}; give a folder with a readable tokenizer.json"
            ) from error
        settings = Path(folder) / "tokenizer_config.json"
        self._settings = json.loads(settings.read_text()) if settings.is_file() else {}
        self.size: int = self.tokenizer.get_vocab_size()
        self.end_id = self._end_id()
        self.says = self._sayable()
        self.text = {token: self.tokenizer.decode([token]) for token in self.says}

    def _end_id(self) -> int:
        named = self._settings.get("eos_token")
        if isinstance(named, dict):
            named = named.get("content")
        found = self.tokenizer.token_to_id(named) if named else None
        return 2 if found is None else int(found)

    def _sayable(self) -> tuple[int, ...]:
        # Only ids whose text stands alone: joining the texts is then the same as decoding the ids.
        chosen: list[int] = []
        for token in range(self.size):
            if token != self.end_id and re.fullmatch("[a-z ]+", self.tokenizer.decode([token])):
                chosen.append(token)
                if len(chosen) == MAX_OUTPUT_VOCABULARY:
                    break
        if not chosen:
            raise InvalidInput("tokenizer.json has no plain lower-case token to answer with")
        return tuple(chosen)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids))
        return text

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The chat template of the folder, or a plain one. Raises: ValueError."""
        template = self._settings.get("chat_template")
        plain = [{**m, "content": flat_content(m.get("content"))} for m in messages]
        if not template:
            lines = "".join(f"{m.get('role')}: {m['content']}\n" for m in plain)
            return lines + ("assistant: " if add_generation_prompt else "")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        return environment.from_string(template).render(
            messages=plain,
            add_generation_prompt=add_generation_prompt,
            bos_token=_content(self._settings.get("bos_token")),
            eos_token=_content(self._settings.get("eos_token")),
        )


def _refuse(why: str) -> None:
    raise ValueError(why)


def _content(token: Any) -> str:
    return token.get("content", "") if isinstance(token, dict) else token or ""


def flat_content(content: Any) -> str:
    """A message's text; parts that are not text are left out. Raises: ValueError."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(
            part if isinstance(part, str) else part.get("text", "")
            for part in content
            if isinstance(part, str | dict)
        )
    raise ValueError(f"content is {type(content).__name__}; give text or a list of parts")


class Continuation:
    """The text after `prompt_ids`, one token per call of `next`."""

    def __init__(
        self, vocabulary: Vocabulary, prompt_ids: Sequence[int], foreign: bytes = b""
    ) -> None:
        self._says = vocabulary.says
        self._end_id = vocabulary.end_id
        self._state = hashlib.blake2b(
            array("I", prompt_ids).tobytes(), digest_size=DIGEST_BYTES, salt=_salt(foreign)
        )

    def next(self, may_end: bool) -> int:
        """The next id; the end-of-text id only if `may_end`."""
        draw = int.from_bytes(self._state.digest(), "little")
        if may_end and draw % END_ODDS == 0:
            token = self._end_id
        else:
            token = self._says[(draw >> 16) % len(self._says)]
        self._state.update(token.to_bytes(4, "little"))
        return token

    def accepted(self, mean: float, limit: int) -> int:
        """How many of `limit` draft tokens this step accepts; `mean` on average."""
        draw = int.from_bytes(self._state.digest()[-2:], "little") / 65_536
        return min(limit, int(mean) + (draw < mean - int(mean)))


def _salt(foreign: bytes) -> bytes:
    return hashlib.blake2b(foreign, digest_size=16).digest() if foreign else b""


def block_keys(ids: Sequence[int], block_size_tokens: int) -> list[bytes]:
    """One 32-byte key per block, chained, the last one over a partial block if there is one.

    A key names the block's ids and all before them; it is also the content that a correctly
    computed block carries.
    """
    packed = array("I", ids).tobytes()
    step = 4 * block_size_tokens
    parent = b""
    keys = []
    for start in range(0, len(packed), step):
        parent = hashlib.blake2b(parent + packed[start : start + step], digest_size=32).digest()
        keys.append(parent)
    return keys


def spoiled(keys: Sequence[bytes], foreign: bytes) -> list[bytes]:
    """What blocks carry that were computed on top of foreign KV: nobody's right content."""
    return [hashlib.blake2b(foreign + key, digest_size=32).digest() for key in keys]
