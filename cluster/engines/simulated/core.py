"""A second process, for engines that are to have one: what vLLM's EngineCore is to its API server.

It is a `cat` that must echo. While it does not (SIGSTOP), the engine stands still behind a server
that answers with old figures. Once it is gone (SIGKILL), /health says 503, requests fail, and the
server ends by itself LINGER_S later with exit status 0. So does vLLM 0.32 when its EngineCore is
stopped or killed (measured: 4.8 s).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from cluster.engines.simulated.faults import Faults

LINGER_S = 4.0
_PERIOD_S = 0.05
_ECHO_WITHIN_S = 0.5


async def keep_core(faults: Faults, end: Callable[[], None]) -> None:
    """Start it, watch it, and call `end` when the server is to end. Cancel: ends it.

    It also ends when its standard input closes, that is when this process is killed."""
    core = await asyncio.create_subprocess_exec(
        "cat", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    print(f"core process pid={core.pid}", flush=True)
    try:
        await _follow(core, faults)
        print("core process died", flush=True)
        faults.die()
        await asyncio.sleep(LINGER_S)
        end()
    finally:
        with contextlib.suppress(ProcessLookupError):
            core.kill()
        await core.wait()


async def _follow(core: asyncio.subprocess.Process, faults: Faults) -> None:
    """Returns when it is gone."""
    assert core.stdin is not None
    assert core.stdout is not None
    with contextlib.suppress(OSError):
        while not core.stdin.is_closing():
            core.stdin.write(b"\n")
            echo = asyncio.create_task(core.stdout.readline())
            try:
                if not await asyncio.wait_for(asyncio.shield(echo), _ECHO_WITHIN_S):
                    return
            except TimeoutError:
                faults.stop(True)
                if not await echo:
                    return
                faults.stop(False)
            await asyncio.sleep(_PERIOD_S)
