"""What every connector's dialect is: an order of the two calls, and the fields each is given.

Fields are top-level fields of an engine's request body: `kv_transfer_params` for vLLM and its
kin, `bootstrap_*` for SGLang. A dialect holds no state per transfer.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from cluster.errors import EngineFailed
from cluster.identity import WorkerId
from cluster.snapshot import WorkerView

Fields = dict[str, Any]


class Order(enum.StrEnum):
    """Which engine is called first, and who moves the blocks."""

    PREFILL_FIRST = "prefill first"  # prefill answers and keeps its blocks; decode pulls them
    DECODE_FIRST = "decode first"  # decode makes room and says where; prefill pushes
    TOGETHER = "together"  # both get the same request; they find each other


class Dialect(ABC):
    """One connector."""

    connector: str
    order: ClassVar[Order]
    # Whether prefill keeps blocks once it has answered: those that nobody takes must be released.
    keeps_blocks: ClassVar[bool] = False
    # Whether decode keeps prefill's lease alive from the moment it has queued the request.
    has_heartbeats: ClassVar[bool] = False
    # Whether a decode engine can also serve a request that nobody has prefilled for it.
    decode_prefills: ClassVar[bool] = True

    def forget(self, worker: WorkerId) -> None:
        """`worker` is gone; what was learnt about it is void. Here: nothing is remembered."""
        return


class PrefillFirst(Dialect):
    """Prefill's answer, or the fact that it came, is what decode needs."""

    order = Order.PREFILL_FIRST
    keeps_blocks = True

    @abstractmethod
    async def prefill_fields(self, transfer_id: str, prefill: WorkerView) -> Fields:
        """For the prefill call. Raises: EngineFailed, if prefill cannot be asked what it must."""

    @abstractmethod
    def grant(self, prefill: WorkerView, answer: Mapping[str, Any]) -> Fields:
        """What of prefill's answer decode needs. Raises: EngineFailed, if nothing can be pulled."""

    @abstractmethod
    async def decode_fields(self, transfer_id: str, prefill: WorkerView, grant: Fields) -> Fields:
        """For the decode call. Raises: EngineFailed."""


class DecodeFirst(Dialect):
    """Decode's engine posts where it wants the blocks to a URL, the metaserver's."""

    order = Order.DECODE_FIRST

    @abstractmethod
    def decode_fields(self, metaserver: str) -> Fields:
        """For the decode call."""

    @abstractmethod
    def prefill_fields(self, transfer_id: str, decode: WorkerView, asked: Any) -> Fields:
        """For the prefill call, from the JSON that decode's engine posted.

        Raises: EngineFailed, if nothing can be pushed to it."""


class Together(Dialect):
    """Both engines get the same fields at the same time."""

    order = Order.TOGETHER

    @abstractmethod
    def fields(self, prefill: WorkerView) -> Fields:
        """For both calls, another each time. Raises: EngineFailed."""


def remote_params(prefill: WorkerView, answer: Mapping[str, Any], connector: str) -> Fields:
    """The `kv_transfer_params` of an answer that say where its blocks are.

    Raises: EngineFailed, if there are none or they lack what a peer must know."""
    params = answer.get("kv_transfer_params")
    if not isinstance(params, dict):
        raise EngineFailed(
            prefill.id.name,
            200,
            "its answer has no kv_transfer_params, so there is nothing to pull; "
            f"does its engine run with the {connector} connector?",
        )
    missing = [
        key
        for key in ("remote_engine_id", "remote_request_id", "remote_host", "remote_port")
        if not params.get(key)
    ]
    if missing:
        raise EngineFailed(
            prefill.id.name, 200, f"its kv_transfer_params lack {', '.join(missing)}"
        )
    blocks = params.get("remote_block_ids")
    if not isinstance(blocks, list) or not any(blocks):
        raise EngineFailed(prefill.id.name, 200, "its kv_transfer_params name no blocks to pull")
    return params


# vLLM's nixl and vLLM-Ascend's mooncake both read these, and expect all of them to be there.
ASK_TO_KEEP: Mapping[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
