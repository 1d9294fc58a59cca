"""What came of a run: a table for people, JSON for programs, and whether it was well. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from chaos_run.faults import Done
from chaos_run.run import Run
from chaos_run.schedule import Kind
from chaos_run.traffic import Outcome, Record

# A stream that gave nothing for longer than this before a fault was held up by an earlier one.
_FLOWING_S = 0.5


def summary(run: Run) -> dict[str, Any]:
    """Everything that is told of a run, as JSON takes it."""
    gateway_deaths_s = [d.at_s for d in run.faults if d.planned.kind is Kind.KILL_GATEWAY]
    outcomes = Counter(str(record.outcome) for record in run.records)
    cut = [r for r in run.records if r.outcome is Outcome.CUT and _met(r, gateway_deaths_s)]
    failed = [
        record
        for record in run.records
        if record.outcome not in (Outcome.RIGHT, Outcome.WRONG) and record not in cut
    ]
    wrong = [record for record in run.records if record.outcome is Outcome.WRONG]
    broken = [
        f"fault {d.planned.number}, {d.planned.kind}: {d.wrong}" for d in run.faults if d.wrong
    ]
    if run.not_recovered:
        broken.append(run.not_recovered)
    return {
        "seed": run.options.seed,
        "engines": run.options.engines,
        "took_s": round(run.took_s, 1),
        "faults": len(run.faults),
        "by_kind": _by_kind(run),
        "requests": len(run.records),
        "streamed": sum(record.ask.is_stream for record in run.records),
        "tokens": sum(_tokens(record) for record in run.records),
        "outcomes": dict(outcomes),
        "failed": len(failed),
        "wrong_answers": len(wrong),
        "cut_by_the_death_of_their_gateway": len(cut),
        "slowest_first_token_s": _round(max(_first_tokens_s(run.records), default=None)),
        "connected_again": sum(record.reconnects > 0 for record in run.records),
        "events": dict(sorted(run.events.items())),
        "promises_broken": broken,
        "changes_not_carried_out": [
            f"{one.target}: {one.refused.splitlines()[-1]}" for one in run.faults if one.refused
        ],
        "left_out": run.left_out,
        "leaked": run.leaked,
        "left_by_down": run.left_by_down,
        "held_before": asdict(run.before) if run.before else None,
        "held_after": asdict(run.after) if run.after else None,
        "struck": [_struck(one, run.began_s) for one in run.faults],
        "what_failed": [_told(record, run.began_s) for record in [*failed, *wrong][:20]],
        "is_well": not (failed or wrong or broken or run.leaked or run.left_by_down),
    }


def _struck(done: Done, began_s: float) -> dict[str, Any]:
    return {
        "number": done.planned.number,
        "kind": done.planned.kind.value,
        "target": done.target,
        "at_s": _round(done.at_s - began_s),
        "noticed_s": _round(done.noticed_s),
        "whole_s": _round(done.whole_s),
        "wrong": done.wrong,
    }


def _met(record: Record, deaths_s: Sequence[float]) -> bool:
    ended_s = record.ended_s or record.began_s
    return any(record.began_s <= at_s <= ended_s + 0.5 for at_s in deaths_s)


def _tokens(record: Record) -> int:
    return (record.answer.usage or {}).get("completion_tokens", 0)


def _told(record: Record, began_s: float) -> dict[str, Any]:
    return {
        "ask": record.ask.name,
        "is_stream": record.ask.is_stream,
        "request_id": record.request_id,
        "route": record.route,
        "outcome": str(record.outcome),
        "at_s": _round((record.ended_s or record.began_s) - began_s),
        "took_s": _round((record.ended_s or record.began_s) - record.began_s),
        "why": record.why,
    }


def _by_kind(run: Run) -> list[dict[str, Any]]:
    rows = []
    for kind in Kind:
        done = [one for one in run.faults if one.planned.kind is kind]
        if not done:
            continue
        noticed = [one.noticed_s for one in done if one.noticed_s is not None]
        whole = [one.whole_s for one in done if one.whole_s is not None]
        stalls = [stall for one in done if (stall := _stall_s(one, run.records)) is not None]
        rows.append(
            {
                "kind": kind.value,
                "count": len(done),
                "streams_running": sum(_running(one, run.records) for one in done),
                "slowest_next_token_s": _round(max(stalls, default=None)),
                "noticed_s": _round(statistics.median(noticed) if noticed else None),
                "noticed_at_most_s": _round(max(noticed, default=None)),
                "whole_again_s": _round(statistics.median(whole) if whole else None),
            }
        )
    return rows


def _running(done: Done, records: Sequence[Record]) -> int:
    return sum(
        record.ask.is_stream and record.began_s <= done.at_s <= (record.ended_s or done.at_s)
        for record in records
    )


def _stall_s(done: Done, records: Sequence[Record]) -> float | None:
    """From a fault to the next token, of the stream that waited longest among those that flowed."""
    worst: float | None = None
    for record in records:
        if not record.ask.is_stream:
            continue
        # The first mark is the request itself: a first token is late for reasons of its own.
        before = [mark for mark in record.marks_s[1:] if mark <= done.at_s]
        after = next((mark for mark in record.marks_s if mark > done.at_s), None)
        if before and after is not None and done.at_s - before[-1] <= _FLOWING_S:
            worst = max(worst or 0.0, after - done.at_s)
    return worst


def _first_tokens_s(records: Sequence[Record]) -> list[float]:
    return [
        record.marks_s[1] - record.began_s
        for record in records
        if record.ask.is_stream and len(record.marks_s) > 1
    ]


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def table(found: dict[str, Any]) -> str:
    """For a terminal and for docs/reliability.md: Markdown."""
    lines = [
        f"seed {found['seed']}, {found['engines']} engines, {found['faults']} faults, "
        f"{found['took_s']:.0f} s",
        "",
        "| fault | times | streams running | slowest next token, s | noticed, s (at most) "
        "| whole again, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["by_kind"]:
        noticed = "-"
        if row["noticed_s"] is not None:
            noticed = f"{row['noticed_s']} ({row['noticed_at_most_s']})"
        lines.append(
            f"| {row['kind']} | {row['count']} | {row['streams_running']} "
            f"| {_or_dash(row['slowest_next_token_s'])} | {noticed} "
            f"| {_or_dash(row['whole_again_s'])} |"
        )
    lines += [
        "",
        "| | |",
        "|---|---|",
        f"| requests (streamed) | {found['requests']} ({found['streamed']}) |",
        f"| failed | {found['failed']} |",
        f"| wrong answers | {found['wrong_answers']} |",
        f"| streams cut by the death of their own gateway replica "
        f"| {found['cut_by_the_death_of_their_gateway']} |",
        f"| connected again before the first byte | {found['connected_again']} |",
        f"| slowest first token of a stream, s | {_or_dash(found['slowest_first_token_s'])} |",
        f"| promises broken | {len(found['promises_broken'])} |",
        f"| more held than before | {'; '.join(found['leaked']) or 'nothing'} |",
        f"| left by `down` | {len(found['left_by_down'])} |",
    ]
    held = found["held_before"], found["held_after"]
    if None not in held:
        lines += ["", "| held at rest | before | after |", "|---|---|---|"]
        for name in held[0]:
            before, after = (_counts(side[name]) for side in held)
            lines.append(f"| {name.replace('_', ' ')} | {before} | {after} |")
    for heading, said in (
        ("promises broken", found["promises_broken"]),
        ("went wrong", [str(one) for one in found["what_failed"]]),
        ("changes that were not carried out", found["changes_not_carried_out"]),
        ("left out", found["left_out"]),
        ("left by down", found["left_by_down"]),
    ):
        if said:
            lines += ["", f"{heading}:", *(f"- {one}" for one in said)]
    return "\n".join(lines)


def _counts(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count} {name}" for name, count in sorted(value.items())) or "0"
    return str(value)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else str(value)
