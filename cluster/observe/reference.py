"""docs/metrics.md, made of the declarations. Pure; scripts/write_metrics_reference writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.observe.catalogue import PARTS
from cluster.observe.metric import Kind, Metric
from cluster.observe.rules import Alert, Recording
from cluster.observe.rules_alerts import ALERTS
from cluster.observe.rules_recording import ENGINES, GATEWAYS
from cluster.observe.scraping import DISCOVERY_PATH, REFRESH_S, SCRAPE_S
from cluster.traffic import BOUNDS_S

_INTRO = f"""# Metrics

<!-- Written by scripts/write_metrics_reference from cluster/observe; do not edit. -->

What pdcluster exports to Prometheus, what Prometheus makes of it, and when it calls somebody.

Prometheus finds its targets at `{DISCOVERY_PATH}` of the control port (behind the control token),
asks every {REFRESH_S} s and scrapes every {SCRAPE_S} s: workers and gateway replicas that come, go
or change their role appear within 15 s. On one machine `pdcluster up` starts a Prometheus;
`pdcluster dashboards prometheus-config` prints what another one needs. It adds these labels:

| series of | job | labels |
|---|---|---|
| engines | `pdcluster-engine` | `cluster`, `pool`, `role`, `worker` (POOL/INDEX), `node`, \
`hardware`, `island`, `model`, `engine` |
| gateway replicas | `pdcluster-gateway` | `cluster`, `gateway` (the replica's id) |
| the controller | `pdcluster-controller` | `cluster` |

A label that an engine has by the same name becomes `exported_...`: vLLM's `engine`, the number of a
data-parallel rank, is `exported_engine`. `prefill_pool` is empty where decode prefilled by itself.
Counters of a worker begin at 0 with each generation, those of the controller with its restart;
`rate` and `increase` take that into account.

Histograms of seconds have {len(BOUNDS_S)} buckets from {BOUNDS_S[0] * 1000:g} ms to \
{BOUNDS_S[-1]:.0f} s, each 1.25 times the one before: a percentile of 40 ms is as exact as one of
40 s.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([_INTRO, *_parts(), *_recorded(), *_alerts()])


def _parts() -> Iterator[str]:
    for part in PARTS:
        yield f"## {part.name}\n\nFrom {part.where}.\n"
        yield "| metric | kind | unit | labels | meaning | source |\n|---|---|---|---|---|---|"
        for metric in part.metrics:
            yield _row(metric)
        yield ""


def _row(metric: Metric) -> str:
    name = f"{metric.name}_bucket" if metric.kind is Kind.HISTOGRAM else metric.name
    return (
        f"| `{name}` | {metric.kind} | {metric.unit} | {_names(metric.labels)} | "
        f"{_cell(metric.help)} | {_cell(metric.source)} |"
    )


def _recorded() -> Iterator[str]:
    yield (
        "## Recorded from engines\n\nEngines call the same thing by different names; Prometheus "
        "records one (dashboards/prometheus/recording.yml).\nEverything else that an engine "
        "exports is scraped as it is: vLLM's `vllm:...`, SGLang's `sglang:...`.\n"
    )
    yield from _recordings(ENGINES)
    yield "\n## Recorded from gateways\n"
    yield from _recordings(GATEWAYS)
    yield ""


def _recordings(rules: Sequence[Recording]) -> Iterator[str]:
    yield "| series | unit | labels | meaning | made from |\n|---|---|---|---|---|"
    for rule in rules:
        yield (
            f"| `{rule.name}` | {rule.unit} | {_names(rule.labels)} | {_cell(rule.help)} | "
            f"`{_cell(rule.expr)}` |"
        )


def _alerts() -> Iterator[str]:
    yield "## Alerts\n\nIn dashboards/prometheus/alerts.yml, each with its runbook.\n"
    for alert in ALERTS:
        yield from _alert(alert)


def _alert(alert: Alert) -> Iterator[str]:
    yield f"### {alert.name}\n"
    yield f"{alert.severity}, after {alert.for_s} s: `{alert.expr}`\n"
    yield f"- **It means:** {alert.means}"
    yield f"- **Look at:** {alert.look_at}"
    yield f"- **Do:** {alert.do}\n"


def _names(labels: Sequence[str]) -> str:
    return ", ".join(f"`{label}`" for label in labels)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
