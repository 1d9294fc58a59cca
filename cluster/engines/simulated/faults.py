"""What a test may break in a running engine, and the moments at which it breaks."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

from cluster.engines.simulated.config import FaultSpec
from cluster.engines.simulated.request import Request

CRASH_EXIT_CODE = 70


class Faults:
    """The current faults. `change` takes effect from the next token on."""

    def __init__(self, spec: FaultSpec) -> None:
        self.spec = spec
        self._moving = asyncio.Event()
        if not spec.hang:
            self._moving.set()

    def change(self, patch: dict[str, Any]) -> FaultSpec:
        """Raises: pydantic.ValidationError, and then nothing changed."""
        self.spec = FaultSpec.model_validate({**self.spec.model_dump(), **patch})
        if self.spec.hang:
            self._moving.clear()
        else:
            self._moving.set()
        return self.spec

    async def before_token(self, number: int) -> None:
        """`number` counts a request's output tokens from 1. May never return, or end the process.
        Cancel: safe."""
        if self.spec.crash_at_token is not None and number >= self.spec.crash_at_token:
            print(f"simulated crash before token {number}", file=sys.stderr, flush=True)
            os._exit(CRASH_EXIT_CODE)
        if self.spec.hang:
            await self._moving.wait()

    def take_failure(self) -> bool:
        """Whether this generation is one of the next K that answer 500."""
        if not self.spec.fail_next:
            return False
        self.spec = self.spec.model_copy(update={"fail_next": self.spec.fail_next - 1})
        return True


class GivenBack:
    """The requests that were given back to be recomputed; the newest few."""

    def __init__(self) -> None:
        self._known: deque[tuple[list[int], int]] = deque(maxlen=64)

    def add(self, request: Request, output: Sequence[int]) -> None:
        self._known.append(([*request.prompt_ids, *output], len(request.prompt_ids)))

    def has(self, request: Request) -> bool:
        """Whether `request` goes on from one of them: its prompt and some of what it had said."""
        asked = list(request.prompt_ids)
        return any(
            begun < len(asked) <= len(whole) and whole[: len(asked)] == asked
            for whole, begun in self._known
        )
