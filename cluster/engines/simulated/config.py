"""What a simulated engine is told at start. Written by `adapter` or by a test, read once."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from cluster.topology.schema import ConnectorName, SimulatedSpec, Spec

KvRole = Literal["kv_both", "kv_producer", "kv_consumer"]


class KvConfig(Spec):
    """How this engine exchanges KV blocks with others."""

    dialect: ConnectorName
    role: KvRole = "kv_both"
    engine_id: str = Field(default="", description="Default: a new one at every start.")
    host: str = "127.0.0.1"
    port: int = Field(ge=0, le=65535, description="Side channel; 0: any free port.")
    bootstrap_port: int = Field(
        default=0, ge=0, le=65535, description="Mooncake's /query or SGLang's /route; 0: none."
    )
    lease_s: PositiveFloat = 30.0


def meets_in_rooms(dialect: ConnectorName) -> bool:
    """Whether both engines get the same request, as SGLang's do."""
    return dialect in ("sglang_mooncake", "sglang_nixl", "sglang_ascend")


class EventsConfig(Spec):
    """Where KV cache events are published."""

    endpoint: str = Field(description="tcp://HOST:PORT, bound.")
    replay_endpoint: str | None = None
    topic: str = ""


class RanksConfig(Spec):
    """Which node of a replica that spans several this is, and where rank 0 waits for the others."""

    nodes: int = Field(ge=2)
    node_rank: NonNegativeInt
    head_host: str
    head_port: int = Field(ge=1, le=65535)


class FaultSpec(Spec):
    """What is broken. Everything off by default."""

    crash_at_token: PositiveInt | None = Field(
        default=None, description="The process dies before any request's N-th output token."
    )
    poison_token: NonNegativeInt | None = Field(
        default=None,
        description="The process dies as it begins to read a prompt that holds this token id.",
    )
    hang: bool = Field(default=False, description="Accepts requests, makes no token.")
    slow_factor: PositiveFloat = Field(default=1.0, description="Multiplies every model time.")
    refuse_prefill: bool = Field(default=False, description="503 to prefill for a peer.")
    fail_next: NonNegativeInt = Field(default=0, description="500 to the next K generations.")
    fail_above_tokens: PositiveInt | None = Field(
        default=None, description="500 to prompts of more tokens than this."
    )
    fail_transfers: bool = Field(default=False, description="Gives and takes no blocks.")
    mute_metaserver: bool = Field(
        default=False, description="Decode tells no metaserver where it wants blocks."
    )
    recompute_at_token: int | None = Field(
        default=None,
        ge=2,
        description="Decode gives a request back before its N-th output token, once: finish_reason "
        "stop, stop_reason recomputed, as vLLM-Ascend's recompute scheduler does.",
    )
    start_failure: str | None = Field(default=None, description="Last words of a failed start.")
    extra_load_s: NonNegativeFloat = 0.0


class SimulatedConfig(Spec):
    """One engine process. Secrets are not here: the bearer token is VLLM_API_KEY."""

    host: str = "127.0.0.1"
    port: int = Field(ge=0, le=65535)
    served_model_name: str
    model_path: str = Field(description="Folder with tokenizer.json.")
    max_model_len_tokens: PositiveInt = 131_072
    block_size_tokens: PositiveInt = 16
    max_num_seqs: PositiveInt = 256
    num_speculative_tokens: NonNegativeInt = 0
    timings: SimulatedSpec = Field(default_factory=SimulatedSpec)
    kv: KvConfig | None = None
    events: EventsConfig | None = None
    ranks: RanksConfig | None = Field(default=None, description="Only of a replica over nodes.")
    faults: FaultSpec = Field(default_factory=FaultSpec)
    sglang_metrics: bool = Field(
        default=False, description="Export SGLang's series besides vLLM's."
    )
    core_process: bool = Field(default=False, description="Have a second process: see `core`.")
    fault_endpoint: bool = Field(default=False, description="Serve POST /simulate/fault.")

    @property
    def capacity_blocks(self) -> int:
        return self.timings.kv_capacity_tokens // self.block_size_tokens
