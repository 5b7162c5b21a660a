"""The ten kinds of things in the demo's pictures, drawn part by part.

Here: `KINDS`, a drawing function each, in label order. A thing fills the frame from -1 to 1; every part has a place and a look of its own,
left and right differ as above and below do, so that a glimpse of one part says where another must be.
Not here: surroundings and placing (scenes.py).
"""

import math
from collections.abc import Callable

import numpy as np

from wherefrom.pipeline.demo.pen import Look, Pen, circle, toned

__all__ = ["KINDS"]


def _face(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Hat with a feather left, parted hair, brows, eyes, glasses' glass on the right eye, nose, mouth, ring in the right ear, tie."""
    pen.shape(look.third, [(-0.8, 1.0), (-0.5, 0.72), (0.5, 0.72), (0.8, 1.0)])
    pen.shape(look.accent, [(-0.12, 0.74), (0.12, 0.74), (0.16, 1.0), (-0.16, 1.0)])
    pen.oval(look.second, (0, -0.12, 0.86, 0.7))
    pen.oval(toned(look.main, -0.12), (-0.76, 0.06, 0.14, 0.2), (0.76, 0.06, 0.14, 0.2))
    pen.disc(look.paper, (0.8, 0.32, 0.08))
    pen.oval(look.main, (0, 0.08, 0.7, 0.72))
    pen.shape(look.second, [(-0.66, -0.2), (-0.2, -0.62), (0.62, -0.3), (0.4, -0.46), (-0.1, -0.72), (-0.6, -0.5)])
    pen.box(look.accent, (-0.86, -0.66, 0.86, -0.52))
    pen.shape(look.accent, [(-0.56, -0.64), (-0.48, -0.96), (0.48, -0.96), (0.56, -0.64)])
    pen.flat.box(look.ink, (-0.55, -0.74, 0.55, -0.65))
    pen.shape(look.third, [(-0.5, -0.68), (-0.78, -0.98), (-0.62, -0.99), (-0.36, -0.7)])
    gaze = rng.uniform(-0.04, 0.04)
    for side in (-1, 1):
        pen.flat.oval(look.paper, (0.3 * side, 0.0, 0.15, 0.1))
        pen.flat.oval(look.ink, (0.3 * side + gaze, 0.01, 0.07, 0.08))
    pen.line(look.ink, 0.05, [(-0.46, -0.17), (-0.3, -0.24), (-0.14, -0.18)], [(0.14, -0.24), (0.46, -0.2)])
    pen.line(look.accent, 0.03, circle(0.3, 0.0, 0.2))
    pen.line(look.accent, 0.02, [(0.44, 0.14), (0.62, 0.6)])
    pen.shape(toned(look.main, -0.2), [(-0.02, 0.04), (0.14, 0.28), (-0.08, 0.28)])
    pen.flat.oval(look.third, (-0.42, 0.3, 0.1, 0.07), (0.42, 0.3, 0.1, 0.07))
    smile = rng.uniform(0.04, 0.14)
    pen.flat.shape(look.ink, [(-0.3, 0.44), (0, 0.44 + 0.3 * smile), (0.3, 0.44), (0.14, 0.46 + smile), (-0.14, 0.46 + smile)])
    pen.flat.box(look.paper, (-0.12, 0.46, 0.1, 0.5))


def _house(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Chimney with smoke right, weathercock left, round attic window, door left, window with flowers right, bricks, lamp."""
    pen.box(look.third, (0.4, -0.8, 0.62, -0.3))
    for step in range(3):
        pen.disc(toned(look.paper, -0.08 * step), (0.54 + 0.1 * step, -0.88 - 0.04 * step, 0.06 + 0.02 * step))
    pen.line(look.ink, 0.04, [(-0.6, -0.25), (-0.6, -0.9)])
    pen.shape(look.accent, [(-0.78, -0.8), (-0.5, -0.98), (-0.5, -0.8)])
    pen.box(look.main, (-0.78, -0.12, 0.78, 0.94))
    mortar = toned(look.main, -0.25)
    for row, y in enumerate(np.arange(-0.02, 0.9, 0.16)):
        pen.line(mortar, 0.012, [(-0.76, y), (0.76, y)], *([(x, y), (x, y + 0.16)] for x in np.arange(-0.7 + 0.14 * (row % 2), 0.76, 0.28)))
    pen.shape(look.second, [(-1.0, -0.08), (-0.08, -0.8), (0.08, -0.8), (1.0, -0.08)])
    rows = ((0.98 + 1.24 * (y + 0.08), y) for y in (-0.24, -0.42, -0.6))
    pen.line(toned(look.second, -0.3), 0.025, *([(-half, y), (half, y)] for half, y in rows))
    pen.flat.disc(look.paper, (0, -0.38, 0.17))
    pen.line(look.ink, 0.03, [(-0.17, -0.38), (0.17, -0.38)], [(0, -0.55), (0, -0.21)])
    pen.box(look.third, (-0.62, 0.26, -0.18, 0.94))
    pen.flat.box(look.paper, (-0.52, 0.36, -0.28, 0.56))
    pen.flat.disc(look.ink, (-0.25, 0.66, 0.04))
    pen.box(look.accent, (-0.72, 0.9, -0.08, 1.0))
    pen.line(look.ink, 0.03, [(-0.05, 0.2), (0.02, 0.2)])
    pen.oval(look.paper, (-0.02, 0.3, 0.06, 0.08))
    pen.flat.box(look.paper, (0.18, 0.16, 0.62, 0.56))
    pen.line(look.ink, 0.035, [(0.4, 0.16), (0.4, 0.56)], [(0.18, 0.36), (0.62, 0.36)])
    pen.box(look.accent, *((x, 0.14, x + 0.1, 0.58) for x in (0.06, 0.64)))
    pen.box(look.third, (0.12, 0.58, 0.68, 0.68))
    pen.flat.disc(look.second, *((x, 0.56 + rng.uniform(-0.02, 0.02), 0.05) for x in (0.2, 0.33, 0.46, 0.59)))


def _car(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Heading right: exhaust and aerial left, luggage on the roof, passenger and driver, door, lamp and bumper right, two unlike wheels."""
    for step in range(3):
        pen.disc(toned(look.paper, -0.1 * step), (-0.9 - 0.03 * step, 0.55 - 0.16 * step, 0.06 + 0.02 * step))
    pen.line(look.ink, 0.03, [(-0.7, -0.1), (-0.86, -0.8)])
    pen.disc(look.accent, (-0.86, -0.82, 0.06))
    pen.box(look.third, (-0.42, -0.84, -0.02, -0.58))
    pen.flat.box(look.paper, (-0.28, -0.84, -0.18, -0.58))
    pen.box(look.accent, (0.04, -0.76, 0.26, -0.58))
    pen.shape(look.second, [(-0.66, 0.02), (-0.5, -0.56), (0.34, -0.56), (0.62, 0.02)])
    pen.flat.shape(look.paper, [(-0.54, -0.04), (-0.43, -0.46), (-0.1, -0.46), (-0.1, -0.04)])
    pen.flat.shape(look.paper, [(0.0, -0.04), (0.0, -0.46), (0.28, -0.46), (0.48, -0.04)])
    pen.oval(look.accent, (-0.32, -0.2, 0.11, 0.14))
    pen.oval(look.third, (0.12, -0.22, 0.11, 0.14))
    pen.line(look.ink, 0.04, [(0.26, -0.04), (0.34, -0.2)])
    pen.shape(look.main, [(-0.96, 0.56), (-0.94, 0.04), (-0.6, -0.06), (0.62, -0.04), (0.94, 0.14), (0.98, 0.56)])
    pen.flat.box(look.accent, (-0.96, 0.28, 0.96, 0.35))
    pen.line(look.ink, 0.025, [(-0.05, 0.0), (-0.05, 0.52)], [(0.5, 0.0), (0.42, 0.5)])
    pen.flat.box(look.ink, (0.02, 0.12, 0.18, 0.17))
    pen.oval(look.paper, (0.87, 0.22, 0.08, 0.1))
    pen.box(look.third, (-0.97, 0.1, -0.86, 0.26))
    pen.box(look.ink, (0.84, 0.44, 1.0, 0.56), (-1.0, 0.44, -0.84, 0.56))
    start = rng.uniform(0, 2 * math.pi)
    for x, spokes in ((-0.54, 3), (0.56, 6)):
        pen.oval(look.ink, (x, 0.62, 0.3, 0.36))
        pen.flat.oval(look.paper, (x, 0.62, 0.17, 0.2))
        for turn in range(spokes):
            angle = start + 2 * math.pi * turn / spokes
            pen.line(look.third, 0.04, [(x, 0.62), (x + 0.17 * math.cos(angle), 0.62 + 0.2 * math.sin(angle))])


def _clock(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Alarm clock: two bells and a hammer above, four unlike quarter marks, hands at any hour, small seconds dial, key right, feet."""
    pen.shape(look.third, *([(0.4 * side, 0.6), (0.78 * side, 1.0), (0.6 * side, 1.0), (0.24 * side, 0.7)] for side in (-1, 1)))
    pen.shape(look.second, [(-0.82, -0.5), (-0.74, -0.84), (-0.4, -0.94), (-0.24, -0.7)])
    pen.shape(look.accent, [(0.82, -0.5), (0.74, -0.84), (0.4, -0.94), (0.24, -0.7)])
    pen.line(look.ink, 0.05, [(0, -0.7), (0.06, -0.9)])
    pen.box(look.third, (-0.06, -1.0, 0.2, -0.88))
    pen.box(look.ink, (0.82, -0.1, 0.92, 0.1))
    pen.oval(look.third, (0.94, 0.0, 0.06, 0.18))
    pen.oval(look.main, (0, 0.06, 0.84, 0.8))
    pen.flat.oval(look.paper, (0, 0.06, 0.68, 0.65))
    for hour in range(12):
        angle = math.pi * hour / 6
        x, y = 0.56 * math.sin(angle), 0.06 - 0.54 * math.cos(angle)
        if hour % 3:
            pen.line(look.ink, 0.035, [(x, y), (1.1 * x, 0.06 + 1.1 * (y - 0.06))])
    pen.flat.shape(look.accent, [(0, -0.58), (0.09, -0.47), (0, -0.36), (-0.09, -0.47)])
    pen.flat.box(look.second, (0.46, 0.0, 0.62, 0.12))
    pen.flat.disc(look.third, (0, 0.6, 0.08))
    pen.flat.shape(look.ink, [(-0.62, 0.06), (-0.46, -0.04), (-0.46, 0.16)])
    pen.flat.disc(toned(look.paper, -0.2), (0, 0.34, 0.13))
    for length, width, color in ((0.34, 0.08, look.ink), (0.48, 0.055, look.ink), (0.5, 0.02, look.third)):
        angle = rng.uniform(0, 2 * math.pi)
        pen.line(color, width, [(0, 0.06), (length * math.sin(angle), 0.06 - length * math.cos(angle))])
    pen.flat.disc(look.accent, (0, 0.06, 0.06))


def _fish(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Heading left: bubbles, mouth, eye and gill left, crown fin above, scales, belly fin, striped tail right, weed below it."""
    pen.disc(look.paper, (-0.92, -0.3, 0.05), (-0.84, -0.56, 0.08), (-0.94, -0.82, 0.1))
    for x, top in ((0.66, 0.5), (0.8, 0.34), (0.94, 0.56)):
        pen.line(look.third, 0.07, [(x, 1.0), (x + 0.06, 0.85), (x - 0.06, 0.7), (x, top)])
    pen.shape(look.second, [(0.45, 0.0), (1.0, -0.62), (0.86, 0.0), (1.0, 0.56)])
    pen.line(look.ink, 0.035, *([(0.66, 0.5 * y), (0.94, 1.1 * y)] for y in (-0.36, -0.14, 0.1, 0.32)))
    pen.shape(look.accent, [(-0.34, -0.44), (-0.26, -0.9), (-0.02, -0.74), (0.1, -0.95), (0.26, -0.66), (0.4, -0.34)])
    pen.shape(look.accent, [(-0.1, 0.42), (0.06, 0.92), (0.3, 0.74), (0.26, 0.36)])
    pen.oval(look.main, (-0.16, 0.0, 0.76, 0.56))
    for column, x in enumerate(np.arange(-0.16, 0.46, 0.15)):
        for y in np.arange(-0.34 + 0.09 * (column % 2), 0.4, 0.18):
            if ((x + 0.16) / 0.68) ** 2 + (y / 0.5) ** 2 < 0.8:
                pen.line(toned(look.main, -0.4), 0.025, [(x - 0.06, y - 0.08), (x + 0.04, y), (x - 0.06, y + 0.08)])
    pen.line(look.second, 0.06, [(-0.4, -0.44), (-0.28, -0.2), (-0.26, 0.12), (-0.36, 0.44)])
    pen.shape(look.third, [(-0.24, 0.06), (0.1, 0.3 + rng.uniform(-0.06, 0.06)), (-0.16, 0.36)])
    pen.flat.disc(look.paper, (-0.58, -0.16, 0.15))
    pen.flat.disc(look.ink, (-0.6 + rng.uniform(-0.03, 0.03), -0.15, 0.075))
    pen.line(look.ink, 0.05, [(-0.86, 0.16), (-0.7, 0.22), (-0.6, 0.14)])
    pen.flat.oval(look.third, (-0.5, 0.14, 0.07, 0.05))


def _tree(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Roots, trunk with a hollow, apples in the left crown, a nest above, a bird house right, a swing below it, ladder left."""
    pen.shape(look.second, [(-0.2, 1.0), (-0.14, 0.1), (0.14, 0.1), (0.2, 1.0)])
    pen.shape(look.second, *([(x, 1.0), (0.4 * x, 0.7), (0.3 * x, 1.0)] for x in (-0.42, 0.4)))
    pen.line(toned(look.second, -0.2), 0.1, [(0.08, 0.3), (0.72, 0.2)])
    pen.line(look.ink, 0.025, *([(x, 0.22), (x, 0.72)] for x in (0.44, 0.68)))
    pen.box(look.accent, (0.36, 0.7, 0.76, 0.78))
    pen.line(look.third, 0.04, *([(x - 0.1, 1.0), (x, 0.1)] for x in (-0.5, -0.34)))
    pen.line(look.third, 0.04, *([(-0.5 - 0.11 * (y - 0.1), y), (-0.34 - 0.11 * (y - 0.1), y)] for y in (0.28, 0.46, 0.64, 0.82)))
    blobs = ((-0.56, -0.1, 0.4), (0.58, -0.12, 0.38), (-0.36, -0.52, 0.38), (0.38, -0.54, 0.36), (0.0, -0.22, 0.46), (0.0, -0.68, 0.3))
    pen.oval(look.main, *((x + rng.uniform(-0.03, 0.03), y, radius, 0.85 * radius) for x, y, radius in blobs))
    apples = ((-0.72, -0.08), (-0.5, 0.08), (-0.46, -0.28), (-0.24, -0.02), (-0.58, -0.54), (-0.24, -0.42))
    pen.disc(look.accent, *((x, y, 0.075) for x, y in apples))
    pen.shape(look.third, [(-0.16, -0.82), (0.2, -0.82), (0.12, -0.68), (-0.08, -0.68)])
    pen.flat.oval(look.paper, *((x, -0.86, 0.06, 0.08) for x in (-0.06, 0.04, 0.12)))
    pen.box(look.paper, (0.32, -0.42, 0.66, -0.02))
    pen.shape(look.accent, [(0.26, -0.4), (0.49, -0.64), (0.72, -0.4)])
    pen.flat.disc(look.ink, (0.49, -0.26, 0.08))
    pen.line(look.ink, 0.04, [(0.49, -0.1), (0.49, 0.02)])
    pen.flat.oval(look.ink, (0.0, 0.5, 0.09, 0.13))
    pen.line(look.ink, 0.025, [(-0.08, 0.8), (-0.04, 0.68)], [(0.06, 0.9), (0.08, 0.72)])


def _boat(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Heading left: flag on the mast, jib left, striped mainsail right, cabin, portholes, anchor left, rudder right, waves."""
    pen.line(look.ink, 0.06, [(-0.08, 0.36), (-0.08, -0.98)])
    pen.shape(look.accent, [(-0.06, -0.98), (0.26, -0.9), (-0.06, -0.8)])
    pen.shape(look.second, [(-0.14, -0.76), (-0.14, 0.2), (-0.78, 0.2)])
    pen.flat.disc(look.ink, (-0.32, -0.02, 0.09))
    pen.shape(look.third, [(0.0, -0.74), (0.84, 0.2), (0.0, 0.2)])
    pen.line(look.paper, 0.05, *([(0.0, y), (0.84 * (y + 0.74) / 0.94, y)] for y in (-0.46, -0.22, 0.02)))
    pen.flat.box(look.accent, (0.14, -0.16, 0.3, 0.0))
    pen.box(look.paper, (0.1, 0.24, 0.62, 0.44))
    pen.flat.box(look.ink, *((x, 0.28, x + 0.12, 0.38) for x in (0.18, 0.4)))
    pen.box(look.accent, (0.9, 0.42, 0.98, 0.94))
    pen.shape(look.main, [(-0.96, 0.38), (0.92, 0.38), (0.74, 0.86), (-0.62, 0.86)])
    pen.flat.shape(look.second, [(-0.94, 0.44), (0.9, 0.44), (0.88, 0.52), (-0.9, 0.52)])
    for x in (-0.2, 0.1, 0.4):
        pen.flat.disc(look.paper, (x, 0.64, 0.075))
        pen.flat.disc(look.ink, (x, 0.64, 0.04))
    pen.line(look.ink, 0.045, [(-0.66, 0.52), (-0.66, 0.78)], [(-0.78, 0.68), (-0.66, 0.8), (-0.54, 0.68)])
    pen.line(look.accent, 0.05, [(-0.94, 0.36), (-1.0, 0.16)])
    wave = look.paper if rng.random() < 0.5 else look.ink
    for x in np.arange(-0.95, 0.9, 0.32):
        pen.line(wave, 0.04, [(x, 0.96), (x + 0.08, 0.88), (x + 0.16, 0.96), (x + 0.24, 0.9), (x + 0.3, 0.96)])


def _flower(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Pot, stem, broad leaf left, fern right, petals (light above, dark below) about a heart that smiles, bee right, snail left."""
    pen.line(look.third, 0.09, [(0, 0.6), (rng.uniform(-0.06, 0.06), 0.2), (0, -0.2)])
    pen.shape(look.third, [(0, 0.44), (-0.3, 0.1), (-0.78, 0.12), (-0.5, 0.4)])
    pen.line(toned(look.third, -0.4), 0.03, [(0, 0.44), (-0.7, 0.16)])
    pen.line(look.third, 0.04, [(0, 0.5), (0.5, 0.16)])
    for share in (0.3, 0.5, 0.7, 0.9):
        x, y = 0.5 * share, 0.5 - 0.34 * share
        pen.flat.shape(look.third, [(x, y), (x + 0.06, y - 0.18), (x + 0.12, y - 0.04)])
        pen.flat.shape(look.third, [(x, y), (x + 0.16, y + 0.14), (x + 0.14, y + 0.02)])
    start = rng.uniform(-0.15, 0.15)
    for petal in range(9):
        angle = start + 2 * math.pi * petal / 9
        x, y = math.sin(angle), -math.cos(angle)
        pen.disc(toned(look.main, 0.35 if y < 0 else -0.25), (0.5 * x, -0.4 + 0.44 * y, 0.21))
    pen.oval(look.second, (0, -0.4, 0.32, 0.3))
    pen.flat.oval(look.ink, (-0.11, -0.47, 0.045, 0.06), (0.11, -0.47, 0.045, 0.06))
    pen.line(look.ink, 0.035, [(-0.14, -0.32), (-0.05, -0.25), (0.05, -0.25), (0.14, -0.32)])
    pen.shape(look.accent, [(-0.44, 0.62), (0.44, 0.62), (0.32, 1.0), (-0.32, 1.0)])
    pen.box(toned(look.accent, -0.2), (-0.5, 0.54, 0.5, 0.66))
    pen.flat.shape(look.paper, [(-0.38, 0.8), (-0.2, 0.72), (0, 0.8), (0.2, 0.72), (0.38, 0.8), (0.36, 0.88), (-0.36, 0.88)])
    pen.oval(look.paper, (0.78, -0.1, 0.16, 0.11))
    pen.line(look.ink, 0.05, [(0.74, -0.2), (0.74, 0.0)], [(0.84, -0.19), (0.84, -0.01)])
    pen.flat.oval(toned(look.paper, -0.15), (0.72, -0.24, 0.08, 0.12))
    pen.flat.disc(look.ink, (0.62, -0.1, 0.06))
    pen.box(look.second, (-0.94, 0.88, -0.56, 0.96))
    pen.disc(look.main, (-0.74, 0.76, 0.16))
    pen.flat.disc(look.ink, (-0.74, 0.76, 0.07))
    pen.line(look.second, 0.03, [(-0.92, 0.9), (-0.96, 0.7)])


def _train(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Heading left: lamp, plow, chimney with smoke, bell, banded boiler, cab with driver right, coal, one big wheel, rail."""
    drift = rng.uniform(0.1, 0.2)
    for step in range(4):
        pen.oval(toned(look.paper, -0.09 * step), (-0.56 + drift * step, -0.74 - 0.06 * step, 0.09 + 0.025 * step, 0.07 + 0.02 * step))
    pen.shape(look.third, [(-0.66, -0.14), (-0.62, -0.5), (-0.7, -0.64), (-0.42, -0.64), (-0.5, -0.5), (-0.46, -0.14)])
    pen.shape(look.accent, [(-0.2, -0.14), (-0.2, -0.26), (-0.1, -0.4), (0.0, -0.26), (0.0, -0.14)])
    pen.box(toned(look.second, -0.3), (0.72, 0.0, 1.0, 0.5))
    pen.disc(look.ink, (0.78, 0.0, 0.08), (0.87, -0.05, 0.08), (0.95, 0.0, 0.08))
    pen.box(look.main, (-0.84, -0.16, 0.3, 0.38))
    pen.flat.box(look.accent, *((x, -0.17, x + 0.06, 0.39) for x in (-0.62, -0.34, -0.06)))
    pen.oval(toned(look.main, -0.3), (-0.86, 0.1, 0.09, 0.28))
    pen.disc(look.paper, (-0.88, -0.16, 0.08))
    pen.box(look.second, (0.22, -0.5, 0.76, 0.5))
    pen.box(look.third, (0.14, -0.62, 0.84, -0.48))
    pen.flat.box(look.paper, (0.34, -0.36, 0.64, -0.02))
    pen.oval(look.accent, (0.48, -0.14, 0.09, 0.12))
    pen.flat.box(look.ink, (0.38, -0.3, 0.58, -0.24))
    pen.flat.box(look.accent, (0.36, 0.12, 0.62, 0.34))
    pen.box(look.third, (-0.88, 0.38, 0.98, 0.52))
    pen.shape(look.accent, [(-0.86, 0.5), (-1.0, 0.88), (-0.66, 0.88), (-0.7, 0.5)])
    for x, radius in ((-0.5, 0.17), (-0.12, 0.17), (0.42, 0.28), (0.84, 0.14)):
        pen.disc(look.ink, (x, 0.9 - radius, radius))
        pen.flat.disc(look.paper, (x, 0.9 - radius, 0.55 * radius))
        pen.flat.disc(look.ink, (x, 0.9 - radius, 0.2 * radius))
    pen.line(look.accent, 0.05, [(-0.5, 0.73), (-0.12, 0.73), (0.42, 0.66)])
    pen.line(look.ink, 0.05, [(-1.0, 0.94), (1.0, 0.94)])
    pen.flat.box(look.second, *((x - 0.06, 0.95, x + 0.06, 1.0) for x in np.arange(-0.9, 1.0, 0.3)))


def _butterfly(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Feelers above, ringed body, upper wings with an eye left and a square right, lower wings with stripes left and dots right, tails."""
    span = rng.uniform(0.9, 1.0)
    for side in (-1, 1):
        pen.shape(look.second, [(0, 0.1), (0.5 * side, 0.1), (0.84 * side, 0.44), (0.66 * side, 0.8), (0.3 * side, 0.74)])
        pen.shape(look.third, [(0.5 * side, 0.74), (0.66 * side, 0.76), (0.74 * side, 1.0)])
        edge = [(0.3 * side, -0.8), (0.8 * side, -0.92), (span * side, -0.6), (0.86 * side, -0.06), (0.4 * side, 0.18)]
        pen.shape(look.main, [(0, -0.2), *edge, (0, 0.1)])
        pen.line(look.ink, 0.025, [(0.1 * side, -0.16), (0.74 * side, -0.8)], [(0.1 * side, -0.02), (0.8 * side, -0.1)])
        pen.line(look.ink, 0.035, [(0.06 * side, -0.62), (0.14 * side, -0.86), (0.3 * side, -0.96)])
        pen.flat.disc(look.accent, (0.3 * side, -0.96, 0.05))
        pen.flat.disc(look.paper, (0.86 * side, -0.7, 0.06))
    pen.disc(look.third, (-0.56, -0.42, 0.2))
    pen.flat.disc(look.ink, (-0.56, -0.42, 0.1))
    pen.shape(look.accent, [(0.38, -0.42), (0.56, -0.62), (0.74, -0.42), (0.56, -0.22)])
    pen.flat.box(look.ink, (0.51, -0.47, 0.61, -0.37))
    pen.line(look.paper, 0.055, *([(x, 0.26), (x + 0.04, 0.66)] for x in (-0.64, -0.5, -0.36)))
    pen.flat.disc(look.paper, (0.36, 0.3, 0.065), (0.56, 0.3, 0.065), (0.42, 0.52, 0.065), (0.62, 0.54, 0.065))
    pen.oval(look.accent, (0, 0.12, 0.12, 0.6))
    pen.line(look.ink, 0.05, *([(-0.1, y), (0.1, y)] for y in (-0.1, 0.1, 0.3, 0.5)))
    pen.oval(look.third, (0, -0.54, 0.14, 0.15))
    pen.flat.oval(look.ink, (-0.06, -0.57, 0.035, 0.05), (0.06, -0.57, 0.035, 0.05))


KINDS: dict[str, Callable[[Pen, Look, np.random.Generator], None]] = {
    "face": _face,
    "house": _house,
    "car": _car,
    "clock": _clock,
    "fish": _fish,
    "tree": _tree,
    "boat": _boat,
    "flower": _flower,
    "train": _train,
    "butterfly": _butterfly,
}
