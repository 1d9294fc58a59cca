"""One request's life in a simulated engine: admission, KV pull, prefill, decode, grant.

Called by `server`; owns cache, transfers and counters. Timings are a model of a real engine:
prefill work is done one request after the other, a decode step takes the same time however many
requests share it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cluster.engines.simulated.config import SimulatedConfig
from cluster.engines.simulated.events import EventPublisher
from cluster.engines.simulated.faults import Faults
from cluster.engines.simulated.kv import Block, BlockCache
from cluster.engines.simulated.metrics import Metrics
from cluster.engines.simulated.model import Continuation, Vocabulary, block_keys, spoiled
from cluster.engines.simulated.transfer import Grants, Puller, SideChannel, TransferFailed
from cluster.transfers import Outcome, TransferRecord, TransferReporter

# Below this, asyncio's timer (1 ms steps) costs more than the time it stands for.
SHORTEST_PAUSE_S = 0.000_05
# Without pauses a stream would never let other streams, or its own client's goodbye, through.
STEPS_BETWEEN_YIELDS = 8


class RequestFailed(Exception):
    """The engine ends this request with finish reason `error`, as vLLM does when KV blocks cannot
    be loaded and its policy is `fail`."""


class Step(NamedTuple):
    """What one decode step brought. `finish`: None while there is more."""

    ids: list[int]
    finish: str | None = None
    stop_reason: int | None = None


@dataclass(slots=True)
class Request:
    """One sequence. The last three fields are filled in while it runs."""

    request_id: str
    prompt_ids: Sequence[int]
    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    kv_params: dict[str, Any] = field(default_factory=dict)
    copies: int = 1  # n: identical choices
    cached_tokens: int = 0
    kv_answer: dict[str, Any] | None = None
    foreign: bytes = b""  # contents of blocks that were computed for other ids


class Engine:
    """Start with `start`, end with `close`."""

    def __init__(self, config: SimulatedConfig, vocabulary: Vocabulary) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.faults = Faults(config.faults)
        self.engine_id = (config.kv and config.kv.engine_id) or uuid.uuid4().hex
        self.metrics = Metrics(
            config.served_model_name,
            config.block_size_tokens,
            config.capacity_blocks,
            config.kv.dialect if config.kv else None,
            config.num_speculative_tokens,
        )
        self._events = (
            EventPublisher(config.events, config.block_size_tokens) if config.events else None
        )
        self.cache = BlockCache(
            config.capacity_blocks, config.block_size_tokens, self._stored, self._removed
        )
        self._reporter = TransferReporter()
        lease_s = config.kv.lease_s if config.kv else 0.0
        self.grants = Grants(lease_s, self._reporter, self._free, self._count_expired)
        self._puller = Puller(self.faults)
        self.side_channel = (
            SideChannel(config.kv, self.engine_id, self.grants, self.faults) if config.kv else None
        )
        self._queue: deque[tuple[Request, list[bytes], asyncio.Future[tuple[list[Block], int]]]]
        self._queue = deque()
        self._prefilling = asyncio.Lock()
        self._replay: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises: OSError if the side channel's port is taken."""
        if self.side_channel is not None:
            await self.side_channel.start()
        if self._events is not None:
            self._replay = asyncio.create_task(self._events.serve_replay(), name="kv event replay")

    async def close(self) -> None:
        if self._replay is not None:
            self._replay.cancel()
        await self._puller.close()
        if self.side_channel is not None:
            await self.side_channel.close()
        if self._events is not None:
            self._events.close()

    def reject(self, kv_params: dict[str, Any]) -> None:
        """A request that will never run here need not hold prefill's blocks."""
        if self.config.kv and kv_params.get("do_remote_prefill"):
            self._puller.decline(kv_params)

    async def generate(self, request: Request) -> AsyncGenerator[Step, None]:
        """Steps up to and including the one with a finish reason.

        Raises: RequestFailed. Cancel or aclose: ends the request at once and frees its blocks.
        """
        began_s = time.perf_counter()
        keys = block_keys(request.prompt_ids, self.config.block_size_tokens)
        blocks, held = await self._admit(request, keys)
        finish = "abort"
        owned = True
        output: list[int] = []
        try:
            await self._fill(request, keys, blocks, held)
            continuation = Continuation(self.vocabulary, request.prompt_ids, request.foreign)
            last_s = began_s
            for number in range(1, request.max_tokens + 1):
                await self._step(number)
                step = self._think(request, continuation, len(output))
                output += step.ids
                last_s = self._count(step, len(output), began_s, last_s, request.copies)
                if step.finish is not None:
                    finish = step.finish
                    owned = not self._grant(request, keys, blocks, finish)
                    yield step
                    return
                self._extend(blocks, len(request.prompt_ids) + len(output))
                yield step
        except TransferFailed as error:
            finish = "error"
            raise RequestFailed(str(error)) from error
        finally:
            self._finish(request, keys, blocks, output, finish, owned, began_s)

    async def _admit(self, request: Request, keys: list[bytes]) -> tuple[list[Block], int]:
        if not self._queue and self._has_room(request, keys):
            return self._take(request, keys)
        place: asyncio.Future[tuple[list[Block], int]] = asyncio.get_running_loop().create_future()
        entry = (request, keys, place)
        self._queue.append(entry)
        self.metrics.waiting = len(self._queue)
        renewing = self._renewing(request.kv_params)
        try:
            return await place
        except asyncio.CancelledError:
            if entry in self._queue:
                self._queue.remove(entry)
                self.metrics.waiting = len(self._queue)
                self.reject(request.kv_params)
            elif place.done() and not place.cancelled():  # admitted in the same moment
                self.metrics.running -= 1
                self._free(place.result()[0])
            raise
        finally:
            if renewing is not None:
                renewing.cancel()

    def _renewing(self, params: dict[str, Any]) -> asyncio.Task[None] | None:
        """NIXL's decode side keeps the lease alive while a request waits; Mooncake's does not."""
        kv = self.config.kv
        if kv is None or kv.dialect != "nixl" or not params.get("do_remote_prefill"):
            return None
        return self._puller.renewing(params, kv.lease_s)

    def _has_room(self, request: Request, keys: list[bytes]) -> bool:
        return self.metrics.running < self.config.max_num_seqs and self.cache.fits(
            keys, len(request.prompt_ids)
        )

    def _take(self, request: Request, keys: list[bytes]) -> tuple[list[Block], int]:
        self.metrics.running += 1
        taken = self.cache.take(keys, len(request.prompt_ids))
        self.metrics.kv_usage = self.cache.usage
        return taken

    async def _fill(
        self, request: Request, keys: list[bytes], blocks: list[Block], held: int
    ) -> None:
        """Get the prompt's KV: held, pulled or computed."""
        prompt_tokens = len(request.prompt_ids)
        held_tokens = held * self.config.block_size_tokens
        contents = [block.content for block in blocks[:held]]
        external_tokens = 0
        if request.kv_params.get("do_remote_prefill"):
            contents += await self._pull(request, held, len(blocks) - held)
            external_tokens = prompt_tokens - held_tokens
        else:
            contents += keys[held:]
            await self._prefill(prompt_tokens - held_tokens)
        self.cache.store(blocks, keys, held, contents, request.prompt_ids)
        request.cached_tokens = held_tokens + external_tokens
        metrics = self.metrics
        metrics.prefix_queries += prompt_tokens
        metrics.held_tokens += held_tokens
        metrics.external_queries += external_tokens
        metrics.external_tokens += external_tokens
        metrics.computed_tokens += prompt_tokens - held_tokens - external_tokens
        request.foreign = b"".join(
            content for content, key in zip(contents, keys, strict=True) if content != key
        )

    async def _prefill(self, tokens: int) -> None:
        pause_s = tokens / self.config.timings.prefill_tokens_per_s
        async with self._prefilling:
            await self._spend(pause_s)

    async def _pull(self, request: Request, held: int, lack: int) -> list[bytes]:
        began_s = time.perf_counter()
        size = self.config.block_size_tokens
        try:
            if self.config.kv is None:
                raise TransferFailed("this engine has no KV connector")
            if self.config.kv.role == "kv_producer":
                raise TransferFailed("this engine is kv_producer and cannot take blocks")
            contents = await self._puller.pull(request.kv_params, held, lack)
        except TransferFailed:
            self.metrics.failed_transfers += 1
            self._report(request, "failed", held * size, 0, 0, time.perf_counter() - began_s)
            raise
        tokens = len(request.prompt_ids) - held * size
        took_s = time.perf_counter() - began_s
        self.metrics.transfer_s.observe(took_s)
        self.metrics.transfer_bytes.observe(lack * size * self.config.timings.kv_bytes_per_token)
        self._report(request, "pulled", held * size, tokens, lack, took_s)
        return contents

    def _report(
        self, request: Request, outcome: Outcome, held: int, tokens: int, blocks: int, took_s: float
    ) -> None:
        block_bytes = self.config.block_size_tokens * self.config.timings.kv_bytes_per_token
        self._reporter.send(
            TransferRecord(
                request.request_id,
                "decode",
                outcome,
                time.time(),
                len(request.prompt_ids),
                tokens_held=held,
                tokens_pulled=tokens,
                blocks_pulled=blocks,
                bytes_pulled=blocks * block_bytes,
                took_s=took_s,
            )
        )

    async def _step(self, number: int) -> None:
        await self.faults.before_token(number)
        if self.config.timings.decode_step_s > 0:
            await self._spend(self.config.timings.decode_step_s)
        elif number % STEPS_BETWEEN_YIELDS == 0:
            await asyncio.sleep(0)

    async def _spend(self, pause_s: float) -> None:
        pause_s *= self.faults.spec.slow_factor
        if pause_s >= SHORTEST_PAUSE_S:
            await asyncio.sleep(pause_s)

    def _think(self, request: Request, continuation: Continuation, made: int) -> Step:
        """One step: one token, and what a draft model would have guessed right."""
        wanted = 1
        if self.config.num_speculative_tokens and made:
            accepted = continuation.accepted(
                self.config.timings.accepted_per_draft, self.config.num_speculative_tokens
            )
            self.metrics.drafted(accepted)
            wanted += accepted
        ids: list[int] = []
        while len(ids) < wanted:
            made += 1
            token = continuation.next(may_end=made > request.min_tokens)
            ids.append(token)
            if made > request.min_tokens:
                if token == self.vocabulary.end_id and not request.ignore_eos:
                    return Step(ids, "stop")
                if token in request.stop_token_ids:
                    return Step(ids, "stop", token)
            if made == request.max_tokens:
                return Step(ids, "length")
        return Step(ids)

    def _count(self, step: Step, made: int, began_s: float, last_s: float, copies: int) -> float:
        now_s = time.perf_counter()
        metrics = self.metrics
        metrics.generation_tokens += len(step.ids) * copies
        metrics.step_tokens.observe(len(step.ids))
        if made == len(step.ids):
            metrics.first_token_s.observe(now_s - began_s)
        else:
            metrics.between_tokens_s.observe(now_s - last_s)
        return now_s

    def _extend(self, blocks: list[Block], tokens: int) -> None:
        while tokens > len(blocks) * self.config.block_size_tokens:
            self.cache.grow(blocks)
            self.metrics.kv_usage = self.cache.usage

    def _grant(self, request: Request, keys: list[bytes], blocks: list[Block], finish: str) -> bool:
        """Keep the blocks for a peer if the request asked for it. True: the grant owns them."""
        kv, params = self.config.kv, request.kv_params
        if kv is None or not params.get("do_remote_decode"):
            return False
        if kv.dialect == "mooncake" and (finish != "length" or not params.get("transfer_id")):
            return False
        count = len(keys)
        transfer_id = params["transfer_id"] if kv.dialect == "mooncake" else ""
        contents = [block.content or key for block, key in zip(blocks, keys, strict=False)]
        self._free(blocks[count:])
        self.grants.grant(
            request.request_id, transfer_id, blocks[:count], contents, len(request.prompt_ids)
        )
        if kv.dialect == "nixl" and self.side_channel is not None:
            request.kv_answer = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_block_ids": [[block.id for block in blocks[:count]]],
                "remote_engine_id": self.engine_id,
                "remote_request_id": request.request_id,
                "remote_host": kv.host,
                "remote_port": self.side_channel.port,
                "tp_size": 1,
                "dcp_size": 1,
                "pp_size": 1,
                "remote_num_tokens": len(request.prompt_ids),
                "remote_blocks_expiry_time": None,
                "transfer_mode": "pull",
            }
        return True

    def _finish(
        self,
        request: Request,
        keys: list[bytes],
        blocks: list[Block],
        output: list[int],
        finish: str,
        owned: bool,
        began_s: float,
    ) -> None:
        took_s = time.perf_counter() - began_s
        self.metrics.running -= 1
        self.metrics.finish(finish)
        self.metrics.whole_request_s.observe(took_s)
        if len(output) > 1:
            self.metrics.per_output_token_s.observe(took_s / len(output))
        if owned:
            # The last token was made but never fed back: it has no KV.
            ids = [*request.prompt_ids, *output[:-1]]
            size = self.config.block_size_tokens
            first = len(request.prompt_ids) // size
            if output and len(ids) // size > first:
                keys = block_keys(ids, size)
                contents = spoiled(keys, request.foreign) if request.foreign else keys
                self.cache.store(blocks, keys, first, contents, ids)
            self._free(blocks)
        else:
            self._admit_waiting()

    def _free(self, blocks: list[Block]) -> None:
        self.cache.release(blocks)
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        while self._queue:
            request, keys, place = self._queue[0]
            if not place.done():
                if not self._has_room(request, keys):
                    break
                place.set_result(self._take(request, keys))
            self._queue.popleft()
        self.metrics.waiting = len(self._queue)
        self.metrics.kv_usage = self.cache.usage

    def _count_expired(self) -> None:
        self.metrics.expired_leases += 1

    def _stored(self, keys: Sequence[bytes], parent: bytes | None, ids: Sequence[int]) -> None:
        if self._events is not None:
            self._events.stored(keys, parent, ids)

    def _removed(self, keys: Sequence[bytes]) -> None:
        if self._events is not None:
            self._events.removed(keys)
