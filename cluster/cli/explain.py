"""`explain`: what became of one request."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Annotated

import typer

from cluster.cli import output
from cluster.cli.target import Cluster, Json, TopologyFile, target
from cluster.errors import InvalidInput


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
    from cluster.request_records import REQUEST_ID

    if re.fullmatch(REQUEST_ID, request_id) is None:
        raise InvalidInput(
            f"request_id: found {request_id!r}; write the x-request-id of an answer: 1 to 96 "
            "letters, digits, `.`, `_`, `:` or `-`"
        )
    explained = target(topology, cluster).control().explain(request_id)
    if json:
        output.print_json(asdict(explained))
    else:
        output.out.print("\n".join(request_view.lines(explained)), markup=False)
