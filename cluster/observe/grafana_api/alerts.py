"""Our alert rules as Grafana's own. In: rules.Alert. Out: rule groups of its provisioning API.

A rule of Prometheus fires for each series of its expression, whatever its value. Grafana compares
values, so each series becomes 1 first: A asks, B says that there is a number, C holds it against 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cluster.observe.dashboards.beside import SOURCE_UID
from cluster.observe.rules import Alert

GROUP = "pdcluster"
# Grafana takes multiples of ten seconds.
EVALUATED_EVERY_S = 10
_LOOKS_BACK_S = 600
_EXPRESSIONS = "__expr__"


def group(alerts: Sequence[Alert], folder_uid: str) -> dict[str, Any]:
    return {
        "title": GROUP,
        "folderUid": folder_uid,
        "interval": EVALUATED_EVERY_S,
        "rules": [_rule(alert, folder_uid) for alert in alerts],
    }


def uid(alert: Alert) -> str:
    """PdclusterNothingDecodes: pdcluster-nothing-decodes. Grafana takes 40 characters."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", alert.name).lower()


def _rule(alert: Alert, folder_uid: str) -> dict[str, Any]:
    said = alert.rule()
    return {
        "uid": uid(alert),
        "title": alert.name,
        "ruleGroup": GROUP,
        "folderUID": folder_uid,
        "condition": "C",
        "for": duration(alert.for_s),
        "labels": said["labels"],
        "annotations": said["annotations"],
        # No series is how an expression says that all is well.
        "noDataState": "OK",
        "execErrState": "Error",
        "isPaused": False,
        "data": [
            _step("A", SOURCE_UID, "prometheus", _LOOKS_BACK_S, expr=alert.expr, instant=True),
            _step(
                "B",
                _EXPRESSIONS,
                _EXPRESSIONS,
                0,
                type="math",
                expression="is_number($A) || is_nan($A) || is_inf($A)",
            ),
            _step(
                "C",
                _EXPRESSIONS,
                _EXPRESSIONS,
                0,
                type="threshold",
                expression="B",
                conditions=[{"evaluator": {"type": "gt", "params": [0]}}],
            ),
        ],
    }


def _step(ref: str, source: str, kind: str, from_s: int, **model: Any) -> dict[str, Any]:
    return {
        "refId": ref,
        "queryType": "",
        "relativeTimeRange": {"from": from_s, "to": 0},
        "datasourceUid": source,
        "model": {"refId": ref, "datasource": {"type": kind, "uid": source}, **model},
    }


def duration(seconds: int) -> str:
    """As Grafana writes it back: 90 is 1m30s. In any other words a push would never be the same."""
    parts = []
    for unit, size in (("h", 3600), ("m", 60), ("s", 1)):
        count, seconds = divmod(seconds, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"
