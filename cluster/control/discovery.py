"""Where Prometheus finds what to scrape: its HTTP service discovery, made of what the controller
knows. Pure. Called by: control.controller.

    engine       each worker whose engine answers HTTP, at its own port
    gateway      each replica, at its own port for metrics
    controller   the control port, by the address at which it was asked

The labels are the ones that every series of a target gets. `job` tells the three kinds apart: the
control token goes to the controller and to nobody else (observe.scraping).
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.control.exported import place
from cluster.control.state import DesiredState
from cluster.identity import WorkerState
from cluster.observe.scraping import CONTROLLER_JOB, ENGINE_JOB, GATEWAY_JOB
from cluster.traffic import GatewayReport
from cluster.workers.report import WorkerReport

# A model may take half an hour to load: until its engine answers it is not missing.
_ANSWERS_HTTP = frozenset(
    {
        *(WorkerState.WARMING, WorkerState.READY, WorkerState.HUNG),
        *(WorkerState.CHANGING, WorkerState.DRAINING),
    }
)


@dataclass(frozen=True, slots=True)
class TargetGroup:
    """As Prometheus' http_sd_config reads it."""

    targets: tuple[str, ...]  # host:port
    labels: Mapping[str, str] = field(default_factory=dict)


def target_groups(
    cluster: str,
    desired: DesiredState | None,
    reports: Sequence[WorkerReport],
    gateways: Sequence[GatewayReport],
    asked_at: str,
) -> tuple[TargetGroup, ...]:
    """`asked_at`: host:port of the control API, as whoever asks reaches it; "": not known."""
    groups = [*_engines(desired, reports), *_gateways(gateways)]
    if asked_at:
        groups.append(TargetGroup((asked_at,), {"job": CONTROLLER_JOB}))
    return tuple(
        TargetGroup(group.targets, {"cluster": cluster, **group.labels}) for group in groups
    )


def _engines(
    desired: DesiredState | None, reports: Sequence[WorkerReport]
) -> Iterator[TargetGroup]:
    if desired is None:
        return
    for report in reports:
        if report.state not in _ANSWERS_HTTP or not report.url:
            continue
        island, hardware, engine = place(desired.serving, report.id.pool)
        yield TargetGroup(
            (urllib.parse.urlsplit(report.url).netloc,),
            {
                "job": ENGINE_JOB,
                "__metrics_path__": report.metrics_path,
                "pool": report.id.pool,
                "role": report.role.value,
                "worker": report.id.name,
                "node": report.node_ip,
                "hardware": hardware,
                "island": island,
                "model": desired.serving.model.public_name,
                "engine": engine,
            },
        )


def _gateways(gateways: Sequence[GatewayReport]) -> Iterator[TargetGroup]:
    for report in gateways:
        if report.metrics_url:
            url = urllib.parse.urlsplit(report.metrics_url)
            labels = {"job": GATEWAY_JOB, "__metrics_path__": url.path, "gateway": report.gateway}
            yield TargetGroup((url.netloc,), labels)
