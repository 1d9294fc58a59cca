"""What a dashboard says, as values: panels that answer a question, in sections, on a board.

Ids and places on the grid are computed (`grafana`), never written down.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass


class Kind(enum.StrEnum):
    LINES = "timeseries"
    STAT = "stat"
    BARS = "bargauge"
    TABLE = "table"


class Unit(enum.StrEnum):
    """Grafana's own ids."""

    COUNT = "short"
    SHARE = "percentunit"  # 1 is 100 %
    SECONDS = "s"
    BYTES = "bytes"
    BYTES_PER_S = "binBps"
    REQUESTS_PER_S = "reqps"
    PER_S = "ops"


class Needs(enum.StrEnum):
    """What a cluster must have for a panel to have data; `verify --allow-empty` takes these."""

    TRAFFIC = "traffic"
    SPECULATION = "speculation"


@dataclass(frozen=True, slots=True)
class Query:
    """`legend`: with labels in double braces. A table's columns are its labels instead."""

    expr: str
    legend: str = ""
    is_target: bool = False  # drawn as a dashed line that others are held against


@dataclass(frozen=True, slots=True)
class Steps:
    """Green up to `warn`, then yellow, from `bad` on red; the other way round if `warn` > `bad`."""

    warn: float
    bad: float


@dataclass(frozen=True, slots=True)
class Panel:
    """One question and what answers it.

    `formula`: how it is computed, for people. `do`: what to do about a bad answer.
    `steps`: None where no number is good or bad by itself.
    `matrix`: of a table, the labels whose values become rows and columns.
    """

    asks: str
    formula: str
    do: str
    unit: Unit
    queries: tuple[Query, ...]
    kind: Kind = Kind.LINES
    steps: Steps | None = None
    at_most: float | None = None
    is_stacked: bool = False
    matrix: tuple[str, str] | None = None
    columns: tuple[str, ...] = ()
    needs: Needs | None = Needs.TRAFFIC

    @property
    def is_instant(self) -> bool:
        """Answered for now, instead of over time."""
        return self.kind in (Kind.TABLE, Kind.BARS)


@dataclass(frozen=True, slots=True)
class Section:
    """Rows of panels. Panels of one row share its 24 columns equally."""

    title: str
    rows: tuple[tuple[Panel, ...], ...]


@dataclass(frozen=True, slots=True)
class Board:
    uid: str
    title: str
    description: str
    sections: tuple[Section, ...]
    has_targets: bool = False  # asks for the targets of TTFT and TPOT above its panels

    def panels(self) -> Iterator[Panel]:
        for section in self.sections:
            for row in section.rows:
                yield from row
