"""A cluster to kill parts of at chosen moments, and streams that run meanwhile; each answer is held
against an undisturbed engine's. What runs it all is scripts/chaos_run.

A token takes 20 ms, 1,000 tokens (characters) of prompt half a second.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from chaos_run import clusters
from chaos_run import log_disk as log_disk
from chaos_run.asks import CHAT, COMPLETIONS, Ask
from chaos_run.home import Home
from chaos_run.reference import OwnEngine
from chaos_run.resources import held as held
from chaos_run.resources import leaks as leaks
from chaos_run.traffic import Record, Traffic

from cluster.control.state import ClusterStatus
from cluster.identity import WorkerId
from cluster.workers.report import WorkerReport

PREFILL_TOKENS_PER_S = 2_000.0
CONTEXT_TOKENS = 16_384
WHOLE_WITHIN_S = 40.0
HUNG_AFTER_S = clusters.HUNG_AFTER_S
# The promise: from the moment a failure is noticed to the next token.
GOES_ON_WITHIN_S = 1.0


@dataclass
class Streams:
    """Requests that run at the same time."""

    records: list[Record]
    tasks: list[asyncio.Task[None]]

    async def all_begun(self) -> None:
        """Every one has given a token."""
        await until(lambda: all(len(record.marks_s) > 1 for record in self.records))

    async def ended(self) -> list[str]:
        """What went wrong, once all have ended."""
        await asyncio.gather(*self.tasks)
        return [f"{r.outcome}: {r.why}" for r in self.records if r.outcome != "right"]

    def at(self, worker: str) -> list[Record]:
        """Those whose answer began at the decode worker `worker`."""
        return [record for record in self.records if record.decode == worker]

    def longest_wait_s(self, since_s: float) -> float:
        """The longest time without a token after `since_s`, over all of them."""
        waits = [0.0]
        for record in self.records:
            marks = [mark for mark in record.marks_s if mark > since_s]
            waits += [after - before for before, after in itertools.pairwise([since_s, *marks])]
        return max(waits)


@dataclass
class Torn:
    """The cluster, and who asks it."""

    home: Home
    reference: OwnEngine
    session: aiohttp.ClientSession
    traffic: Traffic
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    async def streams(
        self, count: int = 8, prompt_chars: int = 100, tokens: int = 60, is_stream: bool = True
    ) -> Streams:
        """Begin `count` of them, chat and completions in turns, no two prompts alike."""
        asks = [self._ask(prompt_chars, tokens, is_stream) for _ in range(count)]
        wanted = [await self.reference.answer(ask) for ask in asks]
        records = [self.traffic.open(ask) for ask in asks]
        tasks = [
            asyncio.create_task(self.traffic.ask(self.session, record, answer))
            for record, answer in zip(records, wanted, strict=True)
        ]
        return Streams(records, tasks)

    def _ask(self, prompt_chars: int, tokens: int, is_stream: bool) -> Ask:
        number = next(self._numbers)
        text = f"{number} of {time.monotonic_ns()}: " + "and so on " * (prompt_chars // 10)
        body = {"model": clusters.MODEL, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        if number % 2:
            body |= {"messages": [{"role": "user", "content": text}], "logprobs": True}
            return Ask(f"t{number}", CHAT, body, is_stream)
        return Ask(f"t{number}", COMPLETIONS, {**body, "prompt": text}, is_stream)

    async def status(self) -> ClusterStatus:
        found = await asyncio.to_thread(self.home.status, 20.0)
        assert found is not None
        return found

    async def worker(self, name: str) -> WorkerReport:
        (report,) = [r for r in (await self.status()).workers if r.id.name == name]
        return report

    async def worker_or_none(self, worker: WorkerId) -> WorkerReport | None:
        """Of exactly this generation."""
        return next((r for r in (await self.status()).workers if r.id == worker), None)

    async def whole(self) -> None:
        """Wait until every pool has all its workers, ready, and the gateways know them."""

        async def is_whole() -> bool:
            pools = (await self.status()).pools
            return all(pool.ready == pool.desired == pool.present for pool in pools)

        await until(is_whole, WHOLE_WITHIN_S)
        await asyncio.sleep(0.5)

    async def running(self, worker: WorkerReport) -> int:
        """Requests that its engine has in hand now, by its own count."""
        async with self.session.get(f"{worker.url}/metrics") as answer:
            for line in (await answer.text()).splitlines():
                if line.startswith("vllm:num_requests_running"):
                    return int(float(line.rpartition(" ")[2]))
        raise AssertionError("the engine does not tell")

    async def fault(self, worker: WorkerReport, **faults: object) -> None:
        async with self.session.post(f"{worker.url}/simulate/fault", json=faults) as answer:
            answer.raise_for_status()

    async def endpoint_says(
        self, path: str, body: dict[str, object], request_id: str = ""
    ) -> tuple[int, str, str]:
        """Status, retry-after and text of one request."""
        headers = {"x-request-id": request_id} if request_id else {}
        async with self.session.post(path, json=body, headers=headers) as answer:
            assert answer.headers["x-request-id"] == request_id or not request_id
            return answer.status, answer.headers.get("retry-after", ""), await answer.text()

    def logged(self) -> str:
        """All lines of gateways, controller and worker actors, where docs/operations.md says."""
        running = json.loads((self.home.state / "running.json").read_text())
        folder = Path(running["own_ray"]["folder"]) / "session_latest/logs"
        return "".join(file.read_text() for file in folder.glob("worker-*.err"))


def kill(pid: int | None) -> float:
    """SIGKILL. Returns when."""
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return time.monotonic()


async def until(
    is_so: Callable[[], bool] | Callable[[], Awaitable[bool]], within_s: float = 20.0
) -> None:
    deadline_s = time.monotonic() + within_s
    while True:
        answer = is_so()
        if answer if isinstance(answer, bool) else await answer:
            return
        assert time.monotonic() < deadline_s, "never became true"
        await asyncio.sleep(0.02)
