"""Relative position and scale of pairs of boxes: what a pair-geometry head is asked to predict.

Here: the public call, its checks, the choice of path. The definition is pair_targets_reference.py.
Not here: which views form pairs, and which of them count (wherefrom.train.objectives).
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from wherefrom.kernels.dispatch import (
    INTEGERS,
    LIBRARY,
    Backend,
    check_backend,
    check_device,
    check_dtype,
    check_no_tangent,
    choose_path,
    in_one_thread,
    is_transformed,
    needs_gradient,
    sides_of,
    without_derivative,
)
from wherefrom.kernels.pair_targets_reference import CHANNELS, DEFAULT_UNITS, Axes, PairUnits, PositionUnit, Scale, pair_targets_reference

NO_DERIVATIVE = 'pair_targets has no derivative with backend="triton"; use backend="torch"'


def pair_targets(
    boxes: Tensor,
    pairs: Tensor | None = None,
    *,
    units: PairUnits = DEFAULT_UNITS,
    flipped: Tensor | None = None,
    quarter_turns: Tensor | None = None,
    picture_hw: Tensor | float | tuple[float, float] | None = None,
    check_values: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Return position (x, y) and scale of target boxes relative to reference boxes, in `units`, as the reference view shows them.

    flipped, quarter_turns: how each box's view is mirrored left-right, then turned counter-clockwise; only the reference's matters.
    picture_hw: (height, width) of the pictures, or one number for a square; read by position="picture" alone.

    Shapes: boxes (..., N, 4) xyxy, pairs (P, 2) of (reference, target) or None for all ordered pairs, flipped and quarter_turns (..., N),
            picture_hw (..., 2), or one size for all -> (..., P, C) or (..., N, N, C) float32, C = len(units.channels).
    Units:  boxes and picture_hw in source pixels; targets as `PairUnits`.
    NaN:    a box that is NaN, infinite or empty makes NaN or infinite targets of its own pairs, and touches no other pair's.
    Paths:  "triton" has no derivative of boxes, mean and std ("auto" then takes "torch", which has all, of any order); "torch" is the
            definition in float32, or float64 where the boxes are; "reference" the definition in float64, and returns float64.
    Raises: ValueError if shapes, dtypes or devices do not fit, an option is unknown, position="picture" comes without picture_hw, or a
            pair names no box: on a GPU only with check_values, which waits for it; else such a pair's targets are NaN by "triton".
    """
    check_backend(backend)
    picture_hw = picture_sizes(picture_hw, boxes)
    check_targets(boxes, pairs, units, flipped, quarter_turns, picture_hw, check_values)
    learned = [name for name, value in (("boxes", boxes), ("mean", units.mean), ("std", units.std)) if needs_gradient(value)]
    if backend == "triton" and learned:
        raise ValueError(f'{learned[0]} requires a gradient, which backend="triton" does not give; use backend="torch"')

    by_definition = backend in ("reference", "torch") or (backend == "auto" and (boxes.device.type == "cpu" or learned))
    every_mode = not by_definition and is_transformed(boxes, units.mean, units.std)
    if by_definition or (every_mode and backend == "auto"):
        exact = boxes.double() if backend == "reference" else boxes
        numbers = 4 * boxes[..., 0].numel() * (boxes.shape[-2] if pairs is None else len(pairs))
        with contextlib.nullcontext() if torch.compiler.is_compiling() else in_one_thread(boxes, numbers):
            targets = pair_targets_reference(exact, pairs, units=units, flipped=flipped, quarter_turns=quarter_turns, picture_hw=picture_hw)
        return targets if backend == "reference" else targets.float()
    flat = boxes.reshape(-1, *boxes.shape[-2:])
    flipped, quarter_turns = (None if value is None else value.reshape(flat.shape[:2]) for value in (flipped, quarter_turns))
    picture_hw = None if picture_hw is None else picture_hw.reshape(-1, 2)
    words = (units.position, units.scale, units.axes, backend)
    arguments = (flat, pairs, flipped, quarter_turns, picture_hw, units.mean, units.std, *words)
    function = torch.ops.wherefrom.pair_targets.default
    out = without_derivative(NO_DERIVATIVE, function, *arguments) if every_mode else function(*arguments)
    middle = (boxes.shape[-2],) * 2 if pairs is None else (len(pairs),)
    return out.view(*boxes.shape[:-2], *middle, out.shape[-1])


LIBRARY.define(
    "pair_targets(Tensor boxes, Tensor? pairs, Tensor? flipped, Tensor? quarter_turns, Tensor? picture_hw, Tensor? mean, Tensor? std, "
    "str position, str scale, str axes, str backend) -> Tensor"
)


def _pair_targets_op(
    boxes: Tensor,
    pairs: Tensor | None,
    flipped: Tensor | None,
    quarter_turns: Tensor | None,
    picture_hw: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    position: PositionUnit,
    scale: Scale,
    axes: Axes,
    backend: str,
) -> Tensor:
    """Serve boxes (B, N, 4) by the path that there is -> (B, P, C) float32."""
    check_no_tangent(boxes, mean, std)
    units = PairUnits(position=position, scale=scale, axes=axes, mean=mean, std=std)
    if choose_path(backend, boxes) == "triton":
        from wherefrom.kernels.pair_targets_triton import pair_targets_triton

        return pair_targets_triton(boxes, pairs, units, flipped, quarter_turns, picture_hw)
    targets = pair_targets_reference(boxes, pairs, units=units, flipped=flipped, quarter_turns=quarter_turns, picture_hw=picture_hw)
    return targets.float().reshape(len(boxes), -1, targets.shape[-1]).contiguous()


@torch.library.register_fake("wherefrom::pair_targets", lib=LIBRARY)
def _pair_targets_fake(
    boxes: Tensor,
    pairs: Tensor | None,
    flipped: Tensor | None,
    quarter_turns: Tensor | None,
    picture_hw: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    position: str,
    scale: str,
    axes: str,
    backend: str,
) -> Tensor:
    """Return an empty tensor (B, P, C) for boxes (B, N, 4) and pairs (P, 2) or None."""
    count = boxes.shape[1] ** 2 if pairs is None else pairs.shape[0]
    return boxes.new_empty(boxes.shape[0], count, len(CHANNELS[scale]), dtype=torch.float32)  # (B, P, C)


LIBRARY.impl("pair_targets", _pair_targets_op, "CPU")
LIBRARY.impl("pair_targets", _pair_targets_op, "CUDA")


def check_pair_values(pairs: Tensor, boxes_each: int, *, wait: bool) -> None:
    """Raise ValueError if one of pairs (P, 2) names a box that is not there; a GPU's values are read, and waited for, only if told to."""
    if torch.compiler.is_compiling() or not (wait or pairs.device.type == "cpu"):
        return
    wrong = ((pairs < 0) | (pairs >= boxes_each)).any(-1).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"pairs[{row}] is {tuple(pairs[row].tolist())}, boxes are numbered 0 to {boxes_each - 1}")


def picture_sizes(picture_hw: Tensor | float | Sequence[float] | None, boxes: Tensor) -> Tensor | None:
    """Return the sizes of pictures as a tensor, one size being that of all: for boxes (..., N, 4) a tensor (..., 2).

    Raises: ValueError if one size is neither two numbers above 0 nor one, for a square.
    """
    if picture_hw is None or isinstance(picture_hw, Tensor):
        return picture_hw
    sides = sides_of("picture_hw", picture_hw, "(height, width) of all pictures, one number for a square, or a tensor of each", whole=False)
    return torch.stack([boxes.new_full(boxes.shape[:-2], side) for side in sides], -1)


def check_targets(
    boxes: Tensor,
    pairs: Tensor | None,
    units: PairUnits,
    flipped: Tensor | None,
    quarter_turns: Tensor | None,
    picture_hw: Tensor | None,
    check_values: bool,
) -> None:
    """Raise ValueError, naming the argument, unless a call of `pair_targets` can be served; shapes as there."""
    if boxes.ndim < 2 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes has shape {tuple(boxes.shape)}, expected (..., N, 4)")
    check_dtype("boxes", boxes, (torch.float32, torch.float64))
    for name, value in (("flipped", flipped), ("quarter_turns", quarter_turns)):
        if value is not None:
            if value.shape != boxes.shape[:-1]:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(boxes.shape[:-1])} as boxes")
            check_dtype(name, value, (torch.bool,) if name == "flipped" else INTEGERS)
    if pairs is not None and (pairs.ndim != 2 or pairs.shape[-1] != 2):
        raise ValueError(f"pairs has shape {tuple(pairs.shape)}, expected (P, 2)")
    if pairs is not None:
        check_dtype("pairs", pairs, (torch.int64, torch.int32))
    if picture_hw is not None and picture_hw.shape != (*boxes.shape[:-2], 2):
        raise ValueError(f"picture_hw has shape {tuple(picture_hw.shape)}, expected {(*boxes.shape[:-2], 2)}")
    for name, value in (("pairs", pairs), ("flipped", flipped), ("quarter_turns", quarter_turns), ("picture_hw", picture_hw)):
        if value is not None:
            check_device(name, value, "boxes", boxes)
    check_picture_hw(units, picture_hw)
    if pairs is not None:
        check_pair_values(pairs, boxes.shape[-2], wait=check_values)


def check_picture_hw(units: PairUnits, picture_hw: Tensor | None) -> None:
    """Raise ValueError if `units` is none, or positions are told in a unit that is missing: picture_hw, a tensor (..., 2)."""
    if not isinstance(units, PairUnits):
        raise ValueError(f"units={units!r:.60}: needs PairUnits, e.g. PairUnits(position='reference')")
    if units.position == "picture" and picture_hw is None:
        raise ValueError('picture_hw is None, position="picture" divides by it; pass picture_hw=source_size')
