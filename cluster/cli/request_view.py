"""How `pdcluster explain` words a request that has ended. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from cluster.cli.output import bytes_text
from cluster.control.requests import Explained
from cluster.request_records import AttemptRecord, RequestRecord
from cluster.transfers import TransferRecord

_CLIENT_LEFT = 499
# What a route's reason means; the part behind a colon says why it was so.
_ROUTES = {
    "disaggregated": "prefill computes the prompt, decode takes its KV blocks",
    "local-prefill": "decode lacked so little of the prompt that it computed it itself",
    "mixed": "a mixed worker does both",
    "alone": "only decode can compute this prompt",
    "recompute": "no prefill worker could serve, so decode computed the prompt itself",
}


def lines(explained: Explained) -> Iterator[str]:
    """All of it, for people."""
    record = explained.request
    yield f"request {record.request_id}: {_outcome(record)}"
    kind = "streamed" if record.is_stream else "whole"
    arrived = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.arrived_at_s))
    yield f"  {record.endpoint}, {kind}, arrived {arrived} at gateway {record.gateway[:12]}"
    yield f"  prompt {_tokens(record.prompt_tokens)}, answer {_tokens(record.answer_tokens)}"
    if record.trace_id:
        yield f"  trace {record.trace_id}"
    if explained.alike:
        yield f"  the newest of {explained.alike + 1} requests with this id"
    if record.error:
        yield f"  error: {record.error}"
    left_out = record.attempts_made - len(record.attempts)
    for number, attempt in enumerate(record.attempts):
        is_last = number == len(record.attempts) - 1
        if is_last and left_out:
            yield f"\n{left_out} more attempts, not kept"
        shown = number + left_out if is_last else number
        yield f"\nattempt {shown}: {_pair(attempt)}"
        for name, text in _attempt(record, shown, attempt, explained.transfers):
            yield f"  {name:10}{text}"
    if not record.attempts:
        yield "\nno workers were chosen for it"
    yield ""
    yield from _times(record)


def _outcome(record: RequestRecord) -> str:
    if record.status == _CLIENT_LEFT:
        return f"its client left after {_seconds(record.ended_s)}"
    if record.error:
        return f"failed after {_seconds(record.ended_s)} (status {record.status})"
    verb = "answered" if record.status < 400 else "refused"
    return f"{verb} in {_seconds(record.ended_s)} (status {record.status})"


def _pair(attempt: AttemptRecord) -> str:
    if not attempt.prefill:
        return attempt.decode
    return f"{attempt.prefill} to {attempt.decode} over {attempt.connector}"


def _attempt(
    record: RequestRecord,
    number: int,
    attempt: AttemptRecord,
    transfers: Sequence[TransferRecord],
) -> Iterator[tuple[str, str]]:
    what, _, why = attempt.route.partition(":")
    meaning = _ROUTES.get(what, "")
    yield "route", f"{attempt.route}: {meaning}{f' ({why})' if why else ''}"
    yield (
        "decode",
        _choice(
            attempt.decode_choices,
            attempt.decode_running,
            attempt.decode_waiting,
            f", KV {attempt.decode_kv_usage:.0%} full",
        ),
    )
    if attempt.prefill:
        yield (
            "prefill",
            _choice(attempt.prefill_choices, attempt.prefill_running, attempt.prefill_waiting, ""),
        )
    if attempt.kept_tokens:
        yield "goes on", f"behind {_tokens(attempt.kept_tokens)} of the answer, from before"
    yield "held", _held(record, attempt)
    if attempt.prefill:
        yield "pulled", _pulled(_of_attempt(record, number, transfers))
    yield "took", ", ".join(f"{name} {_seconds(took_s)}" for name, took_s in _parts(attempt))
    if attempt.cause:
        worker = attempt.prefill if attempt.stage == "prefill" else attempt.decode
        yield "ended", f"{worker} {attempt.cause} in {attempt.stage}: {attempt.why}"


def _choice(choices: int, running: int, waiting: int, more: str) -> str:
    return f"one of {choices} ready; {running} running, {waiting} waiting{more}"


def _held(record: RequestRecord, attempt: AttemptRecord) -> str:
    held = min(attempt.held_tokens, record.prompt_tokens)
    share = f" ({held / record.prompt_tokens:.0%})" if record.prompt_tokens else ""
    known = "in decode's prefix cache, as far as was known"
    return f"{held} of {_tokens(record.prompt_tokens)} {known}{share}"


def _pulled(records: Sequence[TransferRecord]) -> str:
    if not records:
        return "not told by the engine"
    failed = [record for record in records if record.outcome == "failed"]
    if failed:
        return f"failed, after {_seconds(sum(record.took_s for record in failed))}"
    tokens = sum(record.tokens_pulled for record in records)
    blocks = sum(record.blocks_pulled for record in records)
    moved = sum(record.bytes_pulled for record in records)
    held = sum(record.tokens_held for record in records)
    took_s = sum(record.took_s for record in records)
    counted = f"{blocks} blocks, " if blocks else ""
    return (
        f"{counted}{_tokens(tokens)}, {bytes_text(moved)} in {_seconds(took_s)}; "
        f"{_tokens(held)} were there (decode's own figures)"
    )


def _of_attempt(
    record: RequestRecord, number: int, transfers: Sequence[TransferRecord]
) -> list[TransferRecord]:
    """Decode's side of what one attempt moved: its id is `ENGINE_ID.NUMBER`, and `pN` behind that
    for each of several prompts."""
    own = f"{record.engine_id}.{number}"
    found = []
    for transfer in transfers:
        _, is_there, rest = transfer.request_id.partition(own)
        if is_there and not rest[:1].isdigit() and transfer.side == "decode":
            found.append(transfer)
    return found


def _parts(attempt: AttemptRecord) -> Iterator[tuple[str, float]]:
    spans = (
        ("route", attempt.asked_s, attempt.chosen_s),
        ("prefill", attempt.prefill_s, attempt.prefilled_s),
        ("transfer and first output", attempt.transfer_s, attempt.transferred_s),
        ("first output", None if attempt.prefill else attempt.decode_s, attempt.first_s),
        ("rest of the answer", attempt.first_s, attempt.ended_s),
    )
    for name, began_s, ended_s in spans:
        if began_s is not None and ended_s is not None:
            yield name, ended_s - began_s


def _times(record: RequestRecord) -> Iterator[str]:
    """The whole request, part by part, from its arrival on."""
    marks = (
        ("read", 0.0, record.read_s),
        ("queue", record.read_s, record.placed_s),
        ("render", record.placed_s, record.rendered_s),
        ("to the first output", 0.0, record.first_s),
        ("whole", 0.0, record.ended_s),
    )
    for name, began_s, ended_s in marks:
        if began_s is not None and ended_s is not None:
            yield f"{name:20}{ended_s - began_s:10.4f} s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s"


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count} tokens"
