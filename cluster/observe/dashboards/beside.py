"""Grafana and Prometheus started beside each other from files: provisioning, and a compose file.

Both containers share the host's network: what they scrape and are read by listens on loopback, or
on the cluster's own network. Both listen on loopback alone, and neither runs as root.
"""

from __future__ import annotations

from typing import Any

import yaml

from cluster.observe import scraping

# Prometheus: the line with long support. Grafana: the version whose schema the boards are checked
# against (scripts/check_dashboards).
PROMETHEUS_IMAGE = "prom/prometheus:v3.5.0"
GRAFANA_IMAGE = "grafana/grafana:13.2.3"

SOURCE_UID = "pdcluster-prometheus"
SOURCE_NAME = "pdcluster Prometheus"
FOLDER_UID = "pdcluster"
FOLDER_TITLE = "pdcluster"
PROMETHEUS_URL = "http://127.0.0.1:9090"
CONTROL_URL = "http://127.0.0.1:8001"

_HEADER = "# Written by `pdcluster dashboards build`; the source is cluster/observe/dashboards/.\n"
_TOKEN = "/etc/prometheus/control-token"


def files() -> dict[str, str]:
    """YAML by path below the folder of dashboards."""
    rules = ["recording.yml", "alerts.yml"]
    return {
        "provisioning/datasources/pdcluster.yml": _text(
            {"apiVersion": 1, "datasources": [data_source(PROMETHEUS_URL)]}
        ),
        "provisioning/dashboards/pdcluster.yml": _text(_dashboards()),
        "prometheus/prometheus.yml": _text(scraping.config(CONTROL_URL, _TOKEN, rules)),
        "compose.yaml": _text(_compose()),
    }


def data_source(url: str) -> dict[str, Any]:
    """As provisioning and the HTTP API take it. `url`: Prometheus as Grafana's server sees it."""
    return {
        "uid": SOURCE_UID,
        "name": SOURCE_NAME,
        "type": "prometheus",
        "access": "proxy",
        "url": url,
        "isDefault": False,
        "jsonData": {
            "httpMethod": "POST",
            "prometheusType": "Prometheus",
            # $__rate_interval is four of these at least.
            "timeInterval": f"{scraping.SCRAPE_S}s",
        },
    }


def _dashboards() -> dict[str, Any]:
    provider = {
        "name": "pdcluster",
        "folder": FOLDER_TITLE,
        "folderUid": FOLDER_UID,
        "type": "file",
        "allowUiUpdates": False,
        "updateIntervalSeconds": 30,
        "options": {"path": "/etc/pdcluster/dashboards"},
    }
    return {"apiVersion": 1, "providers": [provider]}


def _compose() -> dict[str, Any]:
    prometheus = {
        "image": PROMETHEUS_IMAGE,
        "network_mode": "host",
        # The token's file is its owner's alone: Prometheus runs as that user.
        "user": "${PDCLUSTER_UID:?say whose: PDCLUSTER_UID=$$(id -u)}",
        "command": [
            "--config.file=/etc/prometheus/prometheus.yml",
            "--storage.tsdb.path=/prometheus",
            "--storage.tsdb.retention.time=15d",
            "--web.listen-address=127.0.0.1:9090",
        ],
        "volumes": [
            "./prometheus:/etc/prometheus:ro",
            f"${{PDCLUSTER_TOKEN_FILE:?the control token's file}}:{_TOKEN}:ro",
            {
                "type": "bind",
                "source": "${PDCLUSTER_PROMETHEUS_DATA:?a folder that PDCLUSTER_UID may write}",
                "target": "/prometheus",
                "bind": {"create_host_path": False},
            },
        ],
        **_confined(),
    }
    grafana = {
        "image": GRAFANA_IMAGE,
        "network_mode": "host",
        "user": "472:0",
        "environment": {
            "GF_SERVER_HTTP_ADDR": "127.0.0.1",
            "GF_SERVER_HTTP_PORT": "3000",
            "GF_SECURITY_ADMIN_PASSWORD": "${GRAFANA_ADMIN_PASSWORD:?choose one}",
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
            "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": "/etc/pdcluster/dashboards/overview.json",
        },
        "volumes": [
            "grafana-data:/var/lib/grafana",
            "./provisioning:/etc/grafana/provisioning:ro",
            "./:/etc/pdcluster/dashboards:ro",
        ],
        "depends_on": ["prometheus"],
        **_confined(),
    }
    return {
        "name": "pdcluster-observability",
        "services": {"prometheus": prometheus, "grafana": grafana},
        "volumes": {"grafana-data": {}},
    }


def _confined() -> dict[str, Any]:
    return {
        "restart": "unless-stopped",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
    }


def _text(content: dict[str, Any]) -> str:
    return _HEADER + yaml.safe_dump(content, sort_keys=False, width=100, allow_unicode=True)
