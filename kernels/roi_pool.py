"""ROI pooling of channels-last token maps: torchvision's aligned roi_align, or the exact mean of each bin, mirrored and turned.

Here: the public call, its checks, registration, and the fast path in torch. The definition is roi_pool_reference.py.
Not here: Triton (roi_pool_triton.py), pair targets of the pooled boxes (roi_pool_pairs.py).
How: sampling is separable, clamping and all. Each axis of each box has a table of weights, bins x tokens; pooling is two products with
them, its gradient the two transposed products, so that one operator, `roi_contract`, is its own derivative of every order.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.kernels.dispatch import (
    INTEGERS,
    LIBRARY,
    Backend,
    alone,
    check_backend,
    check_device,
    check_dtype,
    check_no_derivative,
    check_no_tangent,
    check_shape,
    choose_path,
    needs_gradient,
    one_by_one,
    sides_of,
    transformed,
    transforms_active,
    without_derivative,
)
from wherefrom.kernels.roi_pool_reference import Sampling, roi_pool_reference

ADAPTIVE, AREA = 0, -1  # "adaptive" and "area" among numbers of samples
READERS = 4  # samples of a bin that may read one token: in adaptive mode they lie at least 1/2 apart, 2/3 if they are three or more
CHUNK = 2**19  # numbers that the torch path keeps between its two sums: more would leave the cache
FEATURES = 16  # those taken at once come in multiples of these: whole vectors, whose sums do not depend on how they are cut
SMALL = 2**18  # numbers of all products of a problem that are written out, 0 and all, rather than listed
DIRECT_WIDTH = 128  # features from which on listing every (output, token) pays
DIRECT_SPAN = 4  # tokens an axis that a bin may read for both axes to be summed at once; more are summed one axis after the other

NO_DERIVATIVE = "roi_pool gives no derivative of boxes; pass boxes.detach()"


def roi_pool(
    tokens: Tensor,
    boxes: Tensor,
    *,
    frame_hw: float | tuple[float, float],
    out_hw: int | tuple[int, int],
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
    One number for out_hw or frame_hw is a square.

    Shapes: tokens (B, H, W, D) float32, bfloat16 or float16 of any strides, boxes (B, R, 4) float32 xyxy, quarter_turns (B, R) integers,
            flipped and valid (B, R) bool -> (B, R, *out_hw, D), contiguous, in tokens' dtype; summed in float32.
    Units:  boxes in those of frame_hw, which the map covers: H / frame_hw[0] tokens each down, W / frame_hw[1] across.
    Edges:  as torchvision: samples more than a token outside the map are 0 and count; boxes that are inverted, NaN or infinite pool to 0
            (inverted ones are read backwards with fixed sampling). Boxes that are not valid pool to 0 and give no gradient.
            "area": bins wholly outside the map, or of no width, are 0. Exact while a bin holds fewer than 2^22 tokens.
    NaN:    a token that is NaN or infinite makes exactly those outputs NaN or infinite that read it with a weight above 0; likewise an
            output's gradient those of the tokens that it read.
    Paths:  float64 tokens take the reference; "torch" waits for a GPU. Tokens have derivatives of every order, in reverse and forward mode
            and under vmap; inside torch.compile gradients alone, other transforms raise RuntimeError. Boxes have none: asking raises.
    Raises: ValueError if shapes, dtypes or devices do not fit, an option is unknown, or boxes requires a gradient.
    Source: roi_align of torchvision 0.29, aligned=True.
    """
    frame_hw, out_hw = check_rois(tokens, boxes, frame_hw, out_hw, sampling, quarter_turns, flipped, valid, backend)
    if backend == "reference" or tokens.dtype == torch.float64:
        if transformed(boxes):
            boxes = without_derivative(NO_DERIVATIVE, torch.clone, boxes)
        options: dict[str, Any] = {"sampling": sampling, "quarter_turns": quarter_turns, "flipped": flipped, "valid": valid}
        return roi_pool_reference(tokens, boxes, frame_hw=frame_hw, out_hw=out_hw, **options)
    map_hw = tokens.shape[1:3]
    samples = samples_of(sampling)
    rows, columns = weights(boxes, quarter_turns, flipped, valid, map_hw, frame_hw, out_hw, samples, backend)
    return contract(tokens, rows, columns, quarter_turns, map_hw, out_hw, False, backend)


def samples_of(sampling: Sampling) -> int:
    """Return the number that stands for a way of sampling inside operators."""
    return {"adaptive": ADAPTIVE, "area": AREA}[sampling] if isinstance(sampling, str) else sampling


def check_rois(
    tokens: Tensor,
    boxes: Tensor,
    frame_hw: float | tuple[float, float],
    out_hw: int | tuple[int, int],
    sampling: Sampling,
    quarter_turns: Tensor | None,
    flipped: Tensor | None,
    valid: Tensor | None,
    backend: Backend,
) -> tuple[tuple[float, float], tuple[int, int]]:
    """Return frame_hw and out_hw as pairs.

    Raises: ValueError, naming the argument, unless a call of `roi_pool` can be served; reads no tensor's values.
    """
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
    check_no_derivative("boxes", boxes, "and pooling gives none for them")
    for name, value, dtypes in (
        ("quarter_turns", quarter_turns, INTEGERS),
        ("flipped", flipped, (torch.bool,)),
        ("valid", valid, (torch.bool,)),
    ):
        if value is not None:
            check_shape(name, value, boxes.shape[:2], "one a box")
            check_dtype(name, value, dtypes)
            check_device(name, value, "tokens", tokens)
    frame = sides_of("frame_hw", frame_hw, "two sides above 0, (height, width) of the frame of the boxes, or one for a square", whole=False)
    bins = sides_of("out_hw", out_hw, "two whole numbers of bins, (rows, columns) of the result, or one for a square", whole=True)
    known = sampling in ("adaptive", "area") if isinstance(sampling, str) else type(sampling) is int and sampling > 0
    if not known:
        words = ", ".join(repr(word) for word in get_args(get_args(Sampling)[1]))
        raise ValueError(f"sampling={sampling!r}: take one of {words}, or a whole number of samples above 0")
    return frame, bins


def weights(boxes: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Call `roi_weights`, so that a derivative of the boxes is refused, never silently 0."""
    if not transformed(boxes):
        return torch.ops.wherefrom.roi_weights.default(boxes, *arguments)
    return without_derivative(NO_DERIVATIVE, torch.ops.wherefrom.roi_weights.default, boxes, *arguments)


def contract(source: Tensor, *arguments: Any) -> Tensor:
    """Call `roi_contract` so that every derivative of its result is right."""
    if transformed(source):
        return _ContractInEveryMode.apply(source, *arguments)
    return _contract(source, *arguments)


def _contract(source: Tensor, *arguments: Any) -> Tensor:
    """Call `roi_contract` so that gradients are right, through a Function only for them: that costs as much as a small problem."""
    if needs_gradient(source):
        return _Contract.apply(source, *arguments)
    return torch.ops.wherefrom.roi_contract.default(source, *arguments)


class _Contract(torch.autograd.Function):
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
        return torch.ops.wherefrom.roi_contract.default(source, rows, columns, quarter_turns, map_hw, out_hw, transposed, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, rows, columns, quarter_turns, ctx.map_hw, ctx.out_hw, ctx.transposed, ctx.backend = inputs
        ctx.save_for_backward(rows, columns, quarter_turns)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        out = contract(gradient, *ctx.saved_tensors, ctx.map_hw, ctx.out_hw, not ctx.transposed, ctx.backend)
        return out, None, None, None, None, None, None, None


class _ContractInEveryMode(_Contract):
    """The same with forward mode, in which it is its own derivative, and vmap; apart, for torch.compile takes no Function that has them."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Contract.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[1:4])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        call = contract if transforms_active() else _contract  # else there is one level of forward mode alone, and this is within it
        return call(tangent, *ctx.saved_tensors, ctx.map_hw, ctx.out_hw, ctx.transposed, ctx.backend)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], source: Tensor, *arguments: Any) -> tuple[Tensor, int]:
        axis = in_dims[0]
        if axis is None or any(isinstance(dim, int) for dim in in_dims[1:]):
            return one_by_one(contract, info.batch_size, in_dims, (source, *arguments))
        wide = source.movedim(axis, -2).flatten(-2)  # features are pooled alike: those of all items side by side
        pooled = contract(wide, *arguments).unflatten(-1, (info.batch_size, -1))
        return pooled, pooled.ndim - 2


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
    check_no_tangent(boxes)
    with torch.autocast(boxes.device.type, enabled=False), torch.cuda.device_of(boxes):
        if choose_path(backend, boxes) == "triton":
            from wherefrom.kernels.roi_pool_triton import roi_weights_triton

            return roi_weights_triton(boxes, quarter_turns, flipped, valid, map_hw, frame_hw, out_hw, samples)
        with alone(boxes, 2 * boxes[..., 0].numel() * max(table_bins(out_hw, quarter_turns)) * max(map_hw)):
            return weights_torch(boxes, quarter_turns, flipped, valid, map_hw, frame_hw, out_hw, samples)


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
    check_no_tangent(source)
    with torch.autocast(source.device.type, enabled=False), torch.cuda.device_of(source):
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


def weights_torch(
    boxes: Tensor,
    quarter_turns: Tensor | None,
    flipped: Tensor | None,
    valid: Tensor | None,
    map_hw: Sequence[int],
    frame_hw: Sequence[float],
    out_hw: Sequence[int],
    samples: int,
) -> tuple[Tensor, Tensor]:
    """Compute what `roi_weights` returns, without waiting for a GPU; both axes at once, the shorter one padded."""
    (B, R), bins, size = boxes.shape[:2], table_bins(out_hw, quarter_turns), max(map_hw)
    sizes, counts = (boxes.new_tensor(hw).view(2, 1, 1, 1) for hw in (map_hw, out_hw))  # leading axis: rows, columns
    scale = boxes.new_tensor([side / frame for side, frame in zip(map_hw, frame_hw, strict=True)]).view(2, 1, 1, 1)
    low, high = boxes.view(B, R, 2, 2).permute(2, 3, 0, 1).flip(1).unsqueeze(-1) * scale - 0.5  # (2, B, R, 1) each
    bin = torch.arange(max(bins), device=boxes.device)
    backwards = None if flipped is None else torch.stack([torch.zeros_like(flipped), flipped])
    if quarter_turns is not None:
        turns = quarter_turns.unsqueeze(-1) % 4
        counts = torch.where(turns % 2 == 1, counts.flip(0), counts)
        turned = torch.stack([turns >= 2, (turns == 1) | (turns == 2)]).squeeze(-1)
        backwards = turned if backwards is None else turned ^ backwards
    if backwards is not None:
        bin = torch.where(backwards.unsqueeze(-1), counts - 1 - bin, bin)
    tables = _axis_weights(low, high, bin, counts, sizes, size, samples)
    if quarter_turns is not None:
        tables = tables * ((bin >= 0) & (bin < counts)).unsqueeze(-1)
    if valid is not None:
        tables = tables * valid.view(B, R, 1, 1)
    rows, columns = (tables[axis, :, :, : bins[axis], : map_hw[axis]] for axis in (0, 1))
    return rows.clone(memory_format=torch.contiguous_format), columns.clone(memory_format=torch.contiguous_format)


def _axis_weights(low: Tensor, high: Tensor, bin: Tensor, bins: Tensor, sizes: Tensor, size: int, samples: int) -> Tensor:
    """Return the weights (2, B, R, n, size) of tokens in bins `bin` of `bins` from low to high (2, B, R, 1), of sizes (2, 1, 1, 1) tokens.

    The order of operations is torchvision's: other rounding would change the number of samples.
    """
    width = (high - low) / bins
    start = (low + bin * width).unsqueeze(-1)  # (2, B, R, n, 1)
    token = torch.arange(size, device=low.device, dtype=torch.float32)
    sizes, width = sizes.unsqueeze(-1), width.unsqueeze(-1)
    if samples == AREA:
        start, end = (edge.clamp(min=-0.5).minimum(sizes - 0.5) for edge in (start, (low + (bin + 1) * width.squeeze(-1)).unsqueeze(-1)))
        overlap = (torch.minimum(end, token + 0.5) - torch.maximum(start, token - 0.5)).clamp_(min=0)
        return torch.where(end > start, overlap / (end - start), 0)

    count, readers = low.new_tensor(samples), samples
    if samples == ADAPTIVE:
        # a box that is inverted, infinite or NaN holds no sample
        count = torch.where((width > 0) & (width < 2**31), width.ceil(), 0)
        readers = min(READERS, int(count.max()) if count.numel() else 0) if low.device.type == "cpu" else READERS
    number = torch.arange(readers, device=low.device)
    if samples == ADAPTIVE and readers == READERS:
        # from the first sample that may read a token on: those between are too many to list in a huge box
        first = ((token - 1 - start) * (count / width) - 0.5).floor().clamp(min=0).minimum((count - readers).clamp(min=0))
        number = first.unsqueeze(-1) + number  # (2, B, R, n, size, readers)
    start, width, count, sizes = (value.unsqueeze(-1) for value in (start, width, count, sizes))
    position = start + (number + 0.5) * width / count
    held = (position >= -1) & (position <= sizes) & (number < count)
    # the outermost tokens reach a whole token further out; what is not held is moved where no token reaches
    position = torch.where(held, position.clamp(min=0).minimum(sizes - 1), -2)
    reach = (1 - (position - token.unsqueeze(-1)).abs()).clamp_(min=0)
    return reach.sum(-1) / count.squeeze(-1).clamp(min=1)


def contract_torch(
    source: Tensor,
    rows: Tensor,
    columns: Tensor,
    quarter_turns: Tensor | None,
    map_hw: Sequence[int],
    out_hw: Sequence[int],
    transposed: bool,
) -> Tensor:
    """Compute what `roi_contract` returns, in float32, rounded at the end; on a GPU this waits for it."""
    odd = None  # where a turn swaps the axes
    if quarter_turns is not None and bool((quarter_turns % 2 == 1).any()):
        odd = (quarter_turns % 2 == 1)[..., None, None, None]
    product = _spread_turned if transposed else _pool_turned
    lines = math.prod(map_hw) * len(rows) if transposed else math.prod(out_hw) * rows[..., 0, 0].numel()
    with alone(source, source.numel() + lines * source.shape[-1]):
        # detached: embedding_bag notes what its gradient would need, though none is taken here
        return product(source.detach().float(), rows, columns, odd, out_hw).to(source.dtype)


def _pool_turned(tokens: Tensor, rows: Tensor, columns: Tensor, odd: Tensor | None, out_hw: Sequence[int]) -> Tensor:
    """Pool float32 tokens (B, H, W, D) -> (B, R, *out_hw, D)."""
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
    """Sum tokens (B, H, W, D) by rows (B, R, n, H) and columns (B, R, m, W) -> (B, R, n, m, D)."""
    return _dense_or_listed(_pool_dense, _pool_listed, tokens, rows, columns)


def _spread(gradient: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply the transpose of `_pool` to (B, R, n, m, D) -> (B, H, W, D)."""
    return _dense_or_listed(_spread_dense, _spread_listed, gradient, rows, columns)


Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def _dense_or_listed(dense: Product, listed: Product, source: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Write out all products of a small problem; but what reads something that is not finite is listed."""
    (B, R, n, H), (m, W) = rows.shape, columns.shape[2:]
    if source.device.type != "cpu" or not 0 < B * R * n * W * source.shape[-1] * max(H, m) <= SMALL:
        return listed(source, rows, columns)
    if source.sum().isfinite():
        return dense(source, rows, columns)
    exact = listed(source, rows, columns)  # 0 * NaN would be NaN everywhere
    return torch.where(exact.isfinite(), dense(source.where(source.isfinite(), 0), rows, columns), exact)


def _pool_dense(tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    between = (rows[..., None, None] * tokens[:, None, None]).sum(3)  # (B, R, n, H, W, D) by H
    return (columns[:, :, None, :, :, None] * between[:, :, :, None]).sum(4)  # (B, R, n, m, W, D) by W


def _spread_dense(gradient: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    between = (columns[:, :, None, :, :, None] * gradient[..., None, :]).sum(3)  # (B, R, n, m, W, D) by m
    return (rows[..., None, None] * between[:, :, :, None]).sum((1, 2))  # (B, R, n, H, W, D) by R and n


def _pool_listed(tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    (B, H, W, D), (R, n), m = tokens.shape, rows.shape[1:3], columns.shape[2]
    terms = _terms(rows, columns) if D >= DIRECT_WIDTH else None
    if terms is not None:
        output, token, weight = terms
        return _sums(token, tokens.reshape(-1, D), weight, output, B * R * n * m).view(B, R, n, m, D)
    pooled = tokens.new_empty(B, R, n, m, D)  # by rows, then by columns, of a few pictures and features at a time
    for few, b in _few_pictures(B, R * n * W * D):
        down, across = _listed(rows[few].reshape(b, R * n, H), 1), _listed(columns[few].reshape(b * R, m, W), n)
        for part, d in _few_features(D, b * R * n * W):
            between = down.sums(tokens[few, :, :, part].reshape(b * H, W * d))
            pooled[few, ..., part] = across.sums(between.view(b * R * n * W, d)).view(b, R, n, m, d)
    return pooled


def _spread_listed(gradient: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    (B, R, n, H), (m, W), D = rows.shape, columns.shape[2:], gradient.shape[-1]
    terms = _terms(rows, columns) if D >= DIRECT_WIDTH else None
    if terms is not None:
        output, token, weight = terms
        token, order = token.sort(stable=True)
        return _sums(output[order], gradient.reshape(-1, D), weight[order], token, B * H * W).view(B, H, W, D)
    tokens = gradient.new_empty(B, H, W, D)
    for few, b in _few_pictures(B, R * n * W * D):
        down, across = _listed(columns[few].reshape(b * R, m, W).mT, n), _listed(rows[few].reshape(b, R * n, H).mT, 1)
        for part, d in _few_features(D, b * R * n * W):
            between = down.sums(gradient[few, ..., part].reshape(b * R * n * m, d))
            tokens[few, ..., part] = across.sums(between.view(b * R * n, W * d)).view(b, H, W, d)
    return tokens


def _terms(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return every (output, token, weight) of rows (B, R, n, H) by columns (B, R, m, W), in the outputs' order.

    None where bins read so many tokens that two sums, one an axis, are less work.
    """
    B, H, W = len(rows), rows.shape[-1], columns.shape[-1]
    spans = []  # of each axis: the first token of a bin, and the weights from there on
    for table in (rows, columns):
        used = table != 0
        length = used.shape[-1]
        place = torch.arange(length, device=table.device)
        first = torch.where(used, place, length).amin(-1).clamp(max=length - 1)
        longest = int((torch.where(used, place, -1).amax(-1) - first).amax()) + 1 if used.numel() else 0
        if longest > DIRECT_SPAN:
            return None
        at = first.unsqueeze(-1) + place[: max(longest, 1)]
        spans.append((at, table.gather(-1, at.clamp(max=length - 1)) * (at < length)))
    (y, down), (x, across) = spans
    weight = (down[:, :, :, None, :, None] * across[:, :, None, :, None, :]).flatten()
    picture = torch.arange(B, device=rows.device).view(B, 1, 1, 1, 1, 1) * (H * W)
    token = (picture + y[:, :, :, None, :, None] * W + x[:, :, None, :, None, :]).flatten()
    kept = weight.nonzero().squeeze(-1)
    return kept // (down.shape[-1] * across.shape[-1]), token[kept], weight[kept]


def _sums(term: Tensor, source: Tensor, weight: Tensor, line: Tensor, lines: int) -> Tensor:
    """Sum weight (T,) times row term (T,) of source (S, C) into each line (T,), ascending, of `lines` -> (lines, C)."""
    return _Listed(term, weight, torch.searchsorted(line, torch.arange(lines + 1, device=line.device))).sums(source)


class _Listed(NamedTuple):
    """What has a weight, in order: a bin reads few tokens, 0 * NaN would be NaN, and no number of threads changes a bit."""

    term: Tensor  # (T,) rows of a source
    weight: Tensor  # (T,)
    ends: Tensor  # (lines + 1,) where each line's terms begin, the first 0

    def sums(self, source: Tensor) -> Tensor:
        """Sum the rows of source (S, C) into lines -> (lines, C)."""
        return F.embedding_bag(self.term, source, self.ends, mode="sum", per_sample_weights=self.weight, include_last_offset=True)


def _listed(weights: Tensor, copies: int) -> _Listed:
    """List products of weights (G, n, m) with each of k copies of matrices: rows of a source (G k m, C), lines (G k n, C)."""
    (G, n, m), k = weights.shape, copies
    used = weights != 0
    group, copy, line, term = used[:, None].expand(G, k, n, m).nonzero(as_tuple=True)
    ends = used.sum(-1)[:, None].expand(G, k, n).reshape(-1).cumsum(0)
    return _Listed((group * k + copy) * m + term, weights[group, line, term], F.pad(ends, (1, 0)))


def _few_pictures(pictures: int, numbers_each: int) -> list[tuple[slice, int]]:
    """Return slices of pictures, and their lengths, of which at most CHUNK numbers lie between the two sums, or one picture."""
    few = max(1, CHUNK // max(1, numbers_each))
    return [(slice(first, first + few), min(few, pictures - first)) for first in range(0, pictures, few)]


def _few_features(features: int, numbers_each: int) -> list[tuple[slice, int]]:
    """Return slices of the features, and their lengths, of which at most CHUNK numbers lie between the two sums, or FEATURES of them."""
    few = max(1, CHUNK // max(1, numbers_each * FEATURES)) * FEATURES
    return [(slice(first, first + few), min(few, features - first)) for first in range(0, features, few)]
