"""vLLM-Ascend's two flows, as its main branch of 2026-08 and 0.23 speak them.

    ascend_mooncake   MooncakeConnectorV1: prefill's answer says where its blocks are, decode pulls
    ascend_layerwise  MooncakeLayerwiseConnector: decode is called first; once it has room, its
                      engine posts where to a metaserver, without a token; prefill is given what
                      was posted and pushes layer by layer

Source: vllm-project/vllm-ascend, vllm_ascend/distributed/kv_transfer/kv_p2p/ and
examples/disaggregated_prefill_v1/load_balance_proxy_{server,layerwise_server}_example.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.errors import EngineFailed
from cluster.kv.dialects.base import (
    ASK_TO_KEEP,
    DecodeFirst,
    Fields,
    PrefillFirst,
    remote_params,
)
from cluster.snapshot import WorkerView


class AscendMooncakeDialect(PrefillFirst):
    """MooncakeConnectorV1. Prefill frees what nobody pulled after its own
    VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT, queued at decode or not: no heartbeats."""

    connector = "ascend_mooncake"

    async def prefill_fields(self, transfer_id: str, prefill: WorkerView) -> Fields:
        return {"kv_transfer_params": {**ASK_TO_KEEP}}

    def grant(self, prefill: WorkerView, answer: Mapping[str, Any]) -> Fields:
        return remote_params(prefill, answer, self.connector)

    async def decode_fields(self, transfer_id: str, prefill: WorkerView, grant: Fields) -> Fields:
        return {"kv_transfer_params": grant}


class AscendLayerwiseDialect(DecodeFirst):
    """MooncakeLayerwiseConnector.

    Prefill tells decode that a request is complete by the request's id: both engines must know it
    by the same one, so both are called at the same endpoint with the same X-Request-Id."""

    connector = "ascend_layerwise"

    def decode_fields(self, metaserver: str) -> Fields:
        params = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": metaserver}
        return {"kv_transfer_params": params}

    def prefill_fields(self, transfer_id: str, decode: WorkerView, asked: Any) -> Fields:
        if not isinstance(asked, dict) or not asked.get("do_remote_decode"):
            raise _not_usable(decode, "it does not ask for do_remote_decode")
        missing = [
            key
            for key in ("request_id", "remote_engine_id", "remote_host", "remote_port")
            if not asked.get(key)
        ]
        if missing:
            raise _not_usable(decode, f"it lacks {', '.join(missing)}")
        if transfer_id not in str(asked["request_id"]):
            raise _not_usable(
                decode, f"it is about request {str(asked['request_id'])!r:.80}, not {transfer_id!r}"
            )
        return {"kv_transfer_params": asked}


def _not_usable(decode: WorkerView, why: str) -> EngineFailed:
    return EngineFailed(
        decode.id.name, 200, f"nothing can be pushed on what it told the metaserver: {why}"
    )
