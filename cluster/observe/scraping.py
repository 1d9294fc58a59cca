"""What Prometheus is told: whom to ask for targets, how often to scrape, which rules to follow.

    config(...)   prometheus.yml as a mapping, for the Prometheus that `up` starts
    jobs(...)     its scrape_configs alone, for a Prometheus that somebody else runs

Targets come and go with the cluster (control.discovery). Two jobs ask the same discovery: the
control token is sent to the controller, and to no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ENGINE_JOB = "pdcluster-engine"
GATEWAY_JOB = "pdcluster-gateway"
CONTROLLER_JOB = "pdcluster-controller"
DISCOVERY_PATH = "/v1/discovery/prometheus"

# Together with the controller's own tick of a second: what comes, goes or changes its role is seen
# within 15 s.
REFRESH_S = 5
SCRAPE_S = 5


def jobs(control_url: str, token_file: str) -> list[dict[str, Any]]:
    """`token_file`: the control token's, as Prometheus sees it."""
    authorization = {"type": "Bearer", "credentials_file": token_file}
    discovery = {
        "url": f"{control_url}{DISCOVERY_PATH}",
        "refresh_interval": f"{REFRESH_S}s",
        "authorization": authorization,
    }

    def job(name: str, controller: str, **more: Any) -> dict[str, Any]:
        relabel = {"source_labels": ["job"], "regex": CONTROLLER_JOB, "action": controller}
        return {
            "job_name": name,
            "http_sd_configs": [discovery],
            "relabel_configs": [relabel],
            **more,
        }

    return [
        job("pdcluster", "drop"),
        job(CONTROLLER_JOB, "keep", authorization=authorization),
    ]


def config(control_url: str, token_file: str, rule_files: Sequence[str]) -> dict[str, Any]:
    """All of prometheus.yml."""
    return {
        "global": {
            "scrape_interval": f"{SCRAPE_S}s",
            "scrape_timeout": f"{SCRAPE_S - 1}s",
            "evaluation_interval": f"{SCRAPE_S}s",
        },
        "rule_files": list(rule_files),
        "scrape_configs": jobs(control_url, token_file),
    }
