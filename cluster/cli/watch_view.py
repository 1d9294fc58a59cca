"""What `watch` shows. In: a Feed, the terminal's size. Out: lines that fit in it, or a dict. Pure.

    header                        cluster, model, how long, what is wrong
    TTFT … acceptance length      newest values, and their course as a sparkline
    pools                         a line each; then what is not ready, and why
    changes, events               as many as there is room for

80 x 24 is enough for six pools. The dict's keys are an interface for scripts: add, never rename.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from cluster.cli import change_view, output
from cluster.cli.live_feed import Feed, Value
from cluster.control.changes import Change, ChangeState
from cluster.control.live import PoolLive, WorkerLive
from cluster.identity import Role, WorkerState

NARROWEST = 60
_TREND_FROM = 100
_BARS = "▁▂▃▄▅▆▇█"
_SPARK_S = 300.0
_LEAST_EVENTS = 3
_PLAIN_EVENTS = 8
_MOST_CHANGES = 5

# Heading, cells. Below 80 columns the rightmost ones are cut off.
_COLUMNS = (
    ("ready", 5),
    ("run", 4),
    ("wait", 4),
    ("KV", 4),
    ("tok/s", 6),
    ("accept", 6),
    ("moves/s", 7),
    ("bytes/s", 8),
    ("held", 4),
)


def frame(feed: Feed, width: int, height: int | None, notice: str = "") -> list[Text]:
    """`height`: of the terminal; None: it scrolls. `notice`: something is not as it should be."""
    width = max(width, NARROWEST)
    top = [_header(feed, width, notice), Text(), *_figures(feed, width), Text()]
    pools, troubles = _pools(feed, width), _troubles(feed)
    newest = feed.live.changes[-_MOST_CHANGES:]
    changes = [_change(change, feed.live.at_s) for change in reversed(newest)]
    if height is None:
        room = len(pools) + len(troubles) + len(changes) + _PLAIN_EVENTS + 2
    else:
        room = height - len(top) - 1  # the last line is the footer's
    lines = top + _capped(pools, room - _LEAST_EVENTS - 1, "pools")
    left = room - (len(lines) - len(top)) - _LEAST_EVENTS - 1
    lines += _capped(troubles, max(0, left), "workers")
    left = room - (len(lines) - len(top)) - _LEAST_EVENTS - 2
    if changes and left > 0:
        lines += [Text(), *changes[:left]]
    left = room - (len(lines) - len(top)) - 1
    events = [_event(told.at_s, told.text) for told in reversed(feed.events)]
    if left > 0:
        lines += [Text(), *(events[:left] or [Text("nothing has happened yet", style="dim")])]
    if height is not None:
        lines += [Text()] * (height - 1 - len(lines))
        lines.append(Text("q quit", style="dim"))
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines


def of(feed: Feed, new_events: int) -> dict[str, Any]:
    """For programs. `new_events`: how many have come since the last frame."""
    live = feed.live
    events = feed.events[-new_events:] if new_events else []
    return {
        "cluster": live.cluster,
        "model": live.model,
        "at_s": live.at_s,
        "controller_started_at_s": live.controller_started_at_s,
        "traffic": feed.group("traffic"),
        "gateways": feed.group("gateways"),
        "engines": feed.group("engines"),
        "roles": {role.value: feed.group(f"role.{role}") for role in Role},
        "pools": [{**asdict(pool), **feed.group(f"pool.{pool.name}")} for pool in live.pools],
        "links": [
            {**asdict(link), **feed.group(f"pair.{link.prefill}>{link.decode}")}
            for link in live.links
        ],
        "nodes": [asdict(node) for node in live.nodes],
        "workers": [asdict(worker) for worker in feed.workers.values()],
        "failed": [asdict(slot) for slot in live.failed],
        "changes": [asdict(change) for change in live.changes],
        "events": [asdict(told) for told in events],
        "scaling": asdict(feed.scaling),
    }


def sparkline(values: Sequence[Value], cells: int, least: float = 0.0) -> str:
    """The course of `values` above `least`, oldest first, in so many cells; a space where nothing
    is known."""
    if cells <= 0:
        return ""
    known = [value for value in values if value is not None]
    top = max(known, default=0.0)
    drawn = []
    for cell in range(cells):
        first, last = (round(len(values) * (cell + part) / cells) for part in (0, 1))
        part = [value for value in values[first : max(last, first + 1)] if value is not None]
        if not part:
            drawn.append(" ")
            continue
        level = (max(part) - least) / (top - least) if top > least else 0.0
        drawn.append(_BARS[max(0, min(len(_BARS) - 1, int(level * len(_BARS))))])
    return "".join(drawn)


def number(value: Value) -> str:
    """Three digits: 4.27, 42.7, 427, 4.27k."""
    if value is None:
        return "-"
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size * 0.9995:
            return f"{_digits(value / size)}{unit}"
    return f"{value:.0f}" if value == int(value) else _digits(value)


def seconds(value: Value) -> str:
    if value is None:
        return "-"
    return f"{_digits(value * 1000)} ms" if value < 0.9995 else f"{_digits(value)} s"


def amount(value: Value) -> str:
    """Bytes, in at most eight characters."""
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 999.5 or unit == "GiB":
            return f"{_digits(value) if unit != 'B' else f'{value:.0f}'} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def percent(value: Value) -> str:
    return "-" if value is None else f"{value:.0%}"


def _digits(value: float) -> str:
    size = abs(value)
    return f"{value:.2f}" if size < 9.995 else f"{value:.1f}" if size < 99.95 else f"{value:.0f}"


def _header(feed: Feed, width: int, notice: str) -> Text:
    live = feed.live
    up_for = output.span_text(max(0.0, live.at_s - live.controller_started_at_s))
    said = Text.assemble((live.cluster, "bold"), f"  {live.model}  ", (f"up for {up_for}", "dim"))
    right = Text(notice, style="red") if notice else Text(_clock(live.at_s), style="dim")
    said.truncate(width - right.cell_len - 2, overflow="ellipsis")
    said.append(" " * (width - said.cell_len - right.cell_len))
    return said.append_text(right)


def _figures(feed: Feed, width: int) -> list[Text]:
    last = feed.last
    ready, desired = last("engines.ready"), last("engines.desired")
    refused, recovered = last("gateways.refused_per_s"), last("gateways.recoveries_per_s")
    requests = (
        f"{number(last('traffic.requests_per_s'))}/s, {number(last('gateways.running'))} running, "
        f"{number(last('gateways.queued'))} queued"
    )
    if refused:
        requests += f", {number(refused)}/s refused"
    elif recovered:
        requests += f", {number(recovered)}/s recovered"
    rows = (
        ("TTFT", _percentiles(feed, "ttft"), "traffic.ttft_p95_s"),
        ("TPOT", _percentiles(feed, "tpot"), "traffic.tpot_p95_s"),
        ("requests", requests, "traffic.requests_per_s"),
        (
            "tokens",
            f"{number(last('engines.generation_tokens_per_s'))}/s out, "
            f"{number(last('engines.prompt_tokens_per_s'))}/s prompt",
            "engines.generation_tokens_per_s",
        ),
        (
            "KV moved",
            f"{amount(last('engines.bytes_per_s'))}/s, "
            f"{number(last('engines.transfers_per_s'))} transfers/s, "
            f"{percent(last('engines.held_share'))} held",
            "engines.bytes_per_s",
        ),
        (
            "accepted",
            f"{_length(last('engines.acceptance_length'))} tokens per step",
            "engines.acceptance_length",
        ),
        ("replicas", f"{number(ready)} of {number(desired)} ready", "engines.ready"),
    )
    points = round(_SPARK_S / feed.live.every_s)
    said_cells = 46
    lines = []
    for name, said, column in rows:
        cells = min(width - 10 - said_cells, 60)
        least = 1.0 if column.endswith("acceptance_length") else 0.0
        spark = sparkline(feed.column(column)[-points:], cells, least)
        lines.append(
            Text.assemble(
                (set_cell_size(name, 10), "dim"), set_cell_size(said, said_cells), (spark, "cyan")
            )
        )
    return lines


def _percentiles(feed: Feed, what: str) -> str:
    return "  ".join(
        f"{name} {seconds(feed.last(f'traffic.{what}_{name}_s'))}" for name in ("p50", "p95", "p99")
    )


def _pools(feed: Feed, width: int) -> list[Text]:
    """A heading, and a line for each."""
    pools = feed.live.pools
    cells = sum(size + 1 for _, size in _COLUMNS) + 8
    trend = 18 if width >= _TREND_FROM else 0
    longest = max((cell_len(pool.name) for pool in pools), default=4)
    name_cells = min(max(longest, 4), max(8, width - cells - (trend + 2 if trend else 0)))
    heading = set_cell_size("pool", name_cells) + " " + set_cell_size("role", 7)
    heading += "".join(f" {name:>{size}}" for name, size in _COLUMNS)
    lines = [Text(heading + ("  tok/s" if trend else ""), style="dim")]
    for pool in pools:
        lines.append(_pool(feed, pool, name_cells, trend))
    return lines


def _pool(feed: Feed, pool: PoolLive, name_cells: int, trend: int) -> Text:
    point = feed.group(f"pool.{pool.name}")
    made = "prompt_tokens_per_s" if pool.role is Role.PREFILL else "generation_tokens_per_s"
    pulls = pool.role is not Role.PREFILL or bool(point.get("transfers_per_s"))
    values = (
        number(point.get("running")),
        number(point.get("waiting")),
        percent(point.get("kv_usage")),
        number(point.get(made)),
        _length(point.get("acceptance_length")),
        number(point.get("transfers_per_s")) if pulls else "-",
        amount(point.get("bytes_per_s")) if pulls else "-",
        percent(point.get("held_share")) if pulls else "-",
    )
    name = Text(pool.name)
    name.truncate(name_cells, overflow="ellipsis", pad=True)
    colour = "green" if pool.ready == pool.desired else "yellow"
    (_, ready_cells), *rest = _COLUMNS
    line = Text.assemble(
        name,
        f" {pool.role.value:7}",
        (f" {f'{pool.ready}/{pool.desired}':>{ready_cells}}", colour),
        *(f" {value:>{size}}" for value, (_, size) in zip(values, rest, strict=True)),
    )
    if trend:
        points = round(_SPARK_S / feed.live.every_s)
        column = feed.column(f"pool.{pool.name}.{made}")[-points:]
        line.append("  ").append(sparkline(column, trend), style="cyan")
    return line


def _troubles(feed: Feed) -> list[Text]:
    """Workers that are not ready, links that are closed, places whose workers fail."""
    live = feed.live
    own = {pool.name: pool.role for pool in live.pools}
    lines = [
        Text(f"link {link.prefill} -> {link.decode} is closed: {'; '.join(link.mismatches)}", "red")
        for link in live.links
        if not link.is_open
    ]
    lines += [
        Text(f"{slot.worker} failed: {slot.why}", "red")
        for slot in live.failed
        if slot.restart_in_s is not None
    ]
    for worker in sorted(feed.workers.values(), key=lambda worker: worker.id):
        if worker.state is not WorkerState.READY:
            lines.append(_not_ready(worker, live.at_s))
        elif worker.role is not own.get(worker.pool, worker.role):
            lines.append(Text(f"{worker.name} serves as {worker.role.value}", "cyan"))
    return lines


def _not_ready(worker: WorkerLive, now_s: float) -> Text:
    why = f": {worker.message}" if worker.message else ""
    since = output.span_text(max(0.0, now_s - worker.started_at_s))
    is_bad = worker.state in (WorkerState.FAILED, WorkerState.HUNG)
    said = f"{worker.name} {worker.state.value}, started {since} ago{why}"
    return Text(said, "red" if is_bad else "yellow")


def _change(change: Change, now_s: float) -> Text:
    is_running = change.state is ChangeState.RUNNING
    took = output.span_text((change.ended_at_s or now_s) - change.asked_at_s)
    said = change.waits_for if is_running else change.why
    return Text.assemble(
        (f"{change.state.value:8}", change_view.COLOURS[change.state]),
        f" {change.what} ",
        (f"({took}, {change.asked_by})", "dim"),
        f": {said}" if said else "",
    )


def _event(at_s: float, text: str) -> Text:
    return Text.assemble((f"{_clock(at_s)} ", "dim"), text)


def _capped(lines: list[Text], room: int, what: str) -> list[Text]:
    if len(lines) <= room:
        return lines
    if room <= 0:
        return []
    return [*lines[: room - 1], Text(f"and {len(lines) - room + 1} more {what}", style="dim")]


def _length(value: Value) -> str:
    return "-" if value is None else f"{value:.2f}"


def _clock(at_s: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at_s))
