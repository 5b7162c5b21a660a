"""The definition of pair targets: relative position and scale of boxes, in the dtype of the boxes given.

Here: the formula, in plain PyTorch; float64 in, float64 out.
Not here: checks and choice of path (pair_targets.py), the kernel (pair_targets_triton.py).
"""

import torch
from torch import Tensor


def pair_targets_reference(
    boxes: Tensor,
    pairs: Tensor | None = None,
    *,
    flipped: Tensor | None = None,
    quarter_turns: Tensor | None = None,
    position: str = "reference",
    scale: str = "log_area",
    axes: str = "view",
    picture_hw: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """Return position and scale of target boxes relative to reference boxes; words, shapes and units as `pair_targets`.

    Raises: nothing; arguments are trusted.
    """

    def reference(value: Tensor, axis: int) -> Tensor:
        return value.unsqueeze(axis) if pairs is None else value.index_select(axis, pairs[:, 0])

    def target(value: Tensor, axis: int) -> Tensor:
        return value.unsqueeze(axis - 1) if pairs is None else value.index_select(axis, pairs[:, 1])

    size = boxes[..., 2:] - boxes[..., :2]
    size_r, size_t = reference(size, -2), target(size, -2)
    if position == "reference":
        unit = size_r
    elif position == "mean":
        unit = (size_r * size_t).sqrt()
    else:
        assert picture_hw is not None
        unit = picture_hw.to(boxes).flip(-1).unsqueeze(-2)
        unit = unit.unsqueeze(-2) if pairs is None else unit
    # differences of edges, not of centers: a box on a grid of pixels loses nothing in float32
    moved = target(boxes, -2) - reference(boxes, -2)
    offset = (moved[..., :2] + moved[..., 2:]) / 2 / unit
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
    return channels
