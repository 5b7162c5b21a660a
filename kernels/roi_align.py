"""ROI pooling of channels-last token maps: torchvision's aligned roi_align, or the exact mean of each bin, mirrored and turned.

Here: the public call, its checks, registration. The definition is roi_align_reference.py.
Not here: the fast path in torch (roi_align_torch.py), Triton (roi_align_triton.py), pair targets of the pooled boxes (roi_align_pairs.py).
How: sampling is separable, clamping and all. Each axis of each box has a table of weights, bins x tokens; pooling is two products with
them, its gradient the two transposed products, so that one operator, `roi_contract`, is its own derivative of every order.
"""

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from wherefrom.kernels.dispatch import (
    INTEGERS,
    LIBRARY,
    Backend,
    check_backend,
    check_device,
    check_dtype,
    check_no_derivative,
    check_no_tangent,
    check_shape,
    choose_path,
    in_one_thread,
    is_transformed,
    needs_gradient,
    one_by_one,
    sides_of,
    transforms_active,
    without_derivative,
)
from wherefrom.kernels.roi_align_reference import Sampling, roi_align_reference
from wherefrom.kernels.roi_align_torch import ADAPTIVE, AREA, contract_torch, table_bins, weights_torch

NO_DERIVATIVE = "roi_align gives no derivative of boxes; pass boxes.detach()"


def roi_align(
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
        if is_transformed(boxes):
            boxes = without_derivative(NO_DERIVATIVE, torch.clone, boxes)
        options: dict[str, Any] = {"sampling": sampling, "quarter_turns": quarter_turns, "flipped": flipped, "valid": valid}
        return roi_align_reference(tokens, boxes, frame_hw=frame_hw, out_hw=out_hw, **options)
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
    """Return frame_hw and out_hw as pairs; shapes as `roi_align`.

    Raises: ValueError, naming the argument, unless a call of `roi_align` can be served; reads no tensor's values.
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
    is_valid = sampling in ("adaptive", "area") if isinstance(sampling, str) else type(sampling) is int and sampling > 0
    if not is_valid:
        words = ", ".join(repr(word) for word in get_args(get_args(Sampling)[1]))
        raise ValueError(f"sampling={sampling!r}: take one of {words}, or a whole number of samples above 0")
    return frame, bins


def weights(boxes: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Call `roi_weights` on boxes (B, R, 4), so that a derivative of them is refused, never silently 0; shapes as there."""
    if not is_transformed(boxes):
        return torch.ops.wherefrom.roi_weights.default(boxes, *arguments)
    return without_derivative(NO_DERIVATIVE, torch.ops.wherefrom.roi_weights.default, boxes, *arguments)


def contract(source: Tensor, *arguments: Any) -> Tensor:
    """Call `roi_contract` so that every derivative of its result is right; shapes as there."""
    if is_transformed(source):
        return _ContractInEveryMode.apply(source, *arguments)
    return _contract(source, *arguments)


def _contract(source: Tensor, *arguments: Any) -> Tensor:
    """Call `roi_contract`, shapes as there, through a Function only for gradients: that costs as much as a small problem."""
    if needs_gradient(source):
        return _Contract.apply(source, *arguments)
    return torch.ops.wherefrom.roi_contract.default(source, *arguments)


class _Contract(torch.autograd.Function):
    """`roi_contract`, shapes as there, with its gradient, which is `roi_contract` in the other direction."""

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
    """The same with forward mode, in which it is its own derivative, and vmap; apart, for torch.compile takes no Function that has them.

    Shapes: as `roi_contract`.
    """

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
    In memory they lie as the path that serves likes to read them.
    """
    check_no_tangent(boxes)
    with torch.autocast(boxes.device.type, enabled=False), torch.cuda.device_of(boxes):
        if choose_path(backend, boxes) == "triton":
            from wherefrom.kernels.roi_align_triton import roi_weights_triton

            return roi_weights_triton(boxes, quarter_turns, flipped, valid, map_hw, frame_hw, out_hw, samples)
        with in_one_thread(boxes, 2 * boxes[..., 0].numel() * max(table_bins(out_hw, quarter_turns)) * max(map_hw)):
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
            from wherefrom.kernels.roi_align_triton import roi_contract_triton

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
    samples: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return empty tables, (B, R, bins, H) and (B, R, bins, W), in memory as those of the path that serves."""
    bins = table_bins(out_hw, quarter_turns)
    if choose_path(backend, boxes) == "triton":
        from wherefrom.kernels.roi_align_triton import empty_table

        return empty_table(boxes, bins[0], map_hw[0]), empty_table(boxes, bins[1], map_hw[1])
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
    """Return an empty result, (B, R, *out_hw, D), or transposed (B, H, W, D)."""
    middle = map_hw if transposed else (rows.shape[1], *out_hw)
    return source.new_empty(source.shape[0], *middle, source.shape[-1])


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("roi_weights", _roi_weights_op, _device)
    LIBRARY.impl("roi_contract", _roi_contract_op, _device)
