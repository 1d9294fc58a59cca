"""`explain`: what became of one request."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cluster.cli import output
from cluster.cli.target import Cluster, Json, TopologyFile, target


def explain(
    request_id: Annotated[str, typer.Argument(help="x-request-id of an answer.")],
    topology: TopologyFile = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Show why a recent request went where it went, what was moved, and how long each part took.

    Exit code 1: no such request is known, or not any more.

    Example: pdcluster explain 38a9c8731d56499e9a082
    """
    from cluster.cli import request_view

    explained = target(topology, cluster).control().explain(request_id)
    if json:
        output.print_json(asdict(explained))
    else:
        output.out.print("\n".join(request_view.lines(explained)), markup=False)
