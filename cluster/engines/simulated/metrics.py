"""Prometheus text under vLLM's names: what pdcluster, dashboards and people look for in vLLM.
SGLang's names besides, if asked for.

Plain integers, rendered on request: a counter must cost nothing per token at 50,000 tokens/s.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

SECONDS = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 16384.0)
BYTES = tuple(float(2**power) for power in range(10, 34, 2))


class Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0
        self.count = 0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value
        self.count += 1

    def lines(self, name: str, labels: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {self.sum}"
        yield f"{name}_count{{{labels}}} {self.count}"


def _seconds() -> Histogram:
    return Histogram(SECONDS)


@dataclass(slots=True)
class Metrics:
    """Totals since start, and what is going on now."""

    model_name: str
    block_size_tokens: int
    capacity_blocks: int
    dialect: str | None
    speculative_tokens: int
    speaks_sglang: bool = False
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    computed_tokens: int = 0
    held_tokens: int = 0
    external_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    external_queries: int = 0
    drafts: int = 0
    accepted_at: list[int] = field(default_factory=list)
    finished: dict[str, int] = field(default_factory=dict)
    failed_transfers: int = 0
    expired_leases: int = 0
    step_tokens: Histogram = field(default_factory=lambda: Histogram(TOKENS))
    first_token_s: Histogram = field(default_factory=_seconds)
    between_tokens_s: Histogram = field(default_factory=_seconds)
    per_output_token_s: Histogram = field(default_factory=_seconds)
    whole_request_s: Histogram = field(default_factory=_seconds)
    transfer_s: Histogram = field(default_factory=_seconds)
    transfer_bytes: Histogram = field(default_factory=lambda: Histogram(BYTES))

    def __post_init__(self) -> None:
        self.accepted_at = [0] * self.speculative_tokens

    def drafted(self, accepted: int) -> None:
        self.drafts += 1
        for position in range(accepted):
            self.accepted_at[position] += 1

    def finish(self, reason: str) -> None:
        self.finished[reason] = self.finished.get(reason, 0) + 1

    def render(self) -> str:
        labels = f'engine="0",model_name="{self.model_name}"'
        prompt_tokens = self.computed_tokens + self.held_tokens + self.external_tokens
        lines: list[str] = []

        def gauge(name: str, value: float, more: str = "") -> None:
            lines.extend((f"# TYPE vllm:{name} gauge", f"vllm:{name}{{{labels}{more}}} {value}"))

        def counter(name: str, values: dict[str, float]) -> None:
            lines.append(f"# TYPE vllm:{name}_total counter")
            lines.extend(
                f"vllm:{name}_total{{{labels}{more}}} {value}" for more, value in values.items()
            )

        def histogram(name: str, value: Histogram) -> None:
            lines.append(f"# TYPE vllm:{name} histogram")
            lines.extend(value.lines(f"vllm:{name}", labels))

        gauge("num_requests_running", self.running)
        gauge("num_requests_waiting", self.waiting)
        gauge("kv_cache_usage_perc", self.kv_usage)
        lines.append("# TYPE vllm:cache_config_info gauge")
        lines.append(
            f'vllm:cache_config_info{{block_size="{self.block_size_tokens}",cache_dtype="auto",'
            f'enable_prefix_caching="True",engine="0",num_gpu_blocks="{self.capacity_blocks}",'
            f'prefix_caching_hash_algo="sha256_cbor"}} 1.0'
        )
        counter("prompt_tokens", {"": prompt_tokens})
        counter(
            "prompt_tokens_by_source",
            {
                ',source="local_compute"': self.computed_tokens,
                ',source="local_cache_hit"': self.held_tokens,
                ',source="external_kv_transfer"': self.external_tokens,
            },
        )
        counter("prompt_tokens_cached", {"": self.held_tokens + self.external_tokens})
        counter("generation_tokens", {"": self.generation_tokens})
        counter("prefix_cache_queries", {"": self.prefix_queries})
        counter("prefix_cache_hits", {"": self.held_tokens})
        counter("external_prefix_cache_queries", {"": self.external_queries})
        counter("external_prefix_cache_hits", {"": self.external_tokens})
        counter("num_preemptions", {"": 0})
        counter(
            "request_success",
            {f',finished_reason="{reason}"': count for reason, count in self.finished.items()}
            or {',finished_reason="stop"': 0},
        )
        histogram("iteration_tokens_total", self.step_tokens)
        histogram("time_to_first_token_seconds", self.first_token_s)
        histogram("inter_token_latency_seconds", self.between_tokens_s)
        histogram("request_time_per_output_token_seconds", self.per_output_token_s)
        histogram("e2e_request_latency_seconds", self.whole_request_s)
        if self.speculative_tokens:
            counter("spec_decode_num_drafts", {"": self.drafts})
            counter("spec_decode_num_draft_tokens", {"": self.drafts * self.speculative_tokens})
            counter("spec_decode_num_accepted_tokens", {"": sum(self.accepted_at)})
            counter(
                "spec_decode_num_accepted_tokens_per_pos",
                {f',position="{i}"': count for i, count in enumerate(self.accepted_at)},
            )
        if self.dialect == "nixl":
            histogram("nixl_xfer_time_seconds", self.transfer_s)
            histogram("nixl_bytes_transferred", self.transfer_bytes)
            counter("nixl_num_failed_transfers", {"": self.failed_transfers})
            counter("nixl_num_kv_expired_reqs", {"": self.expired_leases})
        if self.speaks_sglang:
            lines.extend(self._sglang_lines())
        return "\n".join(lines) + "\n"

    def _sglang_lines(self) -> Iterator[str]:
        """Names of sgl-project/sglang, python/sglang/srt/observability/metrics_collector.py."""
        labels = f'model_name="{self.model_name}"'
        drafts = self.drafts or 1
        gauges = {
            "num_running_reqs": self.running,
            "num_queue_reqs": self.waiting,
            "token_usage": self.kv_usage,
            "cache_hit_rate": self.held_tokens / (self.prefix_queries or 1),
            "spec_accept_length": 1 + sum(self.accepted_at) / drafts if self.drafts else 0.0,
        }
        counters = {
            "num_transfer_failed_reqs_total": self.failed_transfers,
            "prompt_tokens_total": self.computed_tokens + self.held_tokens + self.external_tokens,
            "generation_tokens_total": self.generation_tokens,
            "cached_tokens_total": self.held_tokens,
        }
        for kind, values in (("gauge", gauges), ("counter", counters)):
            for name, value in values.items():
                yield f"# TYPE sglang:{name} {kind}"
                yield f"sglang:{name}{{{labels}}} {value}"
        for name, histogram in (
            ("time_to_first_token_seconds", self.first_token_s),
            ("inter_token_latency_seconds", self.between_tokens_s),
            ("e2e_request_latency_seconds", self.whole_request_s),
        ):
            yield f"# TYPE sglang:{name} histogram"
            yield from histogram.lines(f"sglang:{name}", labels)
