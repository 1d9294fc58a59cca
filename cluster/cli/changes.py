"""`scale`, `role`, `drain`, and `changes`: ask for a change and wait for its end; look at them."""

from __future__ import annotations

import math
import re
from typing import Annotated

import typer

from cluster.cli import change_view, output
from cluster.cli.follow import carry_out, checked_why
from cluster.cli.target import Cluster, Json, TopologyFile, target
from cluster.control.changes import (
    DEFAULT_GRACE_S,
    Ask,
    ChangeRole,
    DrainNode,
    DrainWorker,
    ReturnNode,
    Scale,
)
from cluster.control.client import ControlClient
from cluster.control.wire import NODE_PATTERN
from cluster.errors import InvalidInput
from cluster.identity import Role, WorkerId

Grace = Annotated[
    float,
    typer.Option(
        "--grace",
        metavar="SECONDS",
        help="How long requests in hand may go on where they are; then they go on elsewhere.",
    ),
]
Why = Annotated[str, typer.Option("--why", help="The reason, kept with the cluster's events.")]
NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Return at once; the change goes on by itself.")
]


def scale(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Its name.")],
    replicas: Annotated[int, typer.Argument(metavar="N", min=0, help="How many it is to have.")],
    grace: Grace = DEFAULT_GRACE_S,
    why: Why = "",
    no_wait: NoWait = False,
    topology: TopologyFile = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Have N replicas of a pool. Those too many finish what they have first.

    Ctrl-C ends the waiting, not the change. Exit code 1 if it failed.

    Example: pdcluster scale decode 3
    """
    ask, why = Scale(pool, replicas, grace_s(grace)), checked_why(why)
    at = target(topology, cluster)
    carry_out(at, at.control(), ask, why, no_wait=no_wait, json=json)


def role(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="POOL/INDEX, as in decode/0.")],
    to: Annotated[str, typer.Argument(metavar="prefill|decode", help="Its role from then on.")],
    restart: Annotated[
        bool, typer.Option("--restart", help="Start its engine anew if it cannot do both.")
    ] = False,
    grace: Grace = DEFAULT_GRACE_S,
    why: Why = "",
    no_wait: NoWait = False,
    topology: TopologyFile = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Have a loaded worker serve in another role, once it has finished what it has.

    Its weights stay loaded, where its engine can do both.

    Example: pdcluster role decode/1 prefill
    """
    if to not in (Role.PREFILL, Role.DECODE):
        raise InvalidInput(f"role: found {to}; write prefill or decode")
    wanted, seconds, why = _worker(worker), grace_s(grace), checked_why(why)
    at = target(topology, cluster)
    control = at.control()
    ask = ChangeRole(_present(control, wanted), Role(to), seconds, restart)
    carry_out(at, control, ask, why, no_wait=no_wait, json=json)


def drain(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WORKER|NODE",
            help="POOL/INDEX, or a node's address or Ray's id of it.",
            show_default=False,
        ),
    ],
    give_back: Annotated[
        bool, typer.Option("--return", help="Let a drained NODE take workers again.")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Drain a NODE without which nobody would prefill, or decode."),
    ] = False,
    grace: Grace = DEFAULT_GRACE_S,
    why: Why = "",
    no_wait: NoWait = False,
    topology: TopologyFile = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """End a worker, or all workers of a node, once others have taken their work.

    A worker's pool starts another in its place. A node stays empty until it is returned.

    Example: pdcluster drain 10.0.0.7
    """
    wanted, seconds, why = None, grace_s(grace), checked_why(why)
    if "/" in what:
        if give_back:
            raise InvalidInput(f"--return is for nodes; {what} is a worker, which comes by itself")
        if force:
            raise InvalidInput(f"--force is for nodes; {what} is a worker")
        wanted = _worker(what)
    elif re.fullmatch(NODE_PATTERN, what) is None:
        raise InvalidInput(
            f"drain: found {what!r}; write POOL/INDEX, as in decode/0, or a node's address or "
            "Ray's id of it"
        )
    at = target(topology, cluster)
    control = at.control()
    ask: Ask
    if wanted is not None:
        ask = DrainWorker(_present(control, wanted), seconds)
    else:
        ask = ReturnNode(what) if give_back else DrainNode(what, seconds, force)
    carry_out(at, control, ask, why, no_wait=no_wait, json=json)


def changes(
    id: Annotated[
        int | None,
        typer.Argument(metavar="ID", min=0, help="Show this one in full. Default: list all."),
    ] = None,
    topology: TopologyFile = None,
    cluster: Cluster = None,
    json: Json = False,
) -> None:
    """Show what was asked of the cluster, by whom, and what has become of it.

    Example: pdcluster changes 3
    """
    control = target(topology, cluster).control()
    if id is not None:
        change = control.change(id)
        if json:
            output.print_json(change_view.of(change))
        else:
            change_view.draw(change)
        return
    found = control.changes()
    if json:
        output.print_json([change_view.of(change) for change in found])
    else:
        change_view.draw_list(found)


def grace_s(seconds: float) -> float:
    """Raises: InvalidInput."""
    if not math.isfinite(seconds) or seconds < 0:
        raise InvalidInput(f"--grace: found {seconds:g}; write a number of seconds from 0 on")
    return seconds


def _worker(text: str) -> WorkerId:
    """Raises: InvalidInput."""
    try:
        return WorkerId.parse(text)
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def _present(control: ControlClient, wanted: WorkerId) -> str:
    """POOL/INDEX of a worker. A generation, as `status` shows it, must be the present one.

    Raises: InvalidInput."""
    if wanted.generation:
        present = [r.id for r in control.status().workers if r.id.name == wanted.name]
        if wanted not in present:
            now = f"it is {present[-1]} now" if present else "there is none now"
            raise InvalidInput(f"{wanted} is gone; {now}")
    return wanted.name
