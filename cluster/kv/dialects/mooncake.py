"""vLLM's MooncakeConnector, as 0.32 and 0.33 speak it.

We choose a transfer id; prefill answers nothing; decode gets the id, the address of prefill's
bootstrap server and the engine id that this server tells, and pulls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp

from cluster.errors import EngineFailed
from cluster.identity import WorkerId
from cluster.kv.dialects.base import Fields, PrefillFirst
from cluster.snapshot import WorkerView

# A bootstrap server answers from memory; one that is slow is one that is going down.
QUERY_TIMEOUT_S = 5.0


class MooncakeDialect(PrefillFirst):
    """See the module. Remembers each prefill worker generation's engine id."""

    connector = "mooncake"
    # Prefill drops the blocks when its own timeout has passed, queued at decode or not.
    has_heartbeats = False

    def __init__(self, ask: Callable[[str], Awaitable[Any]]) -> None:
        """`ask(url)`: the parsed JSON answer to a GET. Raises: OSError, aiohttp.ClientError,
        TimeoutError or ValueError."""
        self._ask = ask
        self._engine_ids: dict[WorkerId, asyncio.Task[str]] = {}

    async def prefill_fields(self, transfer_id: str, prefill: WorkerView) -> Fields:
        # Asked before prefill has worked for nothing.
        await self._engine_id(prefill)
        params = {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": transfer_id}
        return {"kv_transfer_params": params}

    def grant(self, prefill: WorkerView, answer: Mapping[str, Any]) -> Fields:
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise EngineFailed(prefill.id.name, 200, "its answer has no choices")
        reason = choices[0].get("finish_reason")
        if reason != "length":
            # The connector keeps blocks only of requests that ran into max_tokens.
            raise EngineFailed(
                prefill.id.name,
                200,
                f"its prefill ended with finish_reason {reason!r} and not 'length', "
                "so it kept no blocks",
            )
        return {}

    async def decode_fields(self, transfer_id: str, prefill: WorkerView, grant: Fields) -> Fields:
        params = {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "remote_bootstrap_addr": _bootstrap_address(prefill),
            "remote_engine_id": await self._engine_id(prefill),
            "transfer_id": transfer_id,
        }
        return {"kv_transfer_params": params}

    def forget(self, worker: WorkerId) -> None:
        asked = self._engine_ids.pop(worker, None)
        if asked is not None:
            asked.cancel()

    async def _engine_id(self, prefill: WorkerView) -> str:
        """Asked once per generation, however many requests wait for it."""
        asked = self._engine_ids.get(prefill.id)
        if asked is None:
            asked = asyncio.create_task(self._query(prefill), name=f"bootstrap {prefill.id}")
            self._engine_ids[prefill.id] = asked
        try:
            # A caller that leaves must not cancel the question for the others.
            return await asyncio.shield(asked)
        except EngineFailed:
            if self._engine_ids.get(prefill.id) is asked:
                del self._engine_ids[prefill.id]
            raise
        except asyncio.CancelledError:
            if asked.cancelled():
                raise EngineFailed(prefill.id.name, None, "it was replaced") from None
            raise

    async def _query(self, prefill: WorkerView) -> str:
        url = f"{_bootstrap_address(prefill)}/query"
        name = prefill.id.name
        try:
            answer = await self._ask(url)
        except (OSError, aiohttp.ClientError, TimeoutError) as error:
            raise EngineFailed(
                name, None, f"its bootstrap server {url} does not answer: {_text(error)}"
            ) from error
        except ValueError as error:
            raise EngineFailed(
                name, 200, f"its bootstrap server {url} answered no JSON: {_text(error)}"
            ) from error
        entries = list(answer.values()) if isinstance(answer, dict) else []
        if not entries:
            raise EngineFailed(name, 200, f"no engine has registered at {url} yet")
        if len(entries) > 1:
            raise EngineFailed(
                name,
                200,
                f"{len(entries)} data-parallel engines share {url}; which one holds the blocks "
                "cannot be told: give each its own worker",
            )
        engine_id = entries[0].get("engine_id") if isinstance(entries[0], dict) else None
        if not isinstance(engine_id, str) or not engine_id:
            raise EngineFailed(name, 200, f"{url} answered without an engine_id")
        return engine_id


def _bootstrap_address(prefill: WorkerView) -> str:
    address = prefill.kv.get("bootstrap_addr")
    if not isinstance(address, str) or not address:
        raise EngineFailed(
            prefill.id.name, None, "its bootstrap_addr is not known, so mooncake cannot reach it"
        )
    return address.rstrip("/")


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
