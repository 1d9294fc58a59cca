"""Clients that ask one thing after the other, hold each answer against the reference, and keep a
record of it.

A client does what client libraries do: a connection that broke before a byte of the answer came is
tried again. Nothing else is.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from chaos_run.answers import Answer, NotAnAnswer, differences
from chaos_run.asks import CHAT, Ask, Client
from chaos_run.reference import Reference

_RECONNECTS = 6
_RECONNECT_PAUSE_S = 0.2
_BOUND_S = 120.0


class Outcome(enum.StrEnum):
    RIGHT = "right"
    WRONG = "wrong"  # it ended well, and says something else than the reference
    REFUSED = "refused"  # an error status, nothing was sent
    ERROR = "error"  # an error event after a part of the answer
    CUT = "cut"  # the connection broke after a part of the answer
    UNREACHED = "unreached"  # no connection, several times in a row
    LATE = "late"  # no end within the bound


@dataclass
class Record:
    """One request and what became of it. Times are monotonic seconds."""

    ask: Ask
    began_s: float
    answer: Answer = field(default_factory=Answer)
    # When it was sent (last), and when each part of a stream came.
    marks_s: list[float] = field(default_factory=list)
    ended_s: float | None = None
    outcome: Outcome | None = None
    why: str = ""
    request_id: str = ""
    route: str = ""
    prefill: str = ""  # POOL/INDEX, as the answer's beginning says
    decode: str = ""
    reconnects: int = 0


@dataclass
class Traffic:
    """`clients` ask until `stop`; those that are answered then still get their answer."""

    endpoint: str
    key: str
    reference: Reference
    on_end: Callable[[Record], None] = lambda record: None
    records: list[Record] = field(default_factory=list)
    _stopped: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self, clients: list[Client]) -> None:
        for number, client in enumerate(clients):
            # Half of them keep their connections.
            keeps = number % 2 == 0
            task = asyncio.create_task(self._run(client, keeps), name=f"client {number}")
            self._tasks.append(task)

    async def stop(self) -> None:
        """Returns when every answer has ended. Raises: what a client raised, a mistake of ours."""
        self._stopped.set()
        await asyncio.gather(*self._tasks)

    async def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def in_flight(self) -> list[Record]:
        return [record for record in self.records if record.ended_s is None]

    async def _run(self, client: Client, keeps_connections: bool) -> None:
        connector = aiohttp.TCPConnector(force_close=not keeps_connections)
        headers = {"authorization": f"Bearer {self.key}"}
        async with aiohttp.ClientSession(
            self.endpoint, connector=connector, headers=headers
        ) as session:
            ask = next(client)
            while not self._stopped.is_set():
                wanted = await self.reference.answer(ask)
                await self.ask(session, self.open(ask), wanted)
                ask = client.send(wanted.text)

    def open(self, ask: Ask) -> Record:
        """The record of a request that begins now."""
        record = Record(ask, time.monotonic())
        self.records.append(record)
        return record

    async def ask(self, session: aiohttp.ClientSession, record: Record, wanted: Answer) -> None:
        """Ask once, and see what comes. Never raises for what the cluster does."""
        ask = record.ask
        try:
            async with asyncio.timeout(_BOUND_S):
                await perform(session, record)
        except TimeoutError:
            record.outcome, record.why = Outcome.LATE, f"no end within {_BOUND_S:g} s"
        if record.outcome is None:
            found = differences(record.answer, wanted, ask.path == CHAT and ask.is_stream)
            record.outcome = Outcome.WRONG if found else Outcome.RIGHT
            record.why = "; ".join(found)
        record.ended_s = time.monotonic()
        self.on_end(record)


async def perform(session: aiohttp.ClientSession, record: Record) -> None:
    """Send, and read to the end. `record.outcome` stays None if the answer ended well."""
    while True:
        record.marks_s = [time.monotonic()]
        is_begun = False
        try:
            async with session.post(record.ask.path, json=record.ask.sent()) as response:
                record.request_id = response.headers.get("x-request-id", "")
                record.route = response.headers.get("x-pdcluster-route", "")
                record.prefill = response.headers.get("x-pdcluster-prefill", "")
                record.decode = response.headers.get("x-pdcluster-decode", "")
                if response.status != 200:
                    body = (await response.read()).decode(errors="replace")
                    record.outcome = Outcome.REFUSED
                    record.why = f"{response.status} {body[:300]}"
                elif record.ask.is_stream:
                    while event := await _event(response):
                        is_begun = True
                        if record.answer.add_event(event):
                            record.marks_s.append(time.monotonic())
                else:
                    record.answer.add_whole(await response.read())
                if record.answer.error is not None:
                    record.outcome = Outcome.ERROR
                    record.why = str(record.answer.error)[:400]
                return
        except NotAnAnswer as error:
            record.outcome, record.why = Outcome.WRONG, str(error)
            return
        except (aiohttp.ClientError, ConnectionError, asyncio.IncompleteReadError) as error:
            why = f"{type(error).__name__}: {error}"
            if is_begun:
                record.outcome, record.why = Outcome.CUT, why
                return
            record.reconnects += 1
            if record.reconnects > _RECONNECTS:
                record.outcome, record.why = Outcome.UNREACHED, why
                return
            await asyncio.sleep(_RECONNECT_PAUSE_S * record.reconnects)


async def _event(response: aiohttp.ClientResponse) -> bytes:
    """The next event; b"" at the end of the body."""
    with contextlib.suppress(asyncio.IncompleteReadError):
        return await response.content.readuntil(b"\n\n")
    return b""
