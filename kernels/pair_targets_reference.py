"""The definition of pair targets: relative position and scale of boxes, in the boxes' dtype.

Here: the units that targets are told in, and the formula, in plain PyTorch; float64 in, float64 out.
Not here: checks and choice of path (pair_targets.py), the kernel (pair_targets_triton.py).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

PositionUnit = Literal["reference", "picture", "mean"]
Scale = Literal["log_area", "log_sides", "ratio", "none"]
Axes = Literal["view", "source"]

CHANNELS: dict[str, tuple[str, ...]] = {  # by scale
    "log_area": ("x", "y", "scale"),
    "log_sides": ("x", "y", "width", "height"),
    "ratio": ("x", "y", "width", "height"),
    "none": ("x", "y"),
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PairUnits:
    """What a target box t is measured in, relative to a reference box r: the settings of pair targets, checked once, on construction.

    With centers c and sides s = (width, height) of both boxes, an axis at a time:

    position: "reference" (c_t - c_r) / s_r; "picture" (c_t - c_r) / the picture's sides; "mean" (c_t - c_r) / sqrt(s_r s_t).
    scale:    "log_area" ln sqrt(area_t / area_r), one channel; "log_sides" ln(s_t / s_r), "ratio" s_t / s_r: width, then height;
              "none": positions alone.
    axes:     "view" carries position and sides by the reference's mirror, then its turn, as its view shows them; "source" leaves them
              upright.
    mean, std: subtracted from the channels; what they are then divided by.

    Shapes: mean and std (C,), one number a channel: C = 3 with scale="log_area", 2 with "none", else 4. They may require a gradient.
    Units:  position is a multiple of the sides named; "log_area" and "log_sides" are in nats, "ratio" is a plain number.
    Raises: ValueError if a word is unknown, or mean or std is no tensor of one number a channel.
    Source: position="reference" with scale="log_sides" is the box regression of R-CNN, arXiv:1311.2524, appendix C.
    """

    position: PositionUnit = "reference"
    scale: Scale = "log_area"
    axes: Axes = "view"
    mean: Tensor | None = None  # (C,)
    std: Tensor | None = None  # (C,)

    def __post_init__(self) -> None:
        for name, word, words in (("position", self.position, PositionUnit), ("scale", self.scale, Scale), ("axes", self.axes, Axes)):
            if word not in get_args(words):
                raise ValueError(f"{name}={word!r}: take one of {', '.join(get_args(words))}")
        expected = (len(self.channels),)
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value is not None and not isinstance(value, Tensor):
                raise ValueError(f"{name}={value!r:.60}: needs a tensor {expected}, one number a channel")
            if value is not None and value.shape != expected:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected}, one a channel")

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of the channels of a target, in order."""
        return CHANNELS[self.scale]


DEFAULT_UNITS = PairUnits()


def pair_targets_reference(
    boxes: Tensor,
    pairs: Tensor | None = None,
    *,
    units: PairUnits = DEFAULT_UNITS,
    flipped: Tensor | None = None,
    quarter_turns: Tensor | None = None,
    picture_hw: Tensor | None = None,
) -> Tensor:
    """Return position and scale of target boxes relative to reference boxes; words and units as `pair_targets`.

    Shapes: boxes (..., N, 4), pairs (P, 2) or None, flipped and quarter_turns (..., N), picture_hw (..., 2) -> (..., P, C), or
            (..., N, N, C) without pairs.
    Raises: nothing; arguments are trusted.
    """

    def reference(value: Tensor, axis: int) -> Tensor:  # (..., N, *) -> (..., P, *) or (..., N, 1, *)
        return value.unsqueeze(axis) if pairs is None else value.index_select(axis, pairs[:, 0])

    def target(value: Tensor, axis: int) -> Tensor:  # (..., N, *) -> (..., P, *) or (..., 1, N, *)
        return value.unsqueeze(axis - 1) if pairs is None else value.index_select(axis, pairs[:, 1])

    size = boxes[..., 2:] - boxes[..., :2]
    size_r, size_t = reference(size, -2), target(size, -2)
    if units.position == "reference":
        unit = size_r
    elif units.position == "mean":
        unit = (size_r * size_t).sqrt()
    else:
        assert picture_hw is not None
        unit = picture_hw.to(boxes).flip(-1).unsqueeze(-2)
        unit = unit.unsqueeze(-2) if pairs is None else unit
    # differences of edges, not of centers: a box on a grid of pixels loses nothing in float32
    moved = target(boxes, -2) - reference(boxes, -2)
    offset = (moved[..., :2] + moved[..., 2:]) / 2 / unit
    ratio = size_t / size_r
    sides = ratio if units.scale == "ratio" else ratio.log()

    if units.axes == "view" and flipped is not None:
        offset = torch.where(reference(flipped, -1).unsqueeze(-1), offset * offset.new_tensor([-1, 1]), offset)
    if units.axes == "view" and quarter_turns is not None:
        turns = reference(quarter_turns, -1).long().unsqueeze(-1) % 4
        odd = turns % 2 == 1
        # counter-clockwise with y down: right becomes up, down becomes right
        offset = torch.where(odd, offset.flip(-1) * offset.new_tensor([1, -1]), offset)
        offset = torch.where(turns >= 2, -offset, offset)
        sides = torch.where(odd, sides.flip(-1), sides)

    kept = {"log_area": sides.mean(-1, keepdim=True), "none": sides[..., :0]}.get(units.scale, sides)
    channels = torch.cat([offset, kept], -1)
    if units.mean is not None:
        channels = channels - units.mean.to(channels)
    if units.std is not None:
        channels = channels / units.std.to(channels)
    return channels
