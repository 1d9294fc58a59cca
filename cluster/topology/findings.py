"""What a check says: which key, what was found, what to write instead; and how to word it.

Checks know key paths, not lines; `topology.loader` turns a Finding into a Fault once it knows where
the key stands in the file. Pure.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

KeyPath = tuple[str | int, ...]

SERVING: KeyPath = ("metadata", "serving")

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_SECRET_NAME = re.compile(
    r"(?i)(?:(?:^|(?<!per)[_-])(?:keys?|token|secrets?|credentials?)|passw(?:or)?d)$"
)
_LONGEST_QUOTE = 60


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong, by key path. `rests_on`: other keys without which it would not be wrong;
    where one of those is itself at fault, the finding may be a mere consequence of it."""

    key: KeyPath
    found: str
    fix: str
    rests_on: tuple[KeyPath, ...] = ()


def dotted(path: KeyPath) -> str:
    """The path as people write it: `pools[1].placement.labels["ray.io/zone"]`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _PLAIN_KEY.fullmatch(part):
            text += f".{part}" if text else part
        else:
            text += f'["{part}"]'
    return text


def serving_key(path: KeyPath) -> str:
    """A key of ours, given from `metadata.serving` down, in full."""
    return dotted(SERVING + path)


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was most likely meant to be, or None."""
    by_shape = {name.lower().replace("-", "_"): name for name in known}
    shape = word.lower().replace("-", "_")
    close = difflib.get_close_matches(shape, by_shape, n=1, cutoff=0.6)
    return by_shape[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A fix for an unknown word: the nearest known one, or all of them."""
    names = sorted(known)
    close = nearest(word, names)
    if close is not None:
        return f"did you mean `{close}`?"
    return f"write one of: {', '.join(names)}" if names else "take it out"


def names_a_secret(name: str) -> bool:
    """Does a variable or key of this name hold a secret, by what it is called?"""
    return _SECRET_NAME.search(name) is not None


def quote(value: Any, under: str = "") -> str:
    """A value for an error message: short, one line, and nothing of what a key named `under` hides.

    >>> quote([1, 2])
    'a list of 2'
    """
    if isinstance(value, Mapping):
        return f"a mapping of {len(value)} keys" if len(value) != 1 else "a mapping of 1 key"
    if isinstance(value, list | tuple | set | frozenset):
        return f"a list of {len(value)}"
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if names_a_secret(under):
        return "a value (not shown, it may be a secret)"
    if isinstance(value, str):
        text = value if len(value) <= _LONGEST_QUOTE else value[: _LONGEST_QUOTE - 3] + "..."
        return '"' + "".join(c if c.isprintable() else "?" for c in text) + '"'
    if isinstance(value, int) and value.bit_length() > 200:  # str() refuses beyond 4,300 digits
        return "a number of more than 60 digits"
    return str(value)
