"""One conversation with one host's probe, over ssh or, for this machine, over a pipe.

The host's Python is given a few words on its command line, which read the probe's source from the
first line of input; nothing is written to the host's disk. `end` ends the ssh connection, and with
it the probe. Called by: nodes.doctor.examine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from cluster.nodes import ssh
from cluster.nodes.doctor.expect import HostPlan
from cluster.nodes.doctor.facts import Clock
from cluster.nodes.doctor.on_host.talk import MARK
from cluster.nodes.ssh import Answer, Unreachable

_MODULES = ("commands", "system", "disk", "reach", "talk")  # in the order of their imports
_PACKAGE = "cluster.nodes.doctor.on_host"
# Each module under its own name, so that they find each other; their packages are never looked for.
_BOOT = """\
import json,sys,types
for name,text in json.loads(sys.stdin.readline()):
 module=types.ModuleType(name);sys.modules[name]=module
 exec(compile(text,name,"exec"),module.__dict__)
module.main()"""
_CLOCK_ROUNDS = 5
_LONGEST_LINE = 16 * 2**20
_END_BOUND_S = 3.0


class ProbeFailed(ClusterError):
    """A host was reached, but its probe did not answer as it should."""


def command(plan: HostPlan) -> list[str]:
    """The command that starts the probe on the host, as Ray's Python is started there."""
    if plan.access is None:
        return [sys.executable, "-u", "-c", _BOOT]
    # The container's Python need not be the host's, and the host's is the one that looks.
    python = "python3" if plan.container else f"{plan.before}{plan.python}"
    remote = f"{python} -u -c {shlex.quote(_BOOT)}"
    return ssh.command(plan.access, ssh.login_shell(remote))


def sources() -> list[tuple[str, str]]:
    """Names and texts of the probe's modules."""
    return [
        (name, Path(str(import_module(name).__file__)).read_text(encoding="utf-8"))
        for name in (f"{_PACKAGE}.{module}" for module in _MODULES)
    ]


class Session:
    """Ask one question at a time."""

    def __init__(self, address: str, process: asyncio.subprocess.Process) -> None:
        self._address = address
        self._process = process
        self._last_id = 0
        self._said: list[str] = []

    async def greeted(self) -> None:
        """Send the probe and wait until it greets. Raises: Unreachable: why it does not."""
        await self._send(json.dumps(sources()))
        await self._answer(0)

    async def ask(self, do: str, **what: Any) -> Any:
        """One answer. Raises: Unreachable: the connection ended. ProbeFailed."""
        self._last_id += 1
        await self._send(json.dumps({"id": self._last_id, "do": do, **what}))
        return await self._answer(self._last_id)

    async def clock(self) -> Clock:
        """The host's clock beside ours, by the quickest of some rounds: it read its clock somewhere
        between our sending and our hearing, so the middle is off by half a round at most."""
        best: Clock | None = None
        for _ in range(_CLOCK_ROUNDS):
            sent_s = time.time()
            now_s = float(await self.ask("clock"))
            heard_s = time.time()
            error_s = (heard_s - sent_s) / 2
            if best is None or error_s < best.error_s:
                best = Clock(offset_s=now_s - (sent_s + heard_s) / 2, error_s=error_s)
        assert best is not None
        return best

    async def end(self) -> None:
        """End the connection; the probe sees its input end, and ends. May be called twice."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _END_BOUND_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            await self._process.stdin.drain()
        except ConnectionError:
            raise await self._ended() from None

    async def _answer(self, wanted: int) -> Any:
        assert self._process.stdout is not None
        while line := await self._process.stdout.readline():
            text = line.decode(errors="replace").rstrip("\n")
            if not text.startswith(MARK):
                self._said.append(text)
                continue
            message = json.loads(text.removeprefix(MARK))
            if message["id"] != wanted:
                continue
            if "error" in message:
                raise ProbeFailed(message["error"])
            return message["answer"]
        raise await self._ended()

    async def _ended(self) -> Unreachable:
        """Why there is nobody any more, in the words of ssh, the shell or Python."""
        assert self._process.stderr is not None
        said = (await self._process.stderr.read()).decode(errors="replace")
        code = await self._process.wait()
        why = Answer(code, "\n".join(self._said), said).last_words
        return Unreachable(self._address, why)


async def begin(plan: HostPlan) -> Session:
    """A conversation with the plan's host, which its caller ends."""
    process = await asyncio.create_subprocess_exec(
        *command(plan),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=_LONGEST_LINE,
        # Ctrl-C in the terminal is for the doctor, which ends each conversation.
        start_new_session=True,
    )
    return Session(plan.address, process)
