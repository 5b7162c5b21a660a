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
    flat = pen.flat()
    pen.shape([(-0.8, 1.0), (-0.5, 0.72), (0.5, 0.72), (0.8, 1.0)], look.third)
    pen.shape([(-0.12, 0.74), (0.12, 0.74), (0.16, 1.0), (-0.16, 1.0)], look.accent)
    pen.oval(0, -0.12, 0.86, 0.7, look.second)
    for side in (-1, 1):
        pen.oval(0.76 * side, 0.06, 0.14, 0.2, toned(look.main, -0.12))
    pen.disc(0.8, 0.32, 0.08, look.paper)
    pen.oval(0, 0.08, 0.7, 0.72, look.main)
    pen.shape([(-0.66, -0.2), (-0.2, -0.62), (0.62, -0.3), (0.4, -0.46), (-0.1, -0.72), (-0.6, -0.5)], look.second)
    pen.box(-0.86, -0.66, 0.86, -0.52, look.accent)
    pen.shape([(-0.56, -0.64), (-0.48, -0.96), (0.48, -0.96), (0.56, -0.64)], look.accent)
    flat.box(-0.55, -0.74, 0.55, -0.65, look.ink)
    pen.shape([(-0.5, -0.68), (-0.78, -0.98), (-0.62, -0.99), (-0.36, -0.7)], look.third)
    gaze = rng.uniform(-0.04, 0.04)
    for side in (-1, 1):
        flat.oval(0.3 * side, 0.0, 0.15, 0.1, look.paper)
        flat.oval(0.3 * side + gaze, 0.01, 0.07, 0.08, look.ink)
    pen.line([(-0.46, -0.17), (-0.3, -0.24), (-0.14, -0.18)], 0.05, look.ink)
    pen.line([(0.14, -0.24), (0.46, -0.2)], 0.05, look.ink)
    pen.line(circle(0.3, 0.0, 0.2), 0.03, look.accent)
    pen.line([(0.44, 0.14), (0.62, 0.6)], 0.02, look.accent)
    pen.shape([(-0.02, 0.04), (0.14, 0.28), (-0.08, 0.28)], toned(look.main, -0.2))
    for side in (-1, 1):
        flat.oval(0.42 * side, 0.3, 0.1, 0.07, look.third)
    smile = rng.uniform(0.04, 0.14)
    flat.shape([(-0.3, 0.44), (0, 0.44 + 0.3 * smile), (0.3, 0.44), (0.14, 0.46 + smile), (-0.14, 0.46 + smile)], look.ink)
    flat.box(-0.12, 0.46, 0.1, 0.5, look.paper)


def _house(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Chimney with smoke right, weathercock left, round attic window, door left, window with flowers right, bricks, lamp."""
    flat = pen.flat()
    pen.box(0.4, -0.8, 0.62, -0.3, look.third)
    for step in range(3):
        pen.disc(0.54 + 0.1 * step, -0.88 - 0.04 * step, 0.06 + 0.02 * step, toned(look.paper, -0.08 * step))
    pen.line([(-0.6, -0.25), (-0.6, -0.9)], 0.04, look.ink)
    pen.shape([(-0.78, -0.8), (-0.5, -0.98), (-0.5, -0.8)], look.accent)
    pen.box(-0.78, -0.12, 0.78, 0.94, look.main)
    mortar = toned(look.main, -0.25)
    for row, y in enumerate(np.arange(-0.02, 0.9, 0.16)):
        pen.line([(-0.76, y), (0.76, y)], 0.012, mortar)
        for x in np.arange(-0.7 + 0.14 * (row % 2), 0.76, 0.28):
            pen.line([(x, y), (x, y + 0.16)], 0.012, mortar)
    pen.shape([(-1.0, -0.08), (-0.08, -0.8), (0.08, -0.8), (1.0, -0.08)], look.second)
    for y in (-0.24, -0.42, -0.6):
        half = 0.98 + 1.24 * (y + 0.08)
        pen.line([(-half, y), (half, y)], 0.025, toned(look.second, -0.3))
    flat.disc(0, -0.38, 0.17, look.paper)
    pen.line([(-0.17, -0.38), (0.17, -0.38)], 0.03, look.ink)
    pen.line([(0, -0.55), (0, -0.21)], 0.03, look.ink)
    pen.box(-0.62, 0.26, -0.18, 0.94, look.third)
    flat.box(-0.52, 0.36, -0.28, 0.56, look.paper)
    flat.disc(-0.25, 0.66, 0.04, look.ink)
    pen.box(-0.72, 0.9, -0.08, 1.0, look.accent)
    pen.line([(-0.05, 0.2), (0.02, 0.2)], 0.03, look.ink)
    pen.oval(-0.02, 0.3, 0.06, 0.08, look.paper)
    flat.box(0.18, 0.16, 0.62, 0.56, look.paper)
    pen.line([(0.4, 0.16), (0.4, 0.56)], 0.035, look.ink)
    pen.line([(0.18, 0.36), (0.62, 0.36)], 0.035, look.ink)
    for x in (0.06, 0.64):
        pen.box(x, 0.14, x + 0.1, 0.58, look.accent)
    pen.box(0.12, 0.58, 0.68, 0.68, look.third)
    for x in (0.2, 0.33, 0.46, 0.59):
        flat.disc(x, 0.56 + rng.uniform(-0.02, 0.02), 0.05, look.second)


def _car(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Heading right: exhaust and aerial left, luggage on the roof, passenger and driver, door, lamp and bumper right, two unlike wheels."""
    flat = pen.flat()
    for step in range(3):
        pen.disc(-0.9 - 0.03 * step, 0.55 - 0.16 * step, 0.06 + 0.02 * step, toned(look.paper, -0.1 * step))
    pen.line([(-0.7, -0.1), (-0.86, -0.8)], 0.03, look.ink)
    pen.disc(-0.86, -0.82, 0.06, look.accent)
    pen.box(-0.42, -0.84, -0.02, -0.58, look.third)
    flat.box(-0.28, -0.84, -0.18, -0.58, look.paper)
    pen.box(0.04, -0.76, 0.26, -0.58, look.accent)
    pen.shape([(-0.66, 0.02), (-0.5, -0.56), (0.34, -0.56), (0.62, 0.02)], look.second)
    flat.shape([(-0.54, -0.04), (-0.43, -0.46), (-0.1, -0.46), (-0.1, -0.04)], look.paper)
    flat.shape([(0.0, -0.04), (0.0, -0.46), (0.28, -0.46), (0.48, -0.04)], look.paper)
    pen.oval(-0.32, -0.2, 0.11, 0.14, look.accent)
    pen.oval(0.12, -0.22, 0.11, 0.14, look.third)
    pen.line([(0.26, -0.04), (0.34, -0.2)], 0.04, look.ink)
    pen.shape([(-0.96, 0.56), (-0.94, 0.04), (-0.6, -0.06), (0.62, -0.04), (0.94, 0.14), (0.98, 0.56)], look.main)
    flat.box(-0.96, 0.28, 0.96, 0.35, look.accent)
    pen.line([(-0.05, 0.0), (-0.05, 0.52)], 0.025, look.ink)
    pen.line([(0.5, 0.0), (0.42, 0.5)], 0.025, look.ink)
    flat.box(0.02, 0.12, 0.18, 0.17, look.ink)
    pen.oval(0.87, 0.22, 0.08, 0.1, look.paper)
    pen.box(-0.97, 0.1, -0.86, 0.26, look.third)
    pen.box(0.84, 0.44, 1.0, 0.56, look.ink)
    pen.box(-1.0, 0.44, -0.84, 0.56, look.ink)
    start = rng.uniform(0, 2 * math.pi)
    for x, spokes in ((-0.54, 3), (0.56, 6)):
        pen.oval(x, 0.62, 0.3, 0.36, look.ink)
        flat.oval(x, 0.62, 0.17, 0.2, look.paper)
        for turn in range(spokes):
            angle = start + 2 * math.pi * turn / spokes
            pen.line([(x, 0.62), (x + 0.17 * math.cos(angle), 0.62 + 0.2 * math.sin(angle))], 0.04, look.third)


def _clock(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Alarm clock: two bells and a hammer above, four unlike quarter marks, hands at any hour, small seconds dial, key right, feet."""
    flat = pen.flat()
    for side in (-1, 1):
        pen.shape([(0.4 * side, 0.6), (0.78 * side, 1.0), (0.6 * side, 1.0), (0.24 * side, 0.7)], look.third)
    pen.shape([(-0.82, -0.5), (-0.74, -0.84), (-0.4, -0.94), (-0.24, -0.7)], look.second)
    pen.shape([(0.82, -0.5), (0.74, -0.84), (0.4, -0.94), (0.24, -0.7)], look.accent)
    pen.line([(0, -0.7), (0.06, -0.9)], 0.05, look.ink)
    pen.box(-0.06, -1.0, 0.2, -0.88, look.third)
    pen.box(0.82, -0.1, 0.92, 0.1, look.ink)
    pen.oval(0.94, 0.0, 0.06, 0.18, look.third)
    pen.oval(0, 0.06, 0.84, 0.8, look.main)
    flat.oval(0, 0.06, 0.68, 0.65, look.paper)
    for hour in range(12):
        angle = math.pi * hour / 6
        x, y = 0.56 * math.sin(angle), 0.06 - 0.54 * math.cos(angle)
        if hour % 3:
            pen.line([(x, y), (1.1 * x, 0.06 + 1.1 * (y - 0.06))], 0.035, look.ink)
    flat.shape([(0, -0.58), (0.09, -0.47), (0, -0.36), (-0.09, -0.47)], look.accent)
    flat.box(0.46, 0.0, 0.62, 0.12, look.second)
    flat.disc(0, 0.6, 0.08, look.third)
    flat.shape([(-0.62, 0.06), (-0.46, -0.04), (-0.46, 0.16)], look.ink)
    flat.disc(0, 0.34, 0.13, toned(look.paper, -0.2))
    for length, width, color in ((0.34, 0.08, look.ink), (0.48, 0.055, look.ink), (0.5, 0.02, look.third)):
        angle = rng.uniform(0, 2 * math.pi)
        pen.line([(0, 0.06), (length * math.sin(angle), 0.06 - length * math.cos(angle))], width, color)
    flat.disc(0, 0.06, 0.06, look.accent)


def _fish(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Heading left: bubbles, mouth, eye and gill left, crown fin above, scales, belly fin, striped tail right, weed below it."""
    flat = pen.flat()
    for x, y, radius in ((-0.92, -0.3, 0.05), (-0.84, -0.56, 0.08), (-0.94, -0.82, 0.1)):
        pen.disc(x, y, radius, look.paper)
    for x, top in ((0.66, 0.5), (0.8, 0.34), (0.94, 0.56)):
        pen.line([(x, 1.0), (x + 0.06, 0.85), (x - 0.06, 0.7), (x, top)], 0.07, look.third)
    pen.shape([(0.45, 0.0), (1.0, -0.62), (0.86, 0.0), (1.0, 0.56)], look.second)
    for y in (-0.36, -0.14, 0.1, 0.32):
        pen.line([(0.66, 0.5 * y), (0.94, 1.1 * y)], 0.035, look.ink)
    pen.shape([(-0.34, -0.44), (-0.26, -0.9), (-0.02, -0.74), (0.1, -0.95), (0.26, -0.66), (0.4, -0.34)], look.accent)
    pen.shape([(-0.1, 0.42), (0.06, 0.92), (0.3, 0.74), (0.26, 0.36)], look.accent)
    pen.oval(-0.16, 0.0, 0.76, 0.56, look.main)
    for column, x in enumerate(np.arange(-0.16, 0.46, 0.15)):
        for y in np.arange(-0.34 + 0.09 * (column % 2), 0.4, 0.18):
            if ((x + 0.16) / 0.68) ** 2 + (y / 0.5) ** 2 < 0.8:
                pen.line([(x - 0.06, y - 0.08), (x + 0.04, y), (x - 0.06, y + 0.08)], 0.025, toned(look.main, -0.4))
    pen.line([(-0.4, -0.44), (-0.28, -0.2), (-0.26, 0.12), (-0.36, 0.44)], 0.06, look.second)
    pen.shape([(-0.24, 0.06), (0.1, 0.3 + rng.uniform(-0.06, 0.06)), (-0.16, 0.36)], look.third)
    flat.disc(-0.58, -0.16, 0.15, look.paper)
    flat.disc(-0.6 + rng.uniform(-0.03, 0.03), -0.15, 0.075, look.ink)
    pen.line([(-0.86, 0.16), (-0.7, 0.22), (-0.6, 0.14)], 0.05, look.ink)
    flat.oval(-0.5, 0.14, 0.07, 0.05, look.third)


def _tree(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Roots, trunk with a hollow, apples in the left crown, a nest above, a bird house right, a swing below it, ladder left."""
    flat = pen.flat()
    pen.shape([(-0.2, 1.0), (-0.14, 0.1), (0.14, 0.1), (0.2, 1.0)], look.second)
    for x in (-0.42, 0.4):
        pen.shape([(x, 1.0), (0.4 * x, 0.7), (0.3 * x, 1.0)], look.second)
    pen.line([(0.08, 0.3), (0.72, 0.2)], 0.1, toned(look.second, -0.2))
    for x in (0.44, 0.68):
        pen.line([(x, 0.22), (x, 0.72)], 0.025, look.ink)
    pen.box(0.36, 0.7, 0.76, 0.78, look.accent)
    for x in (-0.5, -0.34):
        pen.line([(x - 0.1, 1.0), (x, 0.1)], 0.04, look.third)
    for y in (0.28, 0.46, 0.64, 0.82):
        pen.line([(-0.5 - 0.11 * (y - 0.1), y), (-0.34 - 0.11 * (y - 0.1), y)], 0.04, look.third)
    blobs = ((-0.56, -0.1, 0.4), (0.58, -0.12, 0.38), (-0.36, -0.52, 0.38), (0.38, -0.54, 0.36), (0.0, -0.22, 0.46), (0.0, -0.68, 0.3))
    for x, y, radius in blobs:
        pen.oval(x + rng.uniform(-0.03, 0.03), y, radius, 0.85 * radius, look.main)
    for x, y in ((-0.72, -0.08), (-0.5, 0.08), (-0.46, -0.28), (-0.24, -0.02), (-0.58, -0.54), (-0.24, -0.42)):
        pen.disc(x, y, 0.075, look.accent)
    pen.shape([(-0.16, -0.82), (0.2, -0.82), (0.12, -0.68), (-0.08, -0.68)], look.third)
    for x in (-0.06, 0.04, 0.12):
        flat.oval(x, -0.86, 0.06, 0.08, look.paper)
    pen.box(0.32, -0.42, 0.66, -0.02, look.paper)
    pen.shape([(0.26, -0.4), (0.49, -0.64), (0.72, -0.4)], look.accent)
    flat.disc(0.49, -0.26, 0.08, look.ink)
    pen.line([(0.49, -0.1), (0.49, 0.02)], 0.04, look.ink)
    flat.oval(0.0, 0.5, 0.09, 0.13, look.ink)
    pen.line([(-0.08, 0.8), (-0.04, 0.68)], 0.025, look.ink)
    pen.line([(0.06, 0.9), (0.08, 0.72)], 0.025, look.ink)


def _boat(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Heading left: flag on the mast, jib left, striped mainsail right, cabin, portholes, anchor left, rudder right, waves."""
    flat = pen.flat()
    pen.line([(-0.08, 0.36), (-0.08, -0.98)], 0.06, look.ink)
    pen.shape([(-0.06, -0.98), (0.26, -0.9), (-0.06, -0.8)], look.accent)
    pen.shape([(-0.14, -0.76), (-0.14, 0.2), (-0.78, 0.2)], look.second)
    flat.disc(-0.32, -0.02, 0.09, look.ink)
    sail = [(0.0, -0.74), (0.84, 0.2), (0.0, 0.2)]
    pen.shape(sail, look.third)
    for y in (-0.46, -0.22, 0.02):
        pen.line([(0.0, y), (0.84 * (y + 0.74) / 0.94, y)], 0.05, look.paper)
    flat.box(0.14, -0.16, 0.3, 0.0, look.accent)
    pen.box(0.1, 0.24, 0.62, 0.44, look.paper)
    for x in (0.18, 0.4):
        flat.box(x, 0.28, x + 0.12, 0.38, look.ink)
    pen.box(0.9, 0.42, 0.98, 0.94, look.accent)
    pen.shape([(-0.96, 0.38), (0.92, 0.38), (0.74, 0.86), (-0.62, 0.86)], look.main)
    flat.shape([(-0.94, 0.44), (0.9, 0.44), (0.88, 0.52), (-0.9, 0.52)], look.second)
    for x in (-0.2, 0.1, 0.4):
        flat.disc(x, 0.64, 0.075, look.paper)
        flat.disc(x, 0.64, 0.04, look.ink)
    pen.line([(-0.66, 0.52), (-0.66, 0.78)], 0.045, look.ink)
    pen.line([(-0.78, 0.68), (-0.66, 0.8), (-0.54, 0.68)], 0.045, look.ink)
    pen.line([(-0.94, 0.36), (-1.0, 0.16)], 0.05, look.accent)
    wave = look.paper if rng.random() < 0.5 else look.ink
    for x in np.arange(-0.95, 0.9, 0.32):
        pen.line([(x, 0.96), (x + 0.08, 0.88), (x + 0.16, 0.96), (x + 0.24, 0.9), (x + 0.3, 0.96)], 0.04, wave)


def _flower(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Pot, stem, broad leaf left, fern right, petals (light above, dark below) about a heart that smiles, bee right, snail left."""
    flat = pen.flat()
    pen.line([(0, 0.6), (rng.uniform(-0.06, 0.06), 0.2), (0, -0.2)], 0.09, look.third)
    pen.shape([(0, 0.44), (-0.3, 0.1), (-0.78, 0.12), (-0.5, 0.4)], look.third)
    pen.line([(0, 0.44), (-0.7, 0.16)], 0.03, toned(look.third, -0.4))
    pen.line([(0, 0.5), (0.5, 0.16)], 0.04, look.third)
    for share in (0.3, 0.5, 0.7, 0.9):
        x, y = 0.5 * share, 0.5 - 0.34 * share
        flat.shape([(x, y), (x + 0.06, y - 0.18), (x + 0.12, y - 0.04)], look.third)
        flat.shape([(x, y), (x + 0.16, y + 0.14), (x + 0.14, y + 0.02)], look.third)
    start = rng.uniform(-0.15, 0.15)
    for petal in range(9):
        angle = start + 2 * math.pi * petal / 9
        x, y = math.sin(angle), -math.cos(angle)
        pen.disc(0.5 * x, -0.4 + 0.44 * y, 0.21, toned(look.main, 0.35 if y < 0 else -0.25))
    pen.oval(0, -0.4, 0.32, 0.3, look.second)
    for x in (-0.11, 0.11):
        flat.oval(x, -0.47, 0.045, 0.06, look.ink)
    pen.line([(-0.14, -0.32), (-0.05, -0.25), (0.05, -0.25), (0.14, -0.32)], 0.035, look.ink)
    pen.shape([(-0.44, 0.62), (0.44, 0.62), (0.32, 1.0), (-0.32, 1.0)], look.accent)
    pen.box(-0.5, 0.54, 0.5, 0.66, toned(look.accent, -0.2))
    flat.shape([(-0.38, 0.8), (-0.2, 0.72), (0, 0.8), (0.2, 0.72), (0.38, 0.8), (0.36, 0.88), (-0.36, 0.88)], look.paper)
    pen.oval(0.78, -0.1, 0.16, 0.11, look.paper)
    pen.line([(0.74, -0.2), (0.74, 0.0)], 0.05, look.ink)
    pen.line([(0.84, -0.19), (0.84, -0.01)], 0.05, look.ink)
    flat.oval(0.72, -0.24, 0.08, 0.12, toned(look.paper, -0.15))
    flat.disc(0.62, -0.1, 0.06, look.ink)
    pen.box(-0.94, 0.88, -0.56, 0.96, look.second)
    pen.disc(-0.74, 0.76, 0.16, look.main)
    flat.disc(-0.74, 0.76, 0.07, look.ink)
    pen.line([(-0.92, 0.9), (-0.96, 0.7)], 0.03, look.second)


def _train(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Heading left: lamp, plough, chimney with smoke, bell, banded boiler, cab with driver right, coal, one big wheel, rail."""
    flat = pen.flat()
    drift = rng.uniform(0.1, 0.2)
    for step in range(4):
        pen.oval(-0.56 + drift * step, -0.74 - 0.06 * step, 0.09 + 0.025 * step, 0.07 + 0.02 * step, toned(look.paper, -0.09 * step))
    pen.shape([(-0.66, -0.14), (-0.62, -0.5), (-0.7, -0.64), (-0.42, -0.64), (-0.5, -0.5), (-0.46, -0.14)], look.third)
    pen.shape([(-0.2, -0.14), (-0.2, -0.26), (-0.1, -0.4), (0.0, -0.26), (0.0, -0.14)], look.accent)
    pen.box(0.72, 0.0, 1.0, 0.5, toned(look.second, -0.3))
    for x, y in ((0.78, 0.0), (0.87, -0.05), (0.95, 0.0)):
        pen.disc(x, y, 0.08, look.ink)
    pen.box(-0.84, -0.16, 0.3, 0.38, look.main)
    for x in (-0.62, -0.34, -0.06):
        flat.box(x, -0.17, x + 0.06, 0.39, look.accent)
    pen.oval(-0.86, 0.1, 0.09, 0.28, toned(look.main, -0.3))
    pen.disc(-0.88, -0.16, 0.08, look.paper)
    pen.box(0.22, -0.5, 0.76, 0.5, look.second)
    pen.box(0.14, -0.62, 0.84, -0.48, look.third)
    flat.box(0.34, -0.36, 0.64, -0.02, look.paper)
    pen.oval(0.48, -0.14, 0.09, 0.12, look.accent)
    flat.box(0.38, -0.3, 0.58, -0.24, look.ink)
    flat.box(0.36, 0.12, 0.62, 0.34, look.accent)
    pen.box(-0.88, 0.38, 0.98, 0.52, look.third)
    pen.shape([(-0.86, 0.5), (-1.0, 0.88), (-0.66, 0.88), (-0.7, 0.5)], look.accent)
    for x, radius in ((-0.5, 0.17), (-0.12, 0.17), (0.42, 0.28), (0.84, 0.14)):
        pen.disc(x, 0.9 - radius, radius, look.ink)
        flat.disc(x, 0.9 - radius, 0.55 * radius, look.paper)
        flat.disc(x, 0.9 - radius, 0.2 * radius, look.ink)
    pen.line([(-0.5, 0.73), (-0.12, 0.73), (0.42, 0.66)], 0.05, look.accent)
    pen.line([(-1.0, 0.94), (1.0, 0.94)], 0.05, look.ink)
    for x in np.arange(-0.9, 1.0, 0.3):
        flat.box(x - 0.06, 0.95, x + 0.06, 1.0, look.second)


def _butterfly(pen: Pen, look: Look, rng: np.random.Generator) -> None:
    """Feelers above, ringed body, upper wings with an eye left and a square right, lower wings with stripes left and dots right, tails."""
    flat = pen.flat()
    spread = rng.uniform(0.9, 1.0)
    for side in (-1, 1):
        pen.shape([(0, 0.1), (0.5 * side, 0.1), (0.84 * side, 0.44), (0.66 * side, 0.8), (0.3 * side, 0.74)], look.second)
        pen.shape([(0.5 * side, 0.74), (0.66 * side, 0.76), (0.74 * side, 1.0)], look.third)
        wing = [
            (0, -0.2),
            (0.3 * side, -0.8),
            (0.8 * side, -0.92),
            (spread * side, -0.6),
            (0.86 * side, -0.06),
            (0.4 * side, 0.18),
            (0, 0.1),
        ]
        pen.shape(wing, look.main)
        pen.line([(0.1 * side, -0.16), (0.74 * side, -0.8)], 0.025, look.ink)
        pen.line([(0.1 * side, -0.02), (0.8 * side, -0.1)], 0.025, look.ink)
        pen.line([(0.06 * side, -0.62), (0.14 * side, -0.86), (0.3 * side, -0.96)], 0.035, look.ink)
        flat.disc(0.3 * side, -0.96, 0.05, look.accent)
        flat.disc(0.86 * side, -0.7, 0.06, look.paper)
    pen.disc(-0.56, -0.42, 0.2, look.third)
    flat.disc(-0.56, -0.42, 0.1, look.ink)
    pen.shape([(0.38, -0.42), (0.56, -0.62), (0.74, -0.42), (0.56, -0.22)], look.accent)
    flat.box(0.51, -0.47, 0.61, -0.37, look.ink)
    for x in (-0.64, -0.5, -0.36):
        pen.line([(x, 0.26), (x + 0.04, 0.66)], 0.055, look.paper)
    for x, y in ((0.36, 0.3), (0.56, 0.3), (0.42, 0.52), (0.62, 0.54)):
        flat.disc(x, y, 0.065, look.paper)
    pen.oval(0, 0.12, 0.12, 0.6, look.accent)
    for y in (-0.1, 0.1, 0.3, 0.5):
        pen.line([(-0.1, y), (0.1, y)], 0.05, look.ink)
    pen.oval(0, -0.54, 0.14, 0.15, look.third)
    for x in (-0.06, 0.06):
        flat.oval(x, -0.57, 0.035, 0.05, look.ink)


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
