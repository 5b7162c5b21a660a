"""Little pictures of things in their surroundings.

Here: `render_scene`, one picture from (kind, generator, size), and the surroundings, which keep their places: sun left, cloud right, ...
Colors, sizes, places, tilt, stretch and light are drawn at random; arrangements are not, so two glimpses tell how they lie to each other.
Not here: the things (things.py), the strokes (pen.py), files (shards.py).
"""

import math
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from wherefrom.pipeline.demo.pen import Color, Look, Pen, Point, circle, distinct_color, hsv, toned
from wherefrom.pipeline.demo.things import KINDS

__all__ = ["render_scene"]

SUPERSAMPLE = 2
COLORS = {  # of the surroundings -> ranges of hue (in turns), saturation and value: grass is some green, snow some white
    "sky": ((0.48, 0.72), (0.15, 0.55), (0.7, 1.0)),
    "ground": ((0.14, 0.4), (0.3, 0.65), (0.4, 0.75)),
    "sun": ((0.03, 0.16), (0.7, 1.0), (0.85, 1.0)),
    "cloud": ((0.0, 1.0), (0.0, 0.08), (0.88, 1.0)),
    "bird": ((0.0, 1.0), (0.2, 0.8), (0.1, 0.35)),
    "rock": ((0.6, 0.85), (0.15, 0.45), (0.35, 0.65)),
    "hill": ((0.28, 0.45), (0.35, 0.7), (0.3, 0.6)),
    "path": ((0.05, 0.12), (0.25, 0.55), (0.65, 0.9)),
    "leaves": ((0.85, 1.2), (0.4, 0.8), (0.4, 0.8)),
    "wood": ((0.0, 1.0), (0.0, 0.25), (0.75, 1.0)),
    "stone": ((0.5, 0.8), (0.0, 0.15), (0.4, 0.7)),
}


def render_scene(kind: str, rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Draw one picture of a kind in its surroundings.

    Units:  size is (height, width) in pixels.
    Raises: ValueError if the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; the kinds are {', '.join(KINDS)}")
    height, width = size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE
    world = {
        name: hsv(rng.uniform(*hue) % 1, rng.uniform(*saturation), rng.uniform(*value)) for name, (hue, saturation, value) in COLORS.items()
    }
    image = Image.new("RGB", (width, height), world["sky"])
    pen = Pen(draw=ImageDraw.Draw(image), light=float(rng.uniform(0.15, 0.32)))
    _draw_surroundings(pen, rng, (width, height), world)
    look = Look.random(rng, avoid=(world["sky"], world["ground"]))
    outlined = replace(pen, outline=look.ink if rng.random() < 0.5 else None)
    half_x, half_y = rng.uniform(0.72, 0.95, size=2) * (width, height) / 2
    x = rng.uniform(half_x, width - half_x)
    y = rng.uniform(half_y, height - half_y)
    KINDS[kind](outlined.at(x, y, half_x, half_y, turn=rng.uniform(-0.18, 0.18)), look, rng)
    return image.reduce(SUPERSAMPLE)


def _draw_surroundings(pen: Pen, rng: np.random.Generator, size: tuple[int, int], world: dict[str, Color]) -> None:
    """Draw what keeps its place: sun and mountain left, cloud and hill right, birds between; bush, path, fence, stones, grass below."""
    width, height = size
    unit = min(width, height)
    horizon = height * rng.uniform(0.5, 0.66)

    def spot(x: float, y: float, half: float) -> Pen:
        x, y = np.array([x, y]) + rng.normal(0, 0.015, size=2)
        return pen.at(x * width, y * height, half * rng.uniform(0.85, 1.2) * unit)

    sun_x, sun_y = width * rng.uniform(0.08, 0.22), height * rng.uniform(0.08, 0.2)
    _draw_rays(pen, (sun_x, sun_y), reach=2.0 * max(size), count=22, color=toned(world["sky"], 0.3), turn=rng.random())
    _sun(pen.at(sun_x, sun_y, 0.1 * unit), world["sun"])
    _cloud(spot(0.84, 0.13, 0.15), world["cloud"])
    _cloud(spot(0.62, 0.05, 0.07), toned(world["cloud"], -0.08))
    for x, y, half in ((0.36, 0.07, 0.05), (0.47, 0.12, 0.04), (0.30, 0.17, 0.035)):
        _bird(spot(x, y, half), world["bird"])
    _balloon(spot(0.94, 0.34, 0.06), distinct_color(rng, [world["sky"]]), distinct_color(rng, [world["sky"]]))

    _mountain(pen.at(0.12 * width, horizon, 0.25 * unit), world["rock"], toned(world["rock"], 0.75))
    pen.at(0.88 * width, horizon, 0.3 * unit).oval(world["hill"], (0, 0.1, 1.0, 0.62))
    for x in (0.72, 0.82, 0.93):
        _fir(pen.at(x * width, horizon - 0.12 * unit, 0.06 * unit), toned(world["hill"], -0.4))

    pen.flat.box(world["ground"], (0, horizon, width, height))
    vanishing = (width * rng.uniform(0.38, 0.62), horizon)
    _draw_furrows(pen, vanishing, size, toned(world["ground"], -0.18))
    _draw_path(pen, vanishing, size, world["path"])
    blade = toned(world["ground"], -0.45)
    for depth in (0.12, 0.3, 0.52, 0.8):
        for x in np.arange(rng.uniform(0, 0.12), 1.0, 0.17):
            near = 0.012 + 0.03 * depth
            _tuft(pen.at(x * width, horizon + depth * (height - horizon), near * unit), blade)
    _bush(pen.at(0.08 * width, horizon + 0.07 * unit, 0.12 * unit), world["leaves"], distinct_color(rng, [world["leaves"]]))
    _fence(pen.at(0.86 * width, horizon + 0.09 * unit, 0.17 * unit, 0.1 * unit), world["wood"])
    _stones(spot(0.13, 0.94, 0.11), world["stone"])
    _mushroom(spot(0.92, 0.92, 0.06), toned(world["leaves"], 0.2), world["cloud"])


def _draw_rays(pen: Pen, center: Point, *, reach: float, count: int, color: Color, turn: float) -> None:
    step = 2 * math.pi / count
    for angle in (np.arange(count) + turn) * step:
        edges = [(center[0] + reach * math.cos(a), center[1] + reach * math.sin(a)) for a in (angle, angle + step / 2)]
        pen.flat.shape(color, [center, *edges])


def _draw_furrows(pen: Pen, vanishing: Point, size: tuple[int, int], color: Color) -> None:
    width, height = size
    pen.flat.shape(color, *([vanishing, (x * width, height), ((x + 0.15) * width, height)] for x in np.arange(-2.1, 3.1, 0.34)))


def _draw_path(pen: Pen, vanishing: Point, size: tuple[int, int], color: Color) -> None:
    width, height = size
    left, right = 0.3 * width, 0.66 * width
    pen.flat.shape(color, [vanishing, (left, height), (right, height)])
    for share in (0.25, 0.42, 0.62, 0.86):
        y = vanishing[1] + share * (height - vanishing[1])
        x0, x1 = (vanishing[0] + share * (x - vanishing[0]) for x in (left, right))
        pen.line(toned(color, -0.35), 0.012 * height * (0.5 + share), [(x0, y), (x1, y)])


def _sun(pen: Pen, color: Color) -> None:
    for x, y in circle(0, 0, corners=12):
        pen.line(color, 0.22, [(1.1 * x, 1.1 * y), (1.6 * x, 1.6 * y)])
    pen.disc(color, (0, 0, 0.9))


def _cloud(pen: Pen, color: Color) -> None:
    for x, y, radius in ((-0.6, 0.15, 0.42), (0.65, 0.2, 0.36), (0.2, -0.15, 0.55), (-0.15, 0.25, 0.45)):
        pen.oval(color, (x, y, radius, 0.8 * radius))


def _bird(pen: Pen, color: Color) -> None:
    pen.line(color, 0.28, [(-1, -0.5), (-0.5, -0.7), (0, 0), (0.5, -0.7), (1, -0.5)])


def _balloon(pen: Pen, skin: Color, stripe: Color) -> None:
    pen.oval(skin, (0, -0.4, 1.0, 1.15))
    pen.flat.oval(stripe, (0, -0.4, 0.35, 1.15))
    pen.line(stripe, 0.1, [(-0.5, 0.55), (-0.25, 1.2)], [(0.5, 0.55), (0.25, 1.2)])
    pen.box(stripe, (-0.3, 1.2, 0.3, 1.6))


def _mountain(pen: Pen, rock: Color, snow: Color) -> None:
    for x, half, top in ((0.75, 0.7, -0.75), (-0.1, 0.9, -1.15)):
        pen.shape(rock, [(x - half, 0), (x, top), (x + half, 0)])
        pen.shape(snow, [(x - 0.3 * half, 0.7 * top), (x, top), (x + 0.3 * half, 0.7 * top), (x, 0.8 * top)])


def _fir(pen: Pen, color: Color) -> None:
    pen.shape(color, [(-0.6, 0.6), (0, -1), (0.6, 0.6)])
    pen.box(color, (-0.12, 0.6, 0.12, 1.0))


def _tuft(pen: Pen, color: Color) -> None:
    pen.line(color, 0.3, *([(0.3 * x, 0.6), (x, -0.9)] for x in (-0.8, 0.0, 0.8)))


def _bush(pen: Pen, leaves: Color, berries: Color) -> None:
    pen.disc(leaves, (-0.5, 0.1, 0.6), (0.5, 0.15, 0.55), (0, -0.35, 0.65))
    pen.disc(berries, *((x, y, 0.12) for x, y in ((-0.6, 0.0), (-0.1, -0.5), (0.4, -0.1), (0.0, 0.2), (0.7, 0.3))))


def _fence(pen: Pen, color: Color) -> None:
    pen.flat.box(toned(color, -0.2), (-1, -0.35, 1, -0.15), (-1, 0.35, 1, 0.55))
    for x in (-0.85, -0.42, 0.0, 0.42, 0.85):
        pen.shape(color, [(x - 0.12, 0.9), (x - 0.12, -0.6), (x, -0.9), (x + 0.12, -0.6), (x + 0.12, 0.9)])


def _stones(pen: Pen, color: Color) -> None:
    pen.oval(
        color,
        *((x, y, radius, 0.7 * radius) for x, y, radius in ((-0.6, 0.1, 0.45), (0.15, 0.2, 0.35), (0.7, 0.3, 0.22), (-0.15, -0.3, 0.25))),
    )


def _mushroom(pen: Pen, cap: Color, dots: Color) -> None:
    pen.box(toned(dots, 0.3), (-0.25, -0.1, 0.25, 0.9))
    pen.shape(cap, [(-0.9, 0), (-0.6, -0.6), (0, -0.85), (0.6, -0.6), (0.9, 0)])
    pen.flat.disc(dots, *((x, y, 0.13) for x, y in ((-0.4, -0.25), (0.05, -0.55), (0.4, -0.25))))
