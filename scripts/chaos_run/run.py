"""All of it: a cluster up, traffic, faults, the cluster whole again, what it holds, `down`.

Ends in order however it ends: Ctrl-C cancels, and cancelling takes the cluster down.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import aiohttp

from chaos_run import asks, clusters, log_disk
from chaos_run.faults import Done, Faults
from chaos_run.home import CommandFailed, Home
from chaos_run.reference import OwnEngine, Reference, Told
from chaos_run.resources import Held, held, leaks
from chaos_run.schedule import PLANNED, REAL, SIMULATED, Kind, schedule
from chaos_run.targets import NotRecovered, Targets
from chaos_run.traffic import Record, Traffic, perform

_CONTEXT_TOKENS = 16_384
_WARM_S = 4.0
_BACK_TO_BASELINE_S = 30.0
_LOOK_EVERY_S = 0.5
# Of real engines: how many different questions, asked again and again.
_QUESTIONS = 24
Engines = Literal["simulated", "real"]


@dataclass(frozen=True, slots=True)
class Options:
    seed: int
    faults: int
    rate_per_s: float
    clients: int
    engines: Engines = "simulated"
    duration_s: float | None = None  # no further fault after this long
    kinds: tuple[Kind, ...] = ()  # only these; (): all that the engines can do


@dataclass
class Run:
    """What happened. Times are monotonic seconds."""

    options: Options
    records: list[Record] = field(default_factory=list)
    faults: list[Done] = field(default_factory=list)
    before: Held | None = None
    after: Held | None = None
    leaked: list[str] = field(default_factory=list)
    left_by_down: list[str] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    not_recovered: str = ""
    left_out: list[str] = field(default_factory=list)
    began_s: float = field(default_factory=time.monotonic)
    took_s: float = 0.0


async def run(options: Options, say: Callable[[str], None]) -> Run:
    """Raises: CommandFailed: the cluster could not be started or ended. Cancel: ends it all."""
    outcome = Run(options)
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        home = _home(Path(folder), options.engines)
        with log_disk.mounted(home) as has_disk:
            if not has_disk:
                outcome.left_out.append(f"{Kind.DISK_FULL}: mounting a disk needs root")
            try:
                say(f"up: {options.engines} engines, logs in {home.logs}")
                await asyncio.to_thread(home.up)
                await _torment(home, options, outcome, say, has_disk)
                say("down")
                await asyncio.to_thread(home.down)
            finally:
                # In this thread: a cancelled run must not leave before its cluster has.
                outcome.left_by_down = _end(home)
    outcome.took_s = time.monotonic() - outcome.began_s
    return outcome


def _home(folder: Path, engines: Engines) -> Home:
    name = f"chaos-{engines}"
    make = clusters.simulated if engines == "simulated" else clusters.real
    return Home(folder, name, make(name))


def _end(home: Home) -> list[str]:
    """Take away what is left; what `down`, if it was asked to, had not."""
    home.interrupt()
    if (home.state / "running.json").exists():
        with contextlib.suppress(CommandFailed):
            home.down()
    return home.close()


async def _torment(
    home: Home, options: Options, outcome: Run, say: Callable[[str], None], has_disk: bool
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        reference, clients = await _asking(stack, home, options)
        say("undisturbed traffic")
        await _undisturbed(home, reference, options)
        outcome.before = await _at_rest(home, None)
        traffic = Traffic(home.endpoint, home.api_key, reference, _teller(say))
        back_within_s = 60.0 if options.engines == "simulated" else 240.0
        faults = Faults(traffic.in_flight, Targets(home, back_within_s))
        stack.push_async_callback(faults.close)
        stack.push_async_callback(traffic.cancel)
        listening = asyncio.create_task(_listen(home, outcome.events, say), name="events")
        stack.callback(listening.cancel)
        traffic.start(clients)
        outcome.records, outcome.faults = traffic.records, faults.done
        try:
            await _strike_all(faults, options, say, has_disk)
            say("no more faults: the cluster is to become whole")
            usual = {p["name"]: p["replicas"]["initial"] for p in home.serving["pools"]}
            await faults.settled(usual)
        except NotRecovered as error:
            outcome.not_recovered = str(error)
        await traffic.stop()
        outcome.after = await _at_rest(home, outcome.before)
        outcome.leaked = leaks(outcome.before, outcome.after)


async def _strike_all(
    faults: Faults, options: Options, say: Callable[[str], None], has_disk: bool
) -> None:
    weights = dict(SIMULATED if options.engines == "simulated" else REAL)
    if options.kinds:
        weights = {kind: weights.get(kind, 1.0) for kind in options.kinds}
    elif not has_disk:
        weights.pop(Kind.DISK_FULL, None)
    began_s = time.monotonic()
    for planned in schedule(options.seed, options.faults, options.rate_per_s, weights):
        await asyncio.sleep(planned.after_s)
        if options.duration_s is not None and time.monotonic() - began_s > options.duration_s:
            return
        done = await faults.strike(planned)
        word = "asked" if planned.kind in PLANNED else "done"
        say(f"fault {planned.number}/{options.faults} {word}: {planned.kind} ({done.target})")


def _teller(say: Callable[[str], None]) -> Callable[[Record], None]:
    def tell(record: Record) -> None:
        if record.outcome != "right":
            say(
                f"{record.outcome}: {record.ask.name} request {record.request_id} "
                f"{record.why[:300]}"
            )

    return tell


# What is asked


async def _told(home: Home, options: Options) -> tuple[Told, list[asks.Ask]]:
    """Questions and what the cluster says to them, one at a time, before anything is broken."""
    told = Told()
    questions: list[asks.Ask] = []
    headers = {"authorization": f"Bearer {home.api_key}"}
    async with aiohttp.ClientSession(home.endpoint, headers=headers) as session:
        client = asks.client(clusters.REAL_MODEL, options.seed, 0, is_greedy_only=True)
        ask = next(client)
        for _ in range(_QUESTIONS):
            record = Record(ask, time.monotonic())
            # Whole: what streams say is held against it.
            record.ask = asks.Ask(ask.name, ask.path, ask.body, is_stream=False)
            await perform(session, record)
            if record.outcome is not None:
                raise RuntimeError(f"undisturbed, and yet {record.outcome}: {record.why}")
            told.remember(ask, record.answer)
            questions.append(ask)
            ask = client.send(record.answer.text)
    return told, questions


async def _asking(
    stack: contextlib.AsyncExitStack, home: Home, options: Options
) -> tuple[Reference, list[asks.Client]]:
    if options.engines == "simulated":
        own = OwnEngine(home.folder, clusters.MODEL, _CONTEXT_TOKENS)
        reference: Reference = await stack.enter_async_context(own)
        clients = [
            asks.client(clusters.MODEL, options.seed, number) for number in range(options.clients)
        ]
        return reference, clients
    told, questions = await _told(home, options)

    def again(first: int) -> asks.Client:
        for number in itertools.count(first):
            yield questions[number % len(questions)]

    step = max(1, len(questions) // options.clients)
    return told, [again(number * step) for number in range(options.clients)]


async def _undisturbed(home: Home, reference: Reference, options: Options) -> None:
    """Traffic without faults, so that what is held before has been used."""
    traffic = Traffic(home.endpoint, home.api_key, reference)
    if options.engines == "simulated":
        # Others than those that ask later: a client goes on where it stopped.
        others = range(options.clients, 2 * options.clients)
        traffic.start([asks.client(clusters.MODEL, options.seed, number) for number in others])
        await asyncio.sleep(_WARM_S)
    await traffic.stop()
    wrong = [record.why for record in traffic.records if record.outcome != "right"]
    if wrong:
        raise RuntimeError(f"undisturbed, and yet {len(wrong)} went wrong: {wrong[0]}")


# What the cluster holds, and says


async def _at_rest(home: Home, before: Held | None) -> Held:
    """What is held once leases have run out; with `before`, as soon as it is as before."""
    await asyncio.sleep(clusters.LEASE_S + 2.0)
    until_s = time.monotonic() + _BACK_TO_BASELINE_S
    while True:
        found = await held(home)
        if before is None or not leaks(before, found) or time.monotonic() > until_s:
            return found
        await asyncio.sleep(2.0)


async def _listen(home: Home, heard: Counter[str], say: Callable[[str], None]) -> None:
    """Count the cluster's events by kind, and say who becomes what, for as long as it runs."""
    known: set[tuple[float, str, str]] = set()
    before: dict[str, str] = {}
    while True:
        status = await asyncio.to_thread(home.status)
        if status is not None:
            now = {(told.at_s, told.kind, told.text) for told in status.events}
            heard.update(kind for _, kind, _ in now - known)
            known |= now
            states = {str(r.id): f"{r.role} {r.state}" for r in status.workers}
            for worker, state in sorted(states.items() - before.items()):
                say(f"    {worker} {state}")
            for worker in sorted(before.keys() - states.keys()):
                say(f"    {worker} gone")
            before = states
        await asyncio.sleep(_LOOK_EVERY_S)
