"""Pair targets in Triton: one launch writes the targets of all pairs of a batch, or of chosen ones.

Here: the formula for a tile of pairs, which fused kernels call too; the kernel around it, its launcher.
Not here: the definition (pair_targets_reference.py), checks (pair_targets.py).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wherefrom.kernels.dispatch import Launch, contiguous_or
from wherefrom.kernels.pair_targets_reference import PairUnits

PAIRS = 256  # a program: 3 or 4 channels of each, written as one contiguous stretch


@triton.jit
def wide(number):
    """Return int64 of a number, of any shape, that may be a constant: products with it do not overflow."""
    return tl.zeros((), tl.int64) + number


@triton.jit
def pair_target_tile(
    rx0,
    ry0,
    rx1,
    ry1,
    tx0,
    ty0,
    tx1,
    ty1,
    flipped,
    quarter_turns,
    picture_h,
    picture_w,
    POSITION: tl.constexpr,
    SCALE: tl.constexpr,
    VIEW_AXES: tl.constexpr,
):
    """Return (x, y, width or scale, height) of target boxes t relative to reference boxes r, not yet standardized.

    Shapes: all of one shape that broadcasts; float32, flipped and quarter_turns int32. SCALE="log_area" has the one scale in both.
    """
    rw, rh = rx1 - rx0, ry1 - ry0
    tw, th = tx1 - tx0, ty1 - ty0
    # differences of edges, not of centers: a box on a grid of pixels loses nothing in float32
    x, y = ((tx0 - rx0) + (tx1 - rx1)) * 0.5, ((ty0 - ry0) + (ty1 - ry1)) * 0.5
    if POSITION == "reference":
        x, y = x / rw, y / rh
    elif POSITION == "mean":
        x, y = x / tl.sqrt(rw * tw), y / tl.sqrt(rh * th)
    else:
        x, y = x / picture_w, y / picture_h
    across, down = tw / rw, th / rh
    if SCALE != "ratio":
        across, down = tl.log(across), tl.log(down)
    if VIEW_AXES:
        x = tl.where(flipped != 0, -x, x)
        turns = quarter_turns & 3
        odd = (turns & 1) != 0
        # counter-clockwise with y down: right becomes up, down becomes right
        x, y = tl.where(odd, y, x), tl.where(odd, -x, y)
        x, y = tl.where(turns >= 2, -x, x), tl.where(turns >= 2, -y, y)
        across, down = tl.where(odd, down, across), tl.where(odd, across, down)
    if SCALE == "log_area":
        across = (across + down) * 0.5
        down = across
    return x, y, across, down


@triton.jit
def load_boxes(boxes_ptr, index, mask):
    """Return x0, y0, x1, y1 of contiguous boxes (..., 4) float32 by int64 index; 0, 0, 1, 1 where masked."""
    at = boxes_ptr + index * 4
    x0 = tl.load(at, mask=mask, other=0.0)
    y0 = tl.load(at + 1, mask=mask, other=0.0)
    x1 = tl.load(at + 2, mask=mask, other=1.0)
    y1 = tl.load(at + 3, mask=mask, other=1.0)
    return x0, y0, x1, y1


@triton.jit
def store_pair_targets(
    out_ptr,
    boxes_ptr,
    pairs_ptr,
    flipped_ptr,
    turns_ptr,
    picture_ptr,
    mean_ptr,
    std_ptr,
    sample,
    first,
    N,
    P,
    POSITION: tl.constexpr,
    SCALE: tl.constexpr,
    VIEW_AXES: tl.constexpr,
    FLIPPED: tl.constexpr,
    TURNED: tl.constexpr,
    CHOSEN: tl.constexpr,
    MEAN: tl.constexpr,
    STD: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Write the targets of pairs first .. first + PAIRS of one sample: what a program of `pair_targets_kernel` does.

    Shapes: out (B, P, C), boxes (B, N, 4) float32, pairs (P, 2), flipped and turns (B, N), picture (B, 2), mean and std (C,). A pair that
            names no box reads nothing and becomes NaN.
    """
    C: tl.constexpr = 3 if SCALE == "log_area" else 2 if SCALE == "none" else 4
    pair = first + tl.arange(0, PAIRS)
    inside = pair < P
    if CHOSEN:
        r = tl.load(pairs_ptr + pair.to(tl.int64) * 2, mask=inside, other=0)
        t = tl.load(pairs_ptr + pair.to(tl.int64) * 2 + 1, mask=inside, other=0)
    else:
        r, t = pair // N, pair % N
    exists = inside & (r >= 0) & (r < N) & (t >= 0) & (t < N)
    sample = sample.to(tl.int64)
    at_r, at_t = sample * N + r, sample * N + t
    rx0, ry0, rx1, ry1 = load_boxes(boxes_ptr, at_r, exists)
    tx0, ty0, tx1, ty1 = load_boxes(boxes_ptr, at_t, exists)
    flipped = tl.load(flipped_ptr + at_r, mask=exists, other=0).to(tl.int32) if FLIPPED else tl.zeros((PAIRS,), tl.int32)
    turns = tl.load(turns_ptr + at_r, mask=exists, other=0).to(tl.int32) if TURNED else tl.zeros((PAIRS,), tl.int32)
    picture_h = tl.load(picture_ptr + sample * 2).to(tl.float32) if POSITION == "picture" else 1.0
    picture_w = tl.load(picture_ptr + sample * 2 + 1).to(tl.float32) if POSITION == "picture" else 1.0
    x, y, across, down = pair_target_tile(
        rx0, ry0, rx1, ry1, tx0, ty0, tx1, ty1, flipped, turns, picture_h, picture_w, POSITION, SCALE, VIEW_AXES
    )
    # one tile (pair, channel) whose neighbors lie side by side: a warp writes whole lines
    tile = tl.reshape(tl.join(tl.join(x, across), tl.join(y, down)), (PAIRS, 4))
    channel = tl.arange(0, 4)
    if MEAN:
        tile -= tl.load(mean_ptr + channel, mask=channel < C, other=0.0)[None, :]
    if STD:
        tile /= tl.load(std_ptr + channel, mask=channel < C, other=1.0)[None, :]
    tile = tl.where(exists[:, None], tile, float("nan"))
    at = out_ptr + (sample * P + pair)[:, None] * C + channel[None, :]
    tl.store(at, tile, mask=inside[:, None] & (channel < C)[None, :])


@triton.jit
def pair_targets_kernel(
    out_ptr,
    boxes_ptr,
    pairs_ptr,
    flipped_ptr,
    turns_ptr,
    picture_ptr,
    mean_ptr,
    std_ptr,
    N,
    P,
    POSITION: tl.constexpr,
    SCALE: tl.constexpr,
    VIEW_AXES: tl.constexpr,
    FLIPPED: tl.constexpr,
    TURNED: tl.constexpr,
    CHOSEN: tl.constexpr,
    MEAN: tl.constexpr,
    STD: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One program: PAIRS pairs of one sample; grid (ceil(P / PAIRS) * B,), pairs of a sample side by side.

    Shapes: as `store_pair_targets`.
    """
    blocks = tl.cdiv(P, PAIRS)
    program = tl.program_id(0)
    store_pair_targets(
        out_ptr, boxes_ptr, pairs_ptr, flipped_ptr, turns_ptr, picture_ptr, mean_ptr, std_ptr, program // blocks, program % blocks * PAIRS,
        N, P, POSITION, SCALE, VIEW_AXES, FLIPPED, TURNED, CHOSEN, MEAN, STD, PAIRS,
    )  # fmt: skip


def pair_targets_triton(
    boxes: Tensor,
    pairs: Tensor | None,
    units: PairUnits,
    flipped: Tensor | None,
    quarter_turns: Tensor | None,
    picture_hw: Tensor | None,
) -> Tensor:
    """Launch for checked arguments: boxes (B, N, 4), ... -> (B, P, C) float32, P = N * N where pairs is None."""
    samples, boxes_each = boxes.shape[:2]
    count = boxes_each**2 if pairs is None else len(pairs)
    out = boxes.new_empty(samples, count, len(units.channels), dtype=torch.float32)
    if out.numel():
        arguments = target_arguments(boxes, pairs, units, flipped, quarter_turns, picture_hw)
        grid = (triton.cdiv(count, PAIRS) * samples,)
        with torch.cuda.device_of(boxes):  # Triton launches on the current device
            pair_targets_kernel[grid](out, **arguments, N=boxes_each, P=count, PAIRS=PAIRS, num_warps=4, enable_fp_fusion=True)
    return out


def target_arguments(
    boxes: Tensor,
    pairs: Tensor | None,
    units: PairUnits,
    flipped: Tensor | None,
    quarter_turns: Tensor | None,
    picture_hw: Tensor | None,
) -> dict[str, Any]:
    """Return what `store_pair_targets` takes by name, all contiguous; what is None points at the boxes, unread.

    Shapes: boxes (B, N, 4), pairs (P, 2), flipped and quarter_turns (B, N), picture_hw (B, 2), mean and std (C,).
    """
    boxes = boxes.float().contiguous()
    mean, std = (None if value is None else value.to(boxes.device) for value in (units.mean, units.std))
    return {
        "boxes_ptr": boxes,
        "pairs_ptr": contiguous_or(pairs, boxes),
        "flipped_ptr": contiguous_or(flipped, boxes),
        "turns_ptr": contiguous_or(quarter_turns, boxes),
        "picture_ptr": contiguous_or(picture_hw, boxes),
        "mean_ptr": contiguous_or(mean, boxes),
        "std_ptr": contiguous_or(std, boxes),
        "POSITION": units.position,
        "SCALE": units.scale,
        "VIEW_AXES": units.axes == "view" and (flipped is not None or quarter_turns is not None),
        "FLIPPED": flipped is not None,
        "TURNED": quarter_turns is not None,
        "CHOSEN": pairs is not None,
        "MEAN": mean is not None,
        "STD": std is not None,
    }


def launches() -> list[Launch]:
    """Return launches as they are really made: all pairs of upright boxes, and chosen pairs with everything asked for."""
    types = {"out_ptr": "*fp32", "boxes_ptr": "*fp32", "pairs_ptr": "*i64", "flipped_ptr": "*i1", "turns_ptr": "*u8"}
    types |= {"picture_ptr": "*i32", "mean_ptr": "*fp32", "std_ptr": "*fp32", "N": "i32", "P": "i32"}
    every = ("VIEW_AXES", "FLIPPED", "TURNED", "CHOSEN", "MEAN", "STD")
    options = {
        "all pairs": {"POSITION": "reference", "SCALE": "log_area"} | dict.fromkeys(every, False),
        "chosen pairs, turned, standardized": {"POSITION": "picture", "SCALE": "log_sides"} | dict.fromkeys(every, True),
    }
    pointers = tuple(name for name in types if name.endswith("_ptr"))
    return [
        Launch(
            name=f"pair_targets, {name}",
            kernel=pair_targets_kernel,
            types=types,
            constants=constants | {"PAIRS": PAIRS},
            aligned=pointers,
            options={"enable_fp_fusion": True},
        )
        for name, constants in options.items()
    ]
