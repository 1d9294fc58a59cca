"""SGLang's bootstrap flow: both engines get one request, and meet in a room.

`bootstrap_host` and `bootstrap_port` name prefill's bootstrap server, where decode's engine finds
prefill's; `bootstrap_room` is a number that no other open request has. A request with several
answers or prompts takes as many rooms, numbered on from the one given. An engine that runs with
`--disaggregation-mode` refuses a request without a room, so decode never prefills by itself.

Source: sgl-project/sglang, python/sglang/srt/entrypoints/openai/protocol.py (the fields),
srt/managers/{scheduler,io_struct}.py (refusal, rooms of a batch) and sgl-model-gateway's mini_lb.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from urllib.parse import urlsplit

from cluster.errors import EngineFailed
from cluster.kv.dialects.base import Fields, Together
from cluster.snapshot import WorkerView

# Rooms are signed 64-bit; the last ones are left out, so that those numbered on still fit.
ROOMS = 2**63 - 2**20


class SglangDialect(Together):
    """One of `sglang_mooncake`, `sglang_nixl`, `sglang_ascend`: the backend moves the bytes, and
    what is said over HTTP is the same."""

    decode_prefills = False

    def __init__(self, connector: str, room: Callable[[int], int] = secrets.randbelow) -> None:
        """`room(n)`: a random number below n."""
        self.connector = connector
        self._room = room

    def fields(self, prefill: WorkerView) -> Fields:
        port = prefill.kv.get("bootstrap_port")
        host = urlsplit(prefill.url).hostname
        if not isinstance(port, int) or not port or not host:
            raise EngineFailed(
                prefill.id.name, None, "its bootstrap_port is not known, so decode cannot find it"
            )
        return {
            "bootstrap_host": f"[{host}]" if ":" in host else host,
            "bootstrap_port": port,
            "bootstrap_room": self._room(ROOMS),
        }
