"""What a worker states of its engine, put together from what is known. Pure.

Called by: workers.worker.
"""

from __future__ import annotations

from cluster.engines.base import EngineAdapter, Launch, LaunchContext
from cluster.engines.client import EngineSample
from cluster.snapshot import Fingerprint, Load
from cluster.workers.ledger import Ledger
from cluster.workers.report import Counters
from cluster.workers.spec import WorkerSpec


def url(context: LaunchContext) -> str:
    """The engine's HTTP address; "" for a rank that has none."""
    if context.node_rank > 0:
        return ""
    host = f"[{context.host}]" if ":" in context.host else context.host
    return f"http://{host}:{context.ports['http']}"


def fingerprint(
    spec: WorkerSpec,
    adapter: EngineAdapter,
    context: LaunchContext,
    launch: Launch,
    sample: EngineSample,
    version: str,
) -> Fingerprint:
    """What must be equal on both sides of a KV transfer. `version`: the engine's own."""
    return Fingerprint(
        model=spec.model_digest,
        quantization=spec.model.quantization or "none",
        kv_dtype=_kv_dtype(sample, launch),
        block_size_tokens=sample.block_size_tokens,
        connector=spec.island.connector,
        connector_version=adapter.connector_version(context),
        engine=adapter.name,
        engine_version=version,
        hash_seed=launch.env.get("PYTHONHASHSEED", ""),
        hardware=spec.pool.hardware or "",
        tensor_parallel=spec.pool.parallel.tensor,
    )


def load(sample: EngineSample | None) -> Load:
    if sample is None:
        return Load()
    return Load(sample.running, sample.waiting, sample.kv_usage)


def counters(sample: EngineSample | None, ledger: Ledger, now_s: float) -> Counters:
    """Totals from the engine's metrics and from its transfer records. `now_s`: wall clock."""
    return Counters(
        prompt_tokens=sample.prompt_tokens if sample else 0,
        generation_tokens=sample.generation_tokens if sample else 0,
        external_tokens=sample.external_tokens if sample else 0,
        spec_drafts=sample.spec_drafts if sample else 0,
        spec_accepted=sample.spec_accepted if sample else 0,
        transfers=ledger.transfers,
        transfer_failures=ledger.transfer_failures,
        bytes_pulled=ledger.bytes_pulled,
        tokens_held=ledger.tokens_held,
        tokens_pulled=ledger.tokens_pulled,
        leases_open=ledger.leases_open(now_s),
        spec_accepted_per_position=sample.spec_accepted_per_position if sample else (),
    )


def _kv_dtype(sample: EngineSample, launch: Launch) -> str:
    """`auto` means the model's dtype, which may differ from host to host."""
    if sample.cache_dtype != "auto" or "--dtype" not in launch.argv:
        return sample.cache_dtype
    return launch.argv[launch.argv.index("--dtype") + 1]
