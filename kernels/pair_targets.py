"""Relative position and scale of pairs of boxes: what a pair-geometry head is asked to predict.

Here: the public call, its checks, the choice of path. The definition is pair_targets_reference.py.
Not here: which views form pairs, and which of them count (wherefrom.train.objectives).
"""

import contextlib
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from wherefrom.kernels.dispatch import (
    INTEGERS,
    LIBRARY,
    Backend,
    alone,
    check_backend,
    check_device,
    check_dtype,
    check_no_tangent,
    choose_path,
    needs_gradient,
    transformed,
    without_derivative,
)
from wherefrom.kernels.pair_targets_reference import pair_targets_reference

Position = Literal["reference", "picture", "mean"]
Scale = Literal["log_area", "log_sides", "ratio"]
Axes = Literal["view", "source"]

NO_DERIVATIVE = 'pair_targets has no derivative with backend="triton"; use backend="torch"'


def pair_targets(
    boxes: Tensor,
    pairs: Tensor | None = None,
    *,
    flipped: Tensor | None = None,
    quarter_turns: Tensor | None = None,
    position: Position = "reference",
    scale: Scale = "log_area",
    axes: Axes = "view",
    picture_hw: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    check_values: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Return position (x, y) and scale of target boxes relative to reference boxes, as the reference view shows them.

    position: (c_t - c_r) / size_r per axis; / picture size; / the geometric mean of both sizes.
    scale:    ln sqrt(area_t / area_r), one channel; ln of each side's ratio; each side's raw ratio, two channels (x, y).
    axes:     "view" carries vector and side channels by the reference's mirror, then its turn; "source" leaves them upright.

    Shapes: boxes (..., N, 4) xyxy, pairs (P, 2) of (reference, target) or None for all ordered pairs, flipped and quarter_turns (..., N),
            picture_hw (..., 2) -> (..., P, C) or (..., N, N, C) float32, C = 3 or 4; mean and std (C,) standardize.
    Units:  boxes in source pixels; position in the unit of `position`; scale in nats or as a ratio.
    NaN:    a box that is NaN, infinite or empty makes NaN or infinite targets of its own pairs, and touches no other pair's.
    Paths:  "triton" has no derivative of boxes, mean and std ("auto" then takes "torch", which has all, of any order); "torch" is the
            definition in float32, or float64 where the boxes are; "reference" the definition in float64, and returns float64.
    Raises: ValueError if shapes, dtypes or devices do not fit, an option is unknown, position="picture" comes without picture_hw, or a
            pair names no box: on a GPU only with check_values, which waits for it; else such a pair's targets are NaN by "triton".
    """
    check_backend(backend)
    check_targets(boxes, pairs, flipped, quarter_turns, position, scale, axes, picture_hw, mean, std, check_values)
    learned = [name for name, value in (("boxes", boxes), ("mean", mean), ("std", std)) if needs_gradient(value)]
    if backend == "triton" and learned:
        raise ValueError(f'{learned[0]} requires a gradient, which backend="triton" does not give; use backend="torch"')

    plain = backend in ("reference", "torch") or (backend == "auto" and (boxes.device.type == "cpu" or learned))
    every_mode = not plain and transformed(boxes, mean, std)
    if plain or (every_mode and backend == "auto"):
        exact = boxes.double() if backend == "reference" else boxes
        options: dict[str, Any] = {"position": position, "scale": scale, "axes": axes, "picture_hw": picture_hw, "mean": mean, "std": std}
        numbers = 4 * boxes[..., 0].numel() * (boxes.shape[-2] if pairs is None else len(pairs))
        with contextlib.nullcontext() if torch.compiler.is_compiling() else alone(boxes, numbers):
            targets = pair_targets_reference(exact, pairs, flipped=flipped, quarter_turns=quarter_turns, **options)
        return targets if backend == "reference" else targets.float()
    flat = boxes.reshape(-1, *boxes.shape[-2:])
    flipped, quarter_turns = (None if value is None else value.reshape(flat.shape[:2]) for value in (flipped, quarter_turns))
    picture_hw = None if picture_hw is None else picture_hw.reshape(-1, 2)
    arguments = (flat, pairs, flipped, quarter_turns, picture_hw, mean, std, position, scale, axes, backend)
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
    position: str,
    scale: str,
    axes: str,
    backend: str,
) -> Tensor:
    """Serve boxes (B, N, 4) by the path that there is -> (B, P, C) float32."""
    check_no_tangent(boxes, mean, std)
    if choose_path(backend, boxes) == "triton":
        from wherefrom.kernels.pair_targets_triton import pair_targets_triton

        return pair_targets_triton(boxes, pairs, flipped, quarter_turns, position, scale, axes, picture_hw, mean, std)
    targets = pair_targets_reference(
        boxes,
        pairs,
        flipped=flipped,
        quarter_turns=quarter_turns,
        position=position,
        scale=scale,
        axes=axes,
        picture_hw=picture_hw,
        mean=mean,
        std=std,
    )
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
    count = boxes.shape[1] ** 2 if pairs is None else pairs.shape[0]
    return boxes.new_empty(boxes.shape[0], count, 3 if scale == "log_area" else 4, dtype=torch.float32)


LIBRARY.impl("pair_targets", _pair_targets_op, "CPU")
LIBRARY.impl("pair_targets", _pair_targets_op, "CUDA")


def check_pair_values(pairs: Tensor, boxes_each: int, *, wait: bool) -> None:
    """Raise ValueError if a pair names a box that is not there; a GPU's values are read, and waited for, only if told to."""
    if torch.compiler.is_compiling() or not (wait or pairs.device.type == "cpu"):
        return
    wrong = ((pairs < 0) | (pairs >= boxes_each)).any(-1).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"pairs[{row}] is {tuple(pairs[row].tolist())}, boxes are numbered 0 to {boxes_each - 1}")


def check_targets(
    boxes: Tensor,
    pairs: Tensor | None,
    flipped: Tensor | None,
    quarter_turns: Tensor | None,
    position: str,
    scale: str,
    axes: str,
    picture_hw: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    check_values: bool,
) -> None:
    """Raise ValueError, naming the argument, unless a call of `pair_targets` can be served."""
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
    for name, chosen, known in (("position", position, Position), ("scale", scale, Scale), ("axes", axes, Axes)):
        if chosen not in get_args(known):
            raise ValueError(f"{name}={chosen!r}: take one of {', '.join(get_args(known))}")
    if position == "picture" and picture_hw is None:
        raise ValueError('picture_hw is None, position="picture" divides by it; pass picture_hw=source_size')
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and value.shape != (3 if scale == "log_area" else 4,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {(3 if scale == 'log_area' else 4,)}, one a channel")
    if pairs is not None:
        check_pair_values(pairs, boxes.shape[-2], wait=check_values)
