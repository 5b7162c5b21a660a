"""Draw every view's photometric numbers, and turn them into the one matrix that is applied.

Here: brightness, contrast, saturation, hue, gray, blur, solarize as recorded numbers; the 3 x 4 matrix on RGB in 0..255.
Not here: applying them (render/). The law: hue and saturation in YIQ, gray by Rec. 601, contrast about 128, brightness;
clipped once, then blurred, then solarized. The ranges are torchvision's ColorJitter's, the pixels are not.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.draws import Keys, Purpose, uniform
from wherefrom.pipeline.view_recipe import ViewFamily
from wherefrom.pipeline.views import Photometric

QUANTUM = 2.0**-20  # recorded numbers are multiples of it, so no processor's last bit shows

# Source: the NTSC transform as DALI 2.4's color_twist has it; luma by Rec. 601.
_YIQ_FROM_RGB = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.321], [0.211, -0.523, 0.311]], dtype=torch.float64)
_RGB_FROM_YIQ = torch.linalg.inv(_YIQ_FROM_RGB)


def draw_color(family: ViewFamily, keys: Keys) -> Photometric:
    """Draw the photometric numbers of one family for a batch: (B, V) each; without a color law they leave pixels alone."""
    law = family.color
    if law is None:
        return Photometric.unchanged(len(keys.drawn_for), family.views)
    drawn = family.views if family.color_per == "view" else 1
    numbers = uniform(keys.words_for(drawn, Purpose.JITTER, Purpose.COLOR, Purpose.BLUR))  # (B, V, 3, 4)
    numbers = np.repeat(numbers, family.views // drawn, axis=1)
    chance, twist, blur = numbers[:, :, 0], numbers[:, :, 1] * 2 - 1, numbers[:, :, 2, 0]
    jittered, blurred = chance[..., 0] < law.jitter_prob, chance[..., 3] < law.blur_prob
    low, high = law.blur_sigma_px

    def recorded(values: NDArray[np.float64], where: NDArray[np.bool_], otherwise: float) -> Tensor:
        return torch.from_numpy(np.where(where, np.rint(values / QUANTUM) * QUANTUM, otherwise).astype(np.float32))

    return Photometric(
        brightness=recorded(1 + law.brightness * twist[..., 0], jittered, 1),
        contrast=recorded(1 + law.contrast * twist[..., 1], jittered, 1),
        saturation=recorded(1 + law.saturation * twist[..., 2], jittered, 1),
        hue_rad=recorded(2 * math.pi * law.hue * twist[..., 3], jittered, 0),
        gray=torch.from_numpy(chance[..., 1] < law.gray_prob),
        blur_sigma_px=recorded(low + (high - low) * blur, blurred, 0),
        solarized=torch.from_numpy(chance[..., 2] < law.solarize_prob),
    )


def color_matrix(photometric: Photometric) -> Tensor:
    """Return the matrices that are applied to (r, g, b, 1) in 0..255, before clipping: (B, V, 3, 4) float64."""
    saturation, hue = photometric.saturation.double(), photometric.hue_rad.double()
    gain = photometric.brightness.double() * photometric.contrast.double()
    zero, one = torch.zeros_like(hue), torch.ones_like(hue)
    cos, sin = saturation * hue.cos(), saturation * hue.sin()
    chroma = torch.stack([one, zero, zero, zero, cos, sin, zero, -sin, cos], -1).unflatten(-1, (3, 3))
    rgb_from_yiq, yiq_from_rgb = _RGB_FROM_YIQ.to(hue.device), _YIQ_FROM_RGB.to(hue.device)
    linear = rgb_from_yiq @ chroma @ yiq_from_rgb
    gray = yiq_from_rgb[0].expand(3, 3) @ linear
    linear = torch.where(photometric.gray[..., None, None], gray, linear) * gain[..., None, None]
    offset = photometric.brightness.double() * (1 - photometric.contrast.double()) * 128
    return torch.cat([linear, offset[..., None, None].expand(*offset.shape, 3, 1)], -1)
