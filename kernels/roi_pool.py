"""ROI pooling of channels-last token maps: torchvision's aligned roi_align, or the exact mean of each bin, mirrored and turned.

Here: the public call, its checks, registration, and the fast path in torch. The definition is roi_pool_reference.py.
Not here: Triton (roi_pool_triton.py), pair targets of the pooled boxes (roi_pool_pairs.py).
How: sampling is separable, clamping and all. Each axis of each box has a table of weights, bins x tokens; pooling is two products with
them, its gradient the two transposed products, so that one operator, `roi_contract`, is its own derivative of every order.
"""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from wherefrom.kernels.dispatch import LIBRARY, Backend, check_backend, check_device, check_dtype, check_shape, choose_path
from wherefrom.kernels.roi_pool_reference import Sampling, roi_pool_reference

ADAPTIVE, AREA = 0, -1  # "adaptive" and "area" among numbers of samples
READERS = 4  # samples of a bin that may read one token: in adaptive mode they lie at least 1/2 apart, 2/3 if they are three or more
CHUNK = 2**19  # numbers that the torch path keeps between its two products: larger ones leave the cache
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def roi_pool(
    tokens: Tensor,
    boxes: Tensor,
    *,
    frame_hw: tuple[float, float],
    out_hw: tuple[int, int],
    sampling: Sampling = "adaptive",
    quarter_turns: Tensor | None = None,
    flipped: Tensor | None = None,
    valid: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Pool each box of each token map into out_hw bins, then mirror it left-right where flipped, then turn it.

    sampling: "adaptive" averages ceil(bin / token) bilinear samples along each axis of a bin (torchvision's -1), an int that many;
              "area" is the exact mean, over the part of a bin that lies on the map, of a map that is constant within each token's cell.
    A result equals torch.rot90(pooled.flip(columns) if flipped else pooled, quarter_turns, (rows, columns)); out_hw is that of the result.

    Shapes: tokens (B, H, W, D) float32, bfloat16 or float16 of any strides, boxes (B, R, 4) float32 xyxy, quarter_turns (B, R) integers,
            flipped and valid (B, R) bool -> (B, R, *out_hw, D), contiguous, in tokens' dtype; summed in float32.
    Units:  boxes in those of frame_hw, which the map covers: H / frame_hw[0] tokens each down, W / frame_hw[1] across.
    Edges:  as torchvision: samples more than a token outside the map are 0 and count; boxes that are inverted, NaN or infinite pool to 0
            (inverted ones are read backwards with fixed sampling). Boxes that are not valid pool to 0 and give no gradient.
            "area": bins wholly outside the map, or of no width, are 0. Exact while a bin holds fewer than 2^22 tokens.
    NaN:    a token that is NaN or infinite makes NaN of exactly those outputs that read it with a weight above 0; likewise an output's
            gradient and the tokens that it read.
    Paths:  float64 tokens take the reference. There is a gradient for tokens, of any order, none for boxes.
    Raises: ValueError if shapes, dtypes or devices do not fit, an option is unknown, or boxes requires a gradient.
    Source: roi_align of torchvision 0.29, aligned=True.
    """
    check_rois(tokens, boxes, frame_hw, out_hw, sampling, quarter_turns, flipped, valid, backend)
    if backend == "reference" or tokens.dtype == torch.float64:
        options: dict[str, Any] = {"sampling": sampling, "quarter_turns": quarter_turns, "flipped": flipped, "valid": valid}
        return roi_pool_reference(tokens, boxes, frame_hw=frame_hw, out_hw=out_hw, **options)
    map_hw = tokens.shape[1:3]
    samples = samples_of(sampling)
    rows, columns = torch.ops.wherefrom.roi_weights(boxes, quarter_turns, flipped, valid, map_hw, frame_hw, out_hw, samples, backend)
    return Contract.apply(tokens, rows, columns, quarter_turns, map_hw, out_hw, False, backend)


def samples_of(sampling: Sampling) -> int:
    """Return the number that stands for a way of sampling inside operators."""
    return {"adaptive": ADAPTIVE, "area": AREA}[sampling] if isinstance(sampling, str) else sampling


def check_rois(
    tokens: Tensor,
    boxes: Tensor,
    frame_hw: tuple[float, float],
    out_hw: tuple[int, int],
    sampling: Sampling,
    quarter_turns: Tensor | None,
    flipped: Tensor | None,
    valid: Tensor | None,
    backend: Backend,
) -> None:
    """Raise ValueError, naming the argument, unless a call of `roi_pool` can be served; reads no tensor's values."""
    check_backend(backend)
    check_shape("tokens", tokens, "BHWD", "tokens are channels-last, e.g. maps.permute(0, 2, 3, 1)")
    check_dtype("tokens", tokens, (torch.float32, torch.bfloat16, torch.float16, torch.float64))
    if tokens.dtype == torch.float64 and backend in ("triton", "torch"):
        raise ValueError(f'tokens is float64, which backend="{backend}" does not take; use backend="reference"')
    if 0 in tokens.shape[1:3]:
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}: there is no token to pool; a map has at least one row and column")
    check_shape("boxes", boxes, (tokens.shape[0], "R", 4), "add the batch axis with boxes[None]" if boxes.ndim == 2 else "")
    check_dtype("boxes", boxes, (torch.float32,))
    check_device("boxes", boxes, "tokens", tokens)
    if boxes.requires_grad:
        raise ValueError("boxes requires a gradient, and pooling gives none for them; pass boxes.detach()")
    for name, value, dtypes in (
        ("quarter_turns", quarter_turns, INTEGERS),
        ("flipped", flipped, (torch.bool,)),
        ("valid", valid, (torch.bool,)),
    ):
        if value is not None:
            check_shape(name, value, boxes.shape[:2], "one a box")
            check_dtype(name, value, dtypes)
            check_device(name, value, "tokens", tokens)
    if len(frame_hw) != 2 or not all(0 < side < float("inf") for side in frame_hw):
        raise ValueError(f"frame_hw={frame_hw}: needs two sides above 0, (height, width) of the frame of the boxes")
    if len(out_hw) != 2 or not all(isinstance(side, int) and side > 0 for side in out_hw):
        raise ValueError(f"out_hw={out_hw}: needs two whole numbers of bins, (rows, columns) of the result")
    known = sampling in ("adaptive", "area") if isinstance(sampling, str) else type(sampling) is int and sampling > 0
    if not known:
        words = ", ".join(repr(word) for word in get_args(get_args(Sampling)[1]))
        raise ValueError(f"sampling={sampling!r}: take one of {words}, or a whole number of samples above 0")


class Contract(torch.autograd.Function):
    """`roi_contract` with its gradient, which is `roi_contract` in the other direction."""

    @staticmethod
    def forward(
        source: Tensor,
        rows: Tensor,
        columns: Tensor,
        quarter_turns: Tensor | None,
        map_hw: Sequence[int],
        out_hw: Sequence[int],
        transposed: bool,
        backend: str,
    ) -> Tensor:
        return torch.ops.wherefrom.roi_contract(source, rows, columns, quarter_turns, map_hw, out_hw, transposed, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, rows, columns, quarter_turns, ctx.map_hw, ctx.out_hw, ctx.transposed, ctx.backend = inputs
        ctx.save_for_backward(rows, columns, quarter_turns)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        out = Contract.apply(gradient, *ctx.saved_tensors, ctx.map_hw, ctx.out_hw, not ctx.transposed, ctx.backend)
        return out, None, None, None, None, None, None, None


LIBRARY.define(
    "roi_weights(Tensor boxes, Tensor? quarter_turns, Tensor? flipped, Tensor? valid, SymInt[] map_hw, float[] frame_hw, int[] out_hw, "
    "int samples, str backend) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "roi_contract(Tensor source, Tensor rows, Tensor columns, Tensor? quarter_turns, SymInt[] map_hw, int[] out_hw, bool transposed, "
    "str backend) -> Tensor"
)


def _roi_weights_op(
    boxes: Tensor,
    quarter_turns: Tensor | None,
    flipped: Tensor | None,
    valid: Tensor | None,
    map_hw: Sequence[int],
    frame_hw: Sequence[float],
    out_hw: Sequence[int],
    samples: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return each box's weights of its bins' rows (B, R, bins, H) and columns (B, R, bins, W), float32.

    Result (i, j) of a box reads rows[i] and columns[j], rows[j] and columns[i] where its turn is odd: mirror and turn are in the order of
    the bins. Without turns there are out_hw bins; else as many as the longer side of out_hw on both axes, those too many being 0.
    """
    with torch.autocast(boxes.device.type, enabled=False):
        if choose_path(backend, boxes) == "triton":
            from wherefrom.kernels.roi_pool_triton import roi_weights_triton

            return roi_weights_triton(boxes, quarter_turns, flipped, valid, map_hw, frame_hw, out_hw, samples)
        return _weights_torch(boxes, quarter_turns, flipped, valid, map_hw, frame_hw, out_hw, samples)


def _roi_contract_op(
    source: Tensor,
    rows: Tensor,
    columns: Tensor,
    quarter_turns: Tensor | None,
    map_hw: Sequence[int],
    out_hw: Sequence[int],
    transposed: bool,
    backend: str,
) -> Tensor:
    """Pool tokens (B, H, W, D) into (B, R, *out_hw, D), or transposed: sum what each token gave to outputs (B, R, *out_hw, D)."""
    with torch.autocast(source.device.type, enabled=False):
        if choose_path(backend, source) == "triton":
            from wherefrom.kernels.roi_pool_triton import roi_contract_triton

            return roi_contract_triton(source, rows, columns, quarter_turns, map_hw, out_hw, transposed)
        return contract_torch(source, rows, columns, quarter_turns, map_hw, out_hw, transposed)


@torch.library.register_fake("wherefrom::roi_weights", lib=LIBRARY)
def _roi_weights_fake(
    boxes: Tensor,
    quarter_turns: Tensor | None,
    flipped: object,
    valid: object,
    map_hw: Sequence[int],
    frame_hw: object,
    out_hw: Sequence[int],
    *_: object,
) -> tuple[Tensor, Tensor]:
    bins = table_bins(out_hw, quarter_turns)
    return boxes.new_empty(*boxes.shape[:2], bins[0], map_hw[0]), boxes.new_empty(*boxes.shape[:2], bins[1], map_hw[1])


@torch.library.register_fake("wherefrom::roi_contract", lib=LIBRARY)
def _roi_contract_fake(
    source: Tensor,
    rows: Tensor,
    columns: object,
    quarter_turns: object,
    map_hw: Sequence[int],
    out_hw: Sequence[int],
    transposed: bool,
    backend: str,
) -> Tensor:
    middle = map_hw if transposed else (rows.shape[1], *out_hw)
    return source.new_empty(source.shape[0], *middle, source.shape[-1])


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("roi_weights", _roi_weights_op, _device)
    LIBRARY.impl("roi_contract", _roi_contract_op, _device)


def table_bins(out_hw: Sequence[int], quarter_turns: Tensor | None) -> tuple[int, int]:
    """Return how many bins the tables of rows and columns hold: those of out_hw either way round where boxes may be turned."""
    return (out_hw[0], out_hw[1]) if quarter_turns is None else (max(out_hw), max(out_hw))


def _weights_torch(
    boxes: Tensor,
    quarter_turns: Tensor | None,
    flipped: Tensor | None,
    valid: Tensor | None,
    map_hw: Sequence[int],
    frame_hw: Sequence[float],
    out_hw: Sequence[int],
    samples: int,
) -> tuple[Tensor, Tensor]:
    """Compute what `roi_weights` returns, without waiting for a GPU."""
    bins = table_bins(out_hw, quarter_turns)
    counts: tuple[Tensor, Tensor] = (boxes.new_tensor(out_hw[0]), boxes.new_tensor(out_hw[1]))  # of this box: rows, columns
    upwards, leftwards = None, flipped  # bins in reverse order
    if quarter_turns is not None:
        turns = quarter_turns.long() % 4
        odd = turns % 2 == 1
        counts = (torch.where(odd, counts[1], counts[0]), torch.where(odd, counts[0], counts[1]))
        upwards = turns >= 2
        leftwards = (turns == 1) | (turns == 2)
        leftwards = leftwards if flipped is None else leftwards ^ flipped
    tables = []
    for axis, reversed_ in ((0, upwards), (1, leftwards)):
        scale = boxes.new_tensor(map_hw[axis] / frame_hw[axis])
        low, high = (boxes[..., corner] * scale - 0.5 for corner in (1 - axis, 3 - axis))
        bin = torch.arange(bins[axis], device=boxes.device)
        count = counts[axis].unsqueeze(-1)
        if reversed_ is not None:
            bin = torch.where(reversed_.unsqueeze(-1), count - 1 - bin, bin)
        table = _axis_weights(low.unsqueeze(-1), high.unsqueeze(-1), bin, count, map_hw[axis], samples)
        keep = (bin >= 0) & (bin < count) if quarter_turns is not None else None
        if valid is not None:
            keep = valid.unsqueeze(-1) if keep is None else keep & valid.unsqueeze(-1)
        tables.append(table if keep is None else table * keep.unsqueeze(-1))
    return tables[0], tables[1]


def _axis_weights(low: Tensor, high: Tensor, bin: Tensor, bins: Tensor, size: int, samples: int) -> Tensor:
    """Return the weights (B, R, n, size) of the tokens of one axis in bins `bin` of `bins` from low to high (B, R, 1).

    The order of operations is torchvision's: other rounding would change the number of samples.
    """
    width = (high - low) / bins
    start = (low + bin * width).unsqueeze(-1)  # (B, R, n, 1)
    token = torch.arange(size, device=low.device, dtype=torch.float32)
    if samples == AREA:
        end = (low + (bin + 1) * width).unsqueeze(-1).clamp(-0.5, size - 0.5)
        start = start.clamp(-0.5, size - 0.5)
        overlap = (torch.minimum(end, token + 0.5) - torch.maximum(start, token - 0.5)).clamp_(min=0)
        return torch.where(end > start, overlap / (end - start), 0)

    width = width.unsqueeze(-1)
    first: Tensor | int = 0
    if samples == ADAPTIVE:
        # a box that is inverted, infinite or NaN holds no sample
        count = torch.where((width > 0) & (width < 2**31), width.ceil(), 0)
        readers = min(READERS, int(count.max()) if count.numel() else 0) if low.device.type == "cpu" else READERS
        if readers == READERS:
            # the first sample that may read a token: those between are too many to list in a huge box
            first = ((token - 1 - start) * (count / width) - 0.5).floor().clamp(min=0).minimum((count - readers).clamp(min=0))
    else:
        count, readers = low.new_tensor(samples), samples
    total = torch.zeros(*start.shape[:-1], size, device=low.device)
    for sample in range(readers):
        number = first + sample
        position = start + (number + 0.5) * width / count
        held = (position >= -1) & (position <= size) & (number < count)
        # the outermost tokens reach a whole token further out; what is not held is moved where no token reaches
        position = torch.where(held, position.clamp(0, size - 1), -2)
        total += (1 - (position - token).abs()).clamp_(min=0)
    return total / count.clamp(min=1)


def contract_torch(
    source: Tensor,
    rows: Tensor,
    columns: Tensor,
    quarter_turns: Tensor | None,
    map_hw: Sequence[int],
    out_hw: Sequence[int],
    transposed: bool,
) -> Tensor:
    """Compute what `roi_contract` returns, in float32 (a CPU's bfloat16 products are many times slower), rounded at the end."""
    odd = None
    if quarter_turns is not None and (source.device.type != "cpu" or bool((quarter_turns % 2 == 1).any())):
        odd = (quarter_turns % 2 == 1)[..., None, None, None]
    product = _spread_turned if transposed else _pool_turned
    source32 = source.float()
    # a product with a table of weights multiplies every token, and 0 * NaN is NaN; one sum tells that there is none
    if source.device.type == "cpu" and source32.sum().isfinite():
        return product(source32, rows, columns, odd, out_hw).to(source.dtype)
    wild = ~source32.isfinite()
    result = product(source32.masked_fill(wild, 0), rows, columns, odd, out_hw)
    reached = product(wild.float(), rows, columns, odd, out_hw) > 0
    return result.masked_fill_(reached, float("nan")).to(source.dtype)


def _pool_turned(tokens: Tensor, rows: Tensor, columns: Tensor, odd: Tensor | None, out_hw: Sequence[int]) -> Tensor:
    """Pool float32 tokens (B, H, W, D) -> (B, R, *out_hw, D); odd (B, R, 1, 1, 1) says where a turn swaps the axes, None nowhere."""
    h, w = out_hw
    pooled = _pool(tokens, rows[:, :, :h], columns[:, :, :w])
    if odd is None:
        return pooled
    swapped = pooled if h == w else _pool(tokens, rows[:, :, :w], columns[:, :, :h])
    return torch.where(~odd, pooled, swapped.transpose(2, 3))  # in this order contiguous


def _spread_turned(gradient: Tensor, rows: Tensor, columns: Tensor, odd: Tensor | None, out_hw: Sequence[int]) -> Tensor:
    """Apply the transpose of `_pool_turned` to float32 (B, R, *out_hw, D) -> (B, H, W, D)."""
    h, w = out_hw
    if odd is None or h == w:
        upright = gradient if odd is None else torch.where(odd, gradient.transpose(2, 3), gradient)
        return _spread(upright, rows[:, :, :h], columns[:, :, :w])
    swapped = gradient.masked_fill(~odd, 0).transpose(2, 3)
    upright = gradient.masked_fill(odd, 0)
    return _spread(upright, rows[:, :, :h], columns[:, :, :w]) + _spread(swapped, rows[:, :, :w], columns[:, :, :h])


def _pool(tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply tokens (B, H, W, D) by rows (B, R, n, H), then by columns (B, R, m, W), a few pictures at a time -> (B, R, n, m, D)."""
    (B, H, W, D), (R, n), m = tokens.shape, rows.shape[1:3], columns.shape[2]
    pooled = tokens.new_empty(B, R, n, m, D)
    for few, b in _few_pictures(B, R * n * W * D):
        down = torch.bmm(rows[few].reshape(b, R * n, H), tokens[few].reshape(b, H, W * D))
        across = columns[few, :, None].expand(b, R, n, m, W).reshape(b * R * n, m, W)
        torch.bmm(across, down.view(b * R * n, W, D), out=pooled[few].view(b * R * n, m, D))
    return pooled


def _spread(gradient: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply the transpose of `_pool` to (B, R, n, m, D) -> (B, H, W, D)."""
    (B, R, n, H), (m, W), D = rows.shape, columns.shape[2:], gradient.shape[-1]
    tokens = gradient.new_empty(B, H, W, D)
    for few, b in _few_pictures(B, R * n * W * D):
        across = columns[few, :, None].expand(b, R, n, m, W).reshape(b * R * n, m, W)
        down = torch.bmm(across.mT, gradient[few].reshape(b * R * n, m, D))
        torch.bmm(rows[few].reshape(b, R * n, H).mT, down.view(b, R * n, W * D), out=tokens[few].view(b, H, W * D))
    return tokens


def _few_pictures(pictures: int, numbers_each: int) -> list[tuple[slice, int]]:
    """Return slices of pictures, and their lengths, of which at most CHUNK numbers lie between the two products, or one picture."""
    few = max(1, CHUNK // max(1, numbers_each))
    return [(slice(first, first + few), min(few, pictures - first)) for first in range(0, pictures, few)]
