"""One request's life in a simulated engine: admission, KV pull, prefill, decode, grant.

Called by `server`; owns cache, transfers and counters. Timings are a model of a real engine:
prefill work is done one request after the other; a decode step takes the same time however many
requests share it, unless `decode_step_per_sequence_s` is set.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Sequence

from cluster.engines.simulated.config import SimulatedConfig
from cluster.engines.simulated.events import EventPublisher
from cluster.engines.simulated.faults import CoreDied, Faults, GivenBack
from cluster.engines.simulated.frames import TransferFailed
from cluster.engines.simulated.handover import Handover
from cluster.engines.simulated.kv import Block, BlockCache
from cluster.engines.simulated.metrics import Metrics
from cluster.engines.simulated.model import Continuation, Vocabulary, block_keys, spoiled
from cluster.engines.simulated.request import Request, Step

# Below this, asyncio's timer (1 ms steps) costs more than the time it stands for.
SHORTEST_PAUSE_S = 0.000_05
# Without pauses a stream would never let other streams, or its own client's goodbye, through.
STEPS_BETWEEN_YIELDS = 8
# Its progress with a long prompt shows about this often.
LONGEST_CHUNK_S = 1.0


class RequestFailed(Exception):
    """The engine ends this request with finish reason `error`, as vLLM does when KV blocks cannot
    be loaded and its policy is `fail`, or when its EngineCore died."""


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
            config.sglang_metrics,
        )
        self._events = (
            EventPublisher(config.events, config.block_size_tokens) if config.events else None
        )
        self.cache = BlockCache(
            config.capacity_blocks, config.block_size_tokens, self._stored, self._removed
        )
        self.handover = Handover(config, self.engine_id, self.faults, self.metrics, self._free)
        self._queue: deque[tuple[Request, list[bytes], asyncio.Future[tuple[list[Block], int]]]]
        self._queue = deque()
        self._prefilling = asyncio.Lock()
        self._unread_tokens = 0  # of the prompt that is being read
        self._given_back = GivenBack()
        self._replay: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises: OSError if the side channel's port is taken."""
        await self.handover.start()
        if self._events is not None:
            self._replay = asyncio.create_task(self._events.serve_replay(), name="kv event replay")

    async def close(self) -> None:
        if self._replay is not None:
            self._replay.cancel()
        await self.handover.close()
        if self._events is not None:
            self._events.close()

    async def generate(self, request: Request) -> AsyncGenerator[Step, None]:
        """Steps up to and including the one with a finish reason.

        Raises: RequestFailed. Cancel or aclose: ends the request at once and frees its blocks.
        """
        began_s = time.perf_counter()
        if self.handover.in_room_as_prefill(request.kv_params):
            request.max_tokens = 1  # the rest is decode's, whatever the shared request says
        keys = block_keys(request.prompt_ids, self.config.block_size_tokens)
        blocks, held = await self._admit(request, keys)
        finish = "abort"
        owned = True
        output: list[int] = []
        try:
            external_tokens = await self._fill(request, keys, blocks, held)
            continuation = Continuation(self.vocabulary, request.prompt_ids, request.foreign)
            last_s = began_s
            for number in range(1, request.max_tokens + 1):
                await self._step(number)
                if number == 1:
                    self._count_prompt(request, external_tokens)
                if self._recomputes(request, output):
                    finish = "stop"
                    yield Step([], finish, "recomputed")
                    return
                step = self._think(request, continuation, len(output))
                output += step.ids
                last_s = self._count(step, len(output), began_s, last_s, request.copies)
                if step.finish is not None:
                    finish = step.finish
                    owned = not self.handover.keep(request, keys, blocks, finish)
                    await self.handover.deliver(request, keys, blocks)
                    yield step
                    return
                self._extend(blocks, len(request.prompt_ids) + len(output))
                yield step
        except (TransferFailed, CoreDied) as error:
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
        renewing = self.handover.renewing(request.kv_params)
        try:
            return await place
        except asyncio.CancelledError:
            if entry in self._queue:
                self._queue.remove(entry)
                self.metrics.waiting = len(self._queue)
                self.handover.decline(request.kv_params)
            elif place.done() and not place.cancelled():  # admitted in the same moment
                self.metrics.running -= 1
                self._free(place.result()[0])
            raise
        finally:
            if renewing is not None:
                renewing.cancel()

    def _has_room(self, request: Request, keys: list[bytes]) -> bool:
        return self.metrics.running < self.config.max_num_seqs and self.cache.fits(
            keys, len(request.prompt_ids)
        )

    def _take(self, request: Request, keys: list[bytes]) -> tuple[list[Block], int]:
        self.metrics.running += 1
        taken = self.cache.take(keys, len(request.prompt_ids))
        self._show_usage()
        return taken

    async def _fill(
        self, request: Request, keys: list[bytes], blocks: list[Block], held: int
    ) -> int:
        """Get the prompt's KV: held, pulled or computed. Returns the tokens that were pulled."""
        await self.faults.before_chunk()
        self.faults.before_prompt(request.prompt_ids)
        prompt_tokens = len(request.prompt_ids)
        held_tokens = held * self.config.block_size_tokens
        contents = [block.content for block in blocks[:held]]
        external_tokens = 0
        if self.handover.takes(request.kv_params):
            contents += await self.handover.take(request, blocks, held)
            external_tokens = prompt_tokens - held_tokens
        else:
            contents += keys[held:]
            await self._prefill(prompt_tokens - held_tokens)
        self.cache.store(blocks, keys, held, contents, request.prompt_ids)
        request.cached_tokens = held_tokens + external_tokens
        request.foreign = b"".join(
            content for content, key in zip(contents, keys, strict=True) if content != key
        )
        return external_tokens

    def _count_prompt(self, request: Request, external_tokens: int) -> None:
        """With the first token, as vLLM counts it."""
        prompt_tokens, metrics = len(request.prompt_ids), self.metrics
        metrics.prefix_queries += prompt_tokens
        metrics.held_tokens += request.cached_tokens - external_tokens
        metrics.external_queries += external_tokens
        metrics.external_tokens += external_tokens
        metrics.computed_tokens += prompt_tokens - request.cached_tokens

    async def _prefill(self, tokens: int) -> None:
        """Chunk by chunk: as in a real engine, the blocks of a long prompt fill up while it is
        read, though no token is made."""
        rate = self.config.timings.prefill_tokens_per_s
        chunk = max(1, int(rate * LONGEST_CHUNK_S / self.faults.spec.slow_factor))
        async with self._prefilling:
            try:
                for left in range(tokens, 0, -chunk):
                    self._unread_tokens = left
                    self._show_usage()
                    await self.faults.before_chunk()
                    await self._spend(min(chunk, left) / rate)
            finally:
                self._unread_tokens = 0
                self._show_usage()

    def _show_usage(self) -> None:
        if self.faults.stands_still:
            return
        unread = self._unread_tokens // self.config.block_size_tokens
        self.metrics.kv_usage = self.cache.usage - unread / self.config.capacity_blocks

    async def _step(self, number: int) -> None:
        await self.faults.before_token(number)
        timings = self.config.timings
        pause_s = timings.decode_step_s + timings.decode_step_per_sequence_s * self.metrics.running
        if pause_s > 0:
            await self._spend(pause_s)
        elif number % STEPS_BETWEEN_YIELDS == 0:
            await asyncio.sleep(0)

    async def _spend(self, pause_s: float) -> None:
        pause_s *= self.faults.spec.slow_factor
        if pause_s >= SHORTEST_PAUSE_S:
            await asyncio.sleep(pause_s)

    def _recomputes(self, request: Request, output: list[int]) -> bool:
        """Whether this engine runs out of blocks now and gives the request back, as vLLM-Ascend's
        decode engines do. What goes on from a request that was given back is left in peace."""
        at_token = self.faults.spec.recompute_at_token
        if at_token is None or len(output) + 1 < at_token or self._given_back.has(request):
            return False
        if self.config.kv is not None and self.config.kv.role == "kv_producer":
            return False
        self._given_back.add(request, output)
        return True

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
            self._show_usage()

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
        self._show_usage()

    def _stored(self, keys: Sequence[bytes], parent: bytes | None, ids: Sequence[int]) -> None:
        if self._events is not None:
            self._events.stored(keys, parent, ids)

    def _removed(self, keys: Sequence[bytes]) -> None:
        if self._events is not None:
            self._events.removed(keys)
