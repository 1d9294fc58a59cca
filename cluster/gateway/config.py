"""All that a gateway replica is told when it starts: one frozen value that crosses to actors."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.topology.schema import LimitsSpec, ServingSpec
from cluster.topology.tracing import TracingSpec


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Settings of every replica of one endpoint. Holds no client key, only their hashes."""

    cluster: str
    model: str  # the name clients use
    model_path: str  # local folder, or hub id
    host: str = "127.0.0.1"
    port: int = 8000
    # sha256 of each accepted bearer key; None: the endpoint asks for no key.
    key_hashes: tuple[bytes, ...] | None = field(default=None, repr=False)
    engine_key: str = field(default="", repr=False)
    limits: LimitsSpec = field(default_factory=LimitsSpec)
    prefill_attempts: int = 2
    local_prefill_below_tokens: int = 0
    has_reasoning_parser: bool = False  # in the engines of any pool
    tracing: TracingSpec | None = None  # None: off

    @property
    def max_body_bytes(self) -> int:
        return int(self.limits.max_body_mib * 2**20)

    @classmethod
    def of(
        cls,
        cluster: str,
        serving: ServingSpec,
        model_path: str,
        key_hashes: tuple[bytes, ...] | None,
        engine_key: str,
    ) -> GatewayConfig:
        """What a topology says about the endpoint, with the secrets that it does not say."""
        gateway = serving.gateway
        return cls(
            cluster=cluster,
            model=serving.model.public_name,
            model_path=model_path,
            host=gateway.host,
            port=gateway.port,
            key_hashes=key_hashes,
            engine_key=engine_key,
            limits=gateway.limits,
            prefill_attempts=gateway.prefill_attempts,
            local_prefill_below_tokens=gateway.local_prefill_below_tokens,
            has_reasoning_parser=any(
                serving.model_of(pool.name).reasoning_parser for pool in serving.pools
            ),
            tracing=serving.observability.tracing,
        )
