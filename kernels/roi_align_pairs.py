"""Pool the regions of a token map and write the pair targets of their boxes, in one launch.

Here: the public call and its registration. It computes what `roi_align` and `pair_targets` do, and is defined by them.
Not here: the formulas (roi_align_reference.py, pair_targets_reference.py), the kernel (roi_align_triton.py: extra programs on its grid).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wherefrom.kernels.dispatch import (
    LIBRARY,
    Backend,
    check_no_derivative,
    check_no_tangent,
    choose_path,
    in_one_thread,
    is_transformed,
    needs_gradient,
)
from wherefrom.kernels.pair_targets import check_targets, pair_targets, picture_sizes
from wherefrom.kernels.pair_targets_reference import CHANNELS, DEFAULT_UNITS, Axes, PairUnits, PositionUnit, Scale, pair_targets_reference
from wherefrom.kernels.roi_align import check_rois, contract, roi_align, samples_of
from wherefrom.kernels.roi_align_reference import Sampling
from wherefrom.kernels.roi_align_torch import contract_torch


def roi_align_pairs(
    tokens: Tensor,
    boxes: Tensor,
    *,
    frame_hw: float | tuple[float, float],
    out_hw: int | tuple[int, int],
    pairs: Tensor | None = None,
    sampling: Sampling = "adaptive",
    quarter_turns: Tensor | None = None,
    flipped: Tensor | None = None,
    valid: Tensor | None = None,
    units: PairUnits = DEFAULT_UNITS,
    picture_hw: Tensor | float | tuple[float, float] | None = None,
    check_values: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Return `roi_align` of the boxes, and `pair_targets` of all ordered pairs of one picture's boxes, or of those in `pairs`.

    Mirror and turn of a box are those of the reference view when it is the reference of a pair. Boxes that are not valid pool to 0; their
    targets are written like the others'. Only the pooled tokens have a gradient.

    Shapes: as `roi_align`; pairs (P, 2), picture_hw (B, 2), or one size for all -> pooled (B, R, *out_hw, D), targets (B, R, R, C) or
            (B, P, C) float32 (float64 where backend="reference").
    Units:  boxes, and picture_hw, in those of frame_hw; targets as `PairUnits`.
    Raises: ValueError as `roi_align` and `pair_targets`, and if mean or std requires a gradient.
    """
    frame_hw, out_hw = check_rois(tokens, boxes, frame_hw, out_hw, sampling, quarter_turns, flipped, valid, backend)
    picture_hw = picture_sizes(picture_hw, boxes)
    check_targets(boxes, pairs, units, flipped, quarter_turns, picture_hw, check_values)
    for name, value in (("mean", units.mean), ("std", units.std)):
        check_no_derivative(name, value, "and these targets give none")
    if backend == "reference" or tokens.dtype == torch.float64 or is_transformed(tokens, boxes, units.mean, units.std):
        view: dict[str, Any] = {"quarter_turns": quarter_turns, "flipped": flipped, "backend": backend}
        pooled = roi_align(tokens, boxes, frame_hw=frame_hw, out_hw=out_hw, sampling=sampling, valid=valid, **view)
        return pooled, pair_targets(boxes, pairs, units=units, picture_hw=picture_hw, **view)
    map_hw = tokens.shape[1:3]
    samples = samples_of(sampling)
    rows, columns = torch.ops.wherefrom.roi_weights.default(
        boxes, quarter_turns, flipped, valid, map_hw, frame_hw, out_hw, samples, backend
    )
    call = _PoolPairs.apply if needs_gradient(tokens) else torch.ops.wherefrom.roi_align_pairs.default
    words = (units.position, units.scale, units.axes, backend)
    pooled, targets = call(
        tokens, rows, columns, boxes, pairs, quarter_turns, flipped, picture_hw, units.mean, units.std, map_hw, out_hw, *words
    )
    return pooled, targets if pairs is not None else targets.unflatten(1, (boxes.shape[1],) * 2)


class _PoolPairs(torch.autograd.Function):
    """The operator, shapes as `_roi_align_pairs_op`, with the gradient of its pooled tokens, which is `roi_contract` backwards."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.wherefrom.roi_align_pairs.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, rows, columns, _, _, quarter_turns, *_, ctx.map_hw, ctx.out_hw, _, _, _, ctx.backend = inputs
        ctx.save_for_backward(rows, columns, quarter_turns)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return contract(gradient, *ctx.saved_tensors, ctx.map_hw, ctx.out_hw, True, ctx.backend), *[None] * 15


LIBRARY.define(
    "roi_align_pairs(Tensor tokens, Tensor rows, Tensor columns, Tensor boxes, Tensor? pairs, Tensor? quarter_turns, Tensor? flipped, "
    "Tensor? picture_hw, Tensor? mean, Tensor? std, SymInt[] map_hw, int[] out_hw, str position, str scale, str axes, str backend) "
    "-> (Tensor, Tensor)"
)


def _roi_align_pairs_op(
    tokens: Tensor,
    rows: Tensor,
    columns: Tensor,
    boxes: Tensor,
    pairs: Tensor | None,
    quarter_turns: Tensor | None,
    flipped: Tensor | None,
    picture_hw: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    map_hw: Sequence[int],
    out_hw: Sequence[int],
    position: PositionUnit,
    scale: Scale,
    axes: Axes,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return pooled tokens (B, R, *out_hw, D) and targets (B, P, C) float32, by the path that there is."""
    check_no_tangent(tokens, boxes, mean, std)
    options: dict[str, Any] = {"flipped": flipped, "quarter_turns": quarter_turns, "picture_hw": picture_hw}
    options["units"] = PairUnits(position=position, scale=scale, axes=axes, mean=mean, std=std)
    with torch.autocast(tokens.device.type, enabled=False), torch.cuda.device_of(tokens):
        if choose_path(backend, tokens) == "triton":
            from wherefrom.kernels.roi_align_triton import roi_align_pairs_triton

            return roi_align_pairs_triton(tokens, rows, columns, boxes, pairs, map_hw=map_hw, out_hw=out_hw, **options)
        with in_one_thread(boxes, 4 * boxes[..., 0].numel() * (boxes.shape[1] if pairs is None else len(pairs))):
            targets = pair_targets_reference(boxes, pairs, **options).float()
        return (
            contract_torch(tokens, rows, columns, quarter_turns, map_hw, out_hw, transposed=False),
            targets.reshape(len(boxes), -1, targets.shape[-1]).contiguous(),
        )


LIBRARY.impl("roi_align_pairs", _roi_align_pairs_op, "CPU")
LIBRARY.impl("roi_align_pairs", _roi_align_pairs_op, "CUDA")


@torch.library.register_fake("wherefrom::roi_align_pairs", lib=LIBRARY)
def _roi_align_pairs_fake(
    tokens: Tensor, rows: Tensor, columns: Tensor, boxes: Tensor, pairs: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Return empty results, (B, R, *out_hw, D) and (B, P, C)."""
    out_hw, scale = rest[6], rest[8]
    count = boxes.shape[1] ** 2 if pairs is None else pairs.shape[0]
    pooled = tokens.new_empty(*boxes.shape[:2], *out_hw, tokens.shape[-1])
    return pooled, boxes.new_empty(boxes.shape[0], count, len(CHANNELS[scale]))  # (B, P, C)
