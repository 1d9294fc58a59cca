"""Which faults, in which order and how far apart: a pure function of the seed.

Whom a fault hits is decided when its turn comes, among those that it may hit then, by `pick`: who
is ready at a moment depends on the machine, the rest does not.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

T = TypeVar("T")


class Kind(enum.StrEnum):
    """What is done. Each to a real process."""

    KILL_PREFILL = "kill a prefill engine"
    KILL_DECODE = "kill a decode engine"
    KILL_ACTOR = "kill a worker actor"
    KILL_SUPERVISOR = "kill an engine's supervisor"
    KILL_CHILD = "kill a process inside an engine"
    CRASH = "decode engine crashes by itself"
    STOP_SHORT = "stop an engine, shorter than the watchdog's bound"
    STOP_LONG = "stop an engine for good"
    STOP_CHILD = "stop a process inside an engine for good"
    LINK = "an engine gives and takes no blocks"
    ERRORS = "an engine answers 500"
    RECOMPUTE = "a decode engine gives requests back"
    KILL_CONTROLLER = "kill the controller"
    KILL_GATEWAY = "kill a gateway replica"
    DISK_FULL = "disk full under the logs, an engine killed"
    SCALE = "scale a pool"
    ROLE = "change a worker's role"
    DRAIN = "drain a worker"


PLANNED = frozenset({Kind.SCALE, Kind.ROLE, Kind.DRAIN})
# These end an engine, and with it what it has in hand.
ENDS_ENGINE = frozenset(
    {
        Kind.KILL_PREFILL,
        Kind.KILL_DECODE,
        Kind.KILL_ACTOR,
        Kind.KILL_SUPERVISOR,
        Kind.KILL_CHILD,
        Kind.CRASH,
        Kind.STOP_LONG,
        Kind.STOP_CHILD,
        Kind.DISK_FULL,
    }
)

SIMULATED: Mapping[Kind, float] = {
    Kind.KILL_PREFILL: 3,
    Kind.KILL_DECODE: 4,
    Kind.KILL_ACTOR: 2,
    Kind.KILL_SUPERVISOR: 1,
    Kind.KILL_CHILD: 2,
    Kind.CRASH: 2,
    Kind.STOP_SHORT: 2,
    Kind.STOP_LONG: 1.5,
    Kind.STOP_CHILD: 1,
    Kind.LINK: 2,
    Kind.ERRORS: 2,
    Kind.RECOMPUTE: 2,
    Kind.KILL_CONTROLLER: 1.5,
    Kind.KILL_GATEWAY: 1.5,
    Kind.DISK_FULL: 1,
    Kind.SCALE: 2,
    Kind.ROLE: 2,
    Kind.DRAIN: 1,
}
# What real engines can be made to do from outside. A new one takes a minute, so those that are
# ended are few.
REAL: Mapping[Kind, float] = {
    Kind.KILL_DECODE: 3,
    Kind.KILL_ACTOR: 1,
    Kind.STOP_SHORT: 2,
    Kind.KILL_CONTROLLER: 2,
    Kind.KILL_GATEWAY: 2,
}

STANDS_STILL = frozenset({Kind.STOP_LONG, Kind.STOP_CHILD})


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault to come: `after_s` seconds after the one before it."""

    number: int
    kind: Kind
    after_s: float
    pick: float  # 0 <= pick < 1

    def choose(self, among: Sequence[T]) -> T:
        """Raises: IndexError: there is nothing to choose from."""
        return among[int(self.pick * len(among))]


def schedule(
    seed: int, count: int, rate_per_s: float, weights: Mapping[Kind, float]
) -> tuple[Planned, ...]:
    rng = Random(f"faults/{seed}")
    kinds = [kind for kind in Kind if weights.get(kind)]
    likely = [weights[kind] for kind in kinds]
    return tuple(
        Planned(
            number,
            rng.choices(kinds, likely)[0],
            rng.uniform(0.5, 1.5) / rate_per_s,
            rng.random(),
        )
        for number in range(1, count + 1)
    )
