"""Flat colored shapes, lit from the left, on a Pillow canvas.

Here: `Canvas`, a picture and on request what each of its pixels shows; `Pen`, which draws in a frame of its own; `Look`, the colors of
one thing; how colors are drawn so that neighbors differ.
Not here: what is drawn (scenes.py).
Rule: a color is flat within a part and knows nothing of the place in the picture; only shapes say where they are.
"""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

__all__ = ["Canvas", "Color", "Look", "Pen", "Point", "Thing", "circle", "distinct_color", "hsv", "toned"]

Color = tuple[int, int, int]  # red, green, blue, 0 to 255
Point = tuple[float, float]  # (x, y)
Points = Sequence[Point] | NDArray[np.float64]

FAR_APART = 110.0  # distance in RGB from which two colors count as distinct


class Thing(NamedTuple):
    """One of the things on a canvas."""

    name: str
    foot: float  # the row of the canvas where its frame ends below, canvas pixels


class Canvas:
    """A picture to draw on; traced, the number of the stroke that is seen at every pixel beside it, drawn by the same calls.

    Things are numbered as they are begun, what is there before them is thing 0; of two at one place the one of the higher number is seen.
    """

    def __init__(self, size: tuple[int, int], color: Color, *, name: str, traced: bool = False) -> None:
        """size: (height, width) in pixels; the whole canvas is the first stroke, of the thing `name`."""
        height, width = size
        self.image = Image.new("RGB", (width, height), color)
        self._draw = ImageDraw.Draw(self.image)
        self._traced = Image.new("I", (width, height), 0) if traced else None
        self._trace = None if self._traced is None else ImageDraw.Draw(self._traced)
        self.things = [Thing(name, float(height))]
        self.strokes = [(0, 0)]  # of every stroke its thing, and which of the thing's strokes it is
        self._strokes_of = [1]  # things

    def seen(self) -> NDArray[np.int32]:
        """Return the number of the stroke that is seen at every pixel, (H, W); of a traced canvas alone."""
        assert self._traced is not None
        return np.array(self._traced, np.int32)

    def begin_thing(self, name: str, foot: float) -> int:
        """Return the number of a new thing."""
        self.things.append(Thing(name, foot))
        self._strokes_of.append(0)
        return len(self.things) - 1

    def begin_stroke(self, thing: int) -> None:
        """Let what is drawn next be a new stroke of a thing."""
        self.strokes.append((thing, self._strokes_of[thing]))
        self._strokes_of[thing] += 1

    def polygon(self, xy: list[float], color: Color) -> None:
        """Fill a polygon, x and y of its corners in turn."""
        self._draw.polygon(xy, fill=color)
        if self._trace is not None:
            self._trace.polygon(xy, fill=len(self.strokes) - 1)

    def line(self, xy: list[float], color: Color, width: int) -> None:
        """Draw a line, x and y of its corners in turn."""
        self._draw.line(xy, fill=color, width=width, joint="curve")
        if self._trace is not None:
            self._trace.line(xy, fill=len(self.strokes) - 1, width=width, joint="curve")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pen:
    """Draws in a frame of its own: x right, y down, a thing fills -1 to 1."""

    canvas: Canvas
    thing: int = 0  # of the canvas, that it draws
    light: float = 0.0  # how much lighter a part's left and darker its right is, 0 to 1
    outline: Color | None = None
    origin: Point = (0.0, 0.0)  # of the own frame, canvas pixels
    right: Point = (1.0, 0.0)  # one own unit of x, canvas pixels
    down: Point = (0.0, 1.0)  # one own unit of y, canvas pixels

    def at(self, x: float, y: float, half_x: float, half_y: float | None = None, *, turn: float = 0.0) -> "Pen":
        """Return a pen whose frame lies about (x, y) of this one; turn in radians, clockwise as seen."""
        half_y = half_x if half_y is None else half_y
        cos, sin = math.cos(turn), math.sin(turn)
        steps = [(x, y), (x + cos * half_x, y + sin * half_x), (x - sin * half_y, y + cos * half_y)]
        (x0, y0), (x1, y1), (x2, y2) = self._on_canvas(steps).tolist()
        return replace(self, origin=(x0, y0), right=(x1 - x0, y1 - y0), down=(x2 - x0, y2 - y0))

    def drawing(self, name: str) -> "Pen":
        """Return the same pen, to draw a new thing in its frame."""
        foot = self.origin[1] + abs(self.right[1]) + abs(self.down[1])
        return replace(self, thing=self.canvas.begin_thing(name, foot))

    @property
    def flat(self) -> "Pen":
        """The same pen without light."""
        return replace(self, light=0.0)

    def shape(self, color: Color, *polygons: Points) -> None:
        """Fill polygons, the left edge of each lighter and its right third darker."""
        self.canvas.begin_stroke(self.thing)
        for points in polygons:
            self._fill(points, color)
            if self.light:
                xs = [x for x, _ in points]
                low, high = min(xs), max(xs)
                self._fill(_clipped(points, low + 0.64 * (high - low), side=1), toned(color, -self.light))
                self._fill(_clipped(points, low + 0.16 * (high - low), side=-1), toned(color, self.light))
            self._contour(points)

    def box(self, color: Color, *corners: tuple[float, float, float, float]) -> None:
        """Fill rectangles, (x0, y0, x1, y1) each."""
        self.shape(color, *([(x0, y0), (x1, y0), (x1, y1), (x0, y1)] for x0, y0, x1, y1 in corners))

    def disc(self, color: Color, *circles: tuple[float, float, float]) -> None:
        """Fill circles, (x, y, radius) each, lit like balls."""
        self.oval(color, *((x, y, radius, radius) for x, y, radius in circles))

    def oval(self, color: Color, *ellipses: tuple[float, float, float, float]) -> None:
        """Fill ellipses, (x, y, radius_x, radius_y) each, lit like balls: a shadow on the right, a gleam at the upper left."""
        self.canvas.begin_stroke(self.thing)
        for x, y, radius_x, radius_y in ellipses:
            center, radii = np.array([x, y]), np.array([radius_x, radius_y])
            rim = circle(0, 0) * radii + center
            self._fill(rim, toned(color, -self.light))
            if self.light:
                self._fill(circle(-0.14, -0.04, 0.84) * radii + center, color)
                self._fill(circle(-0.42, -0.40, 0.26) * radii + center, toned(color, self.light))
            if radius_x > 0.06:
                self._contour(rim)

    def line(self, color: Color, width: float, *paths: Points) -> None:
        """Draw lines through points; their width in units of this frame, one canvas pixel at least."""
        self.canvas.begin_stroke(self.thing)
        self._line(color, width, *paths)

    def _line(self, color: Color, width: float, *paths: Points) -> None:
        unit = math.sqrt(abs(self.right[0] * self.down[1] - self.right[1] * self.down[0]))
        for points in paths:
            self.canvas.line(self._on_canvas(points).ravel().tolist(), color, max(1, round(width * unit)))

    def _contour(self, points: Points) -> None:
        if self.outline is not None:
            self._line(self.outline, 0.02, [*points, points[0]])

    def _fill(self, points: Points, color: Color) -> None:
        if len(points) >= 3:
            self.canvas.polygon(self._on_canvas(points).ravel().tolist(), color)

    def _on_canvas(self, points: Points) -> NDArray[np.float64]:
        return np.asarray(points, dtype=np.float64) @ (self.right, self.down) + self.origin


def circle(x: float, y: float, radius: float = 1.0, *, corners: int = 28) -> NDArray[np.float64]:
    """Return the corners of a polygon that stands for a circle: (corners, 2)."""
    angles = np.linspace(0, 2 * math.pi, corners, endpoint=False)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radius + (x, y)


def _clipped(points: Points, x: float, *, side: int) -> list[Point]:
    """Return the part of a polygon right (side 1) or left (side -1) of a vertical line.

    Source: Sutherland and Hodgman, Reentrant polygon clipping, 1974.
    """
    inside: list[Point] = []
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
        if side * (x0 - x) >= 0:
            inside.append((x0, y0))
        if (x0 - x) * (x1 - x) < 0:
            inside.append((x, y0 + (y1 - y0) * (x - x0) / (x1 - x0)))
    return inside


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """The colors of one thing: four of any hue for its parts, two for its details, of which either may be the dark one."""

    main: Color
    second: Color
    third: Color
    accent: Color
    ink: Color
    paper: Color

    @classmethod
    def random(cls, rng: np.random.Generator, *, avoid: Sequence[Color]) -> "Look":
        """Draw a look whose main and second colors stand out against the colors to avoid."""
        main = distinct_color(rng, avoid)
        second = distinct_color(rng, [*avoid, main])
        third = distinct_color(rng, [main, second])
        accent = distinct_color(rng, [main, second, third])
        dark = hsv(rng.random(), rng.uniform(0.2, 0.8), rng.uniform(0.08, 0.24))
        bright = hsv(rng.random(), rng.uniform(0.02, 0.2), rng.uniform(0.9, 1.0))
        ink, paper = (dark, bright) if rng.random() < 0.5 else (bright, dark)
        return cls(main=main, second=second, third=third, accent=accent, ink=ink, paper=paper)


def hsv(hue: float, saturation: float, value: float) -> Color:
    """Return the color of a hue (in turns), a saturation and a value, each 0 to 1."""
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return (round(255 * red), round(255 * green), round(255 * blue))


def toned(color: Color, by: float) -> Color:
    """Return the color lightened towards white (by > 0) or darkened towards black (by < 0); by is -1 to 1."""
    goal = 255 if by > 0 else 0
    red, green, blue = (round(channel + (goal - channel) * abs(by)) for channel in color)
    return (red, green, blue)


def distinct_color(rng: np.random.Generator, others: Sequence[Color]) -> Color:
    """Draw eight colors; return the first that is far from all others, else the farthest."""
    colors = [hsv(rng.random(), rng.uniform(0.25, 0.9), rng.uniform(0.3, 1.0)) for _ in range(8)]
    gaps = [min(math.dist(color, other) for other in others) for color in colors]
    return next((color for color, gap in zip(colors, gaps, strict=True) if gap > FAR_APART), colors[int(np.argmax(gaps))])
