"""The nodes of a simulated replica that spans several: rank 0 waits for the others, they follow it.

    rank 0   Assembly: serves HTTP once all have joined; tells when one is lost
    others   follow: join, and end when rank 0 does

A replica with a rank lost accepts requests and makes no token, while its /health says 200: so does
vLLM 0.32 when a headless rank is killed (measured, tensor parallel over three nodes).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from cluster.engines.simulated.config import RanksConfig
from cluster.errors import PeerGone

JOIN_PAUSE_S = 0.1


class Assembly:
    """Rank 0's end. Start with `start`, end with `close`."""

    def __init__(self, config: RanksConfig, lost: Callable[[int], None]) -> None:
        self._config = config
        self._lost = lost
        self._joined: dict[int, asyncio.StreamWriter] = {}
        self._whole = asyncio.Event()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Returns when every rank has joined. Raises: OSError: the port is taken."""
        self._server = await asyncio.start_server(
            self._meet, self._config.head_host, self._config.head_port
        )
        await self._whole.wait()

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in self._joined.values():
                writer.close()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rank = int(await reader.readline() or 0)
        self._joined[rank] = writer
        print(f"rank {rank} joined", flush=True)
        if len(self._joined) == self._config.nodes - 1:
            self._whole.set()
        with contextlib.suppress(OSError):
            await reader.read()
        assert self._server is not None
        if self._server.is_serving():
            self._lost(rank)


async def follow(config: RanksConfig) -> None:
    """A rank above 0. Waits for rank 0 as long as it takes. Cancel: safe.

    Raises: PeerGone: rank 0 has ended."""
    where = f"{config.head_host}:{config.head_port}"
    while True:
        try:
            reader, writer = await asyncio.open_connection(config.head_host, config.head_port)
            break
        except OSError:
            await asyncio.sleep(JOIN_PAUSE_S)
    try:
        writer.write(f"{config.node_rank}\n".encode())
        print(f"rank {config.node_rank} of {config.nodes} follows {where}", flush=True)
        with contextlib.suppress(OSError):
            await reader.read()
    finally:
        writer.close()
    raise PeerGone(f"rank 0 at {where}", "it closed the connection")
