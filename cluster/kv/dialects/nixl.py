"""vLLM's NixlConnector, as 0.32 and 0.33 speak it.

Prefill's answer says where its blocks are; decode gets that answer's params and pulls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.kv.dialects.base import ASK_TO_KEEP, Fields, PrefillFirst, remote_params
from cluster.snapshot import WorkerView


class NixlDialect(PrefillFirst):
    """See the module."""

    connector = "nixl"
    has_heartbeats = True

    async def prefill_fields(self, transfer_id: str, prefill: WorkerView) -> Fields:
        return {"kv_transfer_params": {**ASK_TO_KEEP}}

    def grant(self, prefill: WorkerView, answer: Mapping[str, Any]) -> Fields:
        return remote_params(prefill, answer, self.connector)

    async def decode_fields(self, transfer_id: str, prefill: WorkerView, grant: Fields) -> Fields:
        return {"kv_transfer_params": grant}
