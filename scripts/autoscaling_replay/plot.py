"""The plot, as an SVG of its own making: attainment against worker-hours, and one day.

Colours come from a style sheet with a second set for dark backgrounds; the background itself is
left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from autoscaling_replay import compare
from autoscaling_replay.compare import Result
from autoscaling_replay.replay import TARGET
from autoscaling_replay.trace import READER, WRITER, Day

WIDTH, HEIGHT = 860, 760
LEFT, RIGHT = 70, 20
STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #24292f }
  .title { font-weight: 600; font-size: 14px } .small { font-size: 12px } .faint { fill: #57606a }
  .axis { stroke: #8c959f; stroke-width: 1; fill: none }
  .grid { stroke: #8c959f; stroke-opacity: .25; stroke-width: 1 }
  .line { fill: none; stroke-width: 2; stroke-linejoin: round }
  .c0 { stroke: #0969da } .f0 { fill: #0969da } .c1 { stroke: #8250df } .f1 { fill: #8250df }
  .c2 { stroke: #bc4c00 } .f2 { fill: #bc4c00 } .c3 { stroke: #9a6700 } .f3 { fill: #9a6700 }
  .c4 { stroke: #cf222e } .f4 { fill: #cf222e } .c5 { stroke: #1a7f37 } .f5 { fill: #1a7f37 }
  .c6 { stroke: #57606a } .f6 { fill: #57606a } .dash { stroke-dasharray: 5 4 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .faint { fill: #9198a1 }
    .c0 { stroke: #58a6ff } .f0 { fill: #58a6ff } .c1 { stroke: #d2a8ff } .f1 { fill: #d2a8ff }
    .c2 { stroke: #ffa657 } .f2 { fill: #ffa657 } .c3 { stroke: #e3b341 } .f3 { fill: #e3b341 }
    .c4 { stroke: #ff7b72 } .f4 { fill: #ff7b72 } .c5 { stroke: #56d364 } .f5 { fill: #56d364 }
    .c6 { stroke: #9198a1 } .f6 { fill: #9198a1 }
  }
"""
SERIES = (
    compare.SLO,
    compare.LEAST_TWO,
    compare.NO_ROLES,
    compare.BUSY,
    compare.BATCH,
    compare.BATCH_TWO,
    compare.FIXED,
)
PREFILL, DECODE = 0, 3  # colours of the two sides


@dataclass(frozen=True, slots=True)
class Panel:
    """A rectangle with linear axes."""

    top: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        width = WIDTH - LEFT - RIGHT
        return LEFT + across * width, self.top + self.height * (1 - up)

    def frame(
        self,
        title: str,
        xs: Sequence[float],
        ys: Sequence[float],
        x_text: Callable[[float], str],
        y_text: Callable[[float], str],
    ) -> Iterable[str]:
        yield _text(LEFT, self.top - 12, title, "title")
        for y in ys:
            right, height = self.at(self.x[1], y)
            yield f'<path class="grid" d="M{LEFT} {height:.1f}H{right:.1f}"/>'
            yield _text(LEFT - 8, height + 4, y_text(y), "small faint", "end")
        bottom = self.top + self.height
        for x in xs:
            yield _text(self.at(x, 0)[0], bottom + 18, x_text(x), "small faint", "middle")
        yield f'<path class="axis" d="M{LEFT} {self.top}V{bottom}H{WIDTH - RIGHT}"/>'


def draw(results: list[Result], seed: int, length_s: float, shape: str) -> str:
    """The whole picture."""
    day = Day(seed, length_s, shape)
    parts = [
        *_attainment(results),
        *_load(day),
        *_replicas(compare.default_of(results), length_s),
    ]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">\n'
        f"<title>SLO attainment against worker-hours, and one day of it</title>\n"
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


def _attainment(results: list[Result]) -> Iterable[str]:
    hours = [r.worker_hours for r in results]
    kept = [r.kept for r in results]
    low = max(0.0, int(min(kept) * 10) / 10)
    panel = Panel(40, 300, (int(min(hours)) - 1, int(max(hours)) + 2), (low, 1.0))
    ys = [low + i * (1 - low) / 5 for i in range(6)]
    step = max(1, round((panel.x[1] - panel.x[0]) / 8))
    xs = list(range(int(panel.x[0]), int(panel.x[1]) + 1, step))
    title = (
        f"Requests within both targets (TTFT {TARGET.ttft_s:g} s, "
        f"TPOT {1e3 * (TARGET.tpot_s or 0):g} ms) against worker-hours"
    )
    yield from panel.frame(title, xs, ys, "{:g}".format, "{:.0%}".format)
    yield _text(WIDTH / 2, panel.top + panel.height + 38, "worker-hours", "small faint", "middle")
    for number, series in enumerate(SERIES):
        points = sorted((r.worker_hours, r.kept) for r in results if r.series == series)
        places = [panel.at(*point) for point in points]
        if len(places) > 1 and series != compare.FIXED:
            yield f'<path class="line c{number}" d="{_path(places)}"/>'
        for x, y in places:
            yield f'<circle class="f{number}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>'
        x, y = WIDTH - RIGHT - 230, panel.top + panel.height - 140 + 20 * number
        yield f'<circle class="f{number}" cx="{x}" cy="{y - 4}" r="4.5"/>'
        yield _text(x + 12, y, series, "small")


def _load(day: Day) -> Iterable[str]:
    times = [day.length_s * i / 400 for i in range(401)]
    rates = [day.rates(at_s) for at_s in times]
    highest = max(max(rate.values()) for rate in rates)
    panel = Panel(425, 110, (0, day.length_s), (0, int(highest) + 1))
    yield from panel.frame(
        "Load: requests/s", _hours(day.length_s), [0, int(highest) + 1], _minutes, "{:g}".format
    )
    for kind, colour, name in ((READER, PREFILL, "readers"), (WRITER, DECODE, "writers")):
        places = [panel.at(t, rate[kind]) for t, rate in zip(times, rates, strict=True)]
        yield f'<path class="line c{colour}" d="{_path(places)}"/>'
        lengths = f"{kind.prompt[0]:,.0f} tokens in, {kind.answer[0]:.0f} out"
        x = LEFT + 150 + 290 * (kind is WRITER)
        yield _text(x, panel.top - 12, f"{name}: {lengths}", f"small f{colour}")


def _replicas(default: Result, length_s: float) -> Iterable[str]:
    moments = default.moments
    most = max(max(m.prefill, m.decode) for m in moments) + 1
    panel = Panel(600, 110, (0, length_s), (0, most))
    title = f"Replicas under the autoscaler ({default.setting})"
    yield from panel.frame(title, _hours(length_s), range(0, most + 1, 2), _minutes, "{:g}".format)
    yield _text(WIDTH / 2, panel.top + panel.height + 38, "minutes", "small faint", "middle")
    for colour, name in ((PREFILL, "prefill"), (DECODE, "decode")):
        places: list[tuple[float, float]] = []
        for moment in moments:
            x, y = panel.at(moment.at_s, getattr(moment, name))
            if places and places[-1][1] != y:
                places.append((x, places[-1][1]))
            places.append((x, y))
        dash = " dash" if name == "decode" else ""
        yield f'<path class="line c{colour}{dash}" d="{_path(places)}"/>'
        x = LEFT + 420 + 80 * (name == "decode")
        yield _text(x, panel.top - 12, name, f"small f{colour}")


def _hours(length_s: float) -> list[float]:
    return [length_s * i / 8 for i in range(9)]


def _minutes(at_s: float) -> str:
    return f"{at_s / 60:g}"


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
    )
