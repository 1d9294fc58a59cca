"""Alert rules, each with its runbook: what it means, what to look at, what to do.

`for` times are longer than what the cluster repairs by itself: a worker that dies and comes back,
a replica that is replaced, a burst that the queue takes.
"""

from __future__ import annotations

from cluster.observe import catalogue
from cluster.observe.rules import Alert
from cluster.observe.rules_recording import PAIR, QUANTILES
from cluster.observe.scraping import CONTROLLER_JOB, ENGINE_JOB, GATEWAY_JOB

_DESIRED = catalogue.REPLICAS_DESIRED.name
_READY = catalogue.REPLICAS_READY.name
_PULLED = catalogue.WORKER_KV_TRANSFERS.name
_FAILED = catalogue.WORKER_KV_FAILURES.name
_REQUESTS = catalogue.REQUESTS.name


def _over_target(short: str, target: str) -> str:
    return " or ".join(
        f"pdcluster:{short}:p{percent} > on ({', '.join(PAIR)}) group_left (percentile) "
        f'{target}{{percentile="{percent}"}}'
        for percent in QUANTILES
    )


ALERTS = (
    Alert(
        "PdclusterControllerDown",
        f'up{{job="{CONTROLLER_JOB}"}} == 0 or absent(up{{job="{CONTROLLER_JOB}"}})',
        60,
        "critical",
        "The controller does not answer",
        "Requests are still served from the last snapshot; dead workers are not replaced, and "
        "nothing can be scaled.",
        "`pdcluster status`; on the head: is Ray up, is the control port taken by another process, "
        "did the control token change?",
        "Ray restarts the controller by itself. If it does not come back, `pdcluster up FILE` "
        "starts what is missing.",
    ),
    Alert(
        "PdclusterNothingDecodes",
        f'sum by (cluster) ({_READY}{{role=~"decode|mixed"}}) == 0',
        30,
        "critical",
        "No worker is ready to decode",
        "Every request is refused with 503.",
        "`pdcluster status` says of each worker why it is not ready; `pdcluster logs POOL/INDEX` "
        "shows its engine's last words.",
        "Repair what the log names (memory, model files, a driver). If it began with a change: "
        "`pdcluster changes`, then apply the topology of before.",
    ),
    Alert(
        "PdclusterReplicasMissing",
        f"sum by (cluster, pool, role) ({_DESIRED}) > sum by (cluster, pool, role) ({_READY})",
        900,
        "warning",
        "Pool {{ $labels.pool }} lacks ready replicas for {{ $labels.role }}",
        "Replicas that are wanted have not been ready for a quarter of an hour: longer than most "
        "models load.",
        "`pdcluster status`: not placed (no node has room), loading, or failing again and again?",
        "Not placed: add a node, or scale the pool down. Failing: `pdcluster logs POOL/INDEX`.",
    ),
    Alert(
        "PdclusterWorkerHung",
        f'{catalogue.WORKER_UP.name}{{state="hung"}} == 1',
        60,
        "critical",
        "Worker {{ $labels.worker }} has work and makes no progress",
        "Its engine answers or not, but has made no token for `health.hung_after_s`. Its requests "
        "go on elsewhere, and it is replaced; if this lasts, replacing it does not succeed.",
        "`pdcluster logs {{ $labels.worker }}`; the node's accelerators (nvidia-smi, npu-smi).",
        "If the node is ill: `pdcluster drain NODE`.",
    ),
    Alert(
        "PdclusterWorkerKeepsFailing",
        f"increase({catalogue.WORKER_RESTARTS.name}[15m]) > 2",
        0,
        "warning",
        "Workers of pool {{ $labels.pool }} fail again and again",
        "More than two were restarted within 15 minutes.",
        "`pdcluster status` (failed workers and their last words), `pdcluster events`.",
        "Out of memory: lower `kv_cache_gib` or `max_num_seqs`. After a change: apply the topology "
        "of before. On one node only: `pdcluster drain NODE`.",
    ),
    Alert(
        "PdclusterTargetDown",
        f'up{{job=~"{ENGINE_JOB}|{GATEWAY_JOB}"}} == 0',
        120,
        "warning",
        "{{ $labels.instance }} ({{ $labels.job }}) does not answer to Prometheus",
        "Its series end; what it does is not seen. It may serve all the same.",
        "Can this host reach {{ $labels.instance }}? `pdcluster status` shows whether the worker "
        "is there.",
        "Open the port for this host (docs/hosts.md has the list), or restart the worker: "
        "`pdcluster drain POOL/INDEX`.",
    ),
    Alert(
        "PdclusterErrors",
        f'sum by (cluster) (rate({_REQUESTS}{{status=~"5.."}}[5m])) '
        f"/ (sum by (cluster) (rate({_REQUESTS}[5m])) > 0) > 0.01",
        120,
        "critical",
        "More than 1 % of the answers are server errors",
        "Clients see 5xx although requests are tried again and recovered.",
        "`pdcluster events`; pdcluster_gateway_engine_failures_total by pool and stage; the "
        "gateways' logs (docs/operations.md) name each failed request with its id.",
        "One pool stands out: look at its workers' logs, and drain the ill one. 503 alone: there "
        "is no room; scale up.",
    ),
    Alert(
        "PdclusterRequestsRefused",
        f"sum by (cluster, why) (rate({catalogue.REFUSED.name}[5m])) > 0",
        60,
        "warning",
        "Requests are refused with 429 ({{ $labels.why }})",
        "More requests come than `gateway.limits` lets in: the queue is full, or their turn does "
        "not come within `queue_timeout_s`.",
        "Which engines wait: pdcluster:engine_waiting by pool and role.",
        "Scale the pool that is full. If engines are idle, raise "
        "`gateway.limits.max_concurrent_requests`.",
    ),
    Alert(
        "PdclusterTtftOverTarget",
        _over_target("ttft_seconds", catalogue.TARGET_TTFT.name),
        300,
        "warning",
        "First tokens of {{ $labels.prefill_pool }} and {{ $labels.decode_pool }} are late",
        "The stated percentile of the time to first token is above `scaling.targets[].ttft_s`.",
        "pdcluster:engine_waiting and KV usage of the prefill pool; the share of held tokens; "
        "`pdcluster scaling` says what the autoscaler makes of it.",
        "`pdcluster scale PREFILL_POOL N`, or let `scaling.mode: slo` do it; long prompts: see "
        "whether prefix hits have fallen.",
    ),
    Alert(
        "PdclusterTpotOverTarget",
        _over_target("tpot_seconds", catalogue.TARGET_TPOT.name),
        300,
        "warning",
        "Tokens of {{ $labels.prefill_pool }} and {{ $labels.decode_pool }} come slowly",
        "The stated percentile of the time per output token is above `scaling.targets[].tpot_s`.",
        "Requests in the batch and KV usage of the decode pool; acceptance length, where there is "
        "speculation.",
        "`pdcluster scale DECODE_POOL N`, or lower `max_num_seqs` of the pool.",
    ),
    Alert(
        "PdclusterKvCacheFull",
        'avg by (cluster, pool) (pdcluster:engine_kv_usage_ratio{role!="prefill"}) > 0.95',
        300,
        "warning",
        "The KV cache of pool {{ $labels.pool }} is full",
        "Engines preempt requests, or have them wait, because no blocks are free.",
        "pdcluster:engine_waiting of the pool; how long prompts and answers are.",
        "Scale the pool, raise `kv_cache_gib`, or lower `max_num_seqs`.",
    ),
    Alert(
        "PdclusterPrefillBehind",
        'sum by (cluster, pool) (pdcluster:engine_waiting{role="prefill"}) > 4 * '
        f'sum by (cluster, pool) ({_READY}{{role="prefill"}})',
        300,
        "warning",
        "Prompts wait before prefill pool {{ $labels.pool }}",
        "More than four prompts per worker have waited for five minutes: time to first token grows "
        "with every further request.",
        "Prompt lengths and held tokens; does the decode pool wait, too?",
        "`pdcluster scale {{ $labels.pool }} N`, or have a decode worker help: `pdcluster role`.",
    ),
    Alert(
        "PdclusterKvTransfersFail",
        f"sum by (cluster, pool) (rate({_FAILED}[5m])) / "
        f"(sum by (cluster, pool) (rate({_PULLED}[5m])) "
        f"+ sum by (cluster, pool) (rate({_FAILED}[5m])) > 0) > 0.05",
        60,
        "warning",
        "More than 5 % of the KV pulls of pool {{ $labels.pool }} fail",
        "Decode workers do not get the blocks from prefill; their prompts are prefilled again.",
        "`pdcluster transfers REQUEST_ID`, the decode workers' logs, the network between the hosts "
        "(`pdcluster doctor`).",
        "One worker alone: drain it. All of them: the fabric, its MTU or a firewall.",
    ),
    Alert(
        "PdclusterKvLeasesExpire",
        f"sum by (cluster, prefill_pool) "
        f'(increase({catalogue.KV_TRANSFERS.name}{{outcome="expired"}}[10m])) > 0',
        0,
        "warning",
        "Blocks of pool {{ $labels.prefill_pool }} expire before decode takes them",
        "Prefill let go of KV blocks while their requests still waited for decode: those prompts "
        "are prefilled twice.",
        "How long decode's queue is, against the island's `lease_s`.",
        "Scale decode; or raise `lease_s`, if prefill has room for blocks that wait.",
    ),
    Alert(
        "PdclusterKvMismatch",
        f"sum by (cluster, prefill_pool, decode_pool) "
        f"(increase({catalogue.KV_MISMATCHES.name}[10m])) > 0",
        0,
        "warning",
        "KV blocks of {{ $labels.prefill_pool }} and {{ $labels.decode_pool }} are unlike",
        "The pools cannot exchange blocks: model, revision, KV dtype, block size, engine version "
        "or hash seed differ. Decode prefills by itself.",
        "`pdcluster status` names what differs, per link.",
        "Make the two pools alike and `pdcluster apply FILE`; while a rollout is under way this "
        "goes away by itself.",
    ),
    Alert(
        "PdclusterPoisonousRequest",
        f"sum by (cluster) (increase({catalogue.POISONOUS.name}[10m])) > 0",
        0,
        "critical",
        "A request was refused because engines went away under it",
        "Two engines ended or hung while they worked on one request; it was given to no third.",
        "`pdcluster events` has its id; the engines' last words are in `pdcluster status`.",
        "Find what is special about it (length, grammar, images) and report it to the engine's "
        "makers with the log.",
    ),
    Alert(
        "PdclusterAcceptanceLow",
        "avg by (cluster, pool) (pdcluster:engine_acceptance_length:rate5m) < 1.1",
        1800,
        "info",
        "Speculation of pool {{ $labels.pool }} gains almost nothing",
        "Fewer than one draft in ten is accepted: drafting costs time and gives hardly a token.",
        "Acceptance by position; has the traffic changed, or the model's revision?",
        "Draft fewer tokens (`speculative.num_speculative_tokens`), use another method, or leave "
        "it out.",
    ),
    Alert(
        "PdclusterGatewayBehind",
        f"max by (cluster) ({catalogue.SNAPSHOT_VERSION.name}) - on (cluster) group_right () "
        f"{catalogue.SNAPSHOT_VERSION.name} > 60",
        60,
        "warning",
        "Gateway {{ $labels.gateway }} routes by an old picture of the cluster",
        "The replica is not told of changes any more: it may send requests to workers that are "
        "gone.",
        "Its log: does it reach the controller? The node's network.",
        "End that replica's actor; Ray starts it again.",
    ),
    Alert(
        "PdclusterChangeFailed",
        f'sum by (cluster, kind) (increase({catalogue.CHANGES.name}{{state="failed"}}[15m])) > 0',
        0,
        "warning",
        "A change of the cluster failed ({{ $labels.kind }})",
        "What was asked was not reached; a rollout has gone back to what was before.",
        "`pdcluster changes` says why, step by step.",
        "Repair what it names and ask again.",
    ),
    Alert(
        "PdclusterLogLinesLost",
        f"{catalogue.WORKER_LOG_LINES_LOST.name} > 0",
        60,
        "info",
        "Output of {{ $labels.worker }} was lost",
        "The disk of its log did not take all lines of its engine.",
        "Free space of the state folder on the worker's node.",
        "Make room; the next generation of the worker counts from 0.",
    ),
)
