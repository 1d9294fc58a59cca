"""`validate`, `schema`, `render`: what can be said of a topology file before anything starts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from cluster.cli import explain_view, output
from cluster.cli.target import File, Json

Explain = Annotated[
    bool, typer.Option("--explain", help="Say of each argument and variable where it came from.")
]


def validate(file: File, json: Json = False) -> None:
    """Check FILE: Ray's half, ours, and whether they agree. Every fault comes at once.

    Exit code 2 if there is any.

    Example: pdcluster validate topologies/local-cpu.yaml
    """
    from cluster.launcher.validate import validate as check

    topology = check(file)
    if json:
        output.print_json({"valid": True, "cluster": topology.cluster_name, "faults": []})
        return
    pools = ", ".join(
        f"{pool.name} ({pool.replicas.initial} x {pool.role})" for pool in topology.serving.pools
    )
    output.out.print(f"{file} is valid: cluster {topology.cluster_name}, pools {pools}")
    output.out.print(f"next: pdcluster render {file} | pdcluster up {file}")


def schema() -> None:
    """Print the JSON Schema of topology files, for editors.

    Example: pdcluster schema > topology.schema.json
    """
    from cluster.topology.editor_schema import schema_json

    output.print_json(schema_json())


def render(file: File, json: Json = False, explain: Explain = False) -> None:
    """Print every engine's command, environment and host. Starts nothing; secrets are masked.

    Example: pdcluster render topologies/local-cpu.yaml --explain
    """
    from cluster.launcher import explain as explaining
    from cluster.launcher.render import render as render_topology
    from cluster.topology import loader

    examined = loader.examine(file)
    rendered = render_topology(examined.topology())
    if explain:
        explained = explaining.explain(examined.document, rendered)
        sources = explaining.sources(examined.document)
        if json:
            workers = [asdict(worker) for worker in explained]
            output.print_json({"workers": workers, "presets": sources})
            return
        output.out.print(explain_view.text(explained, sources), markup=False, soft_wrap=True)
        return
    if json:
        output.print_json({"workers": [asdict(worker) for worker in rendered]})
        return
    for worker in rendered:
        output.out.print(explain_view.heading(worker), markup=False)
        output.out.print(worker.shell() + "\n", markup=False)
