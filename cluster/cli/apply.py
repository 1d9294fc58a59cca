"""`apply`: give a running cluster what its changed topology file says.

FILE ─ validated here ─ plan, shown ─ y/N ─ asked for ─ followed to its end
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from cluster.cli import output
from cluster.cli.changes import Grace, NoWait, Why, grace_s
from cluster.cli.follow import FAILED, carry_out, checked_why
from cluster.cli.target import Cluster, File, Json, target
from cluster.control.changes import DEFAULT_GRACE_S, Apply, Plan, PlanStep
from cluster.errors import InvalidInput, TopologyError
from cluster.topology import loader
from cluster.topology.findings import SERVING, dotted
from cluster.topology.schema import Topology

DIFFERS = 3


def apply(
    file: File,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan only. Exit code 3 if it has any step.")
    ] = False,
    no_surge: Annotated[
        bool,
        typer.Option(
            "--no-surge",
            help="End a worker before its successor starts: slower, but takes no further room.",
        ),
    ] = False,
    grace: Grace = DEFAULT_GRACE_S,
    why: Why = "",
    no_wait: NoWait = False,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Give a running cluster what FILE says: show the plan, ask, carry it out.

    Exit codes of --dry-run: 0 nothing differs, 3 something does, 2 it cannot be applied.

    Example: pdcluster apply topologies/local-cpu.yaml --dry-run
    """
    if not (yes or dry_run) and (json or not sys.stdin.isatty()):
        raise InvalidInput("nobody can be asked here; give --yes, or --dry-run for the plan alone")
    seconds, why = grace_s(grace), checked_why(why)
    topology = _validated(file)
    at = target(None, cluster) if cluster is not None else target(file, None)
    control = at.control()
    running = control.status().cluster
    if running != topology.cluster_name:
        raise InvalidInput(
            f"{file} cluster_name: found {topology.cluster_name}; the cluster that answers is "
            f"{running}; name its file"
        )
    ask = Apply(topology.serving, seconds, not no_surge)
    plan = control.plan(topology.serving)
    if not json:
        _draw(plan, running)
    nothing_done = {"plan": asdict(plan), "change": None}
    if plan.refused:
        refused = "; ".join(map(str, plan.refused))
        raise output.Refused(f"{file}: {refused}", nothing_done)
    if dry_run or plan.is_empty:
        if json:
            output.print_json(nothing_done)
        if not plan.is_empty:
            raise typer.Exit(DIFFERS)
        return
    if not yes and not typer.confirm("carry it out?", err=True):
        output.err.print("nothing was changed")
        raise typer.Exit(FAILED)
    carry_out(at, control, ask, why, no_wait=no_wait, json=json, plan=plan)


def _validated(file: Path) -> Topology:
    """The topology of a file without fault in our half and in what it wants of Ray's. Nodes are as
    they were started, so that faults of Ray's half alone are warnings: the file may be what Ray
    made of it on the head (~/ray_bootstrap_config.yaml).

    Raises: TopologyError."""
    from cluster.launcher.validate import validate

    try:
        return validate(file)
    except TopologyError as error:
        if any(fault.key.startswith(dotted(SERVING)) for fault in error.faults):
            raise
        topology = loader.load(file)
        for fault in error.faults:
            output.err.print(f"[yellow]warning:[/yellow] {escape(str(fault))}")
        return topology


def _draw(plan: Plan, cluster: str) -> None:
    if plan.is_empty:
        output.out.print(f"cluster {cluster} serves that already; nothing to change")
        return
    output.out.print(f"plan for cluster {cluster}:")
    _draw_steps(plan.steps, "[green]~[/green]")
    _draw_steps(plan.refused, "[red]x[/red]")


def _draw_steps(steps: Sequence[PlanStep], sign: str) -> None:
    for step in steps:
        keys = f"  [dim]({escape(', '.join(step.keys))})[/dim]" if step.keys else ""
        output.out.print(f"  {sign} {escape(step.what)}{keys}")
