"""Pictures whose pixels say where they are, and how to read them.

Here: two pictures an axis, encoded under any EXIF orientation: a ramp over the whole side tells which period, a steep triangle wave
tells where in it. Read back from levels alone.
Not here: what is proved with them (prove.py).
"""

import io
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wherefrom.kernels.render_views_reference import UNDO_EXIF

Format = Literal["PNG", "JPEG"]

SIGNALS = 4  # pictures a set: ramp and wave along x, ramp and wave along y
DARK, BRIGHT, HALF_PERIOD_PX = 16, 240, 28  # of the wave: 8 levels a pixel, so that rounding moves a point by 1/16 pixel
SLOPE = (BRIGHT - DARK) / HALF_PERIOD_PX
RAMP_ERROR_LEVELS = 2.0  # of the ramp, for rounding in the file and in the view, and for JPEG


def coordinate_pictures(source_size: tuple[int, int], format: Format, orientation: int = 1) -> list[bytes]:
    """Encode ramp and wave along x, ramp and wave along y, as files whose EXIF orientation turns them upright.

    Shapes: source_size (height, width), upright. JPEG is written at quality 100 without chroma subsampling.
    """
    height, width = source_size
    mirrored, turns = UNDO_EXIF[orientation]
    files = []
    for axis, side in ((-1, width), (-2, height)):
        centers = torch.arange(side) + 0.5
        for levels in (ramp_level(centers, side), wave_level(centers)):
            upright = levels.round().byte().unsqueeze(-3 - axis).expand(height, width)
            unturned = torch.rot90(upright, -turns)
            stored = unturned.flip(-1) if mirrored else unturned
            files.append(_encode(stored.unsqueeze(-1).expand(-1, -1, 3).contiguous().numpy(), format, orientation))
    return files


def _encode(picture: NDArray[np.uint8], format: Format, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    Image.fromarray(picture).save(file, format, exif=exif.tobytes(), **options)
    return file.getvalue()


def ramp_level(x: Tensor, side: int) -> Tensor:
    """Return the ramp's level at source coordinate x of a side, in pixels."""
    return DARK + (BRIGHT - DARK) * x / side


def wave_level(x: Tensor) -> Tensor:
    """Return the wave's level at source coordinate x, in pixels."""
    phase = x % (2 * HALF_PERIOD_PX)
    return DARK + SLOPE * torch.minimum(phase, 2 * HALF_PERIOD_PX - phase)


def read_coordinate(ramp: Tensor, wave: Tensor, side: int) -> Tensor:
    """Return the source coordinate that a ramp's and a wave's levels stand for, by the pixels alone; all shapes alike, source pixels."""
    about = (ramp - DARK) / (BRIGHT - DARK) * side
    period = 2 * HALF_PERIOD_PX
    from_trough = (wave - DARK) / SLOPE
    rising = period * ((about - from_trough) / period).round() + from_trough
    falling = period * ((about + from_trough) / period).round() - from_trough
    return torch.where((rising - about).abs() <= (falling - about).abs(), rising, falling)


def is_clear(wave: Tensor, side: int, reach_px: Tensor) -> Tensor:
    """Return where a wave's level lies so far from its crests that it can be read, though a filter flattened them.

    Units: reach_px, half the filter's base, in source pixels. A level that is no number counts as clear: it has to be looked at.
    """
    crest = SLOPE * (reach_px + RAMP_ERROR_LEVELS * side / (BRIGHT - DARK))
    return ~((wave <= DARK + crest) | (wave >= BRIGHT - crest))
