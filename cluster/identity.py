"""Who is who: roles, worker ids with generations, and the states a worker passes through."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass


class Role(enum.StrEnum):
    """What a worker does for a request. MIXED does both for the requests it takes."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


@dataclass(frozen=True, slots=True, order=True)
class WorkerId:
    """A replica's identity. A restarted replica keeps pool and index and gets a new generation,
    so that nobody mistakes it for its former self."""

    pool: str
    index: int
    generation: int = 0

    @property
    def name(self) -> str:
        """What people type: `decode/0`."""
        return f"{self.pool}/{self.index}"

    def __str__(self) -> str:
        return f"{self.pool}/{self.index}#{self.generation}"

    @classmethod
    def parse(cls, text: str) -> WorkerId:
        """Read `pool/index` or `pool/index#generation`. Raises: ValueError."""
        match = re.fullmatch(r"([a-z0-9][a-z0-9-]*)/(\d+)(?:#(\d+))?", text)
        if match is None:
            raise ValueError(f"{text!r} is not a worker; write POOL/INDEX, as in decode/0")
        return cls(match[1], int(match[2]), int(match[3] or 0))


class WorkerState(enum.StrEnum):
    """Where a worker is in its life. Only READY takes new requests."""

    STARTING = "starting"  # process started, weights not yet loading
    LOADING = "loading"
    WARMING = "warming"  # HTTP answers; the one-token generation is on its way
    READY = "ready"
    HUNG = "hung"  # alive, holds work, makes no progress
    CHANGING = "changing"  # loaded, on its way from one role to the other; takes no new work
    DRAINING = "draining"
    STOPPED = "stopped"  # ended on request
    FAILED = "failed"  # ended by itself, or never became ready


TAKES_WORK = frozenset({WorkerState.READY})
ENDED = frozenset({WorkerState.STOPPED, WorkerState.FAILED})
