"""One question to a running cluster, and the proof of which way its answer took.

Called by: cli.demo.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.launcher import target
from cluster.launcher.endpoint import Answer
from cluster.launcher.running import Running
from cluster.transfers import TransferRecord

QUESTION = "What is the capital of France?"
EXPECTED = "Paris"

# The engine reports a transfer by a datagram of its own, the status follows a tick later.
_RECORD_BOUND_S = 5.0
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Demo:
    """An answer and what is known of its way."""

    question: str
    answer: Answer
    took_s: float
    tokens_pulled: int
    tokens_held: int  # were in decode's prefix cache already
    bytes_pulled: int
    acceptance_length: float | None  # of the decode worker, since it started


def ask(at: Running) -> Demo:
    """Greedy, so that the same model gives the same answer. Raises: ClusterError."""
    cluster = target.of_running(at)
    endpoint = cluster.endpoint()
    begun_s = time.monotonic()
    answer = endpoint.chat(
        at.model, [{"role": "user", "content": QUESTION}], temperature=0, max_tokens=48
    )
    took_s = time.monotonic() - begun_s
    made = int(answer.usage.get("completion_tokens", 0))
    control = cluster.control()
    deadline_s = time.monotonic() + _RECORD_BOUND_S
    while True:
        records = arrived(control.transfers(answer.request_id))
        counters = [
            report.counters
            for report in control.status().workers
            if report.id.name == answer.decode
        ]
        is_counted = any(c.generation_tokens >= made for c in counters)
        if (records and is_counted) or time.monotonic() > deadline_s:
            break
        time.sleep(_POLL_S)
    return Demo(
        question=QUESTION,
        answer=answer,
        took_s=took_s,
        tokens_pulled=sum(record.tokens_pulled for record in records),
        tokens_held=sum(record.tokens_held for record in records),
        bytes_pulled=sum(record.bytes_pulled for record in records),
        acceptance_length=counters[0].acceptance_length if counters else None,
    )


def arrived(records: Sequence[TransferRecord]) -> list[TransferRecord]:
    """Decode's side of the transfers: what it pulled and what it held."""
    return [r for r in records if r.side == "decode" and r.outcome in ("pulled", "held")]


def shortcomings(demo: Demo) -> tuple[str, ...]:
    """Why this demo does not show what it should. Empty: it does. Pure."""
    found = []
    if EXPECTED not in demo.answer.text:
        found.append(f"the answer does not name {EXPECTED}: {demo.answer.text!r}")
    if demo.answer.prefill in ("", "none"):
        found.append(f"no prefill worker took part (route: {demo.answer.route})")
    if demo.answer.decode in ("", "none", demo.answer.prefill):
        found.append(f"no decode worker of its own took part (route: {demo.answer.route})")
    if demo.tokens_pulled <= 0 or demo.bytes_pulled <= 0:
        found.append("no KV blocks moved between the two workers")
    return tuple(found)
