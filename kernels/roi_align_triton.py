"""ROI pooling in Triton: one small launch makes the tables of weights, one launch multiplies, forwards or backwards.

Here: both kernels, the product fused with pair targets, their launchers.
Not here: the definition (roi_align_reference.py), checks and the tables (roi_align.py), a pair's formula (pair_targets_triton.py).
How: an output is a weighted sum over a picture's tokens, weight = rows[bin, y] * columns[bin, x]; a program looks up a tile of weights and
leaves the sum to the tensor cores. The gradient is the same product with tokens and outputs in each other's place. No atomics.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from wherefrom.kernels.dispatch import Launch, contiguous_or, interpreted
from wherefrom.kernels.pair_targets_reference import PairUnits
from wherefrom.kernels.pair_targets_triton import PAIRS, store_pair_targets, target_arguments, wide
from wherefrom.kernels.roi_align_torch import ADAPTIVE, AREA, READERS, table_bins

# what a program takes on: lines, terms summed a step, channels, warps, and steps fetched ahead; float32, in three products, has fewer
BLOCK_ROWS, WARPS = 64, 4
BLOCK_SUM = {torch.float32: 16, torch.bfloat16: 32, torch.float16: 32}
BLOCK_D = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}
STAGES = {torch.float32: 2, torch.bfloat16: 3, torch.float16: 3}
STAGES_BACK = 2  # backwards what is read hangs on a box's turn
REGISTERS = 255  # a thread's limit, stated: left to itself ptxas may spill some to fit one more program on a multiprocessor
BLOCK_TABLE = {"BLOCK_BINS": 8, "BLOCK_TOKENS": 32}
MAP_SIZE = ("H", "W")  # known at run time alone: not even whether one is 1 or a multiple of 16 makes another kernel


@triton.jit
def axis_weights(
    low, high, first_bin, bins, reverse, token, size, ADAPTIVE: tl.constexpr, AREA: tl.constexpr, READERS: tl.constexpr,
    BLOCK_BINS: tl.constexpr,
):  # fmt: skip
    """Return the weights (BLOCK_BINS, tokens) of tokens of one axis, of `size`, in a stretch of its bins from low to high.

    Divisions round as IEEE asks: the number of samples must not depend on the device.
    """
    bin = first_bin + tl.arange(0, BLOCK_BINS)
    bin = tl.where(reverse, bins - 1 - bin, bin)
    number = bin.to(tl.float32)
    width = tl.div_rn(high - low, bins.to(tl.float32))
    start = low + number * width
    token = token.to(tl.float32)[None, :]
    size = size.to(tl.float32)
    if AREA:
        end = low + (number + 1.0) * width
        finite = (tl.abs(end) < float("inf"))[:, None]
        end = tl.clamp(end, -0.5, size - 0.5)[:, None]
        start = tl.clamp(start, -0.5, size - 0.5)[:, None]
        overlap = tl.maximum(tl.minimum(end, token + 0.5) - tl.maximum(start, token - 0.5), 0.0)
        inside = finite & (end > start)
        weight = tl.where(inside, tl.div_rn(overlap, tl.where(inside, end - start, 1.0)), 0.0)
    else:
        start = start[:, None]
        count = tl.zeros_like(width) + READERS
        sample = tl.zeros_like(start - token)
        if ADAPTIVE:
            # a box that is inverted, infinite or NaN holds no sample
            count = tl.where((width > 0.0) & (width < 2147483648.0), tl.ceil(width), 0.0)
            # the first sample that may read a token: those between are too many to list in a huge box
            sample = tl.floor((token - 1.0 - start) * (count / width) - 0.5)
            sample = tl.minimum(tl.maximum(sample, 0.0), tl.maximum(count - READERS, 0.0))
        weight = tl.zeros_like(sample)
        for _ in range(READERS):
            position = start + tl.div_rn((sample + 0.5) * width, tl.maximum(count, 1.0))
            inside = (position >= -1.0) & (position <= size) & (sample < count)
            # the outermost tokens reach a whole token further out
            distance = tl.abs(tl.minimum(tl.maximum(position, 0.0), size - 1.0) - token)
            weight += tl.where(inside, tl.maximum(1.0 - distance, 0.0), 0.0)
            sample += 1.0
        weight = tl.div_rn(weight, tl.maximum(count, 1.0))
    return tl.where(((bin >= 0) & (bin < bins))[:, None], weight, 0.0)


@triton.jit(do_not_specialize=MAP_SIZE)
def weights_kernel(
    rows_ptr, columns_ptr, boxes_ptr, turns_ptr, flipped_ptr, valid_ptr, scale_y, scale_x, H, W,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr, TURNED: tl.constexpr, FLIPPED: tl.constexpr,
    VALID: tl.constexpr, ADAPTIVE: tl.constexpr, AREA: tl.constexpr, READERS: tl.constexpr, BLOCK_BINS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_TOKENS rows and columns of one box's two tables; grid (boxes, ceil(max(H, W) / BLOCK_TOKENS)).

    Shapes: boxes (boxes, 4) float32, turns, flipped and valid (boxes,) -> rows (boxes, H, BINS_Y), columns (boxes, W, BINS_X), 0 where
            there is no such bin.
    """
    box = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    turns = tl.load(turns_ptr + box).to(tl.int32) & 3 if TURNED else 0
    odd = (turns & 1) != 0
    leftwards = (turns == 1) | (turns == 2)
    if FLIPPED:
        leftwards = leftwards ^ (tl.load(flipped_ptr + box) != 0)
    is_valid = tl.load(valid_ptr + box) != 0 if VALID else True

    x0 = tl.load(boxes_ptr + box * 4) * scale_x - 0.5
    y0 = tl.load(boxes_ptr + box * 4 + 1) * scale_y - 0.5
    x1 = tl.load(boxes_ptr + box * 4 + 2) * scale_x - 0.5
    y1 = tl.load(boxes_ptr + box * 4 + 3) * scale_y - 0.5
    for first in range(0, BINS_Y, BLOCK_BINS):
        bin = first + tl.arange(0, BLOCK_BINS)
        weight = axis_weights(y0, y1, first, tl.where(odd, OUT_W, OUT_H), turns >= 2, token, H, ADAPTIVE, AREA, READERS, BLOCK_BINS)
        at = (box * H + token)[None, :] * BINS_Y + bin[:, None]
        tl.store(rows_ptr + at, tl.where(is_valid, weight, 0.0), mask=(bin < BINS_Y)[:, None] & (token < H)[None, :])
    for first in range(0, BINS_X, BLOCK_BINS):
        bin = first + tl.arange(0, BLOCK_BINS)
        weight = axis_weights(x0, x1, first, tl.where(odd, OUT_H, OUT_W), leftwards, token, W, ADAPTIVE, AREA, READERS, BLOCK_BINS)
        at = (box * W + token)[None, :] * BINS_X + bin[:, None]
        tl.store(columns_ptr + at, tl.where(is_valid, weight, 0.0), mask=(bin < BINS_X)[:, None] & (token < W)[None, :])


@triton.jit
def token_offset(sample, stride_b, y, stride_y, x, stride_x):
    """Return the int64 offset of tokens (sample, y, x), sample being int64; strides may be any."""
    return sample * stride_b + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x


@triton.jit
def result_offset(sample, lines, line, D):
    """Return the int64 offset of lines of D numbers in a contiguous (B, lines, D), sample being int64."""
    return (sample * lines + line) * D


@triton.jit
def tf32(number):
    """Return float32 of any shape rounded to the 11 leading bits that tensor cores multiply, halves away from 0; NaN may become 0."""
    return ((number.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def float32_product(weight, value):
    """Return weight (lines, K) @ value (K, channels) in float32, from three products of what tensor cores multiply, the small ones first.

    By hand: Triton 3.8 keeps the parts of its own, tf32x3, in several layouts at once, and spills.
    """
    large, large_value = tf32(weight), tf32(value)
    total = tl.dot(weight - large, large_value, input_precision="tf32")
    total = tl.dot(large, value - large_value, total, input_precision="tf32")
    return tl.dot(large, large_value, total, input_precision="tf32")


@triton.jit
def add_products(
    total, source_ptr, rows_ptr, columns_ptr, turns_ptr, sample, line, channel, R, D, stride_b, stride_y, stride_x, stride_d,
    H, W, OUT_H: tl.constexpr, OUT_W: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr,
    TURNED: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
    FINITE: tl.constexpr,
):  # fmt: skip
    """Return total (lines, channels) plus what one picture's source adds to it; tables (boxes, H, BINS_Y) and (boxes, W, BINS_X).

    FINITE: NaN where something that is NaN or infinite has a weight; whatever has none adds nothing.
    """
    # summed over stretches of BLOCK_Y x BLOCK_X tokens of the map, TRANSPOSED of bins of one box: there a weight is a product
    blocks_y: tl.constexpr = ((max(OUT_H, OUT_W) if TURNED else OUT_H) + BLOCK_Y - 1) // BLOCK_Y
    blocks_x: tl.constexpr = ((max(OUT_H, OUT_W) if TURNED else OUT_W) + BLOCK_X - 1) // BLOCK_X
    inside = line < (H * W if TRANSPOSED else R * OUT_H * OUT_W)
    within = inside[:, None]
    k = tl.arange(0, BLOCK_Y * BLOCK_X)
    channel_at = (channel.to(tl.int64) * stride_d)[None, :]
    if FINITE:
        wild = tl.zeros_like(total)
    if TRANSPOSED:
        row_ptrs = rows_ptr + (sample * R * H + line // W) * BINS_Y
        column_ptrs = columns_ptr + (sample * R * W + line % W) * BINS_X
        source_ptr += sample * R * (OUT_H * OUT_W) * D
    else:
        box = sample * R + line // (OUT_H * OUT_W)
        bin_y, bin_x = line // OUT_W % OUT_H, line % OUT_W
        if TURNED:
            odd = (tl.load(turns_ptr + box, mask=inside, other=0).to(tl.int32) & 1) != 0
            bin_y, bin_x = tl.where(odd, bin_x, bin_y), tl.where(odd, bin_y, bin_x)
        row_ptr = rows_ptr + (box * (H * BINS_Y) + bin_y)
        column_ptr = columns_ptr + (box * (W * BINS_X) + bin_x)[:, None]
    row_step: tl.constexpr = 1 if TRANSPOSED else BINS_Y
    # a stretch of the map's columns after another: their weights are read once; TRANSPOSED is one loop
    for block_x in range(1 if TRANSPOSED else tl.cdiv(W, BLOCK_X)):
        if not TRANSPOSED:
            # past the last column weights are 0 and that column is read once more: cheaper than a mask at every step
            k_x = tl.minimum(block_x * BLOCK_X + k % BLOCK_X, W - 1)
            token_at = token_offset(sample, stride_b, k // BLOCK_X, stride_y, k_x, stride_x)[:, None] + channel_at
            x = block_x * BLOCK_X + tl.arange(0, BLOCK_X)
            across = tl.load(column_ptr + (x * BINS_X)[None, :], mask=within & (x < W)[None, :], other=0.0)
        # what hardly ever runs is not fetched ahead: that would take registers and code
        steps = R * (blocks_x * blocks_y) if TRANSPOSED else tl.cdiv(H, BLOCK_Y)
        for step in tl.range(0, steps, num_stages=1 if FINITE else None):
            if TRANSPOSED:
                step_y, step_x = step % blocks_y, step // blocks_y % blocks_x
                box = step // (blocks_y * blocks_x)
                odd = (tl.load(turns_ptr + (sample * R + box)).to(tl.int32) & 1) != 0 if TURNED else False
                size_y, size_x = tl.where(odd, OUT_W, OUT_H), tl.where(odd, OUT_H, OUT_W)
                k_y, k_x = step_y * BLOCK_Y + k // BLOCK_X, step_x * BLOCK_X + k % BLOCK_X
                x = step_x * BLOCK_X + tl.arange(0, BLOCK_X)
                row_ptr = row_ptrs + wide(box) * (H * BINS_Y)
                column_ptr = (column_ptrs + wide(box) * (W * BINS_X))[:, None]
                across = tl.load(column_ptr + x[None, :], mask=within, other=0.0)
                in_box = tl.where(odd, k_x * OUT_W + k_y, k_y * OUT_W + k_x)
                value_ptr = source_ptr + ((box * (OUT_H * OUT_W) + in_box).to(tl.int64) * D)[:, None] + channel_at
                readable = ((k_y < size_y) & (k_x < size_x))[:, None] & (channel < D)[None, :]
                start = step_y * BLOCK_Y
            else:
                # the last stretch ends with the map: rows that it shares with the one before have no weight in it
                start = tl.minimum(step * BLOCK_Y, H - BLOCK_Y)
                value_ptr = source_ptr + wide(start) * stride_y + token_at
                readable = (channel < D)[None, :]
            if BLOCK_Y == 1:
                # one row of a step's tokens, one number a line: an axis of length 1 would get a layout which holds it many times; float32
                # takes it out of the sum, so that the parts of a weight need not be found again at every row
                down = tl.load(row_ptr + start * row_step, mask=inside, other=0.0)[:, None]
                weight, factor = (across, down) if WIDE else (across * down, 1.0)
            else:
                factor = 1.0
                y = start + tl.arange(0, BLOCK_Y)
                has_weight = within if TRANSPOSED else within & (y >= step * BLOCK_Y)[None, :]
                down = tl.load(row_ptr[:, None] + (y * row_step)[None, :], mask=has_weight, other=0.0)
                weight = tl.reshape(down[:, :, None] * across[:, None, :], (line.shape[0], BLOCK_Y * BLOCK_X))
            value = tl.load(value_ptr, mask=readable, other=0.0)
            if WIDE:
                value = value.to(tl.float32)
            if FINITE:
                finite = tl.abs(value.to(tl.float32)) < float("inf")
                reads = (weight * factor > 0.0).to(value.dtype)  # zeros and ones are exact in any dtype
                wild = tl.dot(reads, tl.where(finite, 0.0, 1.0).to(value.dtype), wild, input_precision="tf32")
                value = tl.where(finite, value, 0.0)
            if WIDE:
                # added apart: tensor cores round their own sums towards zero
                total += float32_product(weight, value) * factor
            else:
                # a weight in two parts: rounded once it would cost as much as rounding the result
                large = weight.to(value.dtype)
                total = tl.dot(large, value, total)
                total = tl.dot((weight - large.to(tl.float32)).to(value.dtype), value, total)
    return tl.where(wild > 0.0, float("nan"), total) if FINITE else total


@triton.jit
def store_lines(result_ptr, total, sample, lines, line, channel, D):
    """Write a tile (lines, channels) of one picture's result, rounded to its dtype."""
    at = result_offset(sample, lines, line, D)[:, None] + channel[None, :]
    tl.store(result_ptr + at, total.to(result_ptr.dtype.element_ty), mask=(line < lines)[:, None] & (channel < D)[None, :])


@triton.jit
def contract_program(
    result_ptr, source_ptr, rows_ptr, columns_ptr, turns_ptr, program, R, D, stride_b, stride_y, stride_x, stride_d,
    H, W, OUT_H: tl.constexpr, OUT_W: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr,
    TURNED: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_ROWS lines x BLOCK_D channels of one picture's result: outputs summed over tokens, TRANSPOSED tokens over outputs.

    Shapes: source (B, H, W, D) of any strides, TRANSPOSED (B, R, OUT_H, OUT_W, D) contiguous; result the other of the two, contiguous.
            WIDE multiplies in float32 whatever the source is.
    """
    lines = H * W if TRANSPOSED else R * OUT_H * OUT_W
    channel_blocks = tl.cdiv(D, BLOCK_D)
    line_blocks = tl.cdiv(lines, BLOCK_ROWS)
    first = program % channel_blocks * BLOCK_D
    line = program // channel_blocks % line_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    sample = (program // channel_blocks // line_blocks).to(tl.int64)

    channel = first + tl.arange(0, BLOCK_D)
    total = add_products(
        tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32),
        source_ptr, rows_ptr, columns_ptr, turns_ptr, sample, line, channel, R, D, stride_b, stride_y, stride_x, stride_d,
        H, W, OUT_H, OUT_W, BINS_Y, BINS_X, TURNED, TRANSPOSED, WIDE, BLOCK_Y, BLOCK_X, False,
    )  # fmt: skip
    if tl.max(tl.where(tl.abs(total) < float("inf"), 0, 1)) == 0:
        store_lines(result_ptr, total, sample, lines, line, channel, D)
    else:
        # a NaN somewhere, and 0 * NaN is NaN: sum what is finite, and find which sums have the rest with a weight; in narrow blocks,
        # so that what hardly ever runs takes no registers from what always does
        for part in range(0, BLOCK_D, 16):
            narrow = first + part + tl.arange(0, 16)
            part_total = add_products(
                tl.zeros((BLOCK_ROWS, 16), tl.float32),
                source_ptr, rows_ptr, columns_ptr, turns_ptr, sample, line, narrow, R, D, stride_b, stride_y, stride_x, stride_d,
                H, W, OUT_H, OUT_W, BINS_Y, BINS_X, TURNED, TRANSPOSED, WIDE, BLOCK_Y, BLOCK_X, True,
            )  # fmt: skip
            store_lines(result_ptr, part_total, sample, lines, line, narrow, D)


@triton.jit(do_not_specialize=MAP_SIZE)
def contract_kernel(
    result_ptr, source_ptr, rows_ptr, columns_ptr, turns_ptr, R, D, stride_b, stride_y, stride_x, stride_d, H, W,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr, TURNED: tl.constexpr,
    TRANSPOSED: tl.constexpr, WIDE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one block of lines and channels of one picture; grid (pictures * blocks of lines * blocks of channels,).

    Shapes: as `contract_program`.
    """
    contract_program(
        result_ptr, source_ptr, rows_ptr, columns_ptr, turns_ptr, tl.program_id(0), R, D, stride_b, stride_y, stride_x, stride_d,
        H, W, OUT_H, OUT_W, BINS_Y, BINS_X, TURNED, TRANSPOSED, WIDE, BLOCK_ROWS, BLOCK_Y, BLOCK_X, BLOCK_D,
    )  # fmt: skip


@triton.jit(do_not_specialize=MAP_SIZE)
def pool_pairs_kernel(
    result_ptr, source_ptr, rows_ptr, columns_ptr, R, D, stride_b, stride_y, stride_x, stride_d, H, W,
    OUT_H: tl.constexpr, OUT_W: tl.constexpr, BINS_Y: tl.constexpr, BINS_X: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
    pool_programs, targets_ptr, boxes_ptr, pairs_ptr, flipped_ptr, turns_ptr, picture_ptr, mean_ptr, std_ptr, P, POSITION: tl.constexpr,
    SCALE: tl.constexpr, VIEW_AXES: tl.constexpr, FLIPPED: tl.constexpr, TURNED: tl.constexpr, CHOSEN: tl.constexpr, MEAN: tl.constexpr,
    STD: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One program: what `contract_kernel`'s do, or, from pool_programs on, PAIRS pair targets of one picture's boxes.

    Shapes: as `contract_program` and `store_pair_targets`.
    """
    program = tl.program_id(0)
    if program < pool_programs:
        contract_program(
            result_ptr, source_ptr, rows_ptr, columns_ptr, turns_ptr, program, R, D, stride_b, stride_y, stride_x, stride_d,
            H, W, OUT_H, OUT_W, BINS_Y, BINS_X, TURNED, False, WIDE, BLOCK_ROWS, BLOCK_Y, BLOCK_X, BLOCK_D,
        )  # fmt: skip
    else:
        blocks = tl.cdiv(P, PAIRS)
        program -= pool_programs
        store_pair_targets(
            targets_ptr, boxes_ptr, pairs_ptr, flipped_ptr, turns_ptr, picture_ptr, mean_ptr, std_ptr, program // blocks,
            program % blocks * PAIRS, R, P, POSITION, SCALE, VIEW_AXES, FLIPPED, TURNED, CHOSEN, MEAN, STD, PAIRS,
        )  # fmt: skip


def _padded(bins: int) -> int:
    """Return how many numbers of a table a token has: 8, 16 or a multiple of 32, so that every stretch of bins, of `_blocks`, is whole."""
    return max(8, triton.next_power_of_2(bins)) if bins <= 32 else triton.cdiv(bins, 32) * 32


def empty_table(boxes: Tensor, bins: int, tokens: int) -> Tensor:
    """Return an unwritten table for boxes (B, R, 4), (B, R, bins, tokens), in memory (B, R, tokens, padded bins).

    Every step in it is a number that the compiler knows, for maps of any size, and what is read of a token lies side by side.
    """
    return boxes.new_empty(*boxes.shape[:2], tokens, _padded(bins))[..., :bins].mT


def _laid_out(table: Tensor) -> Tensor:
    """Return a table (B, R, bins, tokens) as `empty_table` lays it out, which that of `roi_weights` is, unless something copied it."""
    B, R, bins, tokens = table.shape
    token = _padded(bins)
    if table.stride() == (R * tokens * token, tokens * token, 1, token):
        return table
    return table.new_zeros(B, R, tokens, token)[..., :bins].copy_(table.mT).mT


def roi_weights_triton(
    boxes: Tensor,
    quarter_turns: Tensor | None,
    flipped: Tensor | None,
    valid: Tensor | None,
    map_hw: Sequence[int],
    frame_hw: Sequence[float],
    out_hw: Sequence[int],
    samples: int,
) -> tuple[Tensor, Tensor]:
    """Launch `roi_weights` for checked arguments; shapes as there, in memory as `empty_table`."""
    (H, W), (B, R) = map_hw, boxes.shape[:2]
    bins = table_bins(out_hw, quarter_turns)
    rows, columns = empty_table(boxes, bins[0], H), empty_table(boxes, bins[1], W)
    boxes = boxes.contiguous()
    if boxes.numel():
        weights_kernel[(B * R, triton.cdiv(max(H, W), BLOCK_TABLE["BLOCK_TOKENS"]))](
            rows,
            columns,
            boxes,
            contiguous_or(quarter_turns, boxes),
            contiguous_or(flipped, boxes),
            contiguous_or(valid, boxes),
            H / frame_hw[0],
            W / frame_hw[1],
            H=H,
            W=W,
            OUT_H=out_hw[0],
            OUT_W=out_hw[1],
            BINS_Y=_padded(bins[0]),
            BINS_X=_padded(bins[1]),
            TURNED=quarter_turns is not None,
            FLIPPED=flipped is not None,
            VALID=valid is not None,
            ADAPTIVE=samples == ADAPTIVE,
            AREA=samples == AREA,
            READERS=READERS if samples == ADAPTIVE else samples,
            **BLOCK_TABLE,
            num_warps=1,
            enable_fp_fusion=False,  # a fused multiply-add rounds once: the number of samples could differ from other devices'
        )
    return rows, columns


def roi_contract_triton(
    source: Tensor,
    rows: Tensor,
    columns: Tensor,
    quarter_turns: Tensor | None,
    map_hw: Sequence[int],
    out_hw: Sequence[int],
    transposed: bool,
) -> Tensor:
    """Launch `roi_contract` for checked arguments; shapes as there."""
    B, R, D = *rows.shape[:2], source.shape[-1]
    result = source.new_empty(B, *(map_hw if transposed else (R, *out_hw)), D)
    source = source.contiguous() if transposed else source
    if result.numel():
        lines = map_hw[0] * map_hw[1] if transposed else R * out_hw[0] * out_hw[1]
        arguments = _contract_arguments(source, rows, columns, map_hw, out_hw, transposed)
        turns = rows if quarter_turns is None else quarter_turns.contiguous()
        contract_kernel[(_programs(B, lines, D, arguments["BLOCK_D"]),)](
            result,
            turns_ptr=turns,
            TURNED=quarter_turns is not None,
            TRANSPOSED=transposed,
            **arguments,
            num_warps=WARPS,
            num_stages=_stages(source.dtype, transposed),
            **_options(),
        )
    return result


def roi_align_pairs_triton(
    source: Tensor,
    rows: Tensor,
    columns: Tensor,
    boxes: Tensor,
    pairs: Tensor | None,
    *,
    units: PairUnits,
    flipped: Tensor | None,
    quarter_turns: Tensor | None,
    picture_hw: Tensor | None,
    map_hw: Sequence[int],
    out_hw: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Launch `roi_align_pairs` for checked arguments -> pooled (B, R, *out_hw, D), targets (B, P, C)."""
    B, R, D = *rows.shape[:2], source.shape[-1]
    count = R * R if pairs is None else len(pairs)
    result = source.new_empty(B, R, *out_hw, D)
    targets = boxes.new_empty(B, count, len(units.channels))
    arguments = _contract_arguments(source, rows, columns, map_hw, out_hw, False)
    pool_programs = _programs(B, R * out_hw[0] * out_hw[1], D, arguments["BLOCK_D"])
    programs = pool_programs + B * triton.cdiv(count, PAIRS)
    if programs:
        pool_pairs_kernel[(programs,)](
            result,
            **arguments,
            **target_arguments(boxes, pairs, units, flipped, quarter_turns, picture_hw),
            pool_programs=pool_programs,
            targets_ptr=targets,
            P=count,
            PAIRS=PAIRS,
            num_warps=WARPS,
            num_stages=_stages(source.dtype, transposed=False),
            **_options(),
        )
    return result, targets


def _programs(pictures: int, lines: int, D: int, block_d: int) -> int:
    return pictures * triton.cdiv(lines, BLOCK_ROWS) * triton.cdiv(D, block_d)


def _contract_arguments(
    source: Tensor, rows: Tensor, columns: Tensor, map_hw: Sequence[int], out_hw: Sequence[int], transposed: bool
) -> dict[str, Any]:
    """Return what `contract_program` takes by name, but its result, its turns and its direction; shapes as `roi_contract`."""
    strides = source.stride()
    wide = source.dtype == torch.float32 or (source.dtype == torch.bfloat16 and interpreted())  # which multiplies bfloat16's bits
    return {
        "source_ptr": source,
        "rows_ptr": _laid_out(rows),
        "columns_ptr": _laid_out(columns),
        "R": rows.shape[1],
        "D": source.shape[-1],
        "stride_b": strides[0],
        "stride_y": strides[1],
        "stride_x": strides[2],
        "stride_d": strides[-1],
        "H": map_hw[0],
        "W": map_hw[1],
        "OUT_H": out_hw[0],
        "OUT_W": out_hw[1],
        "BINS_Y": _padded(rows.shape[2]),
        "BINS_X": _padded(columns.shape[2]),
        "WIDE": wide,
        **_blocks(source.dtype, source.shape[-1], *((None, columns.shape[2]) if transposed else map_hw)),
    }


def _blocks(dtype: torch.dtype, channels: int, map_rows: int | None, summed_x: int) -> dict[str, int]:
    """Return the block sizes, of powers of 2; a stretch of a map has no more rows than the map, of bins (map_rows None) it may."""
    # at least 4 terms along a row: with fewer, the two factors of a tile of weights take more registers than the tile
    block_x = min(BLOCK_SUM[dtype], max(4, triton.next_power_of_2(summed_x)))
    block_y = BLOCK_SUM[dtype] // block_x
    if map_rows is not None:
        # at most 16 a row, whose weights stay in registers down the map; 16 in all is the least that tensor cores sum
        block_x = min(16, block_x)
        block_y = min(BLOCK_SUM[dtype] // block_x, 2 ** (map_rows.bit_length() - 1))
        block_x = max(block_x, 16 // block_y)
    return {
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_Y": block_y,
        "BLOCK_X": block_x,
        "BLOCK_D": min(BLOCK_D[dtype], max(16, triton.next_power_of_2(channels))),
    }


def _stages(dtype: torch.dtype, transposed: bool) -> int:
    return STAGES_BACK if transposed else STAGES[dtype]


def _options() -> dict[str, Any]:
    """Return what the compiler is told; a limit of registers is NVIDIA's."""
    return {"enable_fp_fusion": True} | ({} if torch.version.hip else {"maxnreg": REGISTERS})


UPRIGHT_BINS = {"OUT_H": 1, "OUT_W": 1, "BINS_Y": 8, "BINS_X": 8}
TURNED_BINS = {"OUT_H": 7, "OUT_W": 7, "BINS_Y": 8, "BINS_X": 8}


def launches() -> list[Launch]:
    """Return launches as they are really made: both directions, fused, and both tables; every dtype, small and large maps."""
    large = ", large map, one bin, upright"
    upright = (torch.float32, torch.bfloat16)  # float16 as bfloat16
    return [
        *(_contract_launch(dtype, "roi_align forward", False, TURNED_BINS, 14) for dtype in BLOCK_D),
        *(_contract_launch(dtype, "roi_align backward", True, TURNED_BINS, 14) for dtype in BLOCK_D),
        *(_contract_launch(dtype, "roi_align_pairs", False, TURNED_BINS, 14, pairs=True) for dtype in BLOCK_D),
        *(_contract_launch(dtype, f"roi_align forward{large}", False, UPRIGHT_BINS, 32) for dtype in upright),
        *(_contract_launch(dtype, f"roi_align backward{large}", True, UPRIGHT_BINS, 32) for dtype in upright),
        *(_table_launch(sampling) for sampling in ("adaptive", "area")),
    ]


def _contract_launch(dtype: torch.dtype, name: str, transposed: bool, bins: dict[str, int], width: int, *, pairs: bool = False) -> Launch:
    """Return a launch of `contract_kernel`, or of `pool_pairs_kernel`, on maps of a width."""
    word = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    types = {"result_ptr": f"*{word}", "source_ptr": f"*{word}", "rows_ptr": "*fp32", "columns_ptr": "*fp32", "turns_ptr": "*i64"}
    types |= dict.fromkeys(("R", "D", "stride_b", "stride_y", "stride_x", *MAP_SIZE), "i32")
    aligned = tuple(name for name in types if name not in ("R", *MAP_SIZE))
    summed = (None, bins["OUT_W"]) if transposed else (width, width)
    constants: dict[str, Any] = bins | _blocks(dtype, 768, *summed)
    constants |= {"stride_d": 1, "WIDE": dtype == torch.float32, "TURNED": bins is TURNED_BINS}
    if pairs:
        types |= {"targets_ptr": "*fp32", "boxes_ptr": "*fp32", "pairs_ptr": "*i64", "flipped_ptr": "*i1", "picture_ptr": "*fp32"}
        types |= {"mean_ptr": "*fp32", "std_ptr": "*fp32", "pool_programs": "i32", "P": "i32"}
        constants |= dict.fromkeys(("VIEW_AXES", "FLIPPED", "CHOSEN", "MEAN", "STD"), True)
        constants |= {"POSITION": "reference", "SCALE": "log_area", "PAIRS": PAIRS}
    else:
        constants |= {"TRANSPOSED": transposed}
    return Launch(
        name=f"{name}, {word}",
        kernel=pool_pairs_kernel if pairs else contract_kernel,
        types=types,
        constants=constants,
        aligned=aligned,
        warps=WARPS,
        stages=_stages(dtype, transposed),
        per_step=BLOCK_ROWS * BLOCK_SUM[dtype],
        options=_options(),
    )


def _table_launch(sampling: str) -> Launch:
    """Return a launch of `weights_kernel`."""
    tables = {"rows_ptr": "*fp32", "columns_ptr": "*fp32", "boxes_ptr": "*fp32", "turns_ptr": "*i64", "flipped_ptr": "*i1"}
    constants = TURNED_BINS | BLOCK_TABLE | dict.fromkeys(("TURNED", "FLIPPED", "VALID"), True)
    return Launch(
        name=f"roi_align tables, {sampling}",
        kernel=weights_kernel,
        types=tables | {"valid_ptr": "*i1", "scale_y": "fp32", "scale_x": "fp32"} | dict.fromkeys(MAP_SIZE, "i32"),
        constants=constants | {"ADAPTIVE": sampling == "adaptive", "AREA": sampling == "area", "READERS": READERS},
        aligned=tuple(tables),
        warps=1,
        options={"enable_fp_fusion": False},
    )
