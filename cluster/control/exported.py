"""What the controller's /metrics says of pools and workers as they are. In: the desired state and
the workers' reports. Out: samples. Pure. Called by: control.loop, at each scrape.

A worker's totals are since its engine started. Where two generations of one worker exist at once,
the one that takes work speaks for it, else the newest: a series has one value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from cluster.control.state import DesiredState
from cluster.identity import Role, WorkerId
from cluster.observe import catalogue
from cluster.observe.metric import Sample
from cluster.topology.schema import PoolSpec, ServingSpec
from cluster.workers.report import WorkerReport

_TOTALS = (
    (catalogue.WORKER_KV_TRANSFERS, "transfers"),
    (catalogue.WORKER_KV_FAILURES, "transfer_failures"),
    (catalogue.WORKER_KV_BYTES, "bytes_pulled"),
    (catalogue.WORKER_KV_TOKENS_PULLED, "tokens_pulled"),
    (catalogue.WORKER_KV_TOKENS_HELD, "tokens_held"),
    (catalogue.WORKER_LEASES_OPEN, "leases_open"),
)


def samples(desired: DesiredState | None, reports: Sequence[WorkerReport]) -> Iterator[Sample]:
    """Of catalogue.CONTROLLER_READ."""
    if desired is None:
        return
    yield from _replicas(desired, reports)
    yield from _targets(desired.serving)
    for report in speakers(reports):
        yield from _worker(desired.serving, report)


def speakers(reports: Iterable[WorkerReport]) -> list[WorkerReport]:
    """One report per worker, in the order of their names."""
    chosen: dict[str, WorkerReport] = {}
    for report in sorted(reports, key=lambda r: (r.takes_work, r.id.generation)):
        chosen[report.id.name] = report
    return [chosen[name] for name in sorted(chosen)]


def _replicas(desired: DesiredState, reports: Sequence[WorkerReport]) -> Iterator[Sample]:
    """A worker that serves in another role than its pool counts there, in its own pool."""
    lent = Counter(
        (WorkerId.parse(name).pool, role)
        for name, role in desired.roles.items()
        if _is_lent(desired, name, role)
    )
    ready = Counter((report.id.pool, report.role) for report in reports if report.takes_work)
    for pool in desired.serving.pools:
        away = sum(count for (name, _), count in lent.items() if name == pool.name)
        wanted = {pool.role: pool.replicas.initial - away}
        wanted |= {role: count for (name, role), count in lent.items() if name == pool.name}
        for role in dict.fromkeys((*wanted, *(r for name, r in ready if name == pool.name))):
            labels = (pool.name, role.value, *_place(desired.serving, pool))
            yield Sample(catalogue.REPLICAS_DESIRED, labels, wanted.get(role, 0))
            yield Sample(catalogue.REPLICAS_READY, labels, ready[pool.name, role])


def _targets(serving: ServingSpec) -> Iterator[Sample]:
    for target in serving.scaling.targets:
        labels = (target.prefill, target.decode, f"{target.percentile:g}")
        if target.ttft_s is not None:
            yield Sample(catalogue.TARGET_TTFT, labels, target.ttft_s)
        if target.tpot_s is not None:
            yield Sample(catalogue.TARGET_TPOT, labels, target.tpot_s)


def _is_lent(desired: DesiredState, name: str, role: Role) -> bool:
    pool = desired.pool(WorkerId.parse(name).pool)
    return pool is not None and pool.role is not role


def _worker(serving: ServingSpec, report: WorkerReport) -> Iterator[Sample]:
    own = (report.id.name, report.id.pool)
    island, hardware, engine = place(serving, report.id.pool)
    yield Sample(
        catalogue.WORKER_UP,
        (
            *(*own, report.role.value, report.node_ip, hardware, island),
            *(serving.model.public_name, engine, report.state.value),
        ),
        1,
    )
    for metric, name in _TOTALS:
        yield Sample(metric, own, getattr(report.counters, name))
    block_tokens = report.fingerprint.block_size_tokens if report.fingerprint else 0
    if block_tokens:
        pulled, held = report.counters.tokens_pulled, report.counters.tokens_held
        yield Sample(catalogue.WORKER_KV_BLOCKS_PULLED, own, pulled // block_tokens)
        yield Sample(catalogue.WORKER_KV_BLOCKS_SKIPPED, own, held // block_tokens)
    yield Sample(catalogue.WORKER_RSS, own, report.rss_bytes)
    yield Sample(catalogue.WORKER_LOG_LINES_LOST, own, report.log_lines_lost)


def place(serving: ServingSpec, pool: str) -> tuple[str, str, str]:
    """Island, hardware and engine of a pool; "" each if it is no longer one."""
    for found in serving.pools:
        if found.name == pool:
            return (*_place(serving, found), found.engine)
    return "", "", ""


def _place(serving: ServingSpec, pool: PoolSpec) -> tuple[str, str]:
    return serving.island_of(pool.name).name, pool.hardware or ""
