"""`metadata.serving.observability`: Prometheus and Grafana, ours or somebody else's, and traces.

Shapes, units and defaults, as in `topology.schema`. Read by: launcher.prometheus, the dashboards'
commands, gateway.tracing (`topology.tracing`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, field_validator, model_validator

from cluster.topology.spec import Spec
from cluster.topology.tracing import TracingSpec


class PrometheusSpec(Spec):
    """Who scrapes the cluster's metrics."""

    mode: Literal["auto", "off", "external"] = Field(
        default="auto",
        description="auto: `up` starts one on the head, on loopback, where the program "
        "`prometheus` is installed. external: another one scrapes; `pdcluster dashboards "
        "prometheus-config` prints what it needs. off: nobody.",
    )
    port: int = Field(
        default=9090, ge=1, le=65535, description="TCP port of the one that `up` starts."
    )
    url: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s]+$",
        description="Where the external one is asked, such as http://prometheus:9090.",
    )
    retention_h: PositiveFloat = Field(
        default=360.0, description="How long the one that `up` starts keeps samples."
    )

    @field_validator("mode", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        # YAML 1.1, which Ray and we read, takes a bare `off` for false.
        return "off" if value is False else value

    @model_validator(mode="after")
    def _url_of_an_external_one(self) -> PrometheusSpec:
        if self.mode == "external" and self.url is None:
            raise ValueError("mode is external and there is no url; write url: http://HOST:9090")
        if self.mode != "external" and self.url is not None:
            raise ValueError(f"url is given and mode is {self.mode}; write mode: external")
        return self


class GrafanaSpec(Spec):
    """Where `pdcluster dashboards push` sends the dashboards."""

    url: str | None = Field(
        default=None,
        pattern=r"^https?://[^\s]+$",
        description="Grafana's address, such as http://grafana:3000. Default: as the command says.",
    )
    token_env: str = Field(
        default="GRAFANA_TOKEN",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="NAME of the environment variable that holds the service account's token.",
    )
    folder: str = Field(
        default="pdcluster", min_length=1, description="Title of the folder of dashboards."
    )


class ObservabilitySpec(Spec):
    """Metrics over time and pictures of them; traces of requests."""

    prometheus: PrometheusSpec = Field(
        default_factory=PrometheusSpec, description="Who scrapes the cluster's metrics."
    )
    grafana: GrafanaSpec = Field(
        default_factory=GrafanaSpec, description="Where dashboards are pushed to."
    )
    tracing: TracingSpec | None = Field(
        default=None, description="Where traces of requests go. Default: nowhere, they are off."
    )
