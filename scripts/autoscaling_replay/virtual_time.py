"""An asyncio loop whose clock jumps: when every task waits, it is at once the next timer's moment.

Nothing in it may wait for a socket or a thread.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jump(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Instead of waiting, moves the clock."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("every task waits, and none of them for a time")
        self.now_s += max(0.0, timeout)
        return []


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end. Seconds of `loop.time()` count from 0 and cost nothing."""
    selector = _Jump()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now_s  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(main)
    finally:
        loop.close()
