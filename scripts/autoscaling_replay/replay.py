"""One run: the trace, a fleet that begins with some replicas, and one way of scaling."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from autoscaling_replay import virtual_time
from autoscaling_replay.fleet import Fleet, Served
from autoscaling_replay.measure import Meter
from autoscaling_replay.scalers import Scaler
from autoscaling_replay.trace import Arrival, Day
from cluster.control.autoscale.decision import Action, ScaleDown, ScaleUp
from cluster.engines.simulated.model import Vocabulary
from cluster.identity import Role
from cluster.topology.scaling import ScalingSpec, SloTargetSpec

TARGET = SloTargetSpec(prefill="prefill", decode="decode", ttft_s=2.0, tpot_s=0.06, percentile=95)
POLICY = ScalingSpec(mode="slo", targets=[TARGET])
MOST = 12


@dataclass(frozen=True, slots=True)
class Moment:
    at_s: float
    prefill: int
    decode: int
    starting: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one way of scaling came to."""

    name: str
    served: tuple[Served, ...]
    moments: tuple[Moment, ...]
    actions: dict[str, int]
    worker_hours: float

    def kept(self, what: str = "both") -> float:
        """Share of requests within the TTFT target, the TPOT target, or both."""
        ttft_s, tpot_s = TARGET.ttft_s or 0.0, TARGET.tpot_s or 0.0
        good = {
            "ttft": lambda s: s.ttft_s <= ttft_s,
            "tpot": lambda s: s.tpot_s <= tpot_s,
            "both": lambda s: s.ttft_s <= ttft_s and s.tpot_s <= tpot_s,
        }[what]
        return sum(map(good, self.served)) / len(self.served)

    def quantile(self, what: str, share: float) -> float:
        values = sorted(getattr(served, what) for served in self.served)
        return values[min(len(values) - 1, int(share * len(values)))]

    @property
    def most(self) -> tuple[int, int]:
        """The most replicas that each side had at once."""
        return max(m.prefill for m in self.moments), max(m.decode for m in self.moments)


def run(
    name: str,
    scaler: Scaler,
    begin: tuple[int, int],
    seed: int,
    vocabulary: Vocabulary,
    length_s: float,
    shape: str = "level",
) -> Outcome:
    """Replay the day in virtual time. The same arguments give the same outcome."""
    day = Day(seed, length_s, shape)
    return virtual_time.run(_replay(name, scaler, begin, seed, vocabulary, day))


async def _replay(
    name: str,
    scaler: Scaler,
    begin: tuple[int, int],
    seed: int,
    vocabulary: Vocabulary,
    day: Day,
) -> Outcome:
    loop = asyncio.get_running_loop()
    length_s = day.length_s
    fleet = Fleet(vocabulary, seed)
    fleet.start(Role.PREFILL, begin[0], load_s=0.0)
    fleet.start(Role.DECODE, begin[1], load_s=0.0)
    meter = Meter(fleet, POLICY.load_window_s, TARGET.percentile, MOST)
    served: list[Served] = []
    moments: list[Moment] = []
    actions = {"up": 0, "down": 0, "role": 0}

    async def one(arrival: Arrival) -> None:
        done = await fleet.serve(arrival)
        served.append(done)
        meter.finished(done)

    async def control() -> None:
        while loop.time() < length_s:
            await asyncio.sleep(POLICY.interval_s)
            for action in scaler.decide(meter, fleet, loop.time()):
                _carry_out(action, fleet, actions)
            prefill, decode = fleet.of(Role.PREFILL), fleet.of(Role.DECODE)
            starting = sum(not replica.is_ready for replica in (*prefill, *decode))
            moments.append(Moment(loop.time(), len(prefill), len(decode), starting))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(control())
        for arrival in day.arrivals(seed):
            await asyncio.sleep(arrival.at_s - loop.time())
            meter.arrived(arrival)
            tasks.create_task(one(arrival))
        await asyncio.sleep(length_s - loop.time())
        worker_hours = fleet.worker_s(loop.time()) / 3600
    return Outcome(name, tuple(served), tuple(moments), actions, worker_hours)


def _carry_out(action: Action, fleet: Fleet, count: dict[str, int]) -> None:
    if isinstance(action, ScaleUp):
        fleet.start(Role(action.pool), action.by)
        count["up"] += action.by
    elif isinstance(action, ScaleDown):
        fleet.stop(Role(action.pool), action.by)
        count["down"] += action.by
    else:
        fleet.change_role(action.worker, action.role)
        count["role"] += 1
