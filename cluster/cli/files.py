"""`validate`, `schema`, `render`: what can be said of a topology file before anything starts."""

from __future__ import annotations

from dataclasses import asdict

from cluster.cli import output
from cluster.cli.target import File, Json


def validate(file: File, json: Json = False) -> None:
    """Check FILE: Ray's half, ours, and whether they agree. Every fault comes at once.

    Exit code 2 if there is any.

    Example: pdcluster validate topologies/local-cpu.yaml
    """
    from cluster.errors import TopologyError
    from cluster.launcher.validate import validate as check

    try:
        topology = check(file)
    except TopologyError as error:
        if json:
            output.print_json({"valid": False, "faults": [asdict(f) for f in error.faults]})
        raise
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


def render(file: File, json: Json = False) -> None:
    """Print every engine's command, environment and host. Starts nothing; secrets are masked.

    Example: pdcluster render topologies/local-cpu.yaml
    """
    from cluster.launcher.render import render as render_topology
    from cluster.topology import loader

    rendered = render_topology(loader.load(file))
    if json:
        output.print_json({"workers": [asdict(worker) for worker in rendered]})
        return
    for worker in rendered:
        rank = f", node {worker.node_rank} of the replica" if worker.node_rank else ""
        output.out.print(f"# {worker.worker} ({worker.role}{rank}) on {worker.host}", markup=False)
        output.out.print(worker.shell() + "\n", markup=False)
