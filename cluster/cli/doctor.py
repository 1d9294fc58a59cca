"""`doctor`: are the hosts of a topology file fit for it?"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from cluster.cli import output
from cluster.cli.target import File, Json

if TYPE_CHECKING:
    from cluster.nodes.doctor.compare import Versions
    from cluster.nodes.doctor.report import HostRow, Report


def doctor(
    file: File,
    host: Annotated[
        list[str] | None, typer.Option(help="Only this host; may be given several times.")
    ] = None,
    timeout_s: Annotated[
        float, typer.Option(min=1.0, help="Seconds that one host gets for each step.")
    ] = 60.0,
    json: Json = False,
) -> None:
    """Look at every host of FILE over ssh, and say what is wrong and how to mend it.

    Changes nothing on the hosts. Exit code 1 if there is an error; warnings alone are 0.

    Example: pdcluster doctor topologies/local-cpu.yaml
    """
    from cluster.launcher import local_ray
    from cluster.launcher.validate import validate
    from cluster.nodes.doctor.examine import examine
    from cluster.nodes.doctor.expect import survey as survey_of
    from cluster.nodes.doctor.report import report

    topology = validate(file)
    survey = survey_of(topology, is_this_machine=local_ray.is_local(topology))
    if host:
        survey = survey.only(host)
    with _Progress(len(survey.hosts), is_silent=json) as progress:
        seen = asyncio.run(examine(survey, timeout_s, progress.tell))
    found = report(survey, seen, _here())
    if json:
        output.print_json(found.as_json())
    else:
        _show(found)
    if found.has_errors:
        raise typer.Exit(1)


class _Progress(output.MovingLine):
    """A moving line on a terminal: how many hosts are done, and the last news. Elsewhere nothing,
    except of hosts that failed."""

    def __init__(self, hosts: int, is_silent: bool) -> None:
        super().__init__(is_silent)
        self._hosts = hosts
        self._done: set[str] = set()
        self._is_silent = is_silent

    def tell(self, host: str, news: str) -> None:
        if news.startswith(("looked at", "failed")):
            self._done.add(host)
        if news.startswith("failed") and not self._is_silent:
            output.err.print(f"{host} {news}", markup=False)
        self._move(f"{len(self._done)} of {self._hosts} hosts looked at; {host} {news}")


def _here() -> Versions:
    from importlib import metadata

    from cluster import __version__
    from cluster.nodes.doctor.compare import Versions

    python = ".".join(map(str, sys.version_info[:3]))
    return Versions(python=python, ray=metadata.version("ray"), pdcluster=__version__)


def _show(found: Report) -> None:
    table = _wide(found)
    boundless = output.out.options.update(max_width=1_000)
    # A narrow terminal would cut cells off.
    if Measurement.get(output.out, boundless, table).maximum > output.out.width:
        table = _narrow(found)
    output.out.print(table)
    for one in found.findings:
        colour = "red" if one.severity == "error" else "yellow"
        output.out.print(f"\n[{colour}]{one.severity}[/{colour}] {one.host} {escape(one.check)}")
        output.out.print(f"  found     {one.found}", markup=False)
        output.out.print(f"  expected  {one.expected}", markup=False)
        output.out.print(f"  mend      {one.fix}", markup=False)
    if not found.findings:
        output.out.print("\nnothing is wrong")


def _wide(found: Report) -> Table:
    columns = list(dict.fromkeys(name for row in found.rows for name in row.seen))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("HOST", "NODE TYPE", *(name.upper() for name in columns), "VERDICT"):
        table.add_column(name, no_wrap=True)
    for row in found.rows:
        cells = [escape(row.seen.get(name, "")) for name in columns]
        table.add_row(row.host, row.node_type, *cells, _verdict(row))
    return table


def _narrow(found: Report) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("HOST", no_wrap=True)
    table.add_column("VERDICT", no_wrap=True)
    table.add_column("SEEN", overflow="fold")
    for row in found.rows:
        seen = ", ".join(f"{name} {value}" for name, value in row.seen.items())
        table.add_row(row.host, _verdict(row), escape(seen))
    return table


def _verdict(row: HostRow) -> str:
    """With rich's markup."""
    if not row.seen:
        return "[red]not reached[/red]"
    said = f"[red]{_count(row.errors, 'error')}[/red]" if row.errors else "[green]fit[/green]"
    if row.warnings:
        said += f", [yellow]{_count(row.warnings, 'warning')}[/yellow]"
    return said


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
