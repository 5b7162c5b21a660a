"""Relative position and scale of pairs of boxes: what a pair-geometry head is asked to predict.

Here: plain tensors in, plain tensors out, the definition in float64.
Not here: which views form pairs, and which of them count (wherefrom.train.objectives).
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Position = Literal["reference", "picture", "mean"]
Scale = Literal["log_area", "log_sides", "ratio"]
Axes = Literal["view", "source"]


def pair_targets(
    boxes: Tensor,
    pairs: Tensor | None = None,
    *,
    flipped: Tensor | None = None,
    quarter_turns: Tensor | None = None,
    position: Position = "reference",
    scale: Scale = "log_area",
    axes: Axes = "view",
    picture_hw: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Return position (x, y) and scale of target boxes relative to reference boxes, as the reference view shows them.

    position: (c_t - c_r) / size_r per axis; / picture size; / the geometric mean of both sizes.
    scale:    ln sqrt(area_t / area_r), one channel; ln of each side's ratio; each side's raw ratio, two channels (x, y).
    axes:     "view" carries vector and side channels by the reference's mirror, then its turn; "source" leaves them upright.

    Shapes: boxes (..., N, 4) xyxy, pairs (P, 2) of (reference, target) or None for all ordered pairs, flipped and quarter_turns (..., N),
            picture_hw (..., 2) -> (..., P, C) or (..., N, N, C) float32, C = 3 or 4; mean and std (C,) standardise.
    Units:  boxes in source pixels; position in the unit of `position`; scale in nats or as a ratio.
    Raises: ValueError if shapes do not fit, an option is unknown, or position="picture" comes without picture_hw.
    """
    _check(boxes, pairs, flipped, quarter_turns, picture_hw)
    for name, chosen, known in (("position", position, Position), ("scale", scale, Scale), ("axes", axes, Axes)):
        if chosen not in get_args(known):
            raise ValueError(f"{name}={chosen!r}: take one of {', '.join(get_args(known))}")
    if position == "picture" and picture_hw is None:
        raise ValueError('picture_hw is None, position="picture" divides by it; pass picture_hw=source_size')
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and value.shape != (3 if scale == "log_area" else 4,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {(3 if scale == 'log_area' else 4,)}, one a channel")

    exact = boxes.double()
    centre = (exact[..., :2] + exact[..., 2:]) / 2
    size = exact[..., 2:] - exact[..., :2]

    def reference(value: Tensor, axis: int) -> Tensor:
        return value.unsqueeze(axis) if pairs is None else value.index_select(axis, pairs[:, 0])

    def target(value: Tensor, axis: int) -> Tensor:
        return value.unsqueeze(axis - 1) if pairs is None else value.index_select(axis, pairs[:, 1])

    size_r, size_t = reference(size, -2), target(size, -2)
    if position == "reference":
        unit = size_r
    elif position == "mean":
        unit = (size_r * size_t).sqrt()
    else:
        assert picture_hw is not None
        unit = picture_hw.double().flip(-1).unsqueeze(-2)
        unit = unit.unsqueeze(-2) if pairs is None else unit
    offset = (target(centre, -2) - reference(centre, -2)) / unit
    ratio = size_t / size_r
    sides = ratio if scale == "ratio" else ratio.log()

    if axes == "view" and flipped is not None:
        offset = torch.where(reference(flipped, -1).unsqueeze(-1), offset * offset.new_tensor([-1, 1]), offset)
    if axes == "view" and quarter_turns is not None:
        turns = reference(quarter_turns, -1).long().unsqueeze(-1) % 4
        odd = turns % 2 == 1
        # counter-clockwise with y down: right becomes up, down becomes right
        offset = torch.where(odd, offset.flip(-1) * offset.new_tensor([1, -1]), offset)
        offset = torch.where(turns >= 2, -offset, offset)
        sides = torch.where(odd, sides.flip(-1), sides)

    channels = torch.cat([offset, sides.mean(-1, keepdim=True) if scale == "log_area" else sides], -1)
    if mean is not None:
        channels = channels - mean.to(channels)
    if std is not None:
        channels = channels / std.to(channels)
    return channels.float()


def _check(boxes: Tensor, pairs: Tensor | None, flipped: Tensor | None, quarter_turns: Tensor | None, picture_hw: Tensor | None) -> None:
    if boxes.ndim < 2 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}, expected (..., N, 4)")
    for name, value in (("flipped", flipped), ("quarter_turns", quarter_turns)):
        if value is not None and value.shape != boxes.shape[:-1]:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(boxes.shape[:-1])} as boxes")
    if pairs is not None and (pairs.ndim != 2 or pairs.shape[-1] != 2):
        raise ValueError(f"pairs has shape {tuple(pairs.shape)}, expected (P, 2)")
    if picture_hw is not None and picture_hw.shape != (*boxes.shape[:-2], 2):
        raise ValueError(f"picture_hw has shape {tuple(picture_hw.shape)}, expected {(*boxes.shape[:-2], 2)}")
