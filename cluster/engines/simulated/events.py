"""KV cache events over ZMQ in vLLM's wire format: msgpack batches, sequence numbers, replay.

Frames of a batch: topic, 8-byte big-endian sequence number, msgpack [ts, events, dp_rank].
A subscriber that missed some sends (empty, 8-byte first number) to the replay socket and gets the
buffered batches, then one with number -1.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgpack  # type: ignore[import-untyped]
import zmq
import zmq.asyncio

from cluster.engines.simulated.config import EventsConfig

REPLAY_BATCHES = 10_000
END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)


def wire_hash(key: bytes) -> int:
    """vLLM publishes the low 64 bits of a block's hash as an integer."""
    return int.from_bytes(key[-8:], "big")


class EventPublisher:
    """Sends at once, drops for slow subscribers, never blocks. `serve_replay` is a task's work."""

    def __init__(self, config: EventsConfig, block_size_tokens: int) -> None:
        """Raises: zmq.ZMQError if an endpoint is taken."""
        self._topic = config.topic.encode()
        self._block_size_tokens = block_size_tokens
        self._sequence = 0
        self._sent: deque[tuple[int, bytes]] = deque(maxlen=REPLAY_BATCHES)
        self._context = zmq.asyncio.Context()
        self._publish: zmq.Socket[bytes] = zmq.Context(self._context).socket(zmq.PUB)
        self._publish.set_hwm(100_000)
        self._publish.bind(config.endpoint)
        self._replay: zmq.asyncio.Socket | None = None
        if config.replay_endpoint:
            self._replay = self._context.socket(zmq.ROUTER)
            self._replay.bind(config.replay_endpoint)

    def stored(self, keys: Sequence[bytes], parent: bytes | None, ids: Sequence[int]) -> None:
        self._send(
            {
                "type": "BlockStored",
                "block_hashes": [wire_hash(key) for key in keys],
                "parent_block_hash": None if parent is None else wire_hash(parent),
                "token_ids": list(ids),
                "block_size": self._block_size_tokens,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
            }
        )

    def removed(self, keys: Sequence[bytes]) -> None:
        self._send(
            {
                "type": "BlockRemoved",
                "block_hashes": [wire_hash(key) for key in keys],
                "medium": "GPU",
            }
        )

    def _send(self, event: dict[str, Any]) -> None:
        payload = msgpack.packb([time.time(), [event], 0])
        self._sent.append((self._sequence, payload))
        self._publish.send_multipart(
            (self._topic, self._sequence.to_bytes(8, "big"), payload), zmq.NOBLOCK
        )
        self._sequence += 1

    async def serve_replay(self) -> None:
        """Answer replay requests until cancelled."""
        if self._replay is None:
            return
        while True:
            frames = await self._replay.recv_multipart()
            if len(frames) != 3:
                continue
            client, first = frames[0], int.from_bytes(frames[2], "big", signed=True)
            for number, payload in list(self._sent):
                if number >= first:
                    await self._replay.send_multipart(
                        (client, b"", self._topic, number.to_bytes(8, "big"), payload)
                    )
            await self._replay.send_multipart((client, b"", b"", END_OF_REPLAY, b""))

    def close(self) -> None:
        self._publish.close(linger=0)
        if self._replay is not None:
            self._replay.close(linger=0)
        self._context.term()
