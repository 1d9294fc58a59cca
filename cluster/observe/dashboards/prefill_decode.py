"""Prefill and decode side by side, per pool, island and hardware: who is the bottleneck?"""

from __future__ import annotations

from cluster.observe.dashboards.panel import Board, Kind, Panel, Query, Section, Steps, Unit
from cluster.observe.dashboards.promql import (
    DECODE_POOL,
    everywhere,
    pools,
    quantile,
    rate,
    ratio,
    total,
)

_ONE = ("pool", "island", "hardware")
_LEGEND = "{{pool}} ({{island}}, {{hardware}})"
_PREFILL, _DECODE = 'role=~"prefill|mixed"', 'role=~"decode|mixed"'


def _pressure() -> str:
    waiting = total(pools("pdcluster:engine_waiting"), *_ONE, "role")
    running = total(pools("pdcluster:engine_running"), *_ONE, "role")
    full = f"avg by ({', '.join((*_ONE, 'role'))}) ({pools('pdcluster:engine_kv_usage_ratio')})"
    return (
        f"max by ({', '.join((*_ONE, 'role'))}) ("
        f'label_replace({waiting} / clamp_min({waiting} + {running}, 1), "of", "queue", "", "")'
        f' or label_replace({full}, "of", "memory", "", ""))'
    )


def _sides(
    asks: str, formula: str, do: str, unit: Unit, name: str, fold: str = "sum"
) -> tuple[Panel, Panel]:
    """The same question of prefill, left, and of decode, right."""

    def side(role: str, matcher: str) -> Panel:
        return Panel(
            asks=asks.format(role=role),
            formula=f"{formula} Engines that {role}, by pool.",
            do=do,
            unit=unit,
            queries=(Query(f"{fold} by ({', '.join(_ONE)}) ({pools(name, matcher)})", _LEGEND),),
            at_most=1.0 if unit is Unit.SHARE else None,
            steps=Steps(warn=0.8, bad=0.95) if unit is Unit.SHARE else None,
            needs=None,
        )

    return side("prefill", _PREFILL), side("decode", _DECODE)


def _latency(asks: str, name: str, matcher: str, formula: str, do: str) -> Panel:
    buckets = pools(f"pdcluster:{name}_bucket:rate5m", matcher)
    return Panel(
        asks=asks,
        formula=formula,
        do=do,
        unit=Unit.SECONDS,
        queries=(Query(quantile(0.95, buckets, *_ONE), _LEGEND),),
    )


def _made(asks: str, name: str, matcher: str, what: str) -> Panel:
    """Tokens per second of an average replica: what unlike hardware can be compared by."""
    return Panel(
        asks=asks,
        formula=f"{what} per second of an average replica = avg by (pool, island, hardware) of "
        "what each engine made over the last minute.",
        do="The same load on two kinds of hardware shows their relative speed: state it in the "
        "topology as relative_speed.",
        unit=Unit.PER_S,
        queries=(Query(f"avg by ({', '.join(_ONE)}) ({pools(name, matcher)})", _LEGEND),),
        needs=None,
    )


_BOTTLENECK = Panel(
    asks="Which pool is the bottleneck?",
    formula="Pressure = max(requests waiting / (waiting + running), KV memory in use), of each "
    "pool's engines, now.",
    do="Scale the pool that is red. All green and still slow: the link (KV transfer) or the "
    "gateways' queue.",
    unit=Unit.SHARE,
    queries=(Query(_pressure(), "{{role}} {{pool}} ({{island}}, {{hardware}})"),),
    kind=Kind.BARS,
    steps=Steps(warn=0.6, bad=0.85),
    at_most=1.0,
    needs=None,
)

_ADMISSION = Panel(
    asks="How long do requests wait for admission?",
    formula="Time in the gateways' queue = histogram_quantile(q, sum by (le) "
    "(rate(pdcluster_gateway_queue_seconds_bucket))), of all gateways.",
    do="Above nought the cluster as a whole is full: neither side alone is to blame.",
    unit=Unit.SECONDS,
    queries=tuple(
        Query(
            quantile(q, rate(everywhere("pdcluster_gateway_queue_seconds_bucket"))), f"p{q * 100:g}"
        )
        for q in (0.5, 0.95)
    ),
)

_MIX = Panel(
    asks="Does the traffic want more prefill or more decode?",
    formula="Prompt tokens that had to be computed / answer tokens, per second = "
    "(prompt_tokens - held_tokens) / answer_tokens of the gateways.",
    do="A ratio that has moved wants another share of prefill and decode replicas: "
    "`pdcluster role`, or targets for the autoscaler.",
    unit=Unit.COUNT,
    queries=(
        Query(
            ratio(
                "("
                + total(rate(everywhere("pdcluster_gateway_prompt_tokens_total", DECODE_POOL)))
                + " - "
                + total(rate(everywhere("pdcluster_gateway_held_tokens_total", DECODE_POOL)))
                + ")",
                total(rate(everywhere("pdcluster_gateway_answer_tokens_total", DECODE_POOL))),
            ),
            "computed prompt tokens per answer token",
        ),
    ),
)

BOARD = Board(
    uid="pdcluster-prefill-decode",
    title="pdcluster / Prefill and decode",
    description="Per pool, island and hardware side by side: queues, batches, KV memory, speed.",
    sections=(
        Section("Bottleneck", ((_BOTTLENECK, _ADMISSION, _MIX),)),
        Section(
            "Queue and batch (prefill left, decode right)",
            (
                _sides(
                    "How many requests wait for {role}?",
                    "Requests waiting in the engines = sum of pdcluster:engine_waiting.",
                    "Waiting makes TTFT, at prefill as at decode, where it comes after the pull.",
                    Unit.COUNT,
                    "pdcluster:engine_waiting",
                ),
                _sides(
                    "How large are the batches of {role}?",
                    "Requests running in an average engine = avg of pdcluster:engine_running.",
                    "At the engine's max-num-seqs the batch is full and others wait.",
                    Unit.COUNT,
                    "pdcluster:engine_running",
                    "avg",
                ),
                _sides(
                    "How full is the KV memory of {role}?",
                    "Blocks in use / all blocks = max of pdcluster:engine_kv_usage_ratio.",
                    "Near 100 % engines preempt: scale, or shorten the longest prompts.",
                    Unit.SHARE,
                    "pdcluster:engine_kv_usage_ratio",
                    "max",
                ),
            ),
        ),
        Section(
            "Speed (prefill left, decode right)",
            (
                (
                    _latency(
                        "How long does a prefill engine take to the first token?",
                        "engine_ttft_seconds",
                        _PREFILL,
                        "p95 of the engines' own TTFT, queue included = histogram_quantile(0.95, "
                        "pdcluster:engine_ttft_seconds_bucket:rate5m), by pool.",
                        "Far below the gateways' TTFT: the rest is transfer and decode's queue.",
                    ),
                    _latency(
                        "How long does a decode engine take per step?",
                        "engine_itl_seconds",
                        _DECODE,
                        "p95 of the engines' own time between tokens = histogram_quantile(0.95, "
                        "pdcluster:engine_itl_seconds_bucket:rate5m), by pool.",
                        "Grows with the batch; a prompt computed on decode shows here as well.",
                    ),
                ),
                (
                    _made(
                        "How fast does a replica read prompts?",
                        "pdcluster:engine_prompt_tokens:rate1m",
                        _PREFILL,
                        "Prompt tokens",
                    ),
                    _made(
                        "How fast does a replica write answers?",
                        "pdcluster:engine_generation_tokens:rate1m",
                        _DECODE,
                        "Generated tokens",
                    ),
                ),
            ),
        ),
    ),
)
