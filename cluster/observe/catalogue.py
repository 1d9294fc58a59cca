"""Every metric that pdcluster exports, declared once.

    GATEWAY      each gateway replica, at its own port for metrics and at the endpoint's /metrics
    KV           the KV-transfer coordinator inside each gateway replica
    CONTROLLER   the control port's /metrics

The exporters are built from these declarations, docs/metrics.md is written from them, and the
dashboards' queries name them. What engines export is theirs: `rules` maps it onto one set of names.

Labels are pools, workers, nodes, islands, hardware, models and reasons out of fixed sets: bounded
by the topology, never by traffic. `prefill_pool` is "" where decode prefilled by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.observe.metric import Kind, Metric

_PAIR = ("prefill_pool", "decode_pool")
_LINK = (*_PAIR, "connector")
_WORKER = ("worker", "pool")
_TALLY = "counted per pair of pools (gateway.tally), read at the scrape"
_REQUEST = "counted as the request passes"
_EVENT = "the controller's events; counts from 0 when the controller is restarted"
_REPORT = "the worker's latest report, read at the scrape; counts from 0 with each new generation"
_NOW = "the worker's latest report, read at the scrape"


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the cluster that exports metrics of its own."""

    name: str
    where: str
    metrics: tuple[Metric, ...]


# Gateway

REQUESTS = Metric(
    "pdcluster_gateway_requests_total",
    Kind.COUNTER,
    "Answers sent, by endpoint and status (499: the client left).",
    _REQUEST,
    ("endpoint", "status"),
)
TTFT = Metric(
    "pdcluster_gateway_ttft_seconds",
    Kind.HISTOGRAM,
    "From the request's body to its first streamed byte. Streams only.",
    _TALLY,
    _PAIR,
    "s",
)
TPOT = Metric(
    "pdcluster_gateway_tpot_seconds",
    Kind.HISTOGRAM,
    "Time per output token after the first. One observation per stream: its mean.",
    _TALLY,
    _PAIR,
    "s",
)
E2E = Metric(
    "pdcluster_gateway_e2e_seconds",
    Kind.HISTOGRAM,
    "From the request's head to its last byte.",
    _REQUEST,
    ("endpoint",),
    "s",
)
QUEUE = Metric(
    "pdcluster_gateway_queue_seconds",
    Kind.HISTOGRAM,
    "Time that admitted requests waited for their place.",
    "gateway.admission",
    (),
    "s",
)
REQUESTS_RUNNING = Metric(
    "pdcluster_gateway_requests_running",
    Kind.GAUGE,
    "Requests that have a place.",
    "gateway.admission, read at the scrape",
)
REQUESTS_QUEUED = Metric(
    "pdcluster_gateway_requests_queued",
    Kind.GAUGE,
    "Requests that wait for a place.",
    "gateway.admission, read at the scrape",
)
REFUSED = Metric(
    "pdcluster_gateway_refused_total",
    Kind.COUNTER,
    "Requests refused with 429: the queue was full (full), or their turn did not come in time "
    "(waited).",
    "gateway.admission, read at the scrape",
    ("why",),
)
ROUTES = Metric(
    "pdcluster_gateway_routes_total",
    Kind.COUNTER,
    "Requests answered, by how they were routed and why: disaggregated, decode alone, recompute.",
    _REQUEST,
    ("route",),
)
RETRIES = Metric(
    "pdcluster_gateway_retries_total",
    Kind.COUNTER,
    "Attempts given up before the first byte, by reason: prefill-failed, pull-failed, "
    "decode-failed, hung, drained, recomputed.",
    _REQUEST,
    ("why",),
)
RECOVERIES = Metric(
    "pdcluster_gateway_recoveries_total",
    Kind.COUNTER,
    "Answers that went on with another engine, by way (continue, repeat) and what ended the first "
    "one's (failed, hung, drained, recomputed).",
    _REQUEST,
    ("way", "cause"),
)
ENGINE_FAILURES = Metric(
    "pdcluster_gateway_engine_failures_total",
    Kind.COUNTER,
    "Calls that an engine failed, by its pool and the stage (prefill, decode).",
    _REQUEST,
    ("pool", "stage"),
)
POISONOUS = Metric(
    "pdcluster_gateway_poisonous_total",
    Kind.COUNTER,
    "Requests refused because two engines went away under them.",
    _REQUEST,
)
PROMPT_TOKENS = Metric(
    "pdcluster_gateway_prompt_tokens_total",
    Kind.COUNTER,
    "Prompt tokens of answered requests.",
    _TALLY,
    _PAIR,
    "tokens",
)
HELD_TOKENS = Metric(
    "pdcluster_gateway_held_tokens_total",
    Kind.COUNTER,
    "Of those, tokens that the chosen decode worker was known to hold already: divided by the "
    "prompt tokens, the share of prefix hits. The others had to come over the link, or to be "
    "computed by decode.",
    _TALLY,
    _PAIR,
    "tokens",
)
ANSWER_TOKENS = Metric(
    "pdcluster_gateway_answer_tokens_total",
    Kind.COUNTER,
    "Tokens of answers, each counted once.",
    _TALLY,
    _PAIR,
    "tokens",
)
PAIR_REQUESTS = Metric(
    "pdcluster_gateway_pair_requests_total",
    Kind.COUNTER,
    "Requests routed to a pair of pools, whatever became of them.",
    _TALLY,
    _PAIR,
)
RENDER_ASKS = Metric(
    "pdcluster_gateway_render_asks_total",
    Kind.COUNTER,
    "Prompts that an engine had to render, by reason.",
    _REQUEST,
    ("why",),
)
SNAPSHOT_VERSION = Metric(
    "pdcluster_gateway_snapshot_version",
    Kind.GAUGE,
    "Version of the cluster snapshot that this replica routes by.",
    "gateway.fleet, read at the scrape",
)
GATEWAY = (
    *(REQUESTS, TTFT, TPOT, E2E, QUEUE, REQUESTS_RUNNING, REQUESTS_QUEUED, REFUSED, ROUTES),
    *(RETRIES, RECOVERIES, ENGINE_FAILURES, POISONOUS, PROMPT_TOKENS, HELD_TOKENS, ANSWER_TOKENS),
    *(PAIR_REQUESTS, RENDER_ASKS, SNAPSHOT_VERSION),
)

# KV-transfer coordinator

KV_TRANSFERS = Metric(
    "pdcluster_kv_transfers_total",
    Kind.COUNTER,
    "KV transfers that ended, by pools, connector and outcome: pulled, released (given up), "
    "expired, lost (with its prefill worker).",
    "kv.coordinator",
    (*_LINK, "outcome"),
)
KV_FAILURES = Metric(
    "pdcluster_kv_transfer_failures_total",
    Kind.COUNTER,
    "Of those, transfers whose blocks did not get to decode, by cause: prefill-failed, pull-failed "
    "(decode's engine answered an error), decode-failed, hung, drained, refused (by an engine), "
    "given-up (the client left, or its time was up), expired, lost.",
    "kv.coordinator",
    (*_LINK, "cause"),
)
KV_LEASES_OPEN = Metric(
    "pdcluster_kv_leases_open",
    Kind.GAUGE,
    "Prompts whose blocks this gateway has prefill keep for decode.",
    "kv.coordinator",
    ("prefill_pool",),
)
KV_LEASE = Metric(
    "pdcluster_kv_lease_seconds",
    Kind.HISTOGRAM,
    "From prefill's answer to the end of the transfer, however it ended.",
    "kv.coordinator",
    _LINK,
    "s",
)
KV_RELEASE_FAILURES = Metric(
    "pdcluster_kv_release_failures_total",
    Kind.COUNTER,
    "Early releases that did not reach the prefill worker; its lease runs out instead.",
    "kv.coordinator",
    ("prefill_pool",),
)
KV_MISMATCHES = Metric(
    "pdcluster_kv_mismatches_total",
    Kind.COUNTER,
    "Transfers refused because the two engines' KV blocks are unlike.",
    "kv.coordinator",
    _PAIR,
)
KV = (*(KV_TRANSFERS, KV_FAILURES, KV_LEASES_OPEN, KV_LEASE, KV_RELEASE_FAILURES, KV_MISMATCHES),)

# Controller

REPLICAS_DESIRED = Metric(
    "pdcluster_pool_replicas_desired",
    Kind.GAUGE,
    "Replicas that a pool is to have.",
    "the desired state, read at the scrape",
    ("pool", "role", "island", "hardware"),
)
REPLICAS_READY = Metric(
    "pdcluster_pool_replicas_ready",
    Kind.GAUGE,
    "Replicas of a pool that take work.",
    "the workers' latest reports, read at the scrape",
    ("pool", "role", "island", "hardware"),
)
WORKER_UP = Metric(
    "pdcluster_worker_up",
    Kind.GAUGE,
    "1 for each worker there is, with the state it is in.",
    _NOW,
    ("worker", "pool", "role", "node", "hardware", "island", "model", "engine", "state"),
)
TARGET_TTFT = Metric(
    "pdcluster_target_ttft_seconds",
    Kind.GAUGE,
    "`scaling.targets[].ttft_s`, and the percentile of requests that is to keep it.",
    "the desired state, read at the scrape",
    (*_PAIR, "percentile"),
    "s",
)
TARGET_TPOT = Metric(
    "pdcluster_target_tpot_seconds",
    Kind.GAUGE,
    "`scaling.targets[].tpot_s`, and the percentile of requests that is to keep it.",
    "the desired state, read at the scrape",
    (*_PAIR, "percentile"),
    "s",
)
WORKER_STARTS = Metric(
    "pdcluster_worker_starts_total", Kind.COUNTER, "Workers started.", _EVENT, ("pool",)
)
WORKER_RESTARTS = Metric(
    "pdcluster_worker_restarts_total",
    Kind.COUNTER,
    "Of those, workers started in the place of one that had failed.",
    _EVENT,
    ("pool",),
)
WORKER_DRAINS = Metric(
    "pdcluster_worker_drains_total",
    Kind.COUNTER,
    "Workers that were told to finish what they have and end.",
    _EVENT,
    ("pool",),
)
ROLE_CHANGES = Metric(
    "pdcluster_role_changes_total",
    Kind.COUNTER,
    "Changes of a worker's role without a new start, by its pool and the role it got.",
    _EVENT,
    ("pool", "to"),
)
CHANGES = Metric(
    "pdcluster_changes_total",
    Kind.COUNTER,
    "Changes asked of the cluster that have ended, by kind (scale, role, drain-worker, drain-node, "
    "return-node, apply) and how (done, failed, replaced).",
    _EVENT,
    ("kind", "state"),
)
TIME_TO_READY = Metric(
    "pdcluster_time_to_ready_seconds",
    Kind.HISTOGRAM,
    "From the decision to start a worker until it takes work.",
    _EVENT,
    ("pool",),
    "s",
)
WORKER_KV_TRANSFERS = Metric(
    "pdcluster_worker_kv_transfers_total",
    Kind.COUNTER,
    "Prompts whose KV blocks a decode worker has: pulled, or held already.",
    _REPORT,
    _WORKER,
)
WORKER_KV_FAILURES = Metric(
    "pdcluster_worker_kv_transfer_failures_total",
    Kind.COUNTER,
    "Pulls that failed.",
    _REPORT,
    _WORKER,
)
WORKER_KV_BYTES = Metric(
    "pdcluster_worker_kv_bytes_pulled_total",
    Kind.COUNTER,
    "Bytes of KV blocks that a decode worker pulled.",
    _REPORT,
    _WORKER,
    "bytes",
)
WORKER_KV_TOKENS_PULLED = Metric(
    "pdcluster_worker_kv_tokens_pulled_total",
    Kind.COUNTER,
    "Prompt tokens whose KV a decode worker pulled.",
    _REPORT,
    _WORKER,
    "tokens",
)
WORKER_KV_TOKENS_HELD = Metric(
    "pdcluster_worker_kv_tokens_held_total",
    Kind.COUNTER,
    "Prompt tokens whose KV a decode worker had already, and so did not pull.",
    _REPORT,
    _WORKER,
    "tokens",
)
WORKER_KV_BLOCKS_PULLED = Metric(
    "pdcluster_worker_kv_blocks_pulled_total",
    Kind.COUNTER,
    "Whole KV blocks pulled: tokens pulled over the engine's block size.",
    _REPORT,
    _WORKER,
    "blocks",
)
WORKER_KV_BLOCKS_SKIPPED = Metric(
    "pdcluster_worker_kv_blocks_skipped_total",
    Kind.COUNTER,
    "Whole KV blocks not pulled because decode held them: tokens held over the engine's block "
    "size.",
    _REPORT,
    _WORKER,
    "blocks",
)
WORKER_LEASES_OPEN = Metric(
    "pdcluster_worker_leases_open",
    Kind.GAUGE,
    "Prompts whose blocks a prefill worker keeps, by its own records.",
    _NOW,
    _WORKER,
)
WORKER_RSS = Metric(
    "pdcluster_worker_rss_bytes",
    Kind.GAUGE,
    "Resident memory of the engine's processes, over all nodes of the replica.",
    _NOW,
    _WORKER,
    "bytes",
)
WORKER_LOG_LINES_LOST = Metric(
    "pdcluster_worker_log_lines_lost",
    Kind.GAUGE,
    "Lines of its engine's output, since its start, that the log's disk did not take.",
    _NOW,
    _WORKER,
    "lines",
)
CONTROLLER_COUNTED = (
    *(WORKER_STARTS, WORKER_RESTARTS, WORKER_DRAINS),
    *(ROLE_CHANGES, CHANGES, TIME_TO_READY),
)
CONTROLLER_READ = (
    *(REPLICAS_DESIRED, REPLICAS_READY, TARGET_TTFT, TARGET_TPOT, WORKER_UP),
    *(WORKER_KV_TRANSFERS, WORKER_KV_FAILURES),
    *(WORKER_KV_BYTES, WORKER_KV_TOKENS_PULLED, WORKER_KV_TOKENS_HELD, WORKER_KV_BLOCKS_PULLED),
    *(WORKER_KV_BLOCKS_SKIPPED, WORKER_LEASES_OPEN, WORKER_RSS, WORKER_LOG_LINES_LOST),
)
CONTROLLER = (*CONTROLLER_COUNTED, *CONTROLLER_READ)

PARTS = (
    Part("Gateway", "every gateway replica; Prometheus adds `gateway`, the replica's id", GATEWAY),
    Part("KV-transfer coordinator", "every gateway replica", KV),
    Part("Controller", "`/metrics` on the control port, behind its token", CONTROLLER),
)
