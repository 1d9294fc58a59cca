"""Is the cluster healthy, is it within its targets, how loaded is it, what goes wrong?"""

from __future__ import annotations

from cluster.observe.dashboards.panel import Board, Kind, Panel, Query, Section, Steps, Unit
from cluster.observe.dashboards.promql import (
    DECODE_POOL,
    POOL,
    everywhere,
    or_none,
    or_zero,
    pairs,
    pools,
    quantile,
    rate,
    ratio,
    total,
)
from cluster.observe.dashboards.variables import TPOT_TARGET, TTFT_TARGET, Target

_QUANTILES = (0.5, 0.95, 0.99)


def _latency(of: str, buckets: str, target: Target, formula: str, do: str) -> Panel:
    return Panel(
        asks=f"Is {of} within its target?",
        formula=formula,
        do=do,
        unit=Unit.SECONDS,
        queries=(
            *(Query(quantile(q, pairs(buckets)), f"p{q * 100:g}") for q in _QUANTILES),
            Query(target.expr, "target", is_target=True),
        ),
    )


def _used(of: str, buckets: str, target: Target) -> Panel:
    return Panel(
        asks=f"How much of the {of} target is used?",
        formula=f"p95 of {of} = histogram_quantile(0.95, buckets of all gateways), divided by the "
        f"target: the topology's, else the one typed above. 100 % is the target.",
        do=f"Above 100 % see the bottleneck on the board Prefill and decode; scale the pool that "
        f"makes the {of}.",
        unit=Unit.SHARE,
        queries=(Query(f"{quantile(0.95, pairs(buckets))} / {target.expr}"),),
        kind=Kind.STAT,
        steps=Steps(warn=0.8, bad=1.0),
    )


_READY = Panel(
    asks="Is every wanted replica ready?",
    formula="Ready replicas / desired replicas = sum(pdcluster_pool_replicas_ready) / "
    "sum(pdcluster_pool_replicas_desired) of the chosen pools.",
    do="Below 100 % see which pool on the board Scaling and events, then `pdcluster status`.",
    unit=Unit.SHARE,
    queries=(
        Query(
            ratio(
                total(pools("pdcluster_pool_replicas_ready")),
                total(pools("pdcluster_pool_replicas_desired")),
            )
        ),
    ),
    kind=Kind.STAT,
    steps=Steps(warn=1.0, bad=0.75),
    at_most=1.0,
    needs=None,
)

_ANSWERED = Panel(
    asks="Are requests answered?",
    formula="1 - answers with a 5xx status / all answers = of pdcluster_gateway_requests_total, "
    "per second. Refusals for want of room (429) and clients that left (499) are no failures.",
    do="Below 99.9 % look at What goes wrong, and `pdcluster events`.",
    unit=Unit.SHARE,
    queries=(
        Query(
            "1 - "
            + ratio(
                or_zero(
                    total(rate(everywhere("pdcluster_gateway_requests_total", 'status=~"5.."')))
                ),
                total(rate(everywhere("pdcluster_gateway_requests_total"))),
            )
        ),
    ),
    kind=Kind.STAT,
    steps=Steps(warn=0.999, bad=0.99),
    at_most=1.0,
)

_ALERTS = Panel(
    asks="How many alerts fire?",
    formula='Number of alerts = count(ALERTS{alertstate="firing"}) in Prometheus; 0 if none does.',
    do="Each alert has a runbook text: Alerting in Grafana, or /alerts of Prometheus.",
    unit=Unit.COUNT,
    queries=(Query(or_zero('count(ALERTS{alertstate="firing"})')),),
    kind=Kind.STAT,
    steps=Steps(warn=1, bad=1),
    needs=None,
)

_HELD = Panel(
    asks="What share of prompts does decode hold already?",
    formula="Prompt tokens that the chosen decode worker was known to hold / all prompt tokens, "
    "per second = pdcluster_gateway_held_tokens_total / pdcluster_gateway_prompt_tokens_total.",
    do="It depends on the traffic: chats of several turns should be far above 0.",
    unit=Unit.SHARE,
    queries=(
        Query(
            ratio(
                total(rate(everywhere("pdcluster_gateway_held_tokens_total", DECODE_POOL))),
                total(rate(everywhere("pdcluster_gateway_prompt_tokens_total", DECODE_POOL))),
            )
        ),
    ),
    kind=Kind.STAT,
    at_most=1.0,
)

_REQUESTS = Panel(
    asks="How many requests are answered, and how?",
    formula="Answers per second by status = sum by (status) "
    "(rate(pdcluster_gateway_requests_total)), of all gateways.",
    do="429: more is offered than is let in. 5xx: see What goes wrong. 499: the client left.",
    unit=Unit.REQUESTS_PER_S,
    queries=(
        Query(total(rate(everywhere("pdcluster_gateway_requests_total")), "status"), "{{status}}"),
    ),
    is_stacked=True,
)

_TOKENS = Panel(
    asks="How many tokens go in and come out?",
    formula="Tokens per second = rate of pdcluster_gateway_prompt_tokens_total (in) and of "
    "pdcluster_gateway_answer_tokens_total (out), of the chosen decode pools.",
    do="In without out: decode is stuck. Compare with what the hardware gave before.",
    unit=Unit.PER_S,
    queries=(
        Query(total(rate(everywhere("pdcluster_gateway_prompt_tokens_total", DECODE_POOL))), "in"),
        Query(total(rate(everywhere("pdcluster_gateway_answer_tokens_total", DECODE_POOL))), "out"),
    ),
)

_IN_HAND = Panel(
    asks="How many requests are in hand?",
    formula="Requests being served, and requests that wait for a place at a gateway = "
    "sum(pdcluster_gateway_requests_running), sum(pdcluster_gateway_requests_queued).",
    do="A queue that does not empty: scale the bottleneck, or the gateways' limit is too low.",
    unit=Unit.COUNT,
    queries=(
        Query(total(everywhere("pdcluster_gateway_requests_running")), "served"),
        Query(total(everywhere("pdcluster_gateway_requests_queued")), "queued"),
    ),
    needs=None,
)

_REPLICAS = Panel(
    asks="How many replicas does each role have?",
    formula="Ready and desired replicas by role = sum by (role) "
    "(pdcluster_pool_replicas_ready, pdcluster_pool_replicas_desired).",
    do="Ready below desired for longer than a start takes: `pdcluster events`.",
    unit=Unit.COUNT,
    queries=(
        Query(total(pools("pdcluster_pool_replicas_ready"), "role"), "{{role}} ready"),
        Query(total(pools("pdcluster_pool_replicas_desired"), "role"), "{{role}} desired"),
    ),
    needs=None,
)

_WRONG = Panel(
    asks="What goes wrong?",
    formula="Per second: refusals by reason, attempts given up before the first byte by reason, "
    "and calls that engines failed by pool = rate of pdcluster_gateway_refused_total, "
    "_retries_total, _engine_failures_total.",
    do="Retries are hidden from clients, refusals are not. One pool alone: `pdcluster logs` of it.",
    unit=Unit.PER_S,
    queries=(
        Query(
            or_none(total(rate(everywhere("pdcluster_gateway_refused_total")), "why"), "why"),
            "refused: {{why}}",
        ),
        Query(
            or_none(total(rate(everywhere("pdcluster_gateway_retries_total")), "why"), "why"),
            "retried: {{why}}",
        ),
        Query(
            or_none(
                total(rate(everywhere("pdcluster_gateway_engine_failures_total", POOL)), "pool"),
                "pool",
            ),
            "engine failed: {{pool}}",
        ),
    ),
    needs=None,
)

_RECOVERED = Panel(
    asks="How many answers went on elsewhere?",
    formula="Answers per second that another engine continued or repeated, by what ended the first "
    "one's = sum by (way, cause) (rate(pdcluster_gateway_recoveries_total)).",
    do="Drains and recomputes are planned. `failed` and `hung` are workers to look at.",
    unit=Unit.PER_S,
    queries=(
        Query(
            or_none(
                total(rate(everywhere("pdcluster_gateway_recoveries_total")), "way", "cause"),
                "cause",
            ),
            "{{way}} {{cause}}",
        ),
    ),
    needs=None,
)

BOARD = Board(
    uid="pdcluster-overview",
    title="pdcluster / Overview",
    description="Is it healthy, is it within its targets, how loaded is it, what goes wrong?",
    has_targets=True,
    sections=(
        Section(
            "Now",
            (
                (
                    _READY,
                    _ANSWERED,
                    _used("TTFT", "pdcluster_gateway_ttft_seconds_bucket", TTFT_TARGET),
                    _used("TPOT", "pdcluster_gateway_tpot_seconds_bucket", TPOT_TARGET),
                    _ALERTS,
                    _HELD,
                ),
            ),
        ),
        Section(
            "Latency",
            (
                (
                    _latency(
                        "time to first token",
                        "pdcluster_gateway_ttft_seconds_bucket",
                        TTFT_TARGET,
                        "From a request's body to its first streamed byte = histogram_quantile(q, "
                        "sum by (le) (rate(pdcluster_gateway_ttft_seconds_bucket))), of streams.",
                        "p50 high: prefill is short of replicas. p99 alone: long prompts, or a "
                        "pull that waits (KV transfer).",
                    ),
                    _latency(
                        "time per output token",
                        "pdcluster_gateway_tpot_seconds_bucket",
                        TPOT_TARGET,
                        "Mean gap between the pieces of one stream, one observation per stream = "
                        "histogram_quantile(q, sum by (le) "
                        "(rate(pdcluster_gateway_tpot_seconds_bucket))).",
                        "Decode's batches are too large or its KV memory is full: scale decode.",
                    ),
                ),
            ),
        ),
        Section("Load", ((_REQUESTS, _TOKENS, _IN_HAND),)),
        Section("Replicas and faults", ((_REPLICAS, _WRONG, _RECOVERED),)),
    ),
)
