"""The load: a day pressed into two hours, with bursts, moving from reading to writing.

Two kinds of requests. Readers bring long prompts and want short answers (summaries, retrieval);
writers the reverse (chat, code). In the morning most are readers, in the evening most are writers.
Bursts come on top, each of one kind only. There are two such days:

    level    one wave, four times as much at noon as at night; bursts stand there at once
    peaks    readers have their hours before noon, writers in the evening, at night there are few
             of both; bursts build up within a minute
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

LENGTH_S = 7200.0
BURST_EVERY_S = 900.0
LONGEST_PROMPT_TOKENS, LONGEST_ANSWER_TOKENS = 16_000, 1500


@dataclass(frozen=True, slots=True)
class Kind:
    """Log-normal lengths: mean tokens, coefficient of variation."""

    prompt: tuple[float, float]
    answer: tuple[float, float]


READER = Kind(prompt=(3000.0, 0.6), answer=(50.0, 0.6))
WRITER = Kind(prompt=(500.0, 0.8), answer=(250.0, 0.7))


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True, slots=True)
class Burst:
    begins_s: float
    ends_s: float
    per_s: float
    kind: Kind
    build_up_s: float

    def at(self, at_s: float) -> float:
        """Requests per second that it adds."""
        if not self.begins_s <= at_s < self.ends_s:
            return 0.0
        since_s = at_s - self.begins_s
        return self.per_s * min(1.0, since_s / self.build_up_s) if self.build_up_s else self.per_s


@dataclass(frozen=True, slots=True)
class Shape:
    """One sort of day. `readers`, `writers`: requests per second at a moment of it, from 0 to 1;
    together at most `highest_per_s`."""

    readers: Callable[[float], float]
    writers: Callable[[float], float]
    highest_per_s: float
    burst_s: tuple[float, float]
    burst_per_s: tuple[float, float]
    build_up_s: float


def _level(of_day: float) -> float:
    return 4.0 * (1 - 0.6 * math.cos(2 * math.pi * of_day))


def _share_of_readers(of_day: float) -> float:
    """From 85 % to 15 %; the change takes about a sixth of the day, around noon."""
    return 0.85 - 0.7 / (1 + math.exp(-24 * (of_day - 0.5)))


def _peak(night_per_s: float, peak_per_s: float, peak_at: float) -> Callable[[float], float]:
    def per_s(of_day: float) -> float:
        far = (of_day - peak_at) / 0.14
        return night_per_s + (peak_per_s - night_per_s) * math.exp(-far * far)

    return per_s


SHAPES = {
    "level": Shape(
        readers=lambda of_day: _level(of_day) * _share_of_readers(of_day),
        writers=lambda of_day: _level(of_day) * (1 - _share_of_readers(of_day)),
        highest_per_s=6.4,
        burst_s=(60.0, 240.0),
        burst_per_s=(2.0, 5.0),
        build_up_s=0.0,
    ),
    "peaks": Shape(
        readers=_peak(0.3, 5.5, peak_at=0.35),
        writers=_peak(0.4, 6.0, peak_at=0.7),
        highest_per_s=11.5,
        burst_s=(120.0, 300.0),
        burst_per_s=(1.0, 4.0),
        build_up_s=60.0,
    ),
}


class Day:
    """The rate and the mix at every moment."""

    def __init__(self, seed: int, length_s: float = LENGTH_S, shape: str = "level") -> None:
        self.length_s = length_s
        self.shape = SHAPES[shape]
        rng = Random(f"{seed} day")
        count = max(1, round(length_s / BURST_EVERY_S))
        self.bursts = tuple(self._burst(rng, number / count, count) for number in range(count))

    def _burst(self, rng: Random, share: float, count: int) -> Burst:
        begins_s = (share + rng.uniform(0.2, 0.8) / count) * self.length_s
        shape = self.shape
        ends_s = begins_s + rng.uniform(*shape.burst_s)
        per_s = rng.uniform(*shape.burst_per_s)
        return Burst(begins_s, ends_s, per_s, rng.choice((READER, WRITER)), shape.build_up_s)

    def rates(self, at_s: float) -> dict[Kind, float]:
        """Requests per second of either kind, bursts included."""
        of_day = at_s / self.length_s
        rates = {READER: self.shape.readers(of_day), WRITER: self.shape.writers(of_day)}
        for burst in self.bursts:
            rates[burst.kind] += burst.at(at_s)
        return rates

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """Poisson at the changing rates, by thinning."""
        rng = Random(f"{seed} arrivals")
        highest = self.shape.highest_per_s + len(self.bursts) * self.shape.burst_per_s[1]
        at_s = 0.0
        while (at_s := at_s + rng.expovariate(highest)) < self.length_s:
            drawn, rates = rng.random() * highest, self.rates(at_s)
            if drawn >= sum(rates.values()):
                continue
            kind = READER if drawn < rates[READER] else WRITER
            yield Arrival(
                at_s,
                _length(rng, kind.prompt, LONGEST_PROMPT_TOKENS),
                _length(rng, kind.answer, LONGEST_ANSWER_TOKENS),
            )


def _length(rng: Random, shape: tuple[float, float], longest: int) -> int:
    mean, cv = shape
    variance = math.log1p(cv**2)
    drawn = rng.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))
    return min(longest, max(2, round(drawn)))
