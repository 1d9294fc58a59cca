"""`up` and `down`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster.cli import output
from cluster.cli.target import Cluster, File, Json, MaybeFile, cluster_name

if TYPE_CHECKING:
    from cluster.launcher.up import Up


def up(
    file: File,
    address: Annotated[
        str | None,
        typer.Option(help="A Ray cluster that runs already: HOST:PORT or auto."),
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="After a failure leave all as it is, to be looked at.")
    ] = False,
    no_wait: Annotated[
        bool,
        typer.Option(
            "--no-wait",
            help="Return when the control API and the endpoint answer; workers come as nodes join.",
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Start what FILE describes, and return when its endpoint answers requests.

    A second `up` of the same file changes nothing; one of a file with other `replicas` changes
    those. Ctrl-C ends all that was started.

    Example: pdcluster up topologies/local-cpu.yaml
    """
    from cluster.launcher.endpoint import curl_line
    from cluster.launcher.progress import Silent
    from cluster.launcher.up import up as bring_up

    if json:
        done = bring_up(file, Silent(), address=address, keep=keep, waits=not no_wait)
    else:
        with output.Progress() as progress:
            done = bring_up(file, progress, address=address, keep=keep, waits=not no_wait)
    at = done.running
    curl = curl_line(at.endpoint, at.model, at.key_file, at.key_env)
    if json:
        said: dict[str, Any] = {
            "cluster": at.cluster,
            "model": at.model,
            "endpoint": at.endpoint,
            "key_file": at.key_file,
            "control": at.control_url,
            "token_file": at.token_file,
            "prometheus": at.prometheus_url or None,
            "was_up": done.was_up,
            "changed": list(done.changed),
            "took_s": round(done.took_s, 2),
            "curl": curl,
        }
        output.print_json(said)
        return
    output.out.print(_outcome(done, is_waited_for=not no_wait))
    key = at.key_file or (f"${at.key_env}" if at.key_env else "none asked for")
    output.out.print(f"\n  endpoint  {at.endpoint}/v1   model {at.model}\n  API key   {key}")
    token = at.token_file or f"${at.token_env}"
    output.out.print(f"  control   {at.control_url}   token {token}")
    output.out.print(f"  metrics   {at.prometheus_url or 'nobody scrapes them'}\n")
    output.out.print(curl, markup=False)
    # Where Ray's own launcher started the nodes, it also ends them.
    is_rack = address is None and at.own_ray is None
    end = "ray down FILE, where ray up was" if is_rack else f"pdcluster down --cluster {at.cluster}"
    output.out.print(f"\nnext: pdcluster status | pdcluster chat | {end}")


def _outcome(done: Up, is_waited_for: bool) -> str:
    name = done.running.cluster
    if done.was_up and not done.changed:
        return f"cluster {name} is up already, nothing changed"
    if done.was_up:
        later = "" if is_waited_for else "; new workers come as nodes have room"
        return f"cluster {name} is up; changed: replicas of {', '.join(done.changed)}{later}"
    took = output.span_text(done.took_s)
    if is_waited_for:
        return f"cluster {name} is up after {took}"
    return f"cluster {name} answers after {took}; its workers come as nodes join"


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
            _say_nothing_runs(None, json)
            return
        name = running.choose(None).cluster
    if json:
        done = bring_down(name, grace_s, Silent())
    else:
        with output.Progress() as progress:
            done = bring_down(name, grace_s, progress)
    if not done.was_running:
        _say_nothing_runs(name, json, file)
    elif json:
        output.print_json({"cluster": name, "was_running": True})
    else:
        output.out.print(f"cluster {name} is down")


def _say_nothing_runs(name: str | None, json: bool, file: Path | None = None) -> None:
    from cluster.launcher import local_ray
    from cluster.topology import loader

    if json:
        output.print_json({"cluster": name, "was_running": False})
        return
    output.out.print("nothing runs here" + (f" (cluster: {name})" if name is not None else ""))
    if file is not None and not local_ray.is_local(loader.load(file)):
        output.out.print(f"on its own machines, `ray down {file}` ends it with all its nodes")
