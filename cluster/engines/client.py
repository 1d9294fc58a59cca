"""Ask a running engine how it is: up, generating, counting.

Called by `workers` (readiness, health, reports). Speaks to the engine's own HTTP port.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import astuple, dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from cluster.engines.base import MetricNames, Probes
from cluster.errors import EngineFailed


@dataclass(frozen=True, slots=True)
class EngineSample:
    """What /metrics said. Totals are since the engine started, over all its data-parallel ranks."""

    running: int
    waiting: int
    kv_usage: float  # 0..1, of the fullest rank
    prompt_tokens: int
    generation_tokens: int
    external_tokens: int
    spec_drafts: int
    spec_accepted: int
    steps: int
    block_size_tokens: int
    cache_dtype: str
    kv_usage_sum: float = 0.0  # over all ranks: moves whenever one of them takes or frees a block
    spec_accepted_per_position: tuple[int, ...] = ()  # of each draft's first token, its second, ...


class EngineClient:
    """`session` stays the caller's; timeouts are the session's too unless stated. `probes`: where
    this engine is to be asked; vLLM's places by default.

    Every method is safe to cancel.
    """

    def __init__(
        self, url: str, key: str, session: aiohttp.ClientSession, probes: Probes | None = None
    ) -> None:
        self._url = url.rstrip("/")
        self._probes = probes or Probes()
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._session = session

    async def is_up(self) -> bool:
        """Whether the health path answers 200. Says nothing about tokens: see `generate_one`."""
        try:
            async with self._session.get(f"{self._url}{self._probes.health}") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def check_alive(self) -> None:
        """Raises: EngineFailed: the engine says itself that it is dead, which its HTTP server may
        outlive by a while. One that does not answer says nothing."""
        path = self._probes.death
        if not path:
            return
        try:
            async with self._session.get(f"{self._url}{path}") as answer:
                if answer.status >= 500:
                    raise EngineFailed(self._url, answer.status, f"its {path} says it is dead")
        except (aiohttp.ClientError, TimeoutError, OSError):
            return

    async def generate_one(self, model: str) -> None:
        """One real token out of the model. Raises: EngineFailed."""
        body = {
            "model": model,
            "prompt": "1",
            "max_tokens": 1,
            "temperature": 0,
            **self._probes.one_token,
        }
        try:
            async with self._session.post(
                f"{self._url}/v1/completions", json=body, headers=self._headers
            ) as answer:
                if answer.status != 200:
                    raise EngineFailed(self._url, answer.status, (await answer.text())[:500])
                parsed = await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise self._broke_off(error) from error
        try:
            made = parsed["usage"]["completion_tokens"]
        except (KeyError, TypeError) as error:
            raise EngineFailed(self._url, 200, f"answer without usage: {parsed!r:.200}") from error
        if made != 1:
            raise EngineFailed(self._url, 200, f"asked for 1 token, got {made}")

    async def sample(self, names: MetricNames) -> EngineSample:
        """Scrape the engine's metrics. Raises: EngineFailed."""
        path = self._probes.metrics
        try:
            async with self._session.get(f"{self._url}{path}") as answer:
                text = await answer.text()
                if answer.status != 200:
                    raise EngineFailed(self._url, answer.status, text[:500])
            # Thousands of lines on a busy engine: some 10 ms that the caller's loop need not lose.
            return await asyncio.to_thread(parse_sample, text, names)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._broke_off(error) from error
        except ValueError as error:
            raise EngineFailed(self._url, 200, f"{path} is not Prometheus text: {error}") from error

    async def version(self) -> str:
        """The engine's own version; "" if it does not tell. Raises: EngineFailed."""
        path = self._probes.version
        if not path:
            return ""
        try:
            async with self._session.get(f"{self._url}{path}", headers=self._headers) as answer:
                if answer.status != 200:
                    raise EngineFailed(self._url, answer.status, (await answer.text())[:500])
                return str((await answer.json(content_type=None))["version"])
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._broke_off(error) from error
        except (KeyError, TypeError, ValueError) as error:
            raise EngineFailed(self._url, 200, f"{path} is not understood: {error!r}") from error

    def _broke_off(self, error: Exception) -> EngineFailed:
        return EngineFailed(self._url, None, str(error) or type(error).__name__)


def _wanted_lines(text: str, names: MetricNames) -> str:
    """The few lines that are asked for: the parser's cost is by line, and an engine shows some
    thousand of them every second."""
    wanted = tuple(name for name in astuple(names) if name)
    return "".join(line for line in text.splitlines(keepends=True) if line.startswith(wanted))


def parse_sample(text: str, names: MetricNames) -> EngineSample:
    """Pure. Series that are absent count as 0. Raises: ValueError if `text` is not Prometheus."""
    found: dict[str, list[Sample]] = defaultdict(list)
    for family in text_string_to_metric_families(_wanted_lines(text, names) or text):
        for sample in family.samples:
            found[sample.name].append(sample)

    def total(name: str) -> int:
        return int(sum(sample.value for sample in found[name]))

    def largest(name: str) -> int:
        return int(max((sample.value for sample in found[name]), default=0.0))

    def by_position(name: str) -> tuple[int, ...]:
        counts: dict[int, float] = defaultdict(float)
        for sample in found[name]:
            counts[int(sample.labels["position"])] += sample.value
        return tuple(int(counts[position]) for position in range(max(counts, default=-1) + 1))

    kv_usages = [sample.value for sample in found[names.kv_usage]]
    cache = found[names.cache_info]
    labels = cache[0].labels if cache else {}
    return EngineSample(
        running=total(names.running),
        waiting=total(names.waiting),
        kv_usage=max(kv_usages, default=0.0),
        prompt_tokens=total(names.prompt_tokens),
        generation_tokens=total(names.generation_tokens),
        external_tokens=total(names.external_tokens),
        spec_drafts=total(names.spec_drafts),
        spec_accepted=total(names.spec_accepted),
        steps=total(names.steps),
        block_size_tokens=int(labels.get("block_size") or 0) or largest(names.block_size),
        cache_dtype=labels.get("cache_dtype", ""),
        kv_usage_sum=sum(kv_usages),
        spec_accepted_per_position=by_position(names.spec_accepted_per_position),
    )
