"""`status` and `transfers`: what a running cluster does."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated

import typer

from cluster.cli import output
from cluster.cli.target import Cluster, Json, MaybeFile, TopologyFile, target
from cluster.errors import ClusterError
from cluster.launcher.target import Target


def status(file: MaybeFile = None, cluster: Cluster = None, json: Json = False) -> None:
    """Show pools, workers and why one is not ready, links, transfers, recent events.

    Example: pdcluster status --json
    """
    from cluster.cli import status_view

    at = target(file, cluster)
    found = at.control().status()
    view = status_view.of(at, found, _exposition(at), time.time())
    if json:
        output.print_json(view)
    else:
        status_view.draw(view)


def transfers(
    request_id: Annotated[str, typer.Argument(help="x-request-id of an answer.")],
    topology: TopologyFile = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Show the KV transfers of one request, as both of its engines reported them.

    Example: pdcluster transfers 38a9c8731d56499e9a082
    """
    records = target(topology, cluster).control().transfers(request_id)
    if json:
        output.print_json([asdict(record) for record in records])
        return
    for record in records:
        output.out.print(
            f"{record.side:8} {record.outcome:9} prompt_tokens={record.prompt_tokens} "
            f"tokens_pulled={record.tokens_pulled} tokens_held={record.tokens_held} "
            f"bytes={output.bytes_text(record.bytes_pulled)} took_s={record.took_s:.3f}"
        )
    if not records:
        output.out.print(f"no worker remembers a transfer of request {request_id}")


def _exposition(at: Target) -> str:
    """The gateway's metrics; "" if it does not tell them."""
    try:
        return at.endpoint().metrics()
    except ClusterError:
        return ""
