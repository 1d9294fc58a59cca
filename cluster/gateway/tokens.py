"""Text to token ids, remembering the stretches between special tokens.

A tokenizer cuts a text at its special tokens first and treats what lies between them apart. A
chat's next turn repeats all the messages before it, so their ids are looked up and only the new
message is tokenised: 100,000 tokens of history cost microseconds, not 50 ms.

Whether a tokenizer really works that way is tried out when it is loaded; where it does not (one
that marks only the beginning of a whole text, special tokens that swallow spaces), every text is
tokenised whole.
"""

from __future__ import annotations

import os
import re
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import tokenizers

# One text cannot be split over threads: handing it to another one and back only adds 0.1 ms.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# All remembered stretches together; with their text about 10 bytes each: 20 MB.
MAX_REMEMBERED_TOKENS = 2_000_000
_PROBES = ("a b", " a", "a ", "\n a", "", "The quick brown fox\n\n  jumps", "日本 🙂", "x\t ")


class Encoder:
    """`encode(text)` = the tokenizer's own ids. May be used from several threads."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, max_tokens: int = MAX_REMEMBERED_TOKENS
    ) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._known: OrderedDict[str, array[int]] = OrderedDict()
        self._known_tokens = 0
        self._lock = threading.Lock()
        self._special = {
            added.content: index
            for index, added in tokenizer.get_added_tokens_decoder().items()
            if added.special and not (added.lstrip or added.rstrip or added.single_word)
        }
        longest_first = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self.remembers = bool(self._special) and self._cuts_as_we_do()

    @property
    def remembered_tokens(self) -> int:
        return self._known_tokens

    def encode(self, text: str, add_special_tokens: bool, may_remember: bool = True) -> list[int]:
        """Token ids. Other Python threads run while the tokenizer works."""
        if add_special_tokens or not self.remembers or not may_remember:
            return self._whole(text, add_special_tokens)
        return self._by_stretches(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`, as an engine tells it."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def _whole(self, text: str, add_special_tokens: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )[0].ids
        return ids

    def _by_stretches(self, text: str) -> list[int]:
        ids: list[int] = []
        for stretch in self._cut.split(text):
            if not stretch:
                continue
            special = self._special.get(stretch)
            if special is not None:
                ids.append(special)
            else:
                ids += self._stretch(stretch)
        return ids

    def _stretch(self, stretch: str) -> array[int]:
        with self._lock:
            known = self._known.get(stretch)
            if known is not None:
                self._known.move_to_end(stretch)
                return known
        return self._remember(stretch)

    def _remember(self, stretch: str) -> array[int]:
        ids = array("I", self._whole(stretch))
        with self._lock:
            if stretch not in self._known:
                self._known[stretch] = ids
                self._known_tokens += len(ids)
                while self._known_tokens > self._max_tokens and self._known:
                    _, dropped = self._known.popitem(last=False)
                    self._known_tokens -= len(dropped)
        return ids

    def _cuts_as_we_do(self) -> bool:
        """Try every special token between every two probes."""
        for token in list(self._special)[:64]:
            for before in _PROBES:
                for after in _PROBES[:4]:
                    text = f"{before}{token}{after}{token}{token}{before}"
                    if self._by_stretches(text) != self._whole(text):
                        return False
        return True
