"""`pools[].simulated`: timings of the engine that has no model.

Read by: engines.simulated. Shapes, units and defaults, as in `topology.schema`.
"""

from __future__ import annotations

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from cluster.topology.spec import Spec


class SimulatedSpec(Spec):
    """Timings of the `simulated` engine, which has no model."""

    prefill_tokens_per_s: PositiveFloat = Field(
        default=20_000.0, description="How fast it pretends to read prompts."
    )
    decode_step_s: NonNegativeFloat = Field(
        default=0.002, description="Pause before each decode step."
    )
    decode_step_per_sequence_s: NonNegativeFloat = Field(
        default=0.0, description="What each sequence in the batch adds to that pause."
    )
    load_s: NonNegativeFloat = Field(default=0.0, description="Pause before it becomes ready.")
    kv_bytes_per_token: PositiveInt = Field(
        default=1024, description="What one token of KV counts for in transfers."
    )
    kv_capacity_tokens: PositiveInt = Field(
        default=262_144, description="Tokens of KV it pretends to hold."
    )
    accepted_per_draft: NonNegativeFloat = Field(
        default=0.0, description="Mean accepted draft tokens per step, of num_speculative_tokens."
    )
