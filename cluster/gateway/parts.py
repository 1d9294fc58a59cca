"""What requests share within one gateway replica."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.gateway.config import GatewayConfig
from cluster.gateway.engines import Engines
from cluster.gateway.fleet import Fleet
from cluster.gateway.metaserver import Metaserver
from cluster.gateway.quarantine import Quarantine
from cluster.gateway.render import Renderer
from cluster.gateway.tally import Tally
from cluster.kv.coordinator import Coordinator
from cluster.observe.gateway_metrics import GatewayMetrics


@dataclass(frozen=True, slots=True)
class Parts:
    """One of each per replica, made by gateway.app."""

    config: GatewayConfig
    fleet: Fleet
    renderer: Renderer
    engines: Engines
    coordinator: Coordinator
    metaserver: Metaserver
    quarantine: Quarantine
    metrics: GatewayMetrics
    tally: Tally
