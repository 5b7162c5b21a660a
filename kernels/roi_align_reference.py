"""The definition of ROI pooling of token maps: plain PyTorch, one region at a time, float64 where tokens are float64.

Here: sampled bins (torchvision's roi_align, aligned=True) and exact bin means, mirror and turn after pooling.
Not here: checks and the choice of path (roi_align.py), anything fast.
Convention: token y covers [y, y + 1) of the map, its value sits at its center y + 0.5; boxes are half-open xyxy in a frame of their own.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Sampling = int | Literal["adaptive", "area"]


def roi_align_reference(
    tokens: Tensor,
    boxes: Tensor,
    *,
    frame_hw: tuple[float, float],
    out_hw: tuple[int, int],
    sampling: Sampling = "adaptive",
    quarter_turns: Tensor | None = None,
    flipped: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Pool every box of every token map into out_hw bins; words, shapes and units as `roi_align`.

    Positions of bins and samples are float32 whatever the tokens are, in torchvision's order of operations: the adaptive number of
    samples is a rounded-up quotient and would jump with other rounding. Values are summed in float32, in float64 for float64 tokens.

    Raises: nothing; arguments are trusted.
    Source: roi_align of torchvision 0.29, aligned=True; the area mean is the overlap of intervals.
    """
    B, H, W, D = tokens.shape
    exact = tokens.to(torch.float64 if tokens.dtype == torch.float64 else torch.float32)
    scale = torch.tensor([W / frame_hw[1], H / frame_hw[0]] * 2, dtype=torch.float32, device=boxes.device)
    corners = boxes * scale - 0.5
    pooled = []
    for b in range(B):
        for r in range(boxes.shape[1]):
            turns = 0 if quarter_turns is None else int(quarter_turns[b, r]) % 4
            bins = out_hw if turns % 2 == 0 else out_hw[::-1]
            x0, y0, x1, y1 = corners[b, r]
            rows = _pool_axis(exact[b], y0, y1, bins[0], sampling)  # (p, W, D)
            result = _pool_axis(rows.transpose(0, 1), x0, x1, bins[1], sampling).transpose(0, 1)  # (p, q, D)
            if flipped is not None and flipped[b, r]:
                result = result.flip(1)
            if valid is not None:
                result = torch.where(valid[b, r], result, 0)
            pooled.append(torch.rot90(result, turns, (0, 1)))
    stacked = torch.stack(pooled) if pooled else exact[:, :0]  # of nothing, but still a function of the tokens
    return stacked.reshape(B, boxes.shape[1], *out_hw, D).to(tokens.dtype)


def _pool_axis(line: Tensor, low: Tensor, high: Tensor, bins: int, sampling: Sampling) -> Tensor:
    """Pool the first axis of (n, ...) from low to high into (bins, ...); low and high float32 numbers, token i at i."""
    width = (high - low) / low.new_tensor(bins)  # by a tensor: CUDA multiplies with the reciprocal of a number
    if sampling == "area":
        return _mean_over_bins(line, low, width, bins)
    # inverted, infinite and NaN boxes hold no adaptive sample
    adaptive = math.ceil(width) if 0 < width < 2**31 else 0
    count = adaptive if sampling == "adaptive" else sampling
    step = torch.arange(bins * count, device=line.device)
    position = (low + step // max(count, 1) * width) + (step % max(count, 1) + 0.5) * width / low.new_tensor(count)
    inside = (position >= -1) & (position <= len(line))
    position = torch.where(inside, position, 0).clamp(0, len(line) - 1)
    before = position.floor().long()
    after = (before + 1).clamp(max=len(line) - 1)
    each = (-1, *[1] * (line.ndim - 1))
    weight = (position.to(line.dtype) - before).view(each)
    sampled = torch.where(inside.view(each), line[before] * (1 - weight) + line[after] * weight, 0)
    return sampled.view(bins, count, *line.shape[1:]).sum(1) / max(count, 1)


def _mean_over_bins(line: Tensor, low: Tensor, width: Tensor, bins: int) -> Tensor:
    """Average a line (n, ...) over the part of each bin that lies on the map -> (bins, ...); 0 where none does."""
    edges = low + torch.arange(bins + 1, device=line.device) * width
    edges = edges.to(line.dtype).clamp(-0.5, len(line) - 0.5)
    token = torch.arange(len(line), device=line.device)
    overlap = torch.minimum(edges[1:, None], token + 0.5) - torch.maximum(edges[:-1, None], token - 0.5)
    inside = (edges[1:] - edges[:-1])[:, None]
    return torch.tensordot(torch.where(inside > 0, overlap.clamp(min=0) / inside, 0), line, 1)
