"""The error tree. A class says what to do about it; the fields say what happened.

    ClusterError
    ├── InvalidInput      the operator's file or flag is wrong: print, exit 2
    │   └── TopologyError every fault of a file at once
    ├── Retryable         the same step may succeed elsewhere or later
    │   ├── PeerGone      a worker's generation changed or it does not answer: route again
    │   ├── NoCapacity    nothing can take the work now: 429 or 503 with Retry-After
    │   └── EngineFailed  an engine answered 5xx or broke its stream
    └── Final             trying again cannot help
        ├── StartFailed   an engine did not become ready; carries its own last words
        └── KvMismatch    two engines cannot exchange KV blocks; says what differs

Every class keeps its fields when it crosses an actor boundary (tests/unit/test_errors.py).
"""

from __future__ import annotations

from dataclasses import dataclass


class ClusterError(Exception):
    """Base of everything pdcluster raises on purpose. `str(error)` is fit for an operator."""


class InvalidInput(ClusterError):
    """What the operator gave is wrong. Exit code 2."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a file: where, which key, what was found, what to write instead."""

    file: str
    line: int
    key: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.key}: {self.found}; {self.fix}"


class TopologyError(InvalidInput):
    """All faults found in one topology file."""

    def __init__(self, faults: tuple[Fault, ...]) -> None:
        super().__init__(faults)
        self.faults = faults

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)


class Retryable(ClusterError):
    """The same step may succeed on another worker or a little later."""


class PeerGone(Retryable):
    """`worker` is not the peer it was (restarted) or does not answer."""

    def __init__(self, worker: str, why: str) -> None:
        super().__init__(worker, why)
        self.worker = worker
        self.why = why

    def __str__(self) -> str:
        return f"{self.worker} is gone: {self.why}"


class NoCapacity(Retryable):
    """No worker can take the request now. `retry_after_s` is a hint for the client."""

    def __init__(self, why: str, retry_after_s: float) -> None:
        super().__init__(why, retry_after_s)
        self.why = why
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.why


class EngineFailed(Retryable):
    """An engine answered with a server error, or broke off. `status` is None if it broke off."""

    def __init__(self, worker: str, status: int | None, why: str) -> None:
        super().__init__(worker, status, why)
        self.worker = worker
        self.status = status
        self.why = why

    def __str__(self) -> str:
        status = "broke off" if self.status is None else f"answered {self.status}"
        return f"{self.worker} {status}: {self.why}"


class Final(ClusterError):
    """Trying again cannot help."""


class StartFailed(Final):
    """An engine did not become ready. `last_words` is the tail of its own log."""

    def __init__(self, worker: str, why: str, last_words: tuple[str, ...] = ()) -> None:
        super().__init__(worker, why, last_words)
        self.worker = worker
        self.why = why
        self.last_words = last_words

    def __str__(self) -> str:
        tail = "".join(f"\n    {line}" for line in self.last_words)
        return f"{self.worker} did not start: {self.why}{tail}"


class KvMismatch(Final):
    """Two engines cannot exchange KV blocks. `differences` are plain sentences."""

    def __init__(self, prefill: str, decode: str, differences: tuple[str, ...]) -> None:
        super().__init__(prefill, decode, differences)
        self.prefill = prefill
        self.decode = decode
        self.differences = differences

    def __str__(self) -> str:
        return f"{self.prefill} cannot feed {self.decode}: " + "; ".join(self.differences)
