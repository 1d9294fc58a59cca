"""The load: a day pressed into two hours, with bursts, moving from reading to writing.

Two kinds of requests. Readers bring long prompts and want short answers (summaries, retrieval);
writers the reverse (chat, code). In the morning most are readers, in the evening most are writers.
Bursts come on top, each of one kind only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

LENGTH_S = 7200.0
MEAN_PER_S = 4.0
SWING = 0.6  # of the day's wave around the mean
BURST_EVERY_S = 900.0
BURST_S = (60.0, 240.0)
BURST_PER_S = (2.0, 5.0)
READERS = (0.85, 0.15)  # share in the morning, in the evening
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


class Day:
    """The rate and the mix at every moment."""

    def __init__(self, seed: int, length_s: float = LENGTH_S) -> None:
        self.length_s = length_s
        rng = Random(f"{seed} day")
        count = max(1, round(length_s / BURST_EVERY_S))
        self.bursts = tuple(self._burst(rng, number / count, count) for number in range(count))

    def _burst(self, rng: Random, share: float, count: int) -> Burst:
        begins_s = (share + rng.uniform(0.2, 0.8) / count) * self.length_s
        ends_s = begins_s + rng.uniform(*BURST_S)
        return Burst(begins_s, ends_s, rng.uniform(*BURST_PER_S), rng.choice((READER, WRITER)))

    def per_s(self, at_s: float) -> float:
        """Of the day alone."""
        return MEAN_PER_S * (1 - SWING * math.cos(2 * math.pi * at_s / self.length_s))

    def readers(self, at_s: float) -> float:
        """Their share; the change takes about a sixth of the day, around noon."""
        turned = 1 / (1 + math.exp(-24 * (at_s / self.length_s - 0.5)))
        return READERS[0] + (READERS[1] - READERS[0]) * turned

    def rates(self, at_s: float) -> dict[Kind, float]:
        """Requests per second of either kind, bursts included."""
        readers = self.per_s(at_s) * self.readers(at_s)
        rates = {READER: readers, WRITER: self.per_s(at_s) - readers}
        for burst in self.bursts:
            if burst.begins_s <= at_s < burst.ends_s:
                rates[burst.kind] += burst.per_s
        return rates

    def arrivals(self, seed: int) -> Iterator[Arrival]:
        """Poisson at the changing rates, by thinning."""
        rng = Random(f"{seed} arrivals")
        highest = MEAN_PER_S * (1 + SWING) + len(self.bursts) * BURST_PER_S[1]
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
