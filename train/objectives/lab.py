"""CIELAB: how light a color is, and its hue and strength apart from that; what colorization is told and what it tells.

Here: colors of sRGB to CIELAB and back, lightness to gray levels; the bins of its plane of hues.
Not here: what is learned (colorization.py), changes of color (wherefrom.pipeline.color).
Source: CIE 15 by its rational constants, sRGB by IEC 61966-2-1, white D65; bins arXiv 1603.08511.
"""

import torch
from torch import Tensor

XYZ_FROM_RGB = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
WHITE = (0.950456, 1.0, 1.088754)  # the sums of its rows: white has neither a nor b

BIN = 10  # side of a bin, in a and b
# b of the first and the last bin for a = -90, -80, ..., 100: the 313 "in gamut" of the paper's authors, some at its edge a little outside
_BINS_OF_B = (
    *((50, 90), (20, 90), (0, 90), (-20, 90), (-30, 100), (-40, 100), (-50, 100), (-50, 100), (-60, 100), (-70, 100)),
    *((-80, 90), (-80, 90), (-90, 90), (-100, 90), (-100, 80), (-110, 80), (-110, 80), (-110, 70), (-110, 70), (-90, 0)),
)


def lab_from_rgb(rgb: Tensor) -> Tensor:
    """Return colors in CIELAB: (..., 3, H, W) sRGB in [0, 1] -> (..., 3, H, W), L in [0, 100], a and b about 0 where gray."""
    linear = torch.where(rgb > 0.04045, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    red, green, blue = linear.unbind(-3)
    ratio = torch.stack([(r * red + g * green + b * blue) / white for (r, g, b), white in zip(XYZ_FROM_RGB, WHITE, strict=True)], -3)
    # clamped, for a root's gradient and value do not exist below 0, where the other branch counts
    root = torch.where(ratio > 216 / 24389, ratio.clamp(min=1e-6) ** (1 / 3), (24389 / 27 * ratio + 16) / 116)
    x, y, z = root.unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


def gray_from_lightness(lightness: Tensor) -> Tensor:
    """Return the sRGB level, in [0, 1], of the gray that is as light: L (...) in [0, 100] -> (...)."""
    root = (lightness + 16) / 116
    linear = torch.where(lightness > 8, root.clamp(min=0) ** 3, lightness * 27 / 24389)
    return _srgb_level(linear)


def rgb_from_lab(lab: Tensor) -> Tensor:
    """Return colors in sRGB, those that it lacks beyond [0, 1]: (..., 3, H, W) CIELAB -> (..., 3, H, W)."""
    lightness, a, b = lab.unbind(-3)
    middle = (lightness + 16) / 116
    root = torch.stack([middle + a / 500, middle, middle - b / 200], -3)
    ratio = torch.where(root > 6 / 29, root**3, (116 * root - 16) * 27 / 24389)
    to_rgb = (torch.tensor(XYZ_FROM_RGB, dtype=torch.float64).inverse() * torch.tensor(WHITE)).to(lab)
    return _srgb_level(torch.einsum("ij,...jhw->...ihw", to_rgb, ratio))


def _srgb_level(linear: Tensor) -> Tensor:
    return torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055, 12.92 * linear)


def color_bins() -> Tensor:
    """Return the middles of the bins of (a, b), (313, 2) float32."""
    rows = enumerate(_BINS_OF_B, -9)
    return torch.tensor([(BIN * a, b) for a, (first, last) in rows for b in range(first, last + 1, BIN)], dtype=torch.float32)
