"""Scaling and events: what is wanted, what is there, what changed, how long it took."""

from __future__ import annotations

from cluster.observe.dashboards.panel import Board, Kind, Panel, Query, Section, Steps, Unit
from cluster.observe.dashboards.promql import (
    POOL,
    everywhere,
    or_none,
    or_zero,
    pools,
    quantile,
    total,
)


def _counted(name: str, *labels: str, matcher: str = POOL) -> str:
    selector = everywhere(f"pdcluster_{name}_total", *((matcher,) if matcher else ()))
    return or_none(total(f"increase({selector}[$__rate_interval])", *labels), labels[0])


_MISSING = Panel(
    asks="How many replicas are missing?",
    formula="Desired - ready = sum(pdcluster_pool_replicas_desired) - "
    "sum(pdcluster_pool_replicas_ready), of the chosen pools.",
    do="For longer than a start takes: `pdcluster events`, then `pdcluster logs` of the worker.",
    unit=Unit.COUNT,
    queries=(
        Query(
            f"{total(pools('pdcluster_pool_replicas_desired'))} - "
            f"{total(pools('pdcluster_pool_replicas_ready'))}"
        ),
    ),
    kind=Kind.STAT,
    steps=Steps(warn=1, bad=2),
    needs=None,
)

_RESTARTED = Panel(
    asks="How many workers failed in the time shown?",
    formula="Workers started in the place of one that had failed = "
    "sum(increase(pdcluster_worker_restarts_total)).",
    do="Repeatedly in one pool: its log's last lines are in `pdcluster status`.",
    unit=Unit.COUNT,
    queries=(
        Query(
            or_zero(
                total(f"increase({everywhere('pdcluster_worker_restarts_total', POOL)}[$__range])")
            )
        ),
    ),
    kind=Kind.STAT,
    steps=Steps(warn=1, bad=5),
    needs=None,
)

_TIME_TO_READY_NOW = Panel(
    asks="How long did a worker take to become ready?",
    formula="Median from the decision to start a worker until it takes work, since the controller "
    "started = histogram_quantile(0.5, sum by (le) (pdcluster_time_to_ready_seconds_bucket)).",
    do="It is how far ahead the autoscaler must see; weights on a local disk shorten it.",
    unit=Unit.SECONDS,
    queries=(
        Query(
            quantile(0.5, everywhere("pdcluster_time_to_ready_seconds_bucket", POOL)),
        ),
    ),
    kind=Kind.STAT,
    needs=None,
)

_REPLICAS = Panel(
    asks="Does each pool have the replicas it should?",
    formula="Ready and desired replicas by pool = pdcluster_pool_replicas_ready, "
    "pdcluster_pool_replicas_desired.",
    do="Marks over the panel say when somebody asked for more or fewer.",
    unit=Unit.COUNT,
    queries=(
        Query(total(pools("pdcluster_pool_replicas_ready"), "pool"), "{{pool}} ready"),
        Query(total(pools("pdcluster_pool_replicas_desired"), "pool"), "{{pool}} desired"),
    ),
    needs=None,
)

_STATES = Panel(
    asks="In which states are the workers?",
    formula="Workers by role and state = count by (role, state) (pdcluster_worker_up).",
    do="`failed` and `hung` are restarted by themselves, with growing pauses.",
    unit=Unit.COUNT,
    queries=(
        Query(f"count by (role, state) ({pools('pdcluster_worker_up')})", "{{role}} {{state}}"),
    ),
    is_stacked=True,
    needs=None,
)

_STARTED = Panel(
    asks="Which workers come and go?",
    formula="Workers started, restarted after a failure, and told to drain, per interval and "
    "pool = increase of pdcluster_worker_starts_total, _restarts_total, _drains_total.",
    do="Starts without restarts are scaling; restarts are failures.",
    unit=Unit.COUNT,
    queries=(
        Query(_counted("worker_starts", "pool"), "{{pool}} started"),
        Query(_counted("worker_restarts", "pool"), "{{pool}} restarted"),
        Query(_counted("worker_drains", "pool"), "{{pool}} drained"),
    ),
    needs=None,
)

_ROLES = Panel(
    asks="How often do workers change their role?",
    formula="Changes of role without a new start, per interval, pool and new role = "
    "increase(pdcluster_role_changes_total).",
    do="Back and forth: widen the autoscaler's windows, or fix the roles.",
    unit=Unit.COUNT,
    queries=(Query(_counted("role_changes", "pool", "to"), "{{pool}} to {{to}}"),),
    needs=None,
)

_CHANGES = Panel(
    asks="Do changes succeed?",
    formula="Changes that ended, per interval, by kind and how = "
    "increase(pdcluster_changes_total), of the whole cluster.",
    do="`failed`: `pdcluster changes` has the reason.",
    unit=Unit.COUNT,
    queries=(Query(_counted("changes", "kind", "state", matcher=""), "{{kind}} {{state}}"),),
    needs=None,
)

_TIME_TO_READY = Panel(
    asks="How long do starts take in each pool?",
    formula="p95 from the decision to start until it takes work, since the controller started = "
    "histogram_quantile(0.95, sum by (le, pool) (pdcluster_time_to_ready_seconds_bucket)).",
    do="Grows: the model's disk or the network to it. One pool: its hardware.",
    unit=Unit.SECONDS,
    queries=(
        Query(
            quantile(0.95, everywhere("pdcluster_time_to_ready_seconds_bucket", POOL), "pool"),
            "{{pool}}",
        ),
    ),
    needs=None,
)

_MEMORY = Panel(
    asks="Does a worker's memory grow?",
    formula="Resident memory of the engine's processes = pdcluster_worker_rss_bytes, by worker.",
    do="A line that never levels off is a leak: drain the worker before the host is full.",
    unit=Unit.BYTES,
    queries=(Query(everywhere("pdcluster_worker_rss_bytes", POOL), "{{worker}}"),),
    needs=None,
)

_WORKERS = Panel(
    asks="What is each worker, and where?",
    formula="One row per worker there is now = pdcluster_worker_up, whose value is always 1.",
    do="`pdcluster drain WORKER` empties one, `pdcluster role WORKER ROLE` changes its job.",
    unit=Unit.COUNT,
    queries=(Query(pools("pdcluster_worker_up", 'model=~"$model"')),),
    kind=Kind.TABLE,
    columns=("worker", "role", "state", "pool", "island", "hardware", "node", "engine", "model"),
    needs=None,
)

BOARD = Board(
    uid="pdcluster-scaling",
    title="pdcluster / Scaling and events",
    description="What is wanted, what is there, what changed and how long it took.",
    sections=(
        Section("Now", ((_MISSING, _RESTARTED, _TIME_TO_READY_NOW),)),
        Section("Replicas", ((_REPLICAS, _STATES),)),
        Section("What changed", ((_STARTED, _ROLES, _CHANGES),)),
        Section("Workers", ((_TIME_TO_READY, _MEMORY), (_WORKERS,))),
    ),
)
