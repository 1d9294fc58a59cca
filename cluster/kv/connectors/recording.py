"""What our KV connectors add to the stock ones: records, and early release of pinned blocks.

Runs inside the engine's process, so it imports the standard library and `cluster.transfers` only;
the stock connector comes in as the next class in the method resolution order.

    scheduler side   PullLog            decode: what was held, what is pulled, how each pull ended
                     release.Releases   prefill: which pinned requests are to be let go now
                     Claims             decode: one transfer serves one request
    worker side      SendLog            prefill: were pinned blocks taken, released or expired
    both             RecordingConnector, the mixin that calls them
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.kv.connectors.release import Releases, release_socket_path
from cluster.transfers import Outcome, TransferRecord, TransferReporter

# More than any engine's queue holds.
MAX_CLAIMS = 16_384

logger = logging.getLogger("vllm.pdcluster")

if TYPE_CHECKING:
    _Stock = Any
else:
    _Stock = object


def block_bytes(groups: Iterable[Any], ranks: int) -> tuple[int, ...]:
    """Bytes of one block of each KV cache group, over all tensor-parallel ranks."""
    sizes = []
    for group in groups:
        spec = group.kv_cache_spec
        # A spec that unites unlike layers already sums over them.
        layers = 1 if hasattr(spec, "kv_cache_specs") else len(group.layer_names)
        sizes.append(spec.page_size_bytes * layers * ranks)
    return tuple(sizes)


@dataclass(slots=True)
class _Pull:
    prompt_tokens: int
    tokens_held: int
    tokens_pulled: int
    block_ids: frozenset[int]
    blocks: int
    bytes: int
    began_s: float
    failed: bool = False


class PullLog:
    """Decode's side of transfers. One record per request: pulled, held or failed."""

    def __init__(
        self,
        reporter: TransferReporter,
        bytes_per_block: Sequence[int],
        now_s: Callable[[], float] = time.perf_counter,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._reporter = reporter
        self._bytes_per_block = tuple(bytes_per_block)
        self._now_s = now_s
        self._wall_s = wall_s
        self._held: dict[str, int] = {}  # request -> tokens in the prefix cache when last asked
        self._open: dict[str, _Pull] = {}

    def considered(self, request_id: str, tokens_held: int) -> None:
        """The scheduler asked what could be pulled beyond `tokens_held`."""
        self._held[request_id] = tokens_held

    def began(
        self,
        request_id: str,
        prompt_tokens: int,
        tokens_pulled: int,
        blocks_by_group: Sequence[Sequence[int]],
    ) -> None:
        """Blocks are allocated and the pull is ordered; with nothing to pull, it is over."""
        tokens_held = self._held.pop(request_id, 0)
        if tokens_pulled <= 0:
            self._send(request_id, "held", _Pull(prompt_tokens, tokens_held, 0, _NONE, 0, 0, 0.0))
            return
        self._open[request_id] = _Pull(
            prompt_tokens=prompt_tokens,
            tokens_held=tokens_held,
            tokens_pulled=tokens_pulled,
            block_ids=frozenset(block for group in blocks_by_group for block in group),
            blocks=sum(len(group) for group in blocks_by_group),
            bytes=sum(
                len(group) * size
                for group, size in zip(blocks_by_group, self._bytes_per_block, strict=False)
            ),
            began_s=self._now_s(),
        )

    def ended(
        self, finished: Collection[str], failed: Collection[str], bad_blocks: Collection[int]
    ) -> None:
        """The workers' word: requests that are through, requests and blocks that went wrong.

        With several ranks, a bad block may be told some steps before the request is through."""
        if bad_blocks or failed:
            for request_id, pull in self._open.items():
                if request_id in failed or not pull.block_ids.isdisjoint(bad_blocks):
                    pull.failed = True
        for request_id in finished:
            ended = self._open.pop(request_id, None)
            if ended is not None:
                self._send(request_id, "failed" if ended.failed else "pulled", ended)

    def forget(self, request_id: str) -> None:
        """The request ended. A pull under way goes on: its end is still told."""
        self._held.pop(request_id, None)

    def _send(self, request_id: str, outcome: Outcome, pull: _Pull) -> None:
        moved = outcome == "pulled"
        self._reporter.send(
            TransferRecord(
                request_id=request_id,
                side="decode",
                outcome=outcome,
                at_s=self._wall_s(),
                prompt_tokens=pull.prompt_tokens,
                tokens_held=pull.tokens_held,
                tokens_pulled=pull.tokens_pulled if moved else 0,
                blocks_pulled=pull.blocks if moved else 0,
                bytes_pulled=pull.bytes if moved else 0,
                took_s=self._now_s() - pull.began_s if pull.began_s else 0.0,
            )
        )


_NONE: frozenset[int] = frozenset()


class SendLog:
    """Prefill's side, in the worker that serves the blocks. One record per pinned request."""

    def __init__(
        self,
        reporter: TransferReporter | None,
        now_s: Callable[[], float] = time.perf_counter,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        """`reporter` None: keep quiet (one rank of several speaks for all)."""
        self._reporter = reporter
        self._now_s = now_s
        self._wall_s = wall_s
        self._pinned_s: dict[str, float] = {}
        self._releasing: set[str] = set()

    @property
    def releasing(self) -> frozenset[str]:
        """Requests whose release was asked for and has not happened yet."""
        return frozenset(self._releasing)

    def pinned(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._pinned_s.setdefault(request_id, self._now_s())

    def release_asked(self, request_ids: Iterable[str]) -> None:
        self._releasing.update(request_ids)

    def taken(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._end(request_id, "taken")

    def let_go(self, request_ids: Iterable[str]) -> None:
        """Freed without having been read: released if that was asked for, else expired."""
        for request_id in request_ids:
            self._end(request_id, "released" if request_id in self._releasing else "expired")

    def _end(self, request_id: str, outcome: Outcome) -> None:
        self._releasing.discard(request_id)
        began_s = self._pinned_s.pop(request_id, None)
        if self._reporter is None:
            return
        took_s = 0.0 if began_s is None else self._now_s() - began_s
        self._reporter.send(
            TransferRecord(request_id, "prefill", outcome, self._wall_s(), took_s=took_s)
        )


class Claims:
    """Which request pulls which transfer. Memory: the last MAX_CLAIMS transfers."""

    def __init__(self) -> None:
        self._claimed_by: OrderedDict[str, str] = OrderedDict()

    def take(self, params: dict[str, Any], request_id: str) -> bool:
        """Whether `request_id` is the one that may pull what `params` name."""
        transfer = params.get("remote_request_id") or params.get("transfer_id")
        if not transfer:
            return True
        owner = self._claimed_by.setdefault(transfer, request_id)
        if len(self._claimed_by) > MAX_CLAIMS:
            self._claimed_by.popitem(last=False)
        return owner == request_id


class RecordingConnector(_Stock):  # type: ignore[misc]
    """Mixin before a stock NIXL or Mooncake connector class.

    Changes one thing of what that does: a transfer is pulled by one request only. vLLM hands the
    same parameters to every prompt of a list and every choice of n; prefill frees its blocks after
    the first pull, and a second prompt would even get the first one's blocks (both measured: wrong
    text, or a request that hangs, and its blocks in the prefix cache). The others prefill locally.

    The subclass calls `_record()` once its scheduler or worker side exists. Its worker side offers
    `release(request_ids)`."""

    _pulls: PullLog | None = None
    _releases: Releases | None = None

    def _record(self, vllm_config: Any, kv_cache_config: Any) -> None:
        if self.connector_scheduler is None:
            return
        parallel = vllm_config.parallel_config
        groups = [
            kv_cache_config.kv_cache_groups[index] for index in kv_cache_config.transfer_group_ids
        ]
        self._pulls = PullLog(
            TransferReporter(), block_bytes(groups, parallel.tensor_parallel_size)
        )
        self._reporter = TransferReporter()
        self._claims = Claims()
        self._releases = Releases(release_socket_path(parallel.data_parallel_index))

    # -- scheduler side --------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        if _asks_to_pull(request) and not self._claims.take(
            request.kv_transfer_params, request.request_id
        ):
            logger.warning(
                "pdcluster request=%s prefills locally: its transfer belongs to another request",
                request.request_id,
            )
            # A copy: the requests of one call share the object.
            request.kv_transfer_params = {**request.kv_transfer_params, "do_remote_prefill": False}
        super().on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        answer: tuple[int | None, bool] = super().get_num_new_matched_tokens(
            request, num_computed_tokens
        )
        if self._pulls is not None and _asks_to_pull(request):
            self._pulls.considered(request.request_id, num_computed_tokens)
        return answer

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        asked = _asks_to_pull(request)  # the stock method clears the flag
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if self._pulls is None or not asked:
            return
        ordered = self.connector_scheduler._reqs_need_recv.get(request.request_id)
        self._pulls.began(
            request.request_id,
            request.num_prompt_tokens,
            num_external_tokens,
            ordered[1] if ordered is not None else (),
        )

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        answer: tuple[bool, dict[str, Any] | None] = super().request_finished(request, block_ids)
        self._finished(request, keeps_blocks=answer[0])
        return answer

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        answer: tuple[bool, dict[str, Any] | None] = super().request_finished_all_groups(
            request, block_ids
        )
        self._finished(request, keeps_blocks=answer[0])
        return answer

    def _finished(self, request: Any, *, keeps_blocks: bool) -> None:
        if self._pulls is None or self._releases is None:
            return
        self._pulls.forget(request.request_id)
        if keeps_blocks and (request.kv_transfer_params or {}).get("do_remote_decode"):
            self._releases.pin(request.request_id)
            self._reporter.send(
                TransferRecord(
                    request.request_id,
                    "prefill",
                    "granted",
                    time.time(),
                    prompt_tokens=request.num_prompt_tokens,
                )
            )

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        meta = super().build_connector_meta(scheduler_output)
        if self._releases is not None:
            due = self._releases.due()
            if due:
                # Travels to every rank with the stock metadata.
                meta.pdcluster_release = due
        return meta

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)
        if self._pulls is None or self._releases is None:
            return
        self._pulls.ended(
            connector_output.finished_recving or (),
            connector_output.failed_recving,
            connector_output.invalid_block_ids,
        )
        self._releases.unpin(connector_output.finished_sending or ())

    # -- worker side -----------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        super().start_load_kv(forward_context, **kwargs)
        release = getattr(self._connector_metadata, "pdcluster_release", None)
        if release:
            self.connector_worker.release(release)

    def shutdown(self) -> None:
        super().shutdown()
        if self._releases is not None:
            self._releases.close()


def _asks_to_pull(request: Any) -> bool:
    return bool((request.kv_transfer_params or {}).get("do_remote_prefill"))
