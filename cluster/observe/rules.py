"""Recording and alert rules for Prometheus, as values, and the files that are made of them.

    rules_recording   one set of names for what engines of all kinds export, and quantiles
    rules_alerts      what somebody should be told of, each with its runbook

Written to dashboards/prometheus/ and, by `up`, beside the Prometheus that it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

EVALUATED_EVERY_S = 5
RECORDING_FILE = "recording.yml"
ALERTS_FILE = "alerts.yml"
_HEADER = "# Written by `pdcluster dashboards build`; the source is cluster/observe/rules_*.py.\n"


@dataclass(frozen=True, slots=True)
class Recording:
    """A series that Prometheus computes. `labels`: what it keeps. `unit`: "": a plain number."""

    name: str
    expr: str
    help: str
    labels: tuple[str, ...] = ()
    unit: str = ""

    def rule(self) -> dict[str, Any]:
        return {"record": self.name, "expr": self.expr}


@dataclass(frozen=True, slots=True)
class Alert:
    """`expr` holds for `for_s` seconds. `summary` may name labels, as Prometheus' templates do;
    `means`, `look_at` and `do` are its runbook."""

    name: str
    expr: str
    for_s: int
    severity: str  # critical: clients notice; warning: they will; info: worth to know
    summary: str
    means: str
    look_at: str
    do: str

    def rule(self) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": f"{self.for_s}s",
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "means": self.means,
                "look_at": self.look_at,
                "do": self.do,
            },
        }


@dataclass(frozen=True, slots=True)
class Group:
    """Rules that are evaluated one after another, at one moment."""

    name: str
    rules: Sequence[Recording | Alert]


def files() -> dict[str, str]:
    """All rule files by name, as YAML."""
    from cluster.observe.rules_alerts import ALERTS
    from cluster.observe.rules_recording import ENGINES, GATEWAYS

    return {
        RECORDING_FILE: _text(
            [Group("pdcluster engines", ENGINES), Group("pdcluster gateways", GATEWAYS)]
        ),
        ALERTS_FILE: _text([Group("pdcluster alerts", ALERTS)]),
    }


def _text(groups: Sequence[Group]) -> str:
    said = {
        "groups": [
            {
                "name": group.name,
                "interval": f"{EVALUATED_EVERY_S}s",
                "rules": [rule.rule() for rule in group.rules],
            }
            for group in groups
        ]
    }
    return _HEADER + yaml.safe_dump(said, sort_keys=False, width=100, allow_unicode=True)
