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


class CoreDied(Exception):
    """The process that computes is gone; the HTTP server is still there."""


class Faults:
    """The current faults. `change` takes effect from the next token on."""

    def __init__(self, spec: FaultSpec) -> None:
        self.spec = spec
        self.is_dead = False
        self._is_stopped = False
        self._moving = asyncio.Event()
        self._running = asyncio.Event()
        self._set()

    @property
    def stands_still(self) -> bool:
        """Whether the scheduler does nothing, and so tells nothing new."""
        return self.spec.hang or self._is_stopped

    def change(self, patch: dict[str, Any]) -> FaultSpec:
        """Raises: pydantic.ValidationError, and then nothing changed."""
        self.spec = FaultSpec.model_validate({**self.spec.model_dump(), **patch})
        self._set()
        return self.spec

    def stop(self, is_stopped: bool) -> None:
        """Whether the process that computes stands still, prompts included."""
        self._is_stopped = is_stopped
        self._set()

    def die(self) -> None:
        """From now on every request fails."""
        self.is_dead = True
        self._set()

    async def before_token(self, number: int) -> None:
        """`number` counts a request's output tokens from 1. May never return, or end the process.
        Raises: CoreDied. Cancel: safe."""
        if self.spec.crash_at_token is not None and number >= self.spec.crash_at_token:
            print(f"simulated crash before token {number}", file=sys.stderr, flush=True)
            os._exit(CRASH_EXIT_CODE)
        if self.spec.hang:
            await self._moving.wait()
        await self.before_chunk()

    def before_prompt(self, ids: Sequence[int]) -> None:
        """May end the process."""
        if self.spec.poison_token is not None and self.spec.poison_token in ids:
            print("simulated crash at a poisonous prompt", file=sys.stderr, flush=True)
            os._exit(CRASH_EXIT_CODE)

    async def before_chunk(self) -> None:
        """Of a prompt. May never return. Raises: CoreDied. Cancel: safe."""
        if self._is_stopped:
            await self._running.wait()
        if self.is_dead:
            raise CoreDied("EngineCore encountered an issue")

    def _set(self) -> None:
        for event, is_held in ((self._moving, self.spec.hang), (self._running, self._is_stopped)):
            if is_held and not self.is_dead:
                event.clear()
            else:
                event.set()

    def take_failure(self, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether this generation is one of the next K that answer 500, or is too long for it."""
        most = self.spec.fail_above_tokens
        if most is not None and any(len(ids) > most for ids in prompts):
            return True
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
