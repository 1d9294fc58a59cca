"""Recording rules: one name for what each engine calls its own way, and quantiles of latency.

Engines of one cluster may be vLLM (vLLM-Ascend has the same names), SGLang (KTransformers too),
xLLM or simulated; dashboards and alerts ask for `pdcluster:engine_*`. A series that an engine does
not have is missing, never zero. One engine may export several lines under one name (a line per
data-parallel rank): what can be added up is, what is a share is averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.observe import catalogue
from cluster.observe.metric import Metric
from cluster.observe.rules import Recording

KEPT = ("cluster", "pool", "role", "worker", "node", "island", "hardware", "model")
PAIR = ("cluster", "prefill_pool", "decode_pool")
QUANTILES = (50, 95, 99)
_BY = f"by ({', '.join(KEPT)})"
_BY_LE = f"by ({', '.join((*KEPT, 'le'))})"
_BY_POSITION = f"by ({', '.join((*KEPT, 'position'))})"
_RATIO_WINDOW = "5m"
_RATE_WINDOW = "1m"


@dataclass(frozen=True, slots=True)
class EngineNames:
    """One thing under its names: vLLM's, SGLang's, xLLM's. "": that engine has none."""

    vllm: str
    sglang: str = ""
    xllm: str = ""

    def selectors(self, *matchers: str) -> tuple[str, ...]:
        """One per name."""
        # xLLM's names have no prefix: anybody's could be called so.
        named = (self.vllm, ()), (self.sglang, ()), (self.xllm, ('engine="xllm"',))
        return tuple(_selector(name, *own, *matchers) for name, own in named if name)


RUNNING = EngineNames(
    "vllm:num_requests_running", "sglang:num_running_reqs", "num_running_requests"
)
WAITING = EngineNames("vllm:num_requests_waiting", "sglang:num_queue_reqs", "num_waiting_requests")
KV_USAGE = EngineNames(
    "vllm:kv_cache_usage_perc", "sglang:token_usage", "kv_cache_utilization_perc"
)
PROMPT_TOKENS = EngineNames(
    "vllm:prompt_tokens_total",
    "sglang:prompt_tokens_total",
    "num_processing_tokens_total_prompt",
)
GENERATION_TOKENS = EngineNames(
    "vllm:generation_tokens_total",
    "sglang:generation_tokens_total",
    "num_processing_tokens_total_generated",
)
TTFT = EngineNames(
    "vllm:time_to_first_token_seconds_bucket", "sglang:time_to_first_token_seconds_bucket"
)
ITL = EngineNames(
    "vllm:inter_token_latency_seconds_bucket", "sglang:inter_token_latency_seconds_bucket"
)
DRAFTS = "vllm:spec_decode_num_drafts_total"
DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
ACCEPTED_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
# A mean over the last moments; SGLang counts neither drafts nor what was accepted of them.
SGLANG_ACCEPTANCE = "sglang:spec_accept_length"


def _selector(name: str, *matchers: str) -> str:
    return f"{name}{{{', '.join(matchers)}}}" if matchers else name


def _summed(names: EngineNames) -> str:
    return " or ".join(f"sum {_BY} ({name})" for name in names.selectors())


def _averaged(names: EngineNames) -> str:
    return " or ".join(f"avg {_BY} ({name})" for name in names.selectors())


def _rate(names: EngineNames, by: str, window: str) -> str:
    return " or ".join(f"sum {by} (rate({name}[{window}]))" for name in names.selectors())


_DRAFT_RATE = f"(sum {_BY} (rate({DRAFTS}[{_RATIO_WINDOW}])) > 0)"

ENGINES = (
    Recording("pdcluster:engine_running", _summed(RUNNING), "Requests in the batch.", KEPT),
    Recording("pdcluster:engine_waiting", _summed(WAITING), "Requests before it.", KEPT),
    Recording(
        "pdcluster:engine_kv_usage_ratio",
        _averaged(KV_USAGE),
        "Share of the KV blocks in use, 0 to 1.",
        KEPT,
    ),
    Recording(
        "pdcluster:engine_prompt_tokens:rate1m",
        _rate(PROMPT_TOKENS, _BY, _RATE_WINDOW),
        "Prompt tokens taken in, also those that were held or came by KV transfer. SGLang counts "
        "them when the request ends.",
        KEPT,
        "tokens/s",
    ),
    Recording(
        "pdcluster:engine_generation_tokens:rate1m",
        _rate(GENERATION_TOKENS, _BY, _RATE_WINDOW),
        "Tokens made. SGLang counts them when the request ends.",
        KEPT,
        "tokens/s",
    ),
    Recording(
        "pdcluster:engine_acceptance_length:rate5m",
        f"1 + sum {_BY} (rate({ACCEPTED}[{_RATIO_WINDOW}])) / {_DRAFT_RATE} "
        f"or avg {_BY} ({SGLANG_ACCEPTANCE} > 0)",
        "Mean tokens per decode step with speculation: 1 + accepted / drafts, over 5 minutes.",
        KEPT,
        "tokens",
    ),
    Recording(
        "pdcluster:engine_accepted_per_pos:rate5m",
        f"sum {_BY_POSITION} (rate({ACCEPTED_PER_POSITION}[{_RATIO_WINDOW}])) "
        f"/ ignoring (position) group_left () {_DRAFT_RATE}",
        "Share of the drafts whose token at this position was accepted, 0 to 1, over 5 minutes.",
        (*KEPT, "position"),
    ),
    Recording(
        "pdcluster:engine_draft_tokens:rate5m",
        f"sum {_BY} (rate({DRAFT_TOKENS}[{_RATIO_WINDOW}]))",
        "Tokens drafted, accepted or not.",
        KEPT,
        "tokens/s",
    ),
    Recording(
        "pdcluster:engine_ttft_seconds_bucket:rate5m",
        _rate(TTFT, _BY_LE, _RATIO_WINDOW),
        "The engine's own time to first token, for histogram_quantile.",
        (*KEPT, "le"),
    ),
    Recording(
        "pdcluster:engine_itl_seconds_bucket:rate5m",
        _rate(ITL, _BY_LE, _RATIO_WINDOW),
        "The engine's own time between tokens, for histogram_quantile.",
        (*KEPT, "le"),
    ),
)


def _quantiles(metric: Metric, short: str, what: str) -> tuple[Recording, ...]:
    return tuple(
        Recording(
            f"pdcluster:{short}:p{percent}",
            # One rule, or promtool takes the two for duplicates. NaN, where nothing was counted, is
            # left out.
            f"({_quantile(metric, percent, PAIR)} or {_quantile(metric, percent, PAIR[:1])}) >= 0",
            f"{what} that {percent} % of the streams of 5 minutes keep: of each pair of pools, and "
            "without their labels of all together.",
            PAIR,
            "s",
        )
        for percent in QUANTILES
    )


def _quantile(metric: Metric, percent: int, by: tuple[str, ...]) -> str:
    buckets = f"sum by ({', '.join((*by, 'le'))}) (rate({metric.name}_bucket[5m]))"
    return f"histogram_quantile({percent / 100:g}, {buckets})"


GATEWAYS = (
    *_quantiles(catalogue.TTFT, "ttft_seconds", "Time to first token"),
    *_quantiles(catalogue.TPOT, "tpot_seconds", "Time per output token"),
)
