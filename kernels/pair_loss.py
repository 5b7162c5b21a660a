"""The regression loss of a two-layer head over all pairs of N boxes, without ever storing the pairs' hidden activations.

Here: the public call and its checks, the operator and its gradient.
Not here: the definition (pair_loss_reference.py), the path in plain torch (pair_loss_torch.py), the Triton kernels (pair_loss_triton.py).
The loss is linear in what comes from above, so gradients are computed with the loss, in one pass, and only scaled in backward.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from wherefrom.kernels.dispatch import (
    ALONE,
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
    transformed,
    transforms_active,
    without_derivative,
)
from wherefrom.kernels.pair_loss_reference import PairLoss, pair_loss_reference
from wherefrom.kernels.pair_loss_torch import Problem, Sums, pair_loss_torch
from wherefrom.kernels.pair_targets import Axes, Position, Scale, check_pair_values

Pairs = Literal["all", "others", "disjoint"]
Activation = Literal["gelu", "gelu_tanh", "relu"]
Regression = Literal["squared", "l1", "smooth_l1", "huber", "gaussian_nll"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ONLY_FIRST = 'pair_loss has no second derivative; use backend="reference"'
ONLY_LEARNED = "pair_loss has derivatives of a, b, weight, offset and bias only; detach the others"
MATERIALIZED = 2**20  # hidden activations below which a processor stores them: cheaper than going about it any other way


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
    Gradient: of a, b, weight, offset and bias; reverse and forward mode, vmap of both (items one after the other). A second derivative
             is right where everything is stored, and raises elsewhere: ask "reference" for it.
    Memory:  "torch" holds tiles of a few hundred pairs, "triton" the outputs' gradients, C numbers a pair, of at most 64 samples; "auto"
             stores everything where that is little: on a processor, hidden activations of up to 4 MB.
    Raises:  ValueError if shapes, dtypes or devices do not fit, an option is unknown, another argument requires a gradient, a pair names
             no box, or a valid box is empty or not finite: these two on a GPU only with check_values, which waits for it; else they make
             the loss NaN or infinite where such a pair counts. Nor are boxes asked that torch.func maps over.
    """
    check_backend(backend)
    words: dict[str, tuple[str, Any]] = {"position": (position, Position), "scale": (scale, Scale), "axes": (axes, Axes)}
    words |= {"activation": (activation, Activation), "loss": (loss, Regression)}
    for name, (word, known) in words.items():
        if word not in get_args(known):
            raise ValueError(f"{name}={word!r}: take one of {', '.join(get_args(known))}")
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
    _check_boxes(boxes, valid, wait=check_values)

    every_mode = transformed(*given.values())
    if every_mode:
        boxes = without_derivative(ONLY_LEARNED, torch.clone, boxes)
        picture_hw, mean, std, channel_weights = (
            None if value is None else without_derivative(ONLY_LEARNED, torch.clone, value)
            for value in (picture_hw, mean, std, channel_weights)
        )
    materialized = partial(
        pair_loss_reference,
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
    if backend == "reference":
        return materialized(a, b, boxes, weight=weight, offset=offset, bias=bias)
    count = len(pairs) if isinstance(pairs, Tensor) else a.shape[1] ** 2
    if backend == "auto" and a.device.type == "cpu" and (activations := a.shape[0] * count * a.shape[2]) < MATERIALIZED:
        with torch.autocast("cpu", enabled=False):
            floats = a.float(), b.float(), weight.float(), offset.float(), None if bias is None else bias.float()
            stored = partial(_materialized, materialized, boxes.float())
            if activations > ALONE or every_mode or torch.compiler.is_compiling():
                return stored(*floats)
            with alone(a, activations):
                return PairLoss(*_Alone.apply(stored, activations, *floats)) if needs_gradient(*floats) else stored(*floats)
    # asked here: inside an autograd.Function every input still looks as if it needed a gradient under no_grad
    learned = [value for value in (a, b, weight, offset, bias) if value is not None]
    grads = every_mode or needs_gradient(*learned)
    chosen, which = (pairs, "given") if isinstance(pairs, Tensor) else (None, pairs)
    plain = (chosen, valid, flipped, quarter_turns, picture_hw, mean, std, channel_weights)
    options = (which, position, scale, axes, activation, loss, float(beta), per_sample, grads, backend)
    if not grads:
        return PairLoss(*torch.ops.wherefrom.pair_loss(a, b, weight, offset, bias, boxes, *plain, *options)[:5])
    call = _PairLossInEveryMode if every_mode else _PairLoss
    return PairLoss(
        *call.apply(
            _anchor(learned if every_mode else [value for value in learned if value.requires_grad]),
            a,
            b,
            weight,
            offset,
            bias,
            boxes,
            *plain,
            *options,
        )[:5]
    )


def _materialized(
    call: Callable[..., PairLoss], boxes: Tensor, a: Tensor, b: Tensor, weight: Tensor, offset: Tensor, bias: Tensor | None
) -> PairLoss:
    return call(a, b, boxes, weight=weight, offset=offset, bias=bias)


class _Alone(torch.autograd.Function):
    """A small problem whose graph is kept apart, so that its gradients stay in one thread as its loss did."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., PairLoss], activations: int, *learned: Tensor | None) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[2:]
        apart = [value if value is None else value.detach().requires_grad_(need) for value, need in zip(learned, needed, strict=True)]
        with torch.enable_grad():
            result = call(*apart)
        ctx.call, ctx.activations, ctx.needed = call, activations, needed
        ctx.loss, ctx.apart = result.loss, apart
        ctx.save_for_backward(*learned)
        outputs = tuple(value.detach() for value in result)
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        loss, learned, again = ctx.loss, ctx.apart, torch.is_grad_enabled()
        if again:  # a derivative of the gradients is asked for: they have to know where they come from
            learned = ctx.saved_tensors
            loss = ctx.call(*learned).loss
        asked = [value for value, need in zip(learned, ctx.needed, strict=True) if need]
        with alone(upstream, ctx.activations):
            gradients = iter(torch.autograd.grad(loss, asked, upstream, retain_graph=True, create_graph=again))
        return None, None, *(next(gradients) if need else None for need in ctx.needed)


def _anchor(learned: list[Tensor]) -> Tensor:
    """Return empty sums: what a second derivative needs to find the inputs by, without keeping them in memory."""
    return torch.stack([value[:0].sum(dtype=torch.float32) for value in learned])


def _check(given: dict[str, Tensor], channels: int, outputs: int, *, float64: bool) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit, and only what is learned requires a gradient."""
    check_shape("a", given["a"], ("B", "N", "H"))
    batch, boxes, hidden = given["a"].shape
    expected: dict[str, tuple[int | str, ...]] = {"b": (batch, boxes, hidden), "boxes": (batch, boxes, 4), "weight": (outputs, hidden)}
    expected |= {"offset": (outputs,), "bias": (hidden,), "pairs": ("P", 2), "picture_hw": (batch, 2)}
    expected |= dict.fromkeys(("valid", "flipped", "quarter_turns"), (batch, boxes))
    expected |= dict.fromkeys(("mean", "std", "channel_weights"), (channels,))
    learned = ("a", "b", "weight", "offset", "bias")
    dtypes: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(learned, (*FLOATS, torch.float64) if float64 else FLOATS)
    dtypes |= {"boxes": (torch.float32, torch.float64), "pairs": (torch.int64, torch.int32), "valid": (torch.bool,)}
    dtypes |= {"flipped": (torch.bool,), "quarter_turns": INTEGERS}
    for name, tensor in given.items():
        check_shape(name, tensor, expected.get(name, tensor.shape))
        if name in dtypes:
            check_dtype(name, tensor, dtypes[name])
        check_device(name, tensor, "a", given["a"])
        if name not in learned and torch.is_grad_enabled():
            check_no_derivative(name, tensor, "which pair_loss does not give")


def _check_boxes(boxes: Tensor, valid: Tensor | None, *, wait: bool) -> None:
    """Raise ValueError if a valid box is empty or not finite; a GPU's values are read, and waited for, only if told to."""
    if torch.compiler.is_compiling() or transforms_active() or not (wait or boxes.device.type == "cpu"):
        return
    wrong = ~((boxes[..., 2:] > boxes[..., :2]) & (boxes[..., 2:] - boxes[..., :2] < math.inf)).all(-1)
    wrong = wrong if valid is None else wrong & valid
    if wrong.any():
        sample, box = wrong.nonzero()[0].tolist()
        corners = ", ".join(f"{corner:g}" for corner in boxes[sample, box].tolist())
        raise ValueError(f"boxes[{sample}, {box}] is ({corners}), which has no finite size above 0; mark it as not valid")


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
    check_no_tangent(a, b, weight, offset, bias)
    path = choose_path(backend, a)
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False), torch.cuda.device_of(a):
        problem = Problem(
            a=a,
            b=b,
            weight=weight.float(),
            offset=offset.float(),
            bias=bias,
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
        return _means(problem, pair_loss_torch(problem))


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
        if any(ctx.needs_input_grad[6:]):
            raise RuntimeError(ONLY_LEARNED)
        anchor, *saved = ctx.saved_tensors
        wanted = [dtype if needed else None for dtype, needed in zip(ctx.dtypes, ctx.needs_input_grad[1:6], strict=True)]
        scaled = _scaled if torch.compiler.is_compiling() else _Scaled.apply  # a compiled graph refuses second derivatives by itself
        return None, *scaled(anchor, upstream, *saved, *wanted), *(None,) * ctx.others


class _PairLossInEveryMode(_PairLoss):
    """The same with forward mode and vmap; apart, for torch.compile takes no Function that has them."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _PairLoss.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], *output[5:])
        ctx.set_materialize_grads(False)
        ctx.per_sample = output[0].ndim == 1

    @staticmethod
    def jvp(ctx: Any, _anchor: Tensor | None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        anchor, *saved = ctx.saved_tensors
        # as above: without a transform there is one level of forward mode alone, and this is within it
        slope = _Slope.apply if transforms_active() or needs_gradient(anchor) else _slope
        return slope(anchor, ctx.per_sample, *saved, *tangents[:5]), *(None,) * 8

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _PairLoss.backward(ctx, upstream) if upstream is not None else (None,) * (6 + ctx.others)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return one_by_one(_in_every_mode, info.batch_size, in_dims[1:], inputs[1:])


def _in_every_mode(*arguments: Any) -> tuple[Tensor, ...]:
    return _PairLossInEveryMode.apply(_anchor([value for value in arguments[:5] if value is not None]), *arguments)


def _scaled(
    _anchor: Tensor, upstream: Tensor, of_a: Tensor, of_b: Tensor, of_weight: Tensor, of_offset: Tensor, *dtypes: torch.dtype | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a, b, weight, offset and bias times what comes from above, () or (B,); None where no dtype is given."""
    each = upstream.float().reshape(-1, 1, 1)
    gradients = (
        lambda: of_a * each,
        lambda: of_b * each,
        lambda: (of_weight * each).sum(0),
        lambda: (of_offset * each[..., 0]).sum(0),
        lambda: (of_a.sum(1, keepdim=True) * each).sum((0, 1)),
    )
    return tuple(None if dtype is None else gradient().to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True))


def _slope(
    _anchor: Tensor, per_sample: bool, of_a: Tensor, of_b: Tensor, of_weight: Tensor, of_offset: Tensor, *tangents: Tensor | None
) -> Tensor:
    """Return how the loss, () or (B,), changes with tangents of a, b, weight, offset and bias; 0 for those that are None."""
    slopes = []
    for gradient, tangent in zip((of_a, of_b, of_weight, of_offset, of_a.sum(1)), tangents, strict=True):
        if tangent is not None:
            product = gradient * tangent.float()
            slopes.append(product.sum(tuple(range(int(per_sample), product.ndim))))
    return torch.stack(slopes).sum(0)


class _Once(torch.autograd.Function):
    """A step that has no derivative: saying so is what keeps that from being silently 0."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        raise RuntimeError(ONLY_FIRST)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Tensor:
        raise RuntimeError(ONLY_FIRST)


class _Scaled(_Once):
    forward = staticmethod(_scaled)


class _Slope(_Once):
    forward = staticmethod(_slope)
