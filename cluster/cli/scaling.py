"""`scaling`: what the autoscaler decided last, and why."""

from __future__ import annotations

import time
from dataclasses import asdict

from rich.markup import escape
from rich.table import Table

from cluster.cli import output
from cluster.cli.target import Cluster, Json, TopologyFile, target
from cluster.control.autoscale.view import PoolScaling, Scaling, ScalingAction, TargetScaling

_OUTCOMES = {"asked": "green", "would": "cyan", "held": "yellow", "refused": "red"}


def scaling(topology: TopologyFile = None, cluster: Cluster = None, json: Json = False) -> None:
    """Show what the autoscaler decided last: what each pool needs, and why.

    With `scaling.dry_run: true` it only says what it would do. Events: pdcluster events.

    Example: pdcluster scaling --json
    """
    found = target(topology, cluster).control().scaling()
    if json:
        output.print_json(asdict(found))
    else:
        draw(found, time.time())


def draw(found: Scaling, now_s: float) -> None:
    """On stdout. `now_s`: wall clock."""
    print_ = output.out.print
    if found.mode == "manual":
        print_("scaling.mode is manual: replicas change when somebody asks (pdcluster scale)")
        return
    dry = ", dry run: it only says what it would do" if found.dry_run else ""
    print_(f"scaling.mode {found.mode}, every {found.interval_s:g} s{dry}")
    if found.problem:
        print_(f"[red]{escape(found.problem)}[/red]")
    if found.decided_at_s is None:
        print_("nothing is decided yet")
        return
    print_(f"decided {output.span_text(max(0.0, now_s - found.decided_at_s))} ago")
    for action in found.actions:
        _draw_action(action)
    print_(_pool_table(found.pools))
    for pool in found.pools:
        held = f" [yellow]({escape(pool.held)})[/yellow]" if pool.held else ""
        print_(f"{pool.pool}: {escape(pool.why)}{held}")
    for aim in found.targets:
        print_(_target_text(aim))


def _draw_action(action: ScalingAction) -> None:
    colour = _OUTCOMES.get(action.outcome, "yellow")
    change = f" as change {action.change}" if action.change is not None else ""
    problem = f" ({escape(action.problem)})" if action.problem else ""
    output.out.print(
        f"[{colour}]{action.outcome}[/{colour}] {escape(action.what)}{change}{problem}: "
        f"{escape(action.why)}"
    )


def _pool_table(pools: tuple[PoolScaling, ...]) -> Table:
    table = Table("pool", "has", "ready", "needs", "with headroom", "min", "max", box=None)
    table.pad_edge = False
    for pool in pools:
        table.add_row(
            pool.pool,
            str(pool.serving),
            str(pool.ready),
            _number(pool.need),
            _number(pool.need_with_headroom),
            str(pool.least),
            str(pool.most),
        )
    return table


def _number(value: int | None) -> str:
    return "?" if value is None else str(value)


def _target_text(aim: TargetScaling) -> str:
    parts = [
        _against(f"TTFT p{aim.percentile:g}", aim.ttft_s, aim.ttft_target_s, 1.0, "s"),
        _against(f"TPOT p{aim.percentile:g}", aim.tpot_s, aim.tpot_target_s, 1000.0, "ms"),
    ]
    said = ", ".join(part for part in parts if part)
    return f"{aim.prefill} -> {aim.decode}: {said} (of {aim.requests} requests)"


def _against(
    what: str, found_s: float | None, goal_s: float | None, scale: float, unit: str
) -> str:
    if goal_s is None:
        return ""
    goal = f"target {scale * goal_s:.3g} {unit}"
    if found_s is None:
        return f"{what} not measured yet, {goal}"
    colour = "green" if found_s <= goal_s else "red"
    return f"{what} [{colour}]{scale * found_s:.3g} {unit}[/{colour}], {goal}"
