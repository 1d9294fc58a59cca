"""`dashboards build|push|verify|prometheus-config`: Grafana's boards, and what they are fed by."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from cluster.cli import output
from cluster.cli.events import span_s
from cluster.cli.target import Cluster, Json, TopologyFile, target
from cluster.errors import ClusterError, InvalidInput

if TYPE_CHECKING:
    from cluster.observe.grafana_api.push import Step, Wanted
    from cluster.observe.verify import Checked

Prometheus = Annotated[
    str | None,
    typer.Option(
        "--prometheus",
        metavar="URL",
        help="Root URL of Prometheus. Default: the one that scrapes the cluster.",
    ),
]


def build(
    folder: Annotated[
        Path, typer.Argument(help="Where dashboards, rules and provisioning are written.")
    ] = Path("dashboards"),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit 1 if a file would change.")
    ] = False,
    json: Json = False,
) -> None:
    """Write the dashboards, Prometheus' rules, provisioning and the compose file.

    Example: pdcluster dashboards build --check
    """
    from cluster.observe.dashboards import files

    changed = files.differing(folder) if check else files.write(folder)
    if json:
        output.print_json({"folder": str(folder), "check": check, "changed": changed})
    elif changed:
        said = "would change" if check else "written"
        output.out.print("\n".join(f"{said}: {folder / path}" for path in changed), markup=False)
    else:
        output.out.print(f"{folder}: nothing to change", markup=False)
    if check and changed:
        raise ClusterError(
            f"{len(changed)} files differ from what is generated; run "
            f"`pdcluster dashboards build {folder}`"
        )


def push(
    topology: TopologyFile = None,
    cluster: Cluster = None,
    url: Annotated[
        str | None,
        typer.Option("--url", help="Grafana's root URL. Default: observability.grafana.url."),
    ] = None,
    prometheus: Prometheus = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written; write nothing.")
    ] = False,
    json: Json = False,
) -> None:
    """Bring a Grafana to have the folder, data source, dashboards and alert rules.

    What is there already is left as it is. The token is read from GRAFANA_TOKEN, or from the
    variable that observability.grafana.token_env names.

    Example: pdcluster dashboards push --url http://127.0.0.1:3000 --dry-run
    """
    from cluster.launcher import observing

    found = observing.find(topology, cluster)
    grafana_url, token = found.grafana_url(url), found.grafana_token()
    wanted = _wanted(found.spec.grafana.folder, prometheus or found.prometheus_url)
    version, steps, problem = asyncio.run(_push(grafana_url, token, wanted, dry_run))
    if json:
        output.print_json(
            {
                "grafana": grafana_url,
                "version": version,
                "dry_run": dry_run,
                "steps": [asdict(step) for step in steps],
                "source_problem": problem,
            }
        )
    else:
        _draw_steps(grafana_url, version, steps, dry_run)
    if problem:
        _tell_problem(grafana_url, wanted, problem)


def verify(
    topology: TopologyFile = None,
    cluster: Cluster = None,
    prometheus: Prometheus = None,
    window: Annotated[
        str,
        typer.Option("--window", metavar="SPAN", help="How far back data may be: 15m, 2h."),
    ] = "15m",
    allow_empty: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-empty",
            metavar="WHAT",
            help="No data is fine for a panel's question, a board's title, or everything that "
            "needs `speculation` or `traffic`. May be given several times.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Run every panel's query against a live Prometheus; list the panels without data.

    Exit code 1 if there are any.

    Example: pdcluster dashboards verify --allow-empty speculation
    """
    from cluster.launcher import observing
    from cluster.observe import verify as verifying
    from cluster.observe.dashboards.files import BOARDS

    window_s = span_s(window, "--window")
    url = prometheus or observing.find(topology, cluster).prometheus_url
    checked = asyncio.run(verifying.verify(url, BOARDS, time.time(), window_s))
    allowed = _known(allow_empty or [], checked)
    failed = [one for one in checked if one.problem or not (one.has_data or _is(one, allowed))]
    if json:
        output.print_json(
            {
                "prometheus": url,
                "queries": [{**asdict(one), "has_data": one.has_data} for one in checked],
                "failed": len(failed),
            }
        )
    else:
        _draw_checked(url, checked, failed)
    if failed:
        output.err.print(
            f"{len(failed)} of {len(checked)} queries have no data in the last {window}; "
            "--allow-empty names what may be empty",
            markup=False,
        )
        raise typer.Exit(1)


def prometheus_config(
    topology: TopologyFile = None,
    cluster: Cluster = None,
    token_file: Annotated[
        str,
        typer.Option("--token-file", help="Where Prometheus finds the control token."),
    ] = "/etc/prometheus/pdcluster-control-token",
) -> None:
    """Print what another Prometheus needs in its prometheus.yml to scrape the cluster.

    Example: pdcluster dashboards prometheus-config --topology rack.yaml
    """
    from cluster.launcher.prometheus import scrape_config

    found = target(topology, cluster).control_url
    if isinstance(found, ClusterError):
        raise found
    output.out.print(scrape_config(found, token_file), markup=False, end="")


COMMANDS = (build, push, verify, prometheus_config)


def _wanted(folder_title: str, prometheus_url: str) -> Wanted:
    from cluster.observe.dashboards import beside, grafana
    from cluster.observe.dashboards.files import BOARDS
    from cluster.observe.grafana_api import alerts
    from cluster.observe.grafana_api.push import Wanted
    from cluster.observe.rules_alerts import ALERTS

    return Wanted(
        folder={"uid": beside.FOLDER_UID, "title": folder_title},
        source=beside.data_source(prometheus_url),
        boards=[grafana.as_json(board) for board in BOARDS],
        rule_groups=[alerts.group(ALERTS, beside.FOLDER_UID)],
    )


async def _push(url: str, token: str, wanted: Wanted, is_dry: bool) -> tuple[str, list[Step], str]:
    """Grafana's version, what was done, and what keeps it from Prometheus ("": nothing)."""
    from cluster.observe.grafana_api.client import GrafanaClient
    from cluster.observe.grafana_api.push import Pusher

    async with GrafanaClient(url, token) as client:
        version = await client.version()
        steps = await Pusher(client, is_dry=is_dry).push(wanted)
        problem = "" if is_dry else await client.health(wanted.source["uid"])
        return version, steps, problem


def _tell_problem(url: str, wanted: Wanted, problem: str) -> None:
    """Raises: ClusterError: Grafana lacks what the data source is made of."""
    if "plugin" in problem.lower():
        raise ClusterError(
            f"Grafana at {url} lacks the data source plugin {wanted.source['type']}: {problem}; "
            "install or enable it there, and push again"
        )
    output.err.print(
        f"[yellow]warning:[/yellow] Grafana cannot ask Prometheus at {wanted.source['url']}: "
        f"{escape(problem)}; panels stay empty until it can (--prometheus: its address as Grafana "
        "sees it)"
    )


def _draw_steps(url: str, version: str, steps: Sequence[Step], is_dry: bool) -> None:
    table = Table("", "what", "name", box=None, pad_edge=False, show_header=False)
    for step in steps:
        colour = "dim" if step.outcome == "unchanged" else "green"
        would = "would be " if is_dry and step.outcome != "unchanged" else ""
        table.add_row(f"[{colour}]{would}{step.outcome}[/{colour}]", step.kind, escape(step.name))
    output.out.print(table)
    changed = sum(step.outcome != "unchanged" for step in steps)
    said = "to change" if is_dry else "changed"
    output.out.print(f"Grafana {version} at {url}: {changed} of {len(steps)} {said}", markup=False)


def _known(allowed: Sequence[str], checked: Sequence[Checked]) -> frozenset[str]:
    known = {name for one in checked for name in (one.panel, one.board, one.needs) if name}
    for name in allowed:
        if name not in known:
            raise InvalidInput(
                f"--allow-empty: found {name}; write a panel's question, a board's title, "
                "`speculation` or `traffic`"
            )
    return frozenset(allowed)


def _is(one: Checked, allowed: frozenset[str]) -> bool:
    return bool(allowed & {one.panel, one.board, one.needs})


def _draw_checked(url: str, checked: Sequence[Checked], failed: Sequence[Checked]) -> None:
    for one in failed:
        output.out.print(f"[red]{'refused' if one.problem else 'no data'}[/red]  ", end="")
        output.out.print(f"{one.board}: {one.panel}", markup=False)
        output.out.print(f"    {one.problem or one.expr}", markup=False, style="dim")
    with_data = sum(one.has_data for one in checked)
    output.out.print(f"{url}: {with_data} of {len(checked)} queries have data", markup=False)
