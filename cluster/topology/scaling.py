"""`metadata.serving.scaling`: who decides how many replicas there are, and by which targets.

Shapes, units and defaults, as in `topology.schema`. Bounds are each pool's `replicas.min` and
`replicas.max`. Read by: control.autoscale.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from cluster.topology.spec import Name, Spec


class SloTargetSpec(Spec):
    """What clients of one pair of pools should see."""

    prefill: Name = Field(description="A pool with `role: prefill`.")
    decode: Name = Field(description="A pool with `role: decode` that it feeds.")
    ttft_s: PositiveFloat | None = Field(
        default=None, description="Longest time to the first token. Default: no target."
    )
    tpot_s: PositiveFloat | None = Field(
        default=None, description="Longest mean time per further token. Default: no target."
    )
    percentile: float = Field(
        default=95.0, ge=50, le=99.9, description="Of requests that should keep each target."
    )

    @model_validator(mode="after")
    def _any(self) -> SloTargetSpec:
        if self.ttft_s is None and self.tpot_s is None:
            raise ValueError("neither ttft_s nor tpot_s is given; write one or both")
        return self


class ScalingSpec(Spec):
    """Who decides how many replicas there are, between each pool's `replicas.min` and `.max`."""

    mode: Literal["manual", "slo"] = Field(
        default="manual",
        description="manual: the operator. slo: pools named in `targets` follow their load, as "
        "docs/autoscaling.md says.",
    )
    dry_run: bool = Field(
        default=False, description="Say what would be done, and why, but do nothing."
    )
    targets: list[SloTargetSpec] = Field(
        default_factory=list, description="What `slo` keeps, per pair of pools."
    )
    interval_s: PositiveFloat = Field(default=5.0, description="Time between two decisions.")
    load_window_s: PositiveFloat = Field(
        default=30.0, description="Load and latency are measured over this long."
    )
    up_window_s: NonNegativeFloat = Field(
        default=10.0, description="A shortage counts once it has lasted this long."
    )
    role_window_s: NonNegativeFloat = Field(
        default=30.0,
        description="A pool lends a worker to the other role if it could spare it this long. A "
        "shortage waits as long for one before a replica is started.",
    )
    down_window_s: NonNegativeFloat = Field(
        default=300.0, description="Replicas end if none was needed during this long."
    )
    up_cooldown_s: NonNegativeFloat = Field(
        default=10.0, description="Pause of a pool between two gains."
    )
    down_cooldown_s: NonNegativeFloat = Field(
        default=120.0,
        description="Pause of a pool between a change and stopping a replica, and between a gain "
        "and lending one.",
    )
    headroom: float = Field(
        default=0.15,
        ge=0,
        le=2,
        description="Share by which load may grow before replicas are missing.",
    )

    @model_validator(mode="after")
    def _targets(self) -> ScalingSpec:
        if self.mode == "slo" and not self.targets:
            raise ValueError(
                "mode is slo and there are no targets; "
                "write targets: [{prefill: POOL, decode: POOL, ttft_s: 2}]"
            )
        return self
