"""What an undisturbed engine says to a request.

`OwnEngine` asks a simulated engine that is no part of the cluster, answers at once and is left
alone. `Told` remembers what the cluster itself said before the first fault: real engines are too
large to run one more.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import aiohttp

from chaos_run.answers import Answer
from chaos_run.asks import Ask
from cluster.engines.simulated.config import SimulatedConfig
from cluster.models import store
from cluster.topology.schema import ModelSpec, SimulatedSpec

_REMEMBERED = 2_000
_START_BOUND_S = 30.0


class Reference(Protocol):
    async def answer(self, ask: Ask) -> Answer:
        """The right answer. Raises: LookupError."""
        ...


class OwnEngine:
    """`async with OwnEngine(folder) as reference`."""

    def __init__(self, folder: Path, model: str, context_tokens: int) -> None:
        self._log = folder / "reference.log"
        path = store.resolve(ModelSpec(id=model), lambda what, fraction: None).path
        self._config = SimulatedConfig(
            port=0,
            served_model_name=model,
            model_path=path,
            max_model_len_tokens=context_tokens,
            timings=SimulatedSpec(prefill_tokens_per_s=1e9, decode_step_s=0.0),
        )
        self._known: OrderedDict[str, Answer] = OrderedDict()
        self._process: subprocess.Popen[bytes] | None = None
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> OwnEngine:
        argv = [sys.executable, "-m", "cluster.engines.simulated", "--config-json"]
        argv.append(self._config.model_dump_json())
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        self._start(argv, environment)
        self._session = aiohttp.ClientSession(await self._address())
        return self

    def _start(self, argv: list[str], environment: dict[str, str]) -> None:
        with self._log.open("wb") as sink:
            # In a session of its own: Ctrl-C is for us, and we end it.
            self._process = subprocess.Popen(
                argv, stdout=sink, stderr=sink, env=environment, start_new_session=True
            )

    async def __aexit__(self, *failure: object) -> None:
        if self._session is not None:
            await self._session.close()
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(10)

    async def answer(self, ask: Ask) -> Answer:
        key = repr((ask.path, ask.body))
        if key not in self._known:
            assert self._session is not None
            answer = Answer()
            async with self._session.post(ask.path, json=ask.body) as response:
                response.raise_for_status()
                answer.add_whole(await response.read())
            self._known[key] = answer
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)
        return self._known[key]

    async def _address(self) -> str:
        async with asyncio.timeout(_START_BOUND_S):
            while True:
                text = self._log.read_text(errors="replace")
                if " serves " in text:
                    return f"http://{text.partition(' serves ')[2].split()[0]}"
                if self._process is None or self._process.poll() is not None:
                    raise RuntimeError(f"the reference engine did not start: {text}")
                await asyncio.sleep(0.05)


class Told:
    """Answers that were given before."""

    def __init__(self) -> None:
        self._known: dict[str, Answer] = {}

    def remember(self, ask: Ask, answer: Answer) -> None:
        self._known[repr((ask.path, ask.body))] = answer

    async def answer(self, ask: Ask) -> Answer:
        return self._known[repr((ask.path, ask.body))]
