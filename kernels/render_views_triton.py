"""The view kernel in Triton: one launch renders all views of a family of a batch, straight from the pictures as they lie in memory.

Here: the kernels (render; blur an axis, for the views that drew one), their launcher, and how a batch's numbers reach the device in one
copy. Tiles of pixels are laid on the picture as stored, so that neighboring threads read neighboring bytes; EXIF, mirror and turn only
choose where a finished pixel is written.
Not here: the definition (render_views_reference.py), checks (render_views.py), decoding (wherefrom.pipeline.render.triton_renderer).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from wherefrom.kernels.dispatch import Launch, contiguous_or, interpreted

TILE = (8, 32)  # rows, columns of pixels a program
OVERHANG_PX = tl.constexpr(4096)  # a box is read as reaching no further out of its picture: no number keeps a GPU busy for ever
WIDEST_BLUR_PX = tl.constexpr(4096)  # radius, for the same reason
ALIGNED_BYTES = 16  # where a tensor starts in a block: what every pointer is that torch allocates
LEAST_SECOND_MOMENT = tl.constexpr(1e-6)  # px^2; below it one tap has all the weight and nothing can be centered


@triton.jit
def tap_weight(distance, slope, tilt, CENTERED: tl.constexpr):
    """Return the triangle's weight at a distance (px) from its center, of any shape, not normalized; `slope` is 1 / reach."""
    weight = tl.maximum(1.0 - tl.abs(distance) * slope, 0.0)
    if CENTERED:
        weight *= 1.0 - tilt * distance
    return weight


@triton.jit
def place_taps(start, stop, samples, index, CENTERED: tl.constexpr):
    """Return the taps of output samples `index` along one axis: (first source pixel, its distance, slope, tilt, gain, taps).

    Tap k of a sample is source pixel first + k at distance + k; its weight is gain * tap_weight(distance + k, slope, tilt). The tilt, first
    moment over second, makes the weights' first moment 0 where CENTERED.
    Shapes: index (samples,); start, stop, the slope and the number of taps are scalars, the rest (samples,).
    Units: start and stop of the box in source pixels, float64; distances float32.
    """
    step = (stop - start) / samples
    reach = tl.maximum(step, 1.0)
    # float64: a place on a large picture is wanted to 1e-6 pixel, float32 knows it to 1e-3
    center = start + (index + 0.5) * step
    first = tl.floor(center - reach + 0.5)
    distance = (first + 0.5 - center).to(tl.float32)
    slope = 1.0 / reach.to(tl.float32)
    taps = tl.ceil(2.0 * reach).to(tl.int32)

    weights = tl.zeros_like(distance)
    moment, second_moment = tl.zeros_like(distance), tl.zeros_like(distance)
    at = distance
    for _ in range(taps):
        weight = tap_weight(at, slope, 0.0, False)
        weights += weight
        if CENTERED:
            moment += weight * at
            second_moment += weight * at * at
        at += 1.0
    tilt = tl.zeros_like(distance)
    if CENTERED:  # enlarging is centered as it is
        tilt = tl.where(second_moment > LEAST_SECOND_MOMENT, moment / tl.maximum(second_moment, LEAST_SECOND_MOMENT), 0.0)
        tilt = tl.where(step > 1.0, tilt, 0.0)
    gain = 1.0 / (weights - tilt * moment)
    return first.to(tl.int32), distance, slope, tilt, gain, taps


@triton.jit
def box_edges(boxes_ptr, view, AXIS: tl.constexpr, length, mirrored):
    """Return where a view's box of (views, 4) starts and stops along x (AXIS 0) or y (1), from the other end where mirrored: float64."""
    start = tl.load(boxes_ptr + view.to(tl.int64) * 4 + AXIS).to(tl.float64)
    stop = tl.load(boxes_ptr + view.to(tl.int64) * 4 + AXIS + 2).to(tl.float64)
    start, stop = tl.where(mirrored == 1, length - stop, start), tl.where(mirrored == 1, length - start, stop)
    low, high = -OVERHANG_PX * 1.0, length + OVERHANG_PX * 1.0
    return tl.minimum(tl.maximum(start, low), high), tl.minimum(tl.maximum(stop, low), high)


@triton.jit
def recolor(matrix_ptr, view, ROW: tl.constexpr, r, g, b):
    """Return one channel of matrix (r, g, b, 1), clipped to 0..255, of levels (ROWS, COLS); matrices (views, 3, 4)."""
    row_ptr = matrix_ptr + view.to(tl.int64) * 12 + 4 * ROW
    levels = tl.load(row_ptr) * r + tl.load(row_ptr + 1) * g + tl.load(row_ptr + 2) * b + tl.load(row_ptr + 3)
    return tl.minimum(tl.maximum(levels, 0.0), 255.0)


@triton.jit
def store_channels(at, stride_c, r, g, b, mask):
    """Cast and store three channels, (ROWS, COLS) each; bytes are rounded to the nearest."""
    if at.dtype.element_ty == tl.uint8:
        r, g, b = nearest_byte(r), nearest_byte(g), nearest_byte(b)
    tl.store(at, r.to(at.dtype.element_ty), mask=mask)
    tl.store(at + stride_c, g.to(at.dtype.element_ty), mask=mask)
    tl.store(at + 2 * stride_c, b.to(at.dtype.element_ty), mask=mask)


@triton.jit
def nearest_byte(levels):
    """Round float levels, of any shape, to 0, 1, .. 255."""
    return tl.minimum(tl.maximum(tl.floor(levels + 0.5), 0.0), 255.0)


@triton.jit
def solarize_and_normalize(levels, solarized, mean_ptr, std_ptr, CHANNEL: tl.constexpr, NORMALIZE: tl.constexpr):
    """Return one channel's levels, (ROWS, COLS), solarized and normalized by mean and std (3,)."""
    levels = tl.where(solarized, tl.minimum(levels, 255.0 - levels), levels)
    if NORMALIZE:
        scale = 1.0 / tl.load(std_ptr + CHANNEL)
        levels = levels * (scale / 255.0) - tl.load(mean_ptr + CHANNEL) * scale
    return levels


@triton.jit
def store_pixels(
    at, stride_c, r, g, b, mask, view, solarized_ptr, mean_ptr, std_ptr, SOLARIZE: tl.constexpr, NORMALIZE: tl.constexpr
):  # fmt: skip
    """Solarize, normalize, cast and store the levels of a view, (ROWS, COLS) of each channel."""
    solarized = tl.load(solarized_ptr + view) != 0 if SOLARIZE else False
    r = solarize_and_normalize(r, solarized, mean_ptr, std_ptr, 0, NORMALIZE)
    g = solarize_and_normalize(g, solarized, mean_ptr, std_ptr, 1, NORMALIZE)
    b = solarize_and_normalize(b, solarized, mean_ptr, std_ptr, 2, NORMALIZE)
    store_channels(at, stride_c, r, g, b, mask)


@triton.jit
def render_views_kernel(
    out_ptr,
    blurring_ptr,
    addresses_ptr,
    sizes_ptr,
    orientation_ptr,
    boxes_ptr,
    flipped_ptr,
    turns_ptr,
    matrix_ptr,
    sigma_ptr,
    slot_ptr,
    solarized_ptr,
    mean_ptr,
    std_ptr,
    V,
    stride_b,
    stride_v,
    stride_c,
    stride_h,
    stride_w,
    H: tl.constexpr,
    W: tl.constexpr,
    TILES: tl.constexpr,
    CENTERED: tl.constexpr,
    COLOR: tl.constexpr,
    BLUR: tl.constexpr,
    SOLARIZE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program: ROWS x COLS pixels of one view, counted along the stored picture's rows and columns; grid (B * V * TILES,).

    Views that blur leave clipped levels in `blurring` (slots, 3, H, W) float32, all others are finished in `out` (B, V, 3, H, W).
    """
    view = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    sample = view // V
    stored_h, stored_w = tl.load(sizes_ptr + sample * 2), tl.load(sizes_ptr + sample * 2 + 1)

    # what undoes EXIF: transpose if `lying`, then these two mirrors; then the view's own mirror and turn
    exif = tl.load(orientation_ptr + sample).to(tl.int32) - 1
    lying, vertical, horizontal = (exif >> 2) & 1, (exif >> 1) & 1, ((exif + 1) >> 1) & 1
    flipped = tl.load(flipped_ptr + view).to(tl.int32)
    turns = tl.load(turns_ptr + view).to(tl.int32) & 3
    odd = turns & 1
    rows_mirrored = tl.where(odd == 1, horizontal ^ flipped, vertical) ^ (((turns + 1) >> 1) & 1)
    cols_mirrored = tl.where(odd == 1, vertical, horizontal ^ flipped) ^ (turns >> 1)
    transposed = (lying ^ odd) == 1

    # the box on the stored picture
    upright_h, upright_w = tl.where(lying == 1, stored_w, stored_h), tl.where(lying == 1, stored_h, stored_w)
    x0, x1 = box_edges(boxes_ptr, view, 0, upright_w, horizontal)
    y0, y1 = box_edges(boxes_ptr, view, 1, upright_h, vertical)
    left, right = tl.where(lying == 1, y0, x0), tl.where(lying == 1, y1, x1)
    top, bottom = tl.where(lying == 1, x0, y0), tl.where(lying == 1, x1, y1)

    # i counts samples along the stored picture's rows, j along its columns
    down, across = tl.where(transposed, W, H), tl.where(transposed, H, W)
    tiles_across = tl.cdiv(across, COLS)
    i = tile // tiles_across * ROWS + tl.arange(0, ROWS)
    j = tile % tiles_across * COLS + tl.arange(0, COLS)
    first_y, distance_y, slope_y, tilt_y, gain_y, taps_y = place_taps(top, bottom, down, i, CENTERED)
    first_x, distance_x, slope_x, tilt_x, gain_x, taps_x = place_taps(left, right, across, j, CENTERED)

    picture_ptr = tl.load(addresses_ptr + sample).to(tl.pointer_type(tl.uint8))
    r = tl.zeros((ROWS, COLS), tl.float32)
    g, b = r, r
    row, at_y = first_y, distance_y
    for _ in range(taps_y):
        line_ptr = picture_ptr + tl.minimum(tl.maximum(row, 0), stored_h - 1).to(tl.int64) * (stored_w * 3)
        line_r = tl.zeros((ROWS, COLS), tl.float32)
        line_g, line_b = line_r, line_r
        col, at_x = first_x, distance_x
        for _ in range(taps_x):
            weight = tap_weight(at_x, slope_x, tilt_x, CENTERED)[None, :]
            pixel_ptr = line_ptr[:, None] + (tl.minimum(tl.maximum(col, 0), stored_w - 1) * 3)[None, :]
            line_r += weight * tl.load(pixel_ptr).to(tl.float32)
            line_g += weight * tl.load(pixel_ptr + 1).to(tl.float32)
            line_b += weight * tl.load(pixel_ptr + 2).to(tl.float32)
            col += 1
            at_x += 1.0
        weight = tap_weight(at_y, slope_y, tilt_y, CENTERED)[:, None]
        r += weight * line_r
        g += weight * line_g
        b += weight * line_b
        row += 1
        at_y += 1.0
    gain = gain_y[:, None] * gain_x[None, :]
    r, g, b = r * gain, g * gain, b * gain

    if COLOR:
        r, g, b = recolor(matrix_ptr, view, 0, r, g, b), recolor(matrix_ptr, view, 1, r, g, b), recolor(matrix_ptr, view, 2, r, g, b)

    # sample i becomes the finished view's row, or its column where the picture turns on its side
    i_mirrored, j_mirrored = tl.where(transposed, cols_mirrored, rows_mirrored), tl.where(transposed, rows_mirrored, cols_mirrored)
    to_i = tl.where(i_mirrored == 1, down - 1 - i, i).to(tl.int64)[:, None]
    to_j = tl.where(j_mirrored == 1, across - 1 - j, j).to(tl.int64)[None, :]
    mask = (i < down)[:, None] & (j < across)[None, :]
    slot = tl.where(tl.load(sigma_ptr + view) > 0, tl.load(slot_ptr + view), -1) if BLUR else -1
    if slot >= 0:
        levels_at = blurring_ptr + slot.to(tl.int64) * (3 * H * W)
        levels_at += to_i * tl.where(transposed, 1, W) + to_j * tl.where(transposed, W, 1)
        store_channels(levels_at, H * W, r, g, b, mask)
    else:
        at = out_ptr + sample.to(tl.int64) * stride_b + (view % V).to(tl.int64) * stride_v
        at += to_i * tl.where(transposed, stride_w, stride_h) + to_j * tl.where(transposed, stride_h, stride_w)
        store_pixels(at, stride_c, r, g, b, mask, view, solarized_ptr, mean_ptr, std_ptr, SOLARIZE, NORMALIZE)


@triton.jit
def blur_views_kernel(
    out_ptr,
    from_ptr,
    views_ptr,
    sigma_ptr,
    solarized_ptr,
    mean_ptr,
    std_ptr,
    V,
    stride_b,
    stride_v,
    stride_c,
    stride_h,
    stride_w,
    H: tl.constexpr,
    W: tl.constexpr,
    TILES: tl.constexpr,
    DOWN: tl.constexpr,
    SOLARIZE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """One program: ROWS x COLS pixels of one view that drew a blur; grid (slots * TILES,).

    Not DOWN: along the rows of `from` (slots, 3, H, W) float32 into `out` of the same shape. DOWN: along the columns, finished in `out`
    (B, V, 3, H, W).
    """
    slot = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    view = tl.load(views_ptr + slot)
    sigma = tl.load(sigma_ptr + view)
    if sigma > 0:
        # float64: where 3 sigma is a whole number, float32 may take a tap too few
        radius = tl.minimum(tl.ceil(3.0 * sigma.to(tl.float64)), WIDEST_BLUR_PX * 1.0).to(tl.int32)
        row = tile // tl.cdiv(W, COLS) * ROWS + tl.arange(0, ROWS)
        col = tile % tl.cdiv(W, COLS) * COLS + tl.arange(0, COLS)
        along = row if DOWN else col
        LENGTH: tl.constexpr = H if DOWN else W
        PERIOD: tl.constexpr = 2 * LENGTH - 2 if LENGTH > 1 else 1
        r = tl.zeros((ROWS, COLS), tl.float32)
        g, b = r, r
        weights = 0.0
        falloff = -0.5 / tl.maximum(sigma * sigma, 1e-6)  # below that no neighbor has any weight
        for k in range(-radius, radius + 1):
            weight = tl.exp(falloff * (k * k))
            weights += weight
            reflected = tl.abs(along + k) % PERIOD
            reflected = tl.minimum(reflected, PERIOD - reflected)
            from_row, from_col = reflected if DOWN else tl.minimum(row, H - 1), tl.minimum(col, W - 1) if DOWN else reflected
            at = from_ptr + slot * (3 * H * W) + (from_row * W)[:, None] + from_col[None, :]
            r += weight * tl.load(at)
            g += weight * tl.load(at + H * W)
            b += weight * tl.load(at + 2 * H * W)
        r, g, b = r / weights, g / weights, b / weights

        mask = (row < H)[:, None] & (col < W)[None, :]
        if DOWN:
            at = out_ptr + (view // V).to(tl.int64) * stride_b + (view % V).to(tl.int64) * stride_v
            at += row.to(tl.int64)[:, None] * stride_h + col.to(tl.int64)[None, :] * stride_w
            store_pixels(at, stride_c, r, g, b, mask, view, solarized_ptr, mean_ptr, std_ptr, SOLARIZE, NORMALIZE)
        else:
            at = out_ptr + slot * (3 * H * W) + (row * W)[:, None] + col[None, :]
            store_channels(at, H * W, r, g, b, mask)


def render_views_triton(
    addresses: Tensor,
    sizes: Tensor,
    *,
    orientation: Tensor,
    boxes: Tensor,
    flipped: Tensor,
    quarter_turns: Tensor,
    matrix: Tensor | None,
    blur_sigma_px: Tensor | None,
    solarized: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    size_px: tuple[int, int],
    filter: str,
    out: Tensor,
    blurred: Tensor | None = None,
) -> None:
    """Render checked arguments, all on the device of `out`: B pictures by their addresses, V views each.

    `blurred` (n,) names the views b * V + v that drew a blur, where the caller knows them without waiting for the device: then only they
    take memory, 24 bytes a pixel. None: every view takes it if `blur_sigma_px` is given. No value here can lead a read or a write outside
    pictures and `out`; a box is read as reaching at most 4096 pixels out of its picture, a blur's radius as at most 4096.

    Nothing here waits for the device or copies from the host: with `blurred` on the device, or None, a CUDA graph can capture it, whose
    replays go by what then lies in these tensors; `pack` new numbers, copy them into the block whose views they are, replay.

    Shapes: addresses (B,) int64 of contiguous (H, W, 3) uint8, sizes (B, 2) int32 (height, width) as stored, orientation (B,) integer,
            boxes (B, V, 4) float32, flipped, quarter_turns and solarized (B, V), matrix (B, V, 3, 4) float32, blur_sigma_px (B, V) float32,
            mean and std (3,) float32 -> out (B, V, 3, h, w) uint8 or floating point, any strides.
    """
    if not out.numel():
        return
    views = out.shape[0] * out.shape[1]
    height, width = size_px
    rows, cols = _tile(size_px)
    arguments = {
        "solarized_ptr": contiguous_or(solarized, out),
        "mean_ptr": contiguous_or(mean, out),
        "std_ptr": contiguous_or(std, out),
        "V": out.shape[1],
        **dict(zip(("stride_b", "stride_v", "stride_c", "stride_h", "stride_w"), out.stride(), strict=True)),
        "H": height,
        "W": width,
        "SOLARIZE": solarized is not None,
        "NORMALIZE": mean is not None,
        "ROWS": rows,
        "COLS": cols,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    slots = views_of_slots = blurring = out  # unread
    if blur_sigma_px is not None:
        slots, views_of_slots = _blur_slots(views, blurred, out.device)
        blurring = torch.empty(2, len(views_of_slots), 3, height, width, device=out.device)
    tiles = max(triton.cdiv(height, rows) * triton.cdiv(width, cols), triton.cdiv(width, rows) * triton.cdiv(height, cols))
    with torch.cuda.device_of(out):
        render_views_kernel[(views * tiles,)](
            out,
            blurring,
            addresses,
            sizes.contiguous(),
            orientation.contiguous(),
            boxes.contiguous(),
            flipped.contiguous(),
            quarter_turns.contiguous(),
            contiguous_or(matrix, out),
            contiguous_or(blur_sigma_px, out),
            slots,
            **arguments,
            TILES=tiles,
            CENTERED=filter == "centered",
            COLOR=matrix is not None,
            BLUR=blur_sigma_px is not None,
        )
        if blur_sigma_px is None or not len(views_of_slots):
            return
        tiles = triton.cdiv(height, rows) * triton.cdiv(width, cols)
        for down, source, target in ((False, blurring[0], blurring[1]), (True, blurring[1], out)):
            blur_views_kernel[(len(views_of_slots) * tiles,)](
                target, source, views_of_slots, blur_sigma_px.contiguous(), **arguments, TILES=tiles, DOWN=down
            )


def upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return small CPU tensors, of any shapes, on a device: one copy out of pinned memory, for which nobody waits."""
    return unpack(pack(tensors, pinned=device.type == "cuda").to(device, non_blocking=True), tensors)


def pack(tensors: Sequence[Tensor], *, pinned: bool) -> Tensor:
    """Return the bytes of CPU tensors, of any shapes, one after the other in one block (bytes,)."""
    *starts, total = _starts(tensors)
    block = torch.empty(total, dtype=torch.uint8, pin_memory=pinned)
    for tensor, start in zip(tensors, starts, strict=True):
        block[start : start + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
    return block


def unpack(block: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of a block (bytes,) that was packed of tensors of such dtypes and shapes: views, not copies."""
    *starts, _ = _starts(like)
    parts = zip(like, starts, strict=True)
    return [block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape) for tensor, start in parts]


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    """Return the byte at which each tensor, of any shape, starts in a block, then the length of the block."""
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + -(-tensor.nbytes // ALIGNED_BYTES) * ALIGNED_BYTES)
    return starts


def _blur_slots(views: int, blurred: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the slot of each view (views,), -1 without one, and the view of each slot (slots,): of those `blurred` (slots,), or of all."""
    every = torch.arange(views, dtype=torch.int32, device=device)
    if blurred is None:
        return every, every
    views_of_slots = blurred.to(device, torch.int32, non_blocking=True)
    slots = torch.full_like(every, -1)
    slots[views_of_slots] = torch.arange(len(blurred), dtype=torch.int32, device=device)
    return slots, views_of_slots


def _tile(size_px: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of a program: fixed on a GPU; few and large ones where the interpreter takes its time over each."""
    if not interpreted():
        return TILE
    side = min(64, triton.next_power_of_2(max(size_px)))
    return side, side


def launches() -> list[Launch]:
    """Return launches as they are really made: plain geometry, every photometric, and the blur's two passes."""
    size = {"H": 224, "W": 224, "ROWS": TILE[0], "COLS": TILE[1], "TILES": 196}
    picture = {"blurring_ptr": "*fp32", "addresses_ptr": "*i64", "sizes_ptr": "*i32", "orientation_ptr": "*u8", "boxes_ptr": "*fp32"}
    picture |= {"flipped_ptr": "*i1", "turns_ptr": "*i64", "matrix_ptr": "*fp32", "slot_ptr": "*i32"}
    view = {"sigma_ptr": "*fp32", "solarized_ptr": "*i1", "mean_ptr": "*fp32", "std_ptr": "*fp32", "V": "i32"}
    strides = {"stride_b": "i32", "stride_v": "i32", "stride_c": "i32", "stride_h": "i32"}
    contiguous, channels_last = strides | {"stride_w": "constexpr"}, strides | {"stride_w": "i32"}
    no_color = {"CENTERED": False, "COLOR": False, "BLUR": False, "SOLARIZE": False, "NORMALIZE": False}
    all_color = {"CENTERED": False, "COLOR": True, "BLUR": True, "SOLARIZE": True, "NORMALIZE": True}
    finish = {"SOLARIZE": True, "NORMALIZE": True}
    across = {"out_ptr": "*fp32", "from_ptr": "*fp32", "views_ptr": "*i32"} | view
    to_float32 = {"out_ptr": "*fp32"} | picture | view | contiguous
    entries = [
        ("geometry to uint8", render_views_kernel, {"out_ptr": "*u8"} | picture | view | channels_last, no_color),
        ("centered geometry to float32", render_views_kernel, to_float32, no_color | {"CENTERED": True}),
        ("all photometrics to float32", render_views_kernel, to_float32, all_color),
        ("all photometrics to float16", render_views_kernel, to_float32 | {"out_ptr": "*fp16"}, all_color),
        ("all photometrics to bfloat16", render_views_kernel, to_float32 | {"out_ptr": "*bf16"}, all_color),
        ("blur along rows", blur_views_kernel, across | contiguous, finish | {"DOWN": False}),
        ("blur along columns to float16", blur_views_kernel, across | contiguous | {"out_ptr": "*fp16"}, finish | {"DOWN": True}),
    ]
    return [
        Launch(
            name=f"render_views, {name}",
            kernel=kernel,
            types={argument: kind for argument, kind in types.items() if kind != "constexpr"},
            constants=size | constants | {argument: 1 for argument, kind in types.items() if kind == "constexpr"},
            aligned=tuple(argument for argument in types if argument.endswith("_ptr")),
            options={"enable_fp_fusion": True},
        )
        for name, kernel, types, constants in entries
    ]
