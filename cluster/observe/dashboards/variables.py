"""The choices above every board, and the events that are drawn over its panels.

The pools on offer are those that fit the other choices, so a query need only ask for pools where
its series have no other label.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.observe.dashboards.promql import DECODE_POOL, POOL, everywhere, pools, total


@dataclass(frozen=True, slots=True)
class Choice:
    """Filled from the values of `label` on the workers that fit the choices before it."""

    label: str
    title: str
    after: tuple[str, ...] = ()

    @property
    def query(self) -> str:
        fits = ", ".join(f'{label}=~"${label}"' for label in self.after)
        return f"label_values(pdcluster_worker_up{{{fits}}}, {self.label})"


_ORDER = ("cluster", "model", "island", "hardware", "role", "pool")
CHOICES = tuple(
    Choice(label, label.capitalize(), _ORDER[:number]) for number, label in enumerate(_ORDER)
)


@dataclass(frozen=True, slots=True)
class Target:
    """In seconds. `metric`: from the topology; the variable `name`, typed above a board, is for
    pools for which it has none."""

    name: str
    title: str
    default: str
    metric: str

    @property
    def expr(self) -> str:
        """What the topology says for the chosen pools, else what was typed."""
        return f"(min({everywhere(self.metric, DECODE_POOL)}) or on() vector(${self.name}))"


TTFT_TARGET = Target("ttft_target_s", "TTFT target (s)", "2", "pdcluster_target_ttft_seconds")
TPOT_TARGET = Target("tpot_target_s", "TPOT target (s)", "0.05", "pdcluster_target_tpot_seconds")
TARGETS = (TTFT_TARGET, TPOT_TARGET)


@dataclass(frozen=True, slots=True)
class Event:
    """A mark over all panels wherever `expr` has a value."""

    name: str
    expr: str
    title: str
    text: str
    colour: str


def _last_minute(name: str) -> str:
    return f"increase({everywhere(name, POOL)}[1m])"


EVENTS = (
    Event(
        name="Scale",
        expr=f"delta({pools('pdcluster_pool_replicas_desired')}[1m]) != 0",
        title="Scale",
        text="{{pool}}: another number of replicas is wanted",
        colour="blue",
    ),
    Event(
        name="Role change",
        expr=total(_last_minute("pdcluster_role_changes_total"), "pool", "to") + " > 0",
        title="Role change",
        text="{{pool}}: to {{to}}",
        colour="purple",
    ),
    Event(
        name="Failure",
        expr=total(_last_minute("pdcluster_worker_restarts_total"), "pool") + " > 0",
        title="Failure",
        text="{{pool}}: a worker ended and was started again",
        colour="red",
    ),
)
