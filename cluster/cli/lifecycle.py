"""`up` and `down`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from cluster.cli import output
from cluster.cli.target import Cluster, File, Json, MaybeFile, cluster_name


def up(
    file: File,
    address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster that runs already: HOST:PORT or auto."),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="After a failure leave all as it is, to be looked at.")
    ] = False,
    json: Json = False,
) -> None:
    """Start what FILE describes, and return when its endpoint answers.

    A second `up` of the same file changes nothing. Ctrl-C ends all that was started.

    Example: pdcluster up topologies/local-cpu.yaml
    """
    from cluster.launcher.endpoint import curl_line
    from cluster.launcher.progress import Silent
    from cluster.launcher.up import up as bring_up

    if json:
        done = bring_up(file, Silent(), address=address, keep=keep)
    else:
        with output.Progress() as progress:
            done = bring_up(file, progress, address=address, keep=keep)
    at = done.running
    curl = curl_line(at.endpoint, at.model, at.key_file, at.key_env)
    if json:
        said: dict[str, Any] = {
            "cluster": at.cluster,
            "model": at.model,
            "endpoint": at.endpoint,
            "key_file": at.key_file,
            "was_up": done.was_up,
            "took_s": round(done.took_s, 2),
            "curl": curl,
        }
        output.print_json(said)
        return
    if done.was_up:
        output.out.print(f"cluster {at.cluster} is up already, nothing changed")
    else:
        output.out.print(f"cluster {at.cluster} is up after {output.span_text(done.took_s)}")
    key = at.key_file or (f"${at.key_env}" if at.key_env else "none asked for")
    output.out.print(f"\n  endpoint  {at.endpoint}/v1   model {at.model}\n  API key   {key}\n")
    output.out.print(curl, markup=False)
    output.out.print(
        f"\nnext: pdcluster status | pdcluster chat | pdcluster down --cluster {at.cluster}"
    )


def down(
    file: MaybeFile = None,
    cluster: Cluster = None,
    grace_s: Annotated[
        float, typer.Option(min=0.0, help="Seconds that requests in hand get to finish.")
    ] = 10.0,
    json: Json = False,
) -> None:
    """End a cluster: no process, port or shared memory of it stays.

    Example: pdcluster down
    """
    from cluster.launcher import running
    from cluster.launcher.down import down as bring_down
    from cluster.launcher.progress import Silent

    name = cluster_name(file, cluster)
    if name is None:
        if not running.all_running():
            _say_nothing_runs("any", json)
            return
        name = running.choose(None).cluster
    if json:
        done = bring_down(name, grace_s, Silent())
    else:
        with output.Progress() as progress:
            done = bring_down(name, grace_s, progress)
    if not done.was_running:
        _say_nothing_runs(name, json)
    elif json:
        output.print_json({"cluster": name, "was_running": True})
    else:
        output.out.print(f"cluster {name} is down")


def _say_nothing_runs(name: str, json: bool) -> None:
    if json:
        output.print_json({"cluster": name, "was_running": False})
    else:
        output.out.print(f"nothing runs here (cluster: {name})")
