"""One sequence in a simulated engine, and one step of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Step(NamedTuple):
    """What one decode step brought. `finish`: None while there is more."""

    ids: list[int]
    finish: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Request:
    """One sequence. The last three fields are filled in while it runs."""

    request_id: str
    prompt_ids: Sequence[int]
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    kv_params: dict[str, Any] = field(default_factory=dict)
    copies: int = 1  # n: identical choices
    cached_tokens: int = 0
    kv_answer: dict[str, Any] | None = None
    foreign: bytes = b""  # contents of blocks that were computed for other ids
