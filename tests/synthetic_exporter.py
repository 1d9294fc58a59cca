"""Every series that a cluster with one prefill and one decode pool exports, growing with time.

From the catalogue, so that a query that asks for a label or a name that nobody exports finds
nothing. `has_speculation`: whether decode's engine counts drafts.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping

from aiohttp import web

from cluster.observe import catalogue
from cluster.observe.metric import Kind, Metric
from cluster.traffic import BOUNDS_S

POOLS = {
    "prefill": {"role": "prefill", "island": "nvidia", "hardware": "h200"},
    "decode": {"role": "decode", "island": "nvidia", "hardware": "atlas-a3"},
}
# Labels of one value each, or of several.
WORDS = {
    "endpoint": ("/v1/chat/completions",),
    "status": ("200", "503"),
    "connector": ("nixl",),
    "outcome": ("pulled", "expired"),
    "cause": ("expired",),
    "percentile": ("95",),
    "state": ("ready",),
    "to": ("decode",),
    "stage": ("decode",),
    "prefill_pool": ("prefill",),
    "decode_pool": ("decode",),
}
PER_S = 10.0
# Counters that grow by a part of that: no more can be held than was asked for.
SHARES = {catalogue.HELD_TOKENS: 0.5}


def text(metric: Metric, age_s: float) -> Iterator[str]:
    """Lines of the exposition format, `age_s` after all counters were nought."""
    yield f"# TYPE {metric.name} {metric.kind}"
    for labels in _labelled(metric):
        if metric.kind is Kind.HISTOGRAM:
            # A tenth of what was counted lies below each bound from the tenth on.
            for number, bound in enumerate([*map(str, BOUNDS_S), "+Inf"]):
                share = min(1.0, max(0.0, (number - 9) / 10))
                yield _line(f"{metric.name}_bucket", {**labels, "le": bound}, share * age_s * PER_S)
            yield _line(f"{metric.name}_sum", labels, age_s)
            yield _line(f"{metric.name}_count", labels, age_s * PER_S)
        else:
            grows = metric.kind is Kind.COUNTER
            share = SHARES.get(metric, 1.0)
            yield _line(metric.name, labels, share * age_s * PER_S if grows else 1.0)


def engine_text(pool: str, age_s: float, *, has_speculation: bool) -> Iterator[str]:
    """What vLLM exports of what the rules read."""
    yield _line("vllm:num_requests_running", {}, 3)
    yield _line("vllm:num_requests_waiting", {}, 1)
    yield _line("vllm:kv_cache_usage_perc", {}, 0.4)
    for name in ("prompt_tokens", "generation_tokens"):
        yield _line(f"vllm:{name}_total", {}, age_s * 100)
    for name in ("time_to_first_token", "inter_token_latency"):
        for bound, share in (("0.1", 0.5), ("1.0", 0.9), ("+Inf", 1.0)):
            yield _line(f"vllm:{name}_seconds_bucket", {"le": bound}, share * age_s * PER_S)
    if has_speculation and pool == "decode":
        yield _line("vllm:spec_decode_num_drafts_total", {}, age_s * 10)
        yield _line("vllm:spec_decode_num_draft_tokens_total", {}, age_s * 30)
        yield _line("vllm:spec_decode_num_accepted_tokens_total", {}, age_s * 15)
        for position, share in ((0, 0.8), (1, 0.5), (2, 0.2)):
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            yield _line(name, {"position": str(position)}, age_s * 10 * share)


def app(*, has_speculation: bool) -> web.Application:
    """/controller, /gateway, /engine/POOL."""
    begun_s = time.monotonic()

    def answer(lines: Iterator[str]) -> web.Response:
        return web.Response(text="\n".join(lines) + "\n")

    def of(metrics: tuple[Metric, ...]) -> Iterator[str]:
        age_s = time.monotonic() - begun_s
        return itertools.chain.from_iterable(text(metric, age_s) for metric in metrics)

    async def controller(request: web.Request) -> web.Response:
        return answer(of(catalogue.CONTROLLER))

    async def gateway(request: web.Request) -> web.Response:
        return answer(of((*catalogue.GATEWAY, *catalogue.KV)))

    async def engine(request: web.Request) -> web.Response:
        age_s = time.monotonic() - begun_s
        pool = request.match_info["pool"]
        return answer(engine_text(pool, age_s, has_speculation=has_speculation))

    served = web.Application()
    served.add_routes(
        [
            web.get("/controller", controller),
            web.get("/gateway", gateway),
            web.get("/engine/{pool}", engine),
        ]
    )
    return served


def scrape_configs(address: str) -> list[dict[str, object]]:
    """Of a Prometheus that scrapes `app` at `address`, with the labels that discovery gives."""

    def job(name: str, path: str, labels: Mapping[str, str]) -> dict[str, object]:
        target = {"targets": [address], "labels": {"cluster": "t", **labels}}
        return {"job_name": name, "metrics_path": path, "static_configs": [target]}

    return [
        job("pdcluster-controller", "/controller", {}),
        job("pdcluster-gateway", "/gateway", {"gateway": "g1"}),
        *(
            job(
                f"engine {pool}",
                f"/engine/{pool}",
                {"pool": pool, **labels, "worker": f"{pool}/0", "node": "n1", "model": "m"},
            )
            for pool, labels in POOLS.items()
        ),
    ]


def _labelled(metric: Metric) -> Iterator[dict[str, str]]:
    pools = POOLS.items() if "pool" in metric.labels else (("", {}),)
    for pool, of_pool in pools:
        known = {**of_pool, "pool": pool, "worker": f"{pool}/0"}
        choices = [
            (known[label],) if label in known else WORDS.get(label, ("x",))
            for label in metric.labels
        ]
        for chosen in itertools.product(*choices):
            yield dict(zip(metric.labels, chosen, strict=True))


def _line(name: str, labels: Mapping[str, str], value: float) -> str:
    inside = ",".join(f'{key}="{word}"' for key, word in labels.items())
    return f"{name}{{{inside}}} {value:g}" if inside else f"{name} {value:g}"
