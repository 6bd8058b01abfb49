"""Line charts as inline SVG.

Owns scales, ticks, labels and downsampling. Knows nothing about runs: a chart is made of named series of points.
Colours are CSS classes (`c-base`, `c-1`, ...), so one chart serves light, dark and print; all numbers are rounded to a
tenth of a unit and nothing depends on the clock, so equal points make equal bytes.

Charts are drawn 400 pixels wide: a little enlarged in half of the page's width, and still legible on a phone's 320.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

WIDTH, HEIGHT = 400.0, 225.0
TOP, BOTTOM, LEFT = 32.0, 34.0, 44.0
LABEL_GAP = 14.0  # between the labels at the ends of lines
GLYPH = 7.0  # mean width of a label's character at 12 px
MAX_POINTS = 160
FEWEST_TO_SMOOTH = 16

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A named line. `noisy` draws the points faintly under their running mean; `dots` draws them and no line."""

    name: str
    points: Sequence[Point]
    colour: str = "c-1"
    noisy: bool = False
    dots: bool = False


def short(value: float) -> str:
    """A number for a tick or label: 3 significant digits at most, with k, M, B or T.

    >>> [short(x) for x in (0, 0.034, 1.5, 12, 1234, 250_000, 2.5e6)]
    ['0', '0.034', '1.5', '12', '1.23k', '250k', '2.5M']
    """
    if not math.isfinite(value):
        return "–"
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{letter}"
    text = f"{value:.3g}"
    return "0" if float(text) == 0 else f"{float(text):f}".rstrip("0").rstrip(".").replace("-", "−")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], about `count` of them."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high], or only the powers where those are more than 2 `count`."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(found) <= 2 * count:
            break
    return found


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most `most` points: each the mean of its neighbours, the first and last kept as they are."""
    if len(points) <= most:
        return list(points)
    inner, buckets = points[1:-1], most - 2
    means = []
    for i in range(buckets):
        part = inner[i * len(inner) // buckets : (i + 1) * len(inner) // buckets]
        means.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return [points[0], *means, points[-1]]


def running_mean(points: Sequence[Point], window: float = 0.06) -> list[Point]:
    """Each y the mean of the points within half of `window` (a share of the length) on either side.

    Where the line begins, and falls or climbs most, both sides are cut alike, so that it is not bent; where it ends,
    only the missing side is, so that the last value is no single noisy point.
    """
    reach = max(1, round(len(points) * window / 2))
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    result = []
    for i, (x, _) in enumerate(points):
        left = min(reach, i)
        right = min(left, len(points) - 1 - i)
        result.append((x, (sums[i + right + 1] - sums[i - left]) / (left + right + 1)))
    return result


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_name: str,
    y_low: float | None = None,
    y_high: float | None = None,
    log_x: bool = False,
) -> Markup:
    """A figure's SVG, or nothing when no series has two finite points. The title is drawn above the axis. A series with
    an empty name gets no label; with `log_x` all x are above 0 and drawn by their logarithm."""
    drawn = [replace(s, points=_finite(s.points), noisy=s.noisy and len(s.points) >= FEWEST_TO_SMOOTH) for s in series]
    drawn = [s for s in drawn if len(s.points) >= 2]
    if not drawn:
        return Markup("")
    lines = [thin(running_mean(s.points) if s.noisy else s.points) for s in drawn]
    labels = [f"{s.name} {short(line[-1][1])}" if s.name else "" for s, line in zip(drawn, lines, strict=True)]
    if len(drawn) == 1:
        labels = [short(lines[0][-1][1])]
    frame = _Frame.around(drawn, max(map(len, labels)), y_low, y_high, log_x)
    parts = [_grid(frame, title, x_name)]
    ends: list[tuple[float, str, str]] = []
    for s, line, label in zip(drawn, lines, labels, strict=True):
        if s.dots:
            dot = Markup('<circle class="end {}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>')
            parts += [dot.format(s.colour, *frame.at(point)) for point in line]
            continue
        if s.noisy:
            parts.append(_path(frame, thin(s.points), f"raw {s.colour}"))
        parts.append(_path(frame, line, f"line {s.colour}"))
        x, y = frame.at(line[-1])
        parts.append(Markup('<circle class="end {}" cx="{:.1f}" cy="{:.1f}" r="2.6"/>').format(s.colour, x, y))
        if label:
            ends.append((y, label, s.colour))
    parts.append(_end_labels(frame, ends))
    about = "; ".join(f"{s.name} from {short(s.points[0][1])} to {short(s.points[-1][1])}" for s in drawn)
    return Markup('<svg class="chart" viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, f"{title}: {about}.", Markup("").join(parts)
    )


@dataclass(frozen=True)
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    right: float
    log_x: bool = False

    @classmethod
    def around(
        cls, series: Sequence[Series], longest: int, y_low: float | None, y_high: float | None, log_x: bool
    ) -> _Frame:
        xs = [x for s in series for x, _ in s.points]
        ys = [y for s in series for _, y in s.points]
        low = min(ys) if y_low is None else min(y_low, *ys)
        high = max(ys) if y_high is None else max(y_high, *ys)
        pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low = low - pad if y_low is None else low
        high = high + pad if y_high is None else high
        right = WIDTH - 10 - min(longest * GLYPH, 160.0)
        return cls(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, low, high, right, log_x)

    def at(self, point: Point) -> Point:
        x, x_low, x_high = (math.log(v) if self.log_x else v for v in (point[0], self.x_low, self.x_high))
        x = LEFT + (x - x_low) / (x_high - x_low) * (self.right - LEFT)
        y = HEIGHT - BOTTOM - (point[1] - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - BOTTOM - TOP)
        return x, y


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _path(frame: _Frame, points: Sequence[Point], classes: str) -> Markup:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(frame.at, points))
    return Markup('<polyline class="{}" points="{}"/>').format(classes, line)


def _grid(frame: _Frame, title: str, x_name: str) -> Markup:
    base = HEIGHT - BOTTOM
    parts = [Markup('<text class="name" x="0" y="13">{}</text>').format(title)]
    for value in ticks(frame.y_low, frame.y_high, 4):
        y = frame.at((frame.x_low, value))[1]
        parts.append(
            Markup('<line class="grid" x1="{:.0f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>').format(
                LEFT, frame.right, y, y
            )
        )
        parts.append(Markup('<text class="tick" x="{:.0f}" y="{:.1f}">{}</text>').format(LEFT - 8, y + 4, short(value)))
    for value in (log_ticks if frame.log_x else ticks)(frame.x_low, frame.x_high, 4):
        if frame.x_high >= 2 and value != round(value):
            continue  # half a step
        x = frame.at((value, frame.y_low))[0]
        text = Markup('<text class="tick x" x="{:.1f}" y="{:.0f}">{}</text>')
        parts.append(text.format(x, base + 15, short(value)))
    parts.append(
        Markup('<line class="axis" x1="{:.0f}" x2="{:.1f}" y1="{:.0f}" y2="{:.0f}"/>').format(
            LEFT, frame.right, base, base
        )
    )
    parts.append(
        Markup('<text class="tick x" x="{:.1f}" y="{:.0f}">{}</text>').format(
            (LEFT + frame.right) / 2, base + 30, x_name
        )
    )
    return Markup("").join(parts)


def _end_labels(frame: _Frame, ends: Sequence[tuple[float, str, str]]) -> Markup:
    """Labels right of the lines' ends, moved apart where they would touch."""
    ordered = sorted(ends)
    places: list[float] = []
    for y, _, _ in ordered:
        places.append(max(y + 4, places[-1] + LABEL_GAP) if places else y + 4)
    limit = HEIGHT - BOTTOM + 6
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - LABEL_GAP
    return Markup("").join(
        Markup('<text class="label {}" x="{:.1f}" y="{:.1f}">{}</text>').format(colour, frame.right + 8, place, text)
        for place, (_, text, colour) in zip(places, ordered, strict=True)
    )
