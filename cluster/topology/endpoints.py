"""`gateway` and `control`: where a cluster is reached, by clients and by operators.

Shapes, units and defaults, as in `topology.schema`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cluster.topology.spec import Spec


class LimitsSpec(Spec):
    """What one gateway replica admits."""

    max_body_mib: PositiveFloat = Field(default=8.0, description="Larger bodies get 413.")
    max_concurrent_requests: PositiveInt = Field(
        default=1024, description="Requests at work at once; more are queued."
    )
    max_queued_requests: NonNegativeInt = Field(
        default=1024, description="Requests that wait; more get 429."
    )
    queue_timeout_s: PositiveFloat = Field(
        default=30.0, description="Longest wait in the queue; then 429."
    )
    request_deadline_s: PositiveFloat = Field(
        default=600.0, description="Longest life of a request; then 504."
    )


class AuthSpec(Spec):
    """Where API keys come from, one per line (file) or comma-separated (environment).

    With neither given, `up` makes a key and writes it to a file only its user can read."""

    keys_file: Path | None = Field(default=None, description="File with one key per line.")
    keys_env: str | None = Field(
        default=None, description="NAME of an environment variable with comma-separated keys."
    )

    @model_validator(mode="after")
    def _one(self) -> AuthSpec:
        if self.keys_file is not None and self.keys_env is not None:
            raise ValueError("keys_file and keys_env are both given; keep one of them")
        return self


class GatewaySpec(Spec):
    """The OpenAI-compatible endpoint."""

    host: str = Field(
        default="127.0.0.1", min_length=1, description="Address to bind. 0.0.0.0: all interfaces."
    )
    port: int = Field(default=8000, ge=1, le=65535, description="TCP port to bind.")
    replicas: PositiveInt = Field(default=1, description="Gateway processes.")
    ingress: Literal["serve", "direct"] = Field(
        default="serve",
        description=(
            "serve: Ray Serve behind HAProxy, which also opens ports 8404 and 9101 on all "
            "interfaces; direct: plain actors, nothing beyond `host`."
        ),
    )
    auth: AuthSpec | None = Field(default_factory=AuthSpec, description="null: no keys at all.")
    limits: LimitsSpec = Field(
        default_factory=LimitsSpec, description="What one gateway replica admits."
    )
    prefill_attempts: PositiveInt = Field(
        default=2, description="Prefill workers tried before the island's on_prefill_failure."
    )
    local_prefill_below_tokens: NonNegativeInt = Field(
        default=0,
        description="Decode prefills by itself when it lacks fewer prompt tokens than this.",
    )


class ControlSpec(Spec):
    """The control API on the head: what `pdcluster status`, `logs` and the like ask."""

    host: str = Field(
        default="127.0.0.1",
        min_length=1,
        description="Address to bind. On a rack: the head's own, to be reached from elsewhere.",
    )
    port: int = Field(default=8001, ge=1, le=65535, description="TCP port to bind.")
    token_file: Path | None = Field(
        default=None,
        description="File with the bearer token. Default: `up` makes one that only its user reads.",
    )
    token_env: str | None = Field(
        default=None, description="NAME of an environment variable that holds the token."
    )

    @model_validator(mode="after")
    def _one(self) -> ControlSpec:
        if self.token_file is not None and self.token_env is not None:
            raise ValueError("token_file and token_env are both given; keep one of them")
        return self
