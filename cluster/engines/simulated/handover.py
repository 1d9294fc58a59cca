"""KV blocks between this engine and its peers: who takes, who keeps, who pushes, by dialect.

    nixl, mooncake, ascend_mooncake  prefill keeps blocks (`grants`), decode takes them (`pull`)
    ascend_layerwise                 decode waits (`push.Inbox`), prefill pushes before it answers
    sglang_*                         prefill keeps them until decode, which asks by room, has them,
                                     and answers then

Called by: engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from cluster.engines.simulated.config import SimulatedConfig, meets_in_rooms
from cluster.engines.simulated.faults import Faults
from cluster.engines.simulated.frames import TransferFailed
from cluster.engines.simulated.grants import Grants
from cluster.engines.simulated.kv import Block
from cluster.engines.simulated.metrics import Metrics
from cluster.engines.simulated.pull import Puller
from cluster.engines.simulated.push import Inbox, external_id, push
from cluster.engines.simulated.request import Request
from cluster.engines.simulated.side_channel import SideChannel
from cluster.transfers import Outcome, TransferRecord, TransferReporter

# The bootstrap host of SGLang's own warm-up requests: nobody is there, the engine goes on alone.
FAKE_BOOTSTRAP_HOST = "2.2.2.2"


class Handover:
    """One per engine. `free` gives blocks back to its cache."""

    def __init__(
        self,
        config: SimulatedConfig,
        engine_id: str,
        faults: Faults,
        metrics: Metrics,
        free: Callable[[list[Block]], None],
    ) -> None:
        self._kv = config.kv
        self._config = config
        self._engine_id = engine_id
        self._faults = faults
        self._metrics = metrics
        self._free = free
        self._reporter = TransferReporter()
        lease_s = config.kv.lease_s if config.kv else 0.0
        self.grants = Grants(lease_s, self._reporter, free, self._count_expired)
        self._puller = Puller(faults)
        self._inbox = Inbox(faults)
        self.side_channel = (
            SideChannel(config.kv, engine_id, self.grants, self._inbox, faults)
            if config.kv
            else None
        )

    async def start(self) -> None:
        """Raises: OSError if the side channel's port is taken."""
        if self.side_channel is not None:
            await self.side_channel.start()

    async def close(self) -> None:
        await self._puller.close()
        await self._inbox.close()
        if self.side_channel is not None:
            await self.side_channel.close()

    # -- whose request is it ---------------------------------------------------------------------

    def takes(self, params: dict[str, Any]) -> bool:
        """Whether a peer computes the prompt."""
        if self._has_room(params):
            return self._kv is not None and self._kv.role == "kv_consumer"
        return bool(params.get("do_remote_prefill"))

    def prefills_for_peer(self, params: dict[str, Any]) -> bool:
        if self._has_room(params):
            return self._kv is not None and self._kv.role == "kv_producer"
        return bool(params.get("do_remote_decode"))

    def in_room_as_prefill(self, params: dict[str, Any]) -> bool:
        return self._has_room(params) and self.prefills_for_peer(params)

    def lacks_room(self, params: dict[str, Any]) -> bool:
        """Whether this engine refuses the request, as SGLang's disaggregated engines do."""
        return self._in_rooms and params.get("bootstrap_room") is None

    @property
    def _in_rooms(self) -> bool:
        return self._kv is not None and meets_in_rooms(self._kv.dialect)

    def _has_room(self, params: dict[str, Any]) -> bool:
        return self._in_rooms and params.get("bootstrap_host") != FAKE_BOOTSTRAP_HOST

    # -- decode ----------------------------------------------------------------------------------

    def decline(self, params: dict[str, Any]) -> None:
        """A request that will never run here need not hold prefill's blocks."""
        if self._kv is not None and params.get("do_remote_prefill") and "metaserver" not in params:
            self._puller.decline(params)

    def renewing(self, params: dict[str, Any]) -> asyncio.Task[None] | None:
        """NIXL's decode side keeps the lease alive while a request waits; the others do not."""
        kv = self._kv
        if kv is None or kv.dialect != "nixl" or not params.get("do_remote_prefill"):
            return None
        return self._puller.renewing(params, kv.lease_s)

    async def take(self, request: Request, blocks: Sequence[Block], held: int) -> list[bytes]:
        """Contents of all but the `held` first blocks. Raises: TransferFailed. Cancel: safe."""
        began_s = time.perf_counter()
        size, lack = self._config.block_size_tokens, len(blocks) - held
        try:
            contents = await self._taken(request, blocks, held)
        except TransferFailed:
            self._metrics.failed_transfers += 1
            self._report(request, "failed", held * size, 0, 0, time.perf_counter() - began_s)
            raise
        tokens = len(request.prompt_ids) - held * size
        took_s = time.perf_counter() - began_s
        self._metrics.transfer_s.observe(took_s)
        self._metrics.transfer_bytes.observe(lack * size * self._config.timings.kv_bytes_per_token)
        self._report(request, "pulled", held * size, tokens, lack, took_s)
        return contents

    async def _taken(self, request: Request, blocks: Sequence[Block], held: int) -> list[bytes]:
        if self._kv is None or self.side_channel is None:
            raise TransferFailed("this engine has no KV connector")
        if self._kv.role == "kv_producer":
            raise TransferFailed("this engine is kv_producer and cannot take blocks")
        lack = len(blocks) - held
        if "metaserver" not in request.kv_params:
            return await self._puller.pull(request.kv_params, held, lack)
        size = self._config.block_size_tokens
        message = {
            "token_ids": [],
            "request_id": external_id(request.request_id),
            "do_remote_prefill": False,
            "do_remote_decode": True,
            "remote_block_ids": [[block.id for block in blocks]],
            "remote_block_size": [size],
            "remote_engine_id": self._engine_id,
            "remote_host": self._kv.host,
            "remote_port": self.side_channel.port,
            "remote_tp_size": 1,
            "remote_pcp_size": 1,
            "remote_dcp_size": 1,
            "remote_cached_tokens": held * size,
        }
        return await self._inbox.take(request.kv_params["metaserver"], message, lack)

    # -- prefill ---------------------------------------------------------------------------------

    def keep(
        self, request: Request, keys: Sequence[bytes], blocks: list[Block], finish: str
    ) -> bool:
        """Keep a finished prompt's blocks for a peer. True: they are not the caller's any more."""
        kv, params = self._kv, request.kv_params
        if kv is None or not self.prefills_for_peer(params) or kv.dialect == "ascend_layerwise":
            return False
        # SGLang sends a prompt's blocks whatever its first token is.
        is_length_asked = kv.dialect != "nixl" and not meets_in_rooms(kv.dialect)
        if is_length_asked and finish != "length":
            return False
        if kv.dialect == "mooncake" and not params.get("transfer_id"):
            return False
        count = len(keys)
        self._free(blocks[count:])
        self.grants.grant(
            request.request_id,
            str(params.get("bootstrap_room") or params.get("transfer_id") or ""),
            blocks[:count],
            _contents(keys, blocks),
            len(request.prompt_ids),
        )
        if kv.dialect in ("nixl", "ascend_mooncake"):
            request.kv_answer = self._where(request, blocks[:count])
        return True

    async def deliver(self, request: Request, keys: Sequence[bytes], blocks: list[Block]) -> None:
        """Wait until a peer has the blocks, where the dialect's prefill answers no sooner.

        Raises: TransferFailed. Cancel: lets go of them."""
        kv, params = self._kv, request.kv_params
        if kv is None or not self.prefills_for_peer(params):
            return
        if kv.dialect == "ascend_layerwise":
            await self._push(params, request, _contents(keys, blocks))
        elif meets_in_rooms(kv.dialect):
            outcome = await self.grants.end_of(request.request_id)
            if outcome == "expired":
                raise TransferFailed(f"nobody came to room {params['bootstrap_room']}")

    async def _push(
        self, params: dict[str, Any], request: Request, contents: Sequence[bytes]
    ) -> None:
        """What cannot be pushed is decode's loss: the prefill call itself does not fail."""
        skip = params["remote_cached_tokens"] // self._config.block_size_tokens
        failed = self._faults.spec.fail_transfers
        pushed = [] if failed else list(contents[skip:])
        try:
            await push(params, external_id(request.request_id), pushed, failed)
        except TransferFailed as error:
            self._metrics.failed_transfers += 1
            print(f"{request.request_id} not pushed: {error}", flush=True)

    def _where(self, request: Request, blocks: Sequence[Block]) -> dict[str, Any]:
        """What the answer says of the kept blocks."""
        assert self._kv is not None
        assert self.side_channel is not None
        said = {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[block.id for block in blocks]],
            "remote_engine_id": self._engine_id,
            "remote_request_id": request.request_id,
            "remote_host": self._kv.host,
            "remote_port": self.side_channel.port,
        }
        if self._kv.dialect == "ascend_mooncake":
            return {
                **said,
                "remote_pcp_size": 1,
                "remote_dcp_size": 1,
                "remote_ptp_size": 1,
                "num_prompt_blocks": len(blocks),
                "remote_block_size": [self._config.block_size_tokens],
            }
        return {
            **said,
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": len(request.prompt_ids),
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
        }

    # -- counts ----------------------------------------------------------------------------------

    def _count_expired(self) -> None:
        self._metrics.expired_leases += 1

    def _report(
        self, request: Request, outcome: Outcome, held: int, tokens: int, blocks: int, took_s: float
    ) -> None:
        block_bytes = self._config.block_size_tokens * self._config.timings.kv_bytes_per_token
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


def _contents(keys: Sequence[bytes], blocks: Sequence[Block]) -> list[bytes]:
    return [block.content or key for block, key in zip(blocks, keys, strict=False)]
