"""What `status` shows. In: the controller's status. Out: a plain dict (`--json`), or tables.

The dict's keys are an interface for scripts: add, never rename.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from typing import Any

from rich.markup import escape
from rich.table import Table

from cluster.cli import output
from cluster.cli.ttft import ttft_s
from cluster.control.events import Told
from cluster.control.state import ClusterStatus, LinkStatus, PoolStatus, SilentHost
from cluster.identity import WorkerState
from cluster.launcher.target import Target
from cluster.workers.report import Counters, WorkerReport

_EVENTS_DRAWN = 8
_LAST_WORDS_DRAWN = 3


def of(at: Target, found: ClusterStatus, exposition: str, now_s: float) -> dict[str, Any]:
    """`exposition`: the gateway's metrics, or "". `now_s`: wall clock."""
    here = at.here
    endpoint = at.endpoint_url
    return {
        "cluster": found.cluster,
        "phase": here.phase if here is not None else "up",
        "model": found.model,
        "endpoint": endpoint if isinstance(endpoint, str) else None,
        # Known where `up` ran.
        "prometheus": (here.prometheus_url or None) if here is not None else None,
        "version": found.version,
        # Known where `up` ran.
        "up_for_s": round(now_s - here.started_at_s, 1) if here is not None else None,
        "controller_up_for_s": round(now_s - found.controller_started_at_s, 1),
        "ttft_s": {"p50": ttft_s(exposition, 0.5), "p95": ttft_s(exposition, 0.95)},
        "pools": [_pool(pool, found.workers) for pool in found.pools],
        "workers": [_worker(report, now_s) for report in found.workers],
        "silent_hosts": [_silent(host, now_s) for host in found.silent_hosts],
        "failed": [asdict(slot) for slot in found.failed],
        "links": [_link(state) for state in found.links],
        "events": [_event(told) for told in found.events],
    }


def draw(view: dict[str, Any]) -> None:
    """Tables on stdout."""
    print_ = output.out.print
    endpoint = f"{view['endpoint']}/v1" if view["endpoint"] else "endpoint not known here"
    up_for_s = view["controller_up_for_s"] if view["up_for_s"] is None else view["up_for_s"]
    print_(
        f"[bold]{view['cluster']}[/bold]  {view['model']}  {endpoint}  "
        f"up for {output.span_text(up_for_s)}"
    )
    ttft = view["ttft_s"]
    if ttft["p50"] is not None:
        print_(f"TTFT p50 {ttft['p50'] * 1000:.0f} ms, p95 {ttft['p95'] * 1000:.0f} ms")
    if view["prometheus"]:
        print_(f"metrics over time: {view['prometheus']}")
    print_(_pool_table(view["pools"]))
    print_(_worker_table(view["workers"], {p["name"]: p["role"] for p in view["pools"]}))
    for worker in view["workers"]:
        if worker["message"]:
            print_(f"[yellow]{worker['name']}: {escape(worker['message'])}[/yellow]")
    for host in view["silent_hosts"]:
        span = output.span_text(host["silent_for_s"])
        print_(f"[red]host {host['address']} silent for {span}: {escape(host['why'])}[/red]")
    for slot in view["failed"]:
        _draw_failed(slot)
    for link in view["links"]:
        sign = "[green]->[/green]" if link["is_open"] else "[red]-x-[/red]"
        print_(f"link {link['prefill_pool']} {sign} {link['decode_pool']} over {link['connector']}")
        for sentence in link["mismatches"]:
            print_(f"  [red]{escape(sentence)}[/red]")
    for event in view["events"][-_EVENTS_DRAWN:]:
        print_(f"[dim]{event['time']}  {escape(event['text'])}[/dim]")


def _pool(pool: PoolStatus, workers: Sequence[WorkerReport]) -> dict[str, Any]:
    own = [report.counters for report in workers if report.id.pool == pool.name]
    positions = zip_longest(*(part.spec_accepted_per_position for part in own), fillvalue=0)
    together = Counters(
        spec_drafts=sum(part.spec_drafts for part in own),
        spec_accepted=sum(part.spec_accepted for part in own),
        spec_accepted_per_position=tuple(map(sum, positions)),
    )
    return {
        **asdict(pool),
        "acceptance_length": together.acceptance_length,
        "acceptance_per_position": together.acceptance_per_position,
    }


def _worker(report: WorkerReport, now_s: float) -> dict[str, Any]:
    counters = report.counters
    return {
        "name": report.id.name,
        "generation": report.id.generation,
        "pool": report.id.pool,
        "role": report.role.value,
        "epoch": report.epoch,
        "revision": report.revision,
        "state": report.state.value,
        "message": report.message,
        "url": report.url,
        "node_ip": report.node_ip,
        "engine_pid": report.engine_pid,
        "up_for_s": round(now_s - report.started_at_s, 1),
        "stage_s": dict(report.stage_s),
        "rss_bytes": report.rss_bytes,
        "acceptance_length": counters.acceptance_length,
        "acceptance_per_position": counters.acceptance_per_position,
        "load": asdict(report.load),
        "counters": asdict(counters),
        "fingerprint": asdict(report.fingerprint) if report.fingerprint else None,
        "kv": dict(report.kv),
        "last_words": list(report.last_words),
    }


def _silent(host: SilentHost, now_s: float) -> dict[str, Any]:
    return {**asdict(host), "silent_for_s": round(now_s - host.since_s, 1)}


def _link(state: LinkStatus) -> dict[str, Any]:
    return {
        **asdict(state.link),
        "is_open": state.is_open,
        "mismatches": list(state.mismatches),
    }


def _event(told: Told) -> dict[str, Any]:
    return {
        "at_s": told.at_s,
        "time": time.strftime("%H:%M:%S", time.localtime(told.at_s)),
        "kind": told.kind,
        "subject": told.subject,
        "text": told.text,
        "fields": dict(told.fields),
    }


def _pool_table(pools: list[dict[str, Any]]) -> Table:
    # "accepted": mean tokens per decode step, then the share of accepted drafts by position.
    table = Table("pool", "role", "engine", "ready", "accepted", box=None, pad_edge=False)
    for pool in pools:
        is_whole = pool["ready"] == pool["desired"]
        ready = f"{pool['ready']}/{pool['desired']}"
        colour = "green" if is_whole else "yellow"
        table.add_row(
            *(pool["name"], str(pool["role"]), pool["engine"], f"[{colour}]{ready}[/{colour}]"),
            _accepted(pool),
        )
    return table


def _accepted(pool: dict[str, Any]) -> str:
    if pool["acceptance_length"] is None:
        return "-"
    shares = " ".join(f"{share:.0%}" for share in pool["acceptance_per_position"])
    return f"{pool['acceptance_length']:.2f}" + (f" ({shares})" if shares else "")


def _worker_table(workers: list[dict[str, Any]], roles: dict[str, Any]) -> Table:
    # "accepted": mean tokens per decode step. "pulled", "held": prompt tokens whose KV came from
    # prefill, or was there.
    table = Table(box=None, pad_edge=False)
    for heading in (
        *("worker", "state", "run/wait", "KV", "accepted", "moves", "pulled", "held", "bytes"),
        *("memory", "up for"),
    ):
        table.add_column(heading, no_wrap=True)
    for worker in workers:
        load, counters = worker["load"], worker["counters"]
        accepted = worker["acceptance_length"]
        table.add_row(
            f"{worker['name']}#{worker['generation']}",
            output.state_text(WorkerState(worker["state"]))
            + ("" if worker["role"] == roles.get(worker["pool"]) else f" as {worker['role']}"),
            f"{load['running']}/{load['waiting']}",
            f"{load['kv_usage']:.0%}",
            f"{accepted:.2f}" if accepted is not None else "-",
            f"{counters['transfers']}",
            f"{counters['tokens_pulled']}",
            f"{counters['tokens_held']}",
            output.bytes_text(counters["bytes_pulled"]),
            output.bytes_text(worker["rss_bytes"]),
            output.span_text(worker["up_for_s"]),
        )
    return table


def _draw_failed(slot: dict[str, Any]) -> None:
    again = slot["restart_in_s"]
    then = "restarted" if again is None else f"restarts in {again:.0f} s"
    times = f"{slot['failures']} times in a row" if slot["failures"] > 1 else "once"
    output.out.print(
        f"[yellow]{slot['worker']} failed {times}: {escape(slot['why'])}; {then}[/yellow]"
    )
    for line in slot["last_words"][-_LAST_WORDS_DRAWN:]:
        output.out.print(f"[dim]  {escape(line)}[/dim]")
