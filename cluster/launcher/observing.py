"""Where a cluster's Prometheus and Grafana are: what runs, what a topology says, the defaults.

Called by: the dashboards' commands. Nothing is asked over the network.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InvalidInput
from cluster.launcher import running
from cluster.topology import loader
from cluster.topology.observability import ObservabilitySpec


@dataclass(frozen=True, slots=True)
class Observing:
    """`prometheus_url`: of the one that scrapes the cluster. `spec`: a topology's or defaults."""

    prometheus_url: str
    spec: ObservabilitySpec

    def grafana_url(self, given: str | None) -> str:
        """Raises: InvalidInput: nobody says where it is."""
        url = given or self.spec.grafana.url
        if url is None:
            raise InvalidInput(
                "--url: not given, and the topology has no observability.grafana.url; "
                "write Grafana's address, such as http://127.0.0.1:3000"
            )
        return url

    def grafana_token(self, environ: Mapping[str, str] | None = None) -> str:
        """Raises: InvalidInput: its variable is not set."""
        name = self.spec.grafana.token_env
        token = (os.environ if environ is None else environ).get(name, "").strip()
        if not token:
            raise InvalidInput(
                f"{name} is not set; put the token of a service account of Grafana into it "
                "(Administration, Service accounts; role Admin, for the data source)"
            )
        return token


def find(file: Path | None, cluster: str | None) -> Observing:
    """Of the topology `file`, of the cluster called `cluster`, of the only one that runs here, or,
    where none runs, what the defaults say.

    Raises: TopologyError; NotRunning: `cluster` does not; ClusterError: several run here."""
    spec = loader.load(file).serving.observability if file is not None else None
    at = _running(file, cluster)
    if spec is None:
        spec = _spec_of(at)
    url = spec.prometheus.url or (at.prometheus_url if at is not None else "")
    return Observing(url or f"http://127.0.0.1:{spec.prometheus.port}", spec)


def _running(file: Path | None, cluster: str | None) -> running.Running | None:
    name = loader.load(file).cluster_name if file is not None else cluster
    try:
        return running.choose(name)
    except running.NotRunning:
        if cluster is not None:
            raise
        return None


def _spec_of(at: running.Running | None) -> ObservabilitySpec:
    """Of the file that it was brought up with, if it is still there and can be read."""
    if at is None or not Path(at.topology_file).is_file():
        return ObservabilitySpec()
    try:
        return loader.load(Path(at.topology_file)).serving.observability
    except InvalidInput:
        return ObservabilitySpec()
