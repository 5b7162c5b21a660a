"""Little pictures of things in their surroundings.

Here: `render_scene`, one picture from (kind, generator, size), and `trace_scene`, what each of its pixels shows and how far away that is;
the surroundings, which keep their places: sun left, cloud right, ...
Colors, sizes, places, tilt, stretch and light are drawn at random; arrangements are not, so two glimpses tell how they lie to each other.
Not here: the things (things.py), the strokes (pen.py), files (shards.py).
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wherefrom.pipeline.demo.pen import Canvas, Color, Look, Pen, Point, Thing, circle, distinct_color, hsv, toned
from wherefrom.pipeline.demo.things import KINDS

__all__ = ["FARTHEST", "SHOWN", "SceneMasks", "render_scene", "trace_scene"]

SUPERSAMPLE = 2
FARTHEST, NEAREST = 10.0, 1.0  # of all that is shown: the sky, and what stands before everything; a unit of length that means nothing
SKY = {"sky": FARTHEST, "sun": 9.5, "cloud": 9.0, "bird": 8.5, "balloon": 8.0, "mountain": 7.5, "hill": 7.0, "fir": 6.5}  # how far away
HORIZON, FOREGROUND = 6.0, 1.5  # how far away the ground is where it begins and at the lower edge
GROUND = ("ground", "path", "grass")  # lie flat on it
STANDING = ("bush", "fence", "stones", "mushroom")  # stand upright on it
SHOWN = (*SKY, *GROUND, *STANDING, *KINDS)  # names of all things, in the order of `SceneMasks.classes`
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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SceneMasks:
    """What every pixel of a picture shows: of four pixels that were drawn for it, most."""

    classes: NDArray[np.uint8]  # (H, W), place in SHOWN
    instances: NDArray[np.uint8]  # (H, W), things in the order of depth: a higher number lies before a lower one
    parts: NDArray[np.uint8]  # (H, W), which of its thing's strokes; of one kind of thing the same number means the same part
    depth: NDArray[np.float32]  # (H, W), from NEAREST to FARTHEST


def render_scene(kind: str, rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """Draw one picture of a kind in its surroundings.

    Units:  size is (height, width) in pixels.
    Raises: ValueError if the kind is unknown.
    """
    canvas, _ = _drawn(kind, rng, size, traced=False)
    return canvas.image.reduce(SUPERSAMPLE)


def trace_scene(kind: str, rng: np.random.Generator, size: tuple[int, int]) -> SceneMasks:
    """Return what the pixels show of the picture that `render_scene` draws of the same.

    Raises: ValueError if the kind is unknown.
    """
    canvas, horizon = _drawn(kind, rng, size, traced=True)
    strokes = _most_of_four(canvas.seen())
    thing, part = np.array(canvas.strokes, np.uint8)[strokes].transpose(2, 0, 1)
    classes = np.array([SHOWN.index(name) for name, _ in canvas.things], np.uint8)[thing]
    full = float(SUPERSAMPLE * size[0])
    rows = (np.arange(size[0], dtype=np.float64) + 0.5) * SUPERSAMPLE
    ground = np.isin(classes, [SHOWN.index(name) for name in GROUND])
    depth = np.array([_depth(thing, horizon, full) for thing in canvas.things])[thing]
    depth = np.where(ground, _ground_depth(rows, horizon, full)[:, None], depth)
    return SceneMasks(classes=classes, instances=thing, parts=part, depth=depth.astype(np.float32))


def _most_of_four(drawn: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the number that two or more of every four pixels have, (2 H, 2 W) -> (H, W); where all differ, the upper left one."""
    a, b, c, d = (drawn[row::2, col::2] for row in (0, 1) for col in (0, 1))
    other = np.where((b == c) | (b == d), b, np.where(c == d, c, a))
    return np.where((a == b) | (a == c) | (a == d), a, other)


def _depth(thing: Thing, horizon: float, height: float) -> float:
    if thing.name in STANDING:
        return float(_ground_depth(np.array(thing.foot), horizon, height))
    return SKY.get(thing.name, NEAREST)


def _ground_depth(rows: NDArray[np.float64], horizon: float, height: float) -> NDArray[np.float64]:
    """Return how far away a plane is that is seen at rows of the canvas: in perspective, 1 / depth is linear in the row."""
    share = (rows - horizon).clip(min=0) / (height - horizon)
    return 1 / (1 / HORIZON + (1 / FOREGROUND - 1 / HORIZON) * share)


def _drawn(kind: str, rng: np.random.Generator, size: tuple[int, int], *, traced: bool) -> tuple[Canvas, float]:
    """Return a canvas with one picture, SUPERSAMPLE times as large, and the row of its horizon."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is unknown; the kinds are {', '.join(KINDS)}")
    height, width = size[0] * SUPERSAMPLE, size[1] * SUPERSAMPLE
    world = {
        name: hsv(rng.uniform(*hue) % 1, rng.uniform(*saturation), rng.uniform(*value)) for name, (hue, saturation, value) in COLORS.items()
    }
    canvas = Canvas((height, width), world["sky"], name="sky", traced=traced)
    pen = Pen(canvas=canvas, light=float(rng.uniform(0.15, 0.32)))
    horizon = _draw_surroundings(pen, rng, (width, height), world)
    look = Look.random(rng, avoid=(world["sky"], world["ground"]))
    outlined = replace(pen, outline=look.ink if rng.random() < 0.5 else None)
    half_x, half_y = rng.uniform(0.72, 0.95, size=2) * (width, height) / 2
    x = rng.uniform(half_x, width - half_x)
    y = rng.uniform(half_y, height - half_y)
    KINDS[kind](outlined.at(x, y, half_x, half_y, turn=rng.uniform(-0.18, 0.18)).drawing(kind), look, rng)
    return canvas, horizon


def _draw_surroundings(pen: Pen, rng: np.random.Generator, size: tuple[int, int], world: dict[str, Color]) -> float:
    """Draw what keeps its place: sun and mountain left, cloud and hill right, birds between; bush, path, fence, stones, grass below.

    Returns the row of the horizon.
    """
    width, height = size
    unit = min(width, height)
    horizon = height * rng.uniform(0.5, 0.66)

    def spot(name: str, x: float, y: float, half: float) -> Pen:
        x, y = np.array([x, y]) + rng.normal(0, 0.015, size=2)
        return pen.at(x * width, y * height, half * rng.uniform(0.85, 1.2) * unit).drawing(name)

    sun_x, sun_y = width * rng.uniform(0.08, 0.22), height * rng.uniform(0.08, 0.2)
    _draw_rays(pen, (sun_x, sun_y), reach=2.0 * max(size), count=22, color=toned(world["sky"], 0.3), turn=rng.random())
    _sun(pen.at(sun_x, sun_y, 0.1 * unit).drawing("sun"), world["sun"])
    _cloud(spot("cloud", 0.84, 0.13, 0.15), world["cloud"])
    _cloud(spot("cloud", 0.62, 0.05, 0.07), toned(world["cloud"], -0.08))
    for x, y, half in ((0.36, 0.07, 0.05), (0.47, 0.12, 0.04), (0.30, 0.17, 0.035)):
        _bird(spot("bird", x, y, half), world["bird"])
    _balloon(spot("balloon", 0.94, 0.34, 0.06), distinct_color(rng, [world["sky"]]), distinct_color(rng, [world["sky"]]))

    _mountain(pen.at(0.12 * width, horizon, 0.25 * unit).drawing("mountain"), world["rock"], toned(world["rock"], 0.75))
    pen.at(0.88 * width, horizon, 0.3 * unit).drawing("hill").oval(world["hill"], (0, 0.1, 1.0, 0.62))
    for x in (0.72, 0.82, 0.93):
        _fir(pen.at(x * width, horizon - 0.12 * unit, 0.06 * unit).drawing("fir"), toned(world["hill"], -0.4))

    ground = pen.drawing("ground")
    ground.flat.box(world["ground"], (0, horizon, width, height))
    vanishing = (width * rng.uniform(0.38, 0.62), horizon)
    _draw_furrows(ground, vanishing, size, toned(world["ground"], -0.18))
    _draw_path(pen.drawing("path"), vanishing, size, world["path"])
    blade = toned(world["ground"], -0.45)
    for depth in (0.12, 0.3, 0.52, 0.8):
        for x in np.arange(rng.uniform(0, 0.12), 1.0, 0.17):
            near = 0.012 + 0.03 * depth
            _tuft(pen.at(x * width, horizon + depth * (height - horizon), near * unit).drawing("grass"), blade)
    _bush(pen.at(0.08 * width, horizon + 0.07 * unit, 0.12 * unit).drawing("bush"), world["leaves"], distinct_color(rng, [world["leaves"]]))
    _fence(pen.at(0.86 * width, horizon + 0.09 * unit, 0.17 * unit, 0.1 * unit).drawing("fence"), world["wood"])
    _stones(spot("stones", 0.13, 0.94, 0.11), world["stone"])
    _mushroom(spot("mushroom", 0.92, 0.92, 0.06), toned(world["leaves"], 0.2), world["cloud"])
    return horizon


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
