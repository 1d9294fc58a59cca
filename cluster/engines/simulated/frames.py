"""How simulated engines talk over their side channels.

Frames: 4-byte big-endian length, then JSON; contents of blocks follow in a frame of their own, 32
bytes per block.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

CONTENT_BYTES = 32
PEER_TIMEOUT_S = 5.0


class TransferFailed(Exception):
    """The blocks did not come. `str()` says why."""


async def call(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: dict[str, Any]
) -> None:
    """Say `message`, hear the answer. Raises: TransferFailed: refused. OSError."""
    write_frame(writer, orjson.dumps(message))
    await hear(reader)


async def hear(reader: asyncio.StreamReader) -> None:
    """Raises: TransferFailed: refused. OSError, asyncio.IncompleteReadError."""
    refused = orjson.loads(await read_frame(reader))["refused"]
    if refused:
        raise TransferFailed(refused)


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))


def write_frame(writer: asyncio.StreamWriter, payload: bytes) -> None:
    writer.write(len(payload).to_bytes(4, "big") + payload)


def split(packed: bytes) -> list[bytes]:
    """One content per block."""
    return [packed[at : at + CONTENT_BYTES] for at in range(0, len(packed), CONTENT_BYTES)]
