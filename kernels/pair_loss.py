"""The regression loss of a two-layer head over all pairs of N boxes, without ever storing the pairs' hidden activations.

Here: the public call and its checks, the operator and its gradient, the path in plain torch, tile by tile.
Not here: the definition (pair_loss_reference.py), the Triton kernels (pair_loss_triton.py).
The loss is linear in what comes from above, so gradients are computed with the loss, in one pass, and only scaled in backward.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from wherefrom.kernels.dispatch import LIBRARY, Backend, check_backend, check_device, check_dtype, check_shape, choose_path
from wherefrom.kernels.pair_loss_reference import PairLoss, counted_pairs, pair_loss_reference
from wherefrom.kernels.pair_targets import Axes, Position, Scale, check_pair_values
from wherefrom.kernels.pair_targets_reference import pair_targets_reference

Pairs = Literal["all", "others", "disjoint"]
Activation = Literal["gelu", "gelu_tanh", "relu"]
Regression = Literal["squared", "l1", "smooth_l1", "huber", "gaussian_nll"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TILE = 784 * 512  # elements of one tile's hidden activations: with their gradients they stay in the cache
TARGETS_AT_ONCE = 4096  # pairs whose targets are made in one go, for several tiles


def pair_loss(
    a: Tensor,
    b: Tensor,
    boxes: Tensor,
    *,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    pairs: Pairs | Tensor = "all",
    valid: Tensor | None = None,
    flipped: Tensor | None = None,
    quarter_turns: Tensor | None = None,
    position: Position = "reference",
    scale: Scale = "log_area",
    axes: Axes = "view",
    picture_hw: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    activation: Activation = "gelu",
    loss: Regression = "squared",
    beta: float = 1.0,
    channel_weights: Tensor | None = None,
    per_sample: bool = False,
    check_values: bool = False,
    backend: Backend = "auto",
) -> PairLoss:
    """Return the loss of y_rt = W act(a_r + b_t + bias) + offset against the targets of boxes r and t, over pairs (r, t) of every sample.

    pairs:   "all" N^2 ordered pairs, a box with itself too; "others" all but those; "disjoint" those whose boxes share no area (touching
             is disjoint); or a list. A pair with a member that is not `valid` does not count: what stands there reaches nothing.
    loss:    of the residual e, as PyTorch has it: e^2; |e|; smooth L1 and Huber, which turn linear at `beta` (Huber's delta); or Gaussian
             NLL, (s + e^2 exp(-s)) / 2, whose W has 2 C rows: the C means, then the C log-variances s.
    Targets: position, scale, axes, flipped, quarter_turns, picture_hw, mean and std as `pair_targets`.
    Mean:    sum over channels, each times its `channel_weights`, of the mean over counted pairs: of the whole batch, or with `per_sample`
             of each sample. Where none counts: 0.

    Shapes:  a and b (B, N, H), boxes (B, N, 4) xyxy, weight (C, H) and offset (C,) as nn.Linear has them, bias (H,), pairs (P, 2) of
             (reference, target), valid, flipped and quarter_turns (B, N), picture_hw (B, 2), mean, std and channel_weights (C,); C = 3,
             or 4 unless scale="log_area" -> PairLoss, its loss () or (B,) float32.
    Units:   boxes in source pixels.
    Dtypes:  float32, bfloat16, float16, mixed too; computed in float32. float64 by "reference" alone, which computes in the given dtype.
    Gradient: for a, b, weight, offset and bias, once: double backward raises ("reference" has it).
    Memory:  "torch" holds tiles of a few hundred pairs, "triton" the outputs' gradients, C numbers a pair, of at most 64 samples.
    Raises:  ValueError if shapes, dtypes or devices do not fit, an option is unknown, another argument requires a gradient, or a pair
             names no box: on a GPU only with check_values, which waits for it; else such a pair makes the loss NaN by "triton".
    """
    check_backend(backend)
    words = {"position": (position, Position), "scale": (scale, Scale), "axes": (axes, Axes)}
    words |= {"activation": (activation, Activation), "loss": (loss, Regression)}
    for name, (chosen, known) in words.items():
        if chosen not in get_args(known):
            raise ValueError(f"{name}={chosen!r}: take one of {', '.join(get_args(known))}")
    if loss in ("smooth_l1", "huber") and not beta > 0:
        raise ValueError(f'beta={beta}: needs to be above 0; for |e| alone take loss="l1"')
    tensors = {"a": a, "b": b, "boxes": boxes, "weight": weight, "offset": offset, "bias": bias, "valid": valid, "flipped": flipped}
    tensors |= {"quarter_turns": quarter_turns, "picture_hw": picture_hw, "mean": mean, "std": std, "channel_weights": channel_weights}
    if isinstance(pairs, Tensor):
        tensors["pairs"] = pairs
    elif pairs not in get_args(Pairs):
        raise ValueError(f"pairs={pairs!r}: take one of {', '.join(get_args(Pairs))}, or a tensor (P, 2)")
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    channels = 3 if scale == "log_area" else 4
    outputs = 2 * channels if loss == "gaussian_nll" else channels
    _check(given, channels, outputs, float64=backend == "reference")
    if position == "picture" and picture_hw is None:
        raise ValueError('picture_hw is None, position="picture" divides by it; pass picture_hw=source_size')
    if isinstance(pairs, Tensor):
        check_pair_values(pairs, a.shape[1], wait=check_values)

    if backend == "reference":
        return pair_loss_reference(
            a,
            b,
            boxes,
            weight=weight,
            offset=offset,
            bias=bias,
            pairs=pairs,
            valid=valid,
            flipped=flipped,
            quarter_turns=quarter_turns,
            position=position,
            scale=scale,
            axes=axes,
            picture_hw=picture_hw,
            mean=mean,
            std=std,
            activation=activation,
            loss=loss,
            beta=beta,
            channel_weights=channel_weights,
            per_sample=per_sample,
        )
    # asked here: inside an autograd.Function every input still looks as if it needed a gradient under no_grad
    learnt = [value for value in (a, b, weight, offset, bias) if value is not None and value.requires_grad]
    grads = torch.is_grad_enabled() and bool(learnt)
    chosen, which = (pairs, "given") if isinstance(pairs, Tensor) else (None, pairs)
    plain = (chosen, valid, flipped, quarter_turns, picture_hw, mean, std, channel_weights)
    options = (which, position, scale, axes, activation, loss, float(beta), per_sample, grads, backend)
    if not grads:
        return PairLoss(*torch.ops.wherefrom.pair_loss(a, b, weight, offset, bias, boxes, *plain, *options)[:5])
    # empty sums: what the double backward needs to find the inputs by, without keeping them in memory
    anchor = torch.stack([value[:0].sum(dtype=torch.float32) for value in learnt])
    return PairLoss(*_PairLoss.apply(anchor, a, b, weight, offset, bias, boxes, *plain, *options)[:5])


def _check(given: dict[str, Tensor], channels: int, outputs: int, *, float64: bool) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit, and only what is learnt requires a gradient."""
    check_shape("a", given["a"], ("B", "N", "H"))
    batch, boxes, hidden = given["a"].shape
    expected: dict[str, tuple[int | str, ...]] = {"b": (batch, boxes, hidden), "boxes": (batch, boxes, 4), "weight": (outputs, hidden)}
    expected |= {"offset": (outputs,), "bias": (hidden,), "pairs": ("P", 2), "picture_hw": (batch, 2)}
    expected |= dict.fromkeys(("valid", "flipped", "quarter_turns"), (batch, boxes))
    expected |= dict.fromkeys(("mean", "std", "channel_weights"), (channels,))
    learnt = ("a", "b", "weight", "offset", "bias")
    dtypes: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(learnt, (*FLOATS, torch.float64) if float64 else FLOATS)
    dtypes |= {"boxes": (torch.float32, torch.float64), "pairs": (torch.int64, torch.int32), "valid": (torch.bool,)}
    for name, tensor in given.items():
        check_shape(name, tensor, expected.get(name, tensor.shape))
        if name in dtypes:
            check_dtype(name, tensor, dtypes[name])
        check_device(name, tensor, "a", given["a"])
        if tensor.requires_grad and name not in learnt and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, which pair_loss does not give; pass {name}.detach()")


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What a path is given: checked, in float32, the bias in `a` already, what is not valid put to 0."""

    a: Tensor  # (B, N, H)
    b: Tensor  # (B, N, H)
    weight: Tensor  # (K, H), K = C or 2 C
    offset: Tensor  # (K,)
    boxes: Tensor  # (B, N, 4)
    chosen: Tensor | None  # (P, 2), with pairs="given"
    valid: Tensor | None
    flipped: Tensor | None
    quarter_turns: Tensor | None
    picture_hw: Tensor | None
    mean: Tensor | None
    std: Tensor | None
    channel_weights: Tensor | None
    pairs: str
    position: str
    scale: str
    axes: str
    activation: str
    loss: str
    beta: float
    per_sample: bool
    grads: bool

    @property
    def channels(self) -> int:
        """C: the targets of a pair."""
        return 3 if self.scale == "log_area" else 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Sums:
    """What a path returns: sums over the counted pairs, not divided by anything; gradients are those of the weighted loss."""

    loss: Tensor  # (B, C) float64, each channel's loss, not weighted
    squared: Tensor  # (B, C) float64, squared errors
    target: Tensor  # (B, C) float64
    target_squared: Tensor  # (B, C) float64
    counted: Tensor  # (B,) int64
    a: Tensor  # (B, N, H), as the next three empty without gradients
    b: Tensor  # (B, N, H)
    weight: Tensor  # (B or 1, K, H): per sample, else of all
    offset: Tensor  # (B or 1, K) float64

    @classmethod
    def zeros(cls, problem: Problem) -> "Sums":
        """Return sums over nothing."""
        batch, channels = len(problem.a), problem.channels
        groups = (batch if problem.per_sample else 1) if problem.grads else 0
        exact = problem.a.new_zeros(4, batch, channels, dtype=torch.float64)
        shape = problem.a.shape if problem.grads else (0,)
        return cls(
            loss=exact[0],
            squared=exact[1],
            target=exact[2],
            target_squared=exact[3],
            counted=problem.a.new_zeros(batch, dtype=torch.int64),
            a=problem.a.new_zeros(shape),
            b=problem.a.new_zeros(shape),
            weight=problem.a.new_zeros(groups, *problem.weight.shape),
            offset=problem.a.new_zeros(groups, *problem.offset.shape, dtype=torch.float64),
        )


LIBRARY.define(
    "pair_loss(Tensor a, Tensor b, Tensor weight, Tensor offset, Tensor? bias, Tensor boxes, Tensor? chosen, Tensor? valid, "
    "Tensor? flipped, Tensor? quarter_turns, Tensor? picture_hw, Tensor? mean, Tensor? std, Tensor? channel_weights, str pairs, "
    "str position, str scale, str axes, str activation, str loss, float beta, bool per_sample, bool grads, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _pair_loss_op(
    a: Tensor, b: Tensor, weight: Tensor, offset: Tensor, bias: Tensor | None, boxes: Tensor, chosen: Tensor | None, valid: Tensor | None,
    flipped: Tensor | None, quarter_turns: Tensor | None, picture_hw: Tensor | None, mean: Tensor | None, std: Tensor | None,
    channel_weights: Tensor | None, pairs: str, position: str, scale: str, axes: str, activation: str, loss: str, beta: float,
    per_sample: bool, grads: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Serve the call by the path that there is -> the five parts of PairLoss, then gradients of a, b, weight, offset."""
    path = choose_path(backend, a)
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
        a, b = a.float() if bias is None else a.float() + bias.float(), b.float()
        if valid is not None:
            a, b = (torch.where(valid.unsqueeze(-1), value, 0) for value in (a, b))
        problem = Problem(
            a=a,
            b=b,
            weight=weight.float(),
            offset=offset.float(),
            boxes=boxes.float(),
            chosen=chosen,
            valid=valid,
            flipped=flipped,
            quarter_turns=quarter_turns,
            picture_hw=picture_hw,
            mean=mean,
            std=std,
            channel_weights=channel_weights,
            pairs=pairs,
            position=position,
            scale=scale,
            axes=axes,
            activation=activation,
            loss=loss,
            beta=beta,
            per_sample=per_sample,
            grads=grads,
        )
        if path == "triton":
            from wherefrom.kernels.pair_loss_triton import pair_loss_triton

            return _means(problem, pair_loss_triton(problem))
        return _means(problem, _pair_loss_torch(problem))


def _means(problem: Problem, sums: Sums) -> tuple[Tensor, ...]:
    """Divide sums by the pairs that they are over; the largest, gradients, in place."""
    counted = sums.counted.clamp(min=1)
    total = sums.counted.sum().clamp(min=1)
    of_channel, squared, target, target_squared = (
        each.sum(0) / total for each in (sums.loss, sums.squared, sums.target, sums.target_squared)
    )
    losses = sums.loss / counted.unsqueeze(-1) if problem.per_sample else of_channel
    if problem.channel_weights is not None:
        losses = losses * problem.channel_weights.to(losses)
    variance = (target_squared - target.square()).clamp(min=0)
    means = (value.float() for value in (losses.sum(-1), of_channel, squared, variance))
    if not problem.grads:
        return *means, sums.counted, sums.a, sums.b, sums.weight, sums.offset.float()
    scale = (1 / (counted if problem.per_sample else total)).view(-1, 1, 1)
    gradients = (each.mul_(scale) for each in (sums.a, sums.b, sums.weight))
    return *means, sums.counted, *gradients, sums.offset.mul_(scale[..., 0]).float()


@torch.library.register_fake("wherefrom::pair_loss", lib=LIBRARY)
def _pair_loss_fake(
    a: Tensor, b: Tensor, weight: Tensor, offset: Tensor, bias: Tensor | None, boxes: Tensor, chosen: Tensor | None, valid: Tensor | None,
    flipped: Tensor | None, quarter_turns: Tensor | None, picture_hw: Tensor | None, mean: Tensor | None, std: Tensor | None,
    channel_weights: Tensor | None, pairs: str, position: str, scale: str, axes: str, activation: str, loss: str, beta: float,
    per_sample: bool, grads: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, channels = a.shape[0], 3 if scale == "log_area" else 4
    groups = (batch if per_sample else 1) if grads else 0
    shapes = [(batch,) if per_sample else (), (channels,), (channels,), (channels,)]
    gradients = [a.shape if grads else (0,)] * 2 + [(groups, *weight.shape), (groups, *offset.shape)]
    floats = [a.new_empty(shape, dtype=torch.float32) for shape in [*shapes, *gradients]]
    return *floats[:4], a.new_empty(batch, dtype=torch.int64), *floats[4:]


LIBRARY.impl("pair_loss", _pair_loss_op, "CPU")
LIBRARY.impl("pair_loss", _pair_loss_op, "CUDA")


class _PairLoss(torch.autograd.Function):
    """The operator with its gradient: what it computed beside the loss, times what comes from above."""

    @staticmethod
    def forward(anchor: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return torch.ops.wherefrom.pair_loss.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        anchor, *arguments = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(anchor, *output[5:])
        ctx.dtypes = [None if value is None else value.dtype for value in arguments[:5]]
        ctx.others = len(arguments) - 5

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        anchor, *saved = ctx.saved_tensors
        wanted = [dtype if needed else None for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad[1:6], strict=True)]
        return None, *_Scaled.apply(anchor, upstream, wanted, *saved), *(None,) * ctx.others


class _Scaled(torch.autograd.Function):
    """The gradients of one backward pass, a step that has no derivative: saying so here is what keeps it from being silently 0."""

    @staticmethod
    def forward(anchor: Tensor, upstream: Tensor, dtypes: list[torch.dtype | None], *saved: Tensor) -> tuple[Tensor | None, ...]:
        of_a, of_b, of_weight, of_offset = saved
        each = upstream.float().reshape(-1, 1, 1)

        def scaled(gradient: Tensor, dtype: torch.dtype | None) -> Tensor | None:
            return None if dtype is None else (gradient * each).to(dtype)

        def summed(gradient: Tensor, dtype: torch.dtype | None) -> Tensor | None:
            return None if dtype is None else (gradient * each).sum(0).to(dtype)

        offset = summed(of_offset.unsqueeze(-1), dtypes[3])
        bias = None if dtypes[4] is None else (of_a.sum(1, keepdim=True) * each).sum((0, 1)).to(dtypes[4])
        return (
            scaled(of_a, dtypes[0]),
            scaled(of_b, dtypes[1]),
            summed(of_weight, dtypes[2]),
            None if offset is None else offset.squeeze(-1),
            bias,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        raise RuntimeError('pair_loss has no second derivative; use backend="reference"')


Tile = tuple[slice, slice, slice]  # samples, references (or pairs of the list), targets


def _pair_loss_torch(problem: Problem) -> Sums:
    """Go through the pairs in tiles that fit a cache, in buffers used again and again."""
    sums = Sums.zeros(problem)
    batch, boxes, hidden = problem.a.shape
    rows, columns = (boxes, boxes) if problem.chosen is None else (len(problem.chosen), 1)
    at_once = max(1, (TILE if problem.a.device.type == "cpu" else 64 * TILE) // max(1, hidden))
    buffers = problem.a.new_empty(2, min(at_once, batch * rows * columns) * hidden)
    for block in _tiles((0, 0, 0), (batch, rows, columns), max(1, TARGETS_AT_ONCE // at_once) * at_once):
        chosen = _pairs_of(problem, block)
        targets, counts = _targets(problem, block, chosen, sums)
        starts, lengths = tuple(part.start for part in block), tuple(part.stop - part.start for part in block)
        targets = targets.view(*lengths, -1)
        for tile in _tiles(starts, lengths, at_once):
            inner = tuple(slice(part.start - start, part.stop - start) for part, start in zip(tile, starts, strict=True))
            _add_tile(problem, sums, buffers, tile, targets[inner], None if counts is None else counts.view(lengths)[inner])
    return sums


def _tiles(starts: tuple[int, ...], lengths: tuple[int, ...], at_once: int) -> Iterator[Tile]:
    """Cut a box of (samples, references, targets) into boxes of at most `at_once` pairs: several samples, else rows, else part of a row."""
    _, rows, columns = lengths
    steps = at_once // max(1, rows * columns), at_once // max(1, columns), at_once
    cuts = (
        [slice(start + at, start + min(at + max(1, step), length)) for at in range(0, length, max(1, step))]
        for start, length, step in zip(starts, lengths, steps, strict=True)
    )
    yield from product(*cuts)


def _pairs_of(problem: Problem, block: Tile) -> Tensor:
    """Return the pairs of a block, (P, 2) of (reference, target), targets fastest."""
    _, rows, columns = block
    if problem.chosen is not None:
        return problem.chosen[rows]
    device = problem.a.device
    return torch.cartesian_prod(
        torch.arange(rows.start, rows.stop, device=device), torch.arange(columns.start, columns.stop, device=device)
    )


def _targets(problem: Problem, block: Tile, chosen: Tensor, sums: Sums) -> tuple[Tensor, Tensor | None]:
    """Return targets (B, P, C) and which pairs count (B, P), None for all, of a block's samples and pairs; add them to the sums."""
    samples = block[0]

    def own(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[samples]

    targets = pair_targets_reference(
        problem.boxes[samples],
        chosen,
        flipped=own(problem.flipped),
        quarter_turns=own(problem.quarter_turns),
        position=problem.position,
        scale=problem.scale,
        axes=problem.axes,
        picture_hw=own(problem.picture_hw),
        mean=problem.mean,
        std=problem.std,
    )
    if problem.valid is None and problem.pairs in ("all", "given"):
        counts = None
        sums.counted[samples] += len(chosen)
        exact = targets.double()
    else:
        counts = counted_pairs(problem.boxes[samples], chosen, problem.pairs, own(problem.valid))
        sums.counted[samples] += counts.sum(1)
        exact = torch.where(counts.unsqueeze(-1), targets, 0).double()
    sums.target[samples] += exact.sum(1)
    sums.target_squared[samples] += exact.square_().sum(1)
    return targets, counts


def _add_tile(problem: Problem, sums: Sums, buffers: Tensor, tile: Tile, targets: Tensor, counts: Tensor | None) -> None:
    """Add the loss of one tile of pairs, and its gradients, to the sums.

    Shapes: buffers (2, at least b r t H) for b samples, r references and t targets, targets (b, r, t, C), counts (b, r, t).
    """
    samples, rows, columns = tile
    *lengths, channels = targets.shape
    hidden, outputs = problem.a.shape[-1], len(problem.weight)
    count = lengths[0] * lengths[1] * lengths[2]
    inputs, active = (buffer[: count * hidden].view(count, hidden) for buffer in buffers)

    if problem.chosen is None:
        torch.add(problem.a[samples, rows].unsqueeze(2), problem.b[samples, columns].unsqueeze(1), out=inputs.view(*lengths, hidden))
    else:
        reference, target = problem.chosen[rows].long().unbind(-1)
        torch.index_select(problem.a[samples], 1, reference, out=inputs.view(lengths[0], -1, hidden))
        inputs.view(lengths[0], -1, hidden).add_(problem.b[samples].index_select(1, target))
    _activate(problem.activation, inputs, active)
    output = torch.addmm(problem.offset, active, problem.weight.t())
    residual = output[:, :channels] - targets.reshape(count, channels)
    if counts is not None:
        residual.masked_fill_(~counts.reshape(count, 1), 0)
    values, slope = _loss_and_slope(problem.loss, problem.beta, residual, output[:, channels:])
    if counts is not None and problem.loss == "gaussian_nll":
        uncounted = ~counts.reshape(count, 1)
        values.masked_fill_(uncounted, 0), slope.masked_fill_(uncounted, 0)
    sums.loss[samples] += values.view(lengths[0], -1, channels).sum(1)
    sums.squared[samples] += residual.square_().view(lengths[0], -1, channels).sum(1)
    if not problem.grads:
        return

    if problem.channel_weights is not None:
        slope.view(count, -1, channels).mul_(problem.channel_weights)
    own, groups = (samples, lengths[0]) if problem.per_sample else (slice(None), 1)
    by_group = slope.view(groups, -1, outputs)
    sums.offset[own] += by_group.sum(1, dtype=torch.float64)
    sums.weight[own].baddbmm_(by_group.mT, active.view(groups, -1, hidden))
    torch.mm(slope, problem.weight, out=active)
    _through_activation(problem.activation, inputs, active)
    if problem.chosen is None:
        gradient = active.view(*lengths, hidden)
        sums.a[samples, rows] += gradient.sum(2)
        sums.b[samples, columns] += gradient.sum(1)
    else:
        gradient = active.view(lengths[0], -1, hidden)
        sums.a[samples].index_add_(1, reference, gradient)
        sums.b[samples].index_add_(1, target, gradient)


def _activate(activation: str, inputs: Tensor, out: Tensor) -> None:
    """Write act(inputs) into `out`."""
    if activation == "relu":
        torch.clamp_min(inputs, 0, out=out)
    else:
        torch.ops.aten.gelu.out(inputs, approximate=_APPROXIMATE[activation], out=out)


def _through_activation(activation: str, inputs: Tensor, gradient: Tensor) -> None:
    """Multiply a gradient by act'(inputs), in place."""
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(gradient, inputs, 0, grad_input=gradient)
    else:
        torch.ops.aten.gelu_backward.grad_input(gradient, inputs, approximate=_APPROXIMATE[activation], grad_input=gradient)


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def _loss_and_slope(loss: str, beta: float, residual: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each residual e, (P, C), and its slope by each output, (P, C or 2 C)."""
    if loss == "gaussian_nll":
        precision = log_variance.neg().exp_()
        slope = residual * precision
        share = residual * slope  # e^2 exp(-s)
        return (log_variance + share).mul_(0.5), torch.cat([slope, (1 - share).mul_(0.5)], 1)
    if loss == "squared":
        return residual.square(), 2 * residual
    if loss == "l1":
        return residual.abs(), residual.sign()
    if loss == "smooth_l1":
        slope, half = (residual / beta).clamp_(-1, 1), beta / 2
    else:
        slope, half = residual.clamp(-beta, beta), 0.5
    return slope * (residual - half * slope), slope  # e^2 / 2 beta or e^2 / 2 inside, linear outside
