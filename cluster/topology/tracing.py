"""`metadata.serving.observability.tracing`: OpenTelemetry traces of requests.

Shapes, units and defaults, as in `topology.schema`. Read by: gateway.tracing.
"""

from __future__ import annotations

from pydantic import Field

from cluster.topology.spec import Spec


class TracingSpec(Spec):
    """Where spans go, and of how many requests. There is no tracing without this section."""

    otlp_endpoint: str = Field(
        # No user and password: the address is in logs and in `status`.
        pattern=r"^https?://[^\s/?#@]+(/[^\s?#@]*)?$",
        description="Address of an OpenTelemetry collector that takes OTLP over HTTP, such as "
        "http://127.0.0.1:4318; spans are posted to /v1/traces below it.",
    )
    sample_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of the requests that is traced, 0 to 1. A client that sends a "
        "traceparent has decided for its own.",
    )

    @property
    def traces_url(self) -> str:
        return f"{self.otlp_endpoint.rstrip('/').removesuffix('/v1/traces')}/v1/traces"
