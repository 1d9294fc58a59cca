"""vLLM's KV cache events as they come over the wire (msgpack), without importing vllm.

Fields that nobody here reads are left out; msgspec skips them.
"""

from __future__ import annotations

import msgspec


class BlockStored(msgspec.Struct, tag=True, gc=False):
    """Blocks entered the prefix cache: `token_ids` of all of them in a row."""

    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    # Per block: what besides token ids went into its hash.
    extra_keys: list[list[object] | None] | None = None
    kv_cache_spec_kind: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, gc=False):
    """Blocks left the prefix cache."""

    block_hashes: list[bytes | int]
    medium: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, gc=False):
    """The prefix cache is empty."""


class KVEventBatch(msgspec.Struct, array_like=True, gc=False):
    """What happened in one engine step."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int | None = None


_decoder = msgspec.msgpack.Decoder(KVEventBatch)


def decode(payload: bytes) -> KVEventBatch:
    """Raises: ValueError if the payload is not a batch of the events known here."""
    return _decoder.decode(payload)
