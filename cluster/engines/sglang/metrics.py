"""Names of SGLang's series (python/sglang/srt/observability/metrics_collector.py, 0.5.23).

Prompt and generated tokens are counted when a request ends; progress shows in realtime_tokens.
Accepted drafts have no counter: spec_accept_length is a mean over the last moments.
"""

from __future__ import annotations

from cluster.engines.base import MetricNames

METRICS = MetricNames(
    running="sglang:num_running_reqs",
    waiting="sglang:num_queue_reqs",
    kv_usage="sglang:token_usage",
    prompt_tokens="sglang:prompt_tokens_total",
    generation_tokens="sglang:generation_tokens_total",
    cache_info="",
    steps="sglang:realtime_tokens_total",
    block_size="sglang:page_size",
)
