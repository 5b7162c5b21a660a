"""The regression loss of a two-layer head over all pairs of N boxes, without ever storing the pairs' hidden activations.

Here: the public call and its checks, the operator and its gradient.
Not here: the definition (pair_loss_reference.py), the path in plain torch (pair_loss_torch.py), the Triton kernels (pair_loss_triton.py).
The loss is linear in what comes from above, so gradients are computed with the loss, in one pass, and only scaled in backward.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from wherefrom.kernels.dispatch import (
    INTEGERS,
    LIBRARY,
    ONE_THREAD_BELOW,
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
    transforms_active,
    without_derivative,
)
from wherefrom.kernels.pair_loss_reference import PairLoss, pair_loss_reference
from wherefrom.kernels.pair_loss_torch import PairLossProblem, PairLossSums, pair_loss_torch
from wherefrom.kernels.pair_targets import check_pair_values, check_picture_hw, picture_sizes
from wherefrom.kernels.pair_targets_reference import CHANNELS, DEFAULT_UNITS, Axes, PairUnits, PositionUnit, Scale

Pairs = Literal["all", "others", "disjoint"]
Activation = Literal["gelu", "gelu_tanh", "relu"]
Regression = Literal["squared", "l1", "smooth_l1", "huber", "gaussian_nll"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ONLY_FIRST = 'pair_loss has no second derivative; use backend="reference"'
ONLY_LEARNED = "pair_loss has derivatives of a, b, weight, output_bias and hidden_bias only; detach the others"
STORE_BELOW = 2**20  # hidden activations below which a processor stores them: cheaper than going about it any other way
LEARNED = ("a", "b", "weight", "output_bias", "hidden_bias")  # in the operator's order


def pair_loss(
    a: Tensor,
    b: Tensor,
    boxes: Tensor,
    *,
    weight: Tensor,
    output_bias: Tensor,
    hidden_bias: Tensor | None = None,
    pairs: Pairs | Tensor = "all",
    valid: Tensor | None = None,
    units: PairUnits = DEFAULT_UNITS,
    flipped: Tensor | None = None,
    quarter_turns: Tensor | None = None,
    picture_hw: Tensor | float | tuple[float, float] | None = None,
    activation: Activation = "gelu",
    loss: Regression = "squared",
    beta: float = 1.0,
    channel_weights: Tensor | None = None,
    per_sample: bool = False,
    check_values: bool = False,
    backend: Backend = "auto",
) -> PairLoss:
    """Return the loss of y_rt = W act(a_r + b_t + hidden_bias) + output_bias against the targets of boxes r and t, over pairs (r, t).

    pairs:   "all" N^2 ordered pairs, a box with itself too; "others" all but those; "disjoint" those whose boxes share no area (touching
             is disjoint); or a list. A pair with a member that is not `valid` does not count: what stands there reaches nothing.
    loss:    of the residual e, as PyTorch has it: e^2; |e|; smooth L1 and Huber, which turn linear at `beta` (Huber's delta); or Gaussian
             NLL, (s + e^2 exp(-s)) / 2, whose W has 2 C rows: the C means, then the C log-variances s.
    Targets: units, flipped, quarter_turns and picture_hw as `pair_targets`.
    Mean:    sum over channels, each times its `channel_weights`, of the mean over counted pairs: of the whole batch, or with `per_sample`
             of each sample. Where none counts: 0.

    Shapes:  a and b (B, N, H), boxes (B, N, 4) xyxy, weight (C, H) and output_bias (C,) as nn.Linear has them, hidden_bias (H,), pairs
             (P, 2) of (reference, target), valid, flipped and quarter_turns (B, N), picture_hw (B, 2), or one size for all,
             channel_weights (C,), C = len(units.channels) -> PairLoss, its loss () or (B,) float32.
    Units:   boxes and picture_hw in source pixels.
    Dtypes:  float32, bfloat16, float16, mixed too; computed in float32. float64 by "reference" alone, which computes in the given dtype.
    Gradient: of a, b, weight and both biases; reverse and forward mode, vmap of both (items one after the other). A second derivative
             is right where everything is stored, and raises elsewhere: ask "reference" for it.
    Memory:  "torch" holds tiles of a few hundred pairs, "triton" the outputs' gradients, C numbers a pair, of at most 64 samples; "auto"
             stores everything where that is little: on a processor, hidden activations of up to 4 MB.
    Raises:  ValueError if shapes, dtypes or devices do not fit, an option is unknown, another argument requires a gradient, a pair names
             no box, or a valid box is empty or not finite: these two on a GPU only with check_values, which waits for it; else they make
             the loss NaN or infinite where such a pair counts. Nor are boxes asked that torch.func maps over.
    """
    check_backend(backend)
    _check_words(pairs, activation, loss, beta)
    picture_hw = picture_sizes(picture_hw, boxes)
    check_picture_hw(units, picture_hw)
    learned = (a, b, weight, output_bias, hidden_bias)
    fixed = {"boxes": boxes, "valid": valid, "flipped": flipped, "quarter_turns": quarter_turns, "picture_hw": picture_hw}
    fixed |= {"mean": units.mean, "std": units.std, "channel_weights": channel_weights}
    fixed |= {"pairs": pairs} if isinstance(pairs, Tensor) else {}
    tensors = {name: tensor for name, tensor in [*zip(LEARNED, learned, strict=True), *fixed.items()] if tensor is not None}
    _check_tensors(tensors, len(units.channels), loss, float64=backend == "reference")
    if isinstance(pairs, Tensor):
        check_pair_values(pairs, a.shape[1], wait=check_values)
    _check_boxes(boxes, valid, wait=check_values)

    every_mode = is_transformed(*tensors.values())
    if every_mode:
        boxes = without_derivative(ONLY_LEARNED, torch.clone, boxes)
        picture_hw, mean, std, channel_weights = (
            None if value is None else without_derivative(ONLY_LEARNED, torch.clone, value)
            for value in (picture_hw, units.mean, units.std, channel_weights)
        )
        units = replace(units, mean=mean, std=std)
    activations = a.shape[0] * (len(pairs) if isinstance(pairs, Tensor) else a.shape[1] ** 2) * a.shape[2]
    store = backend == "auto" and a.device.type == "cpu" and activations < STORE_BELOW
    if store or backend == "reference":
        of_pairs: dict[str, Any] = {"pairs": pairs, "valid": valid, "units": units, "flipped": flipped, "quarter_turns": quarter_turns}
        of_pairs |= {"picture_hw": picture_hw, "channel_weights": channel_weights}
        call = partial(_by_definition, of_pairs | {"activation": activation, "loss": loss, "beta": beta, "per_sample": per_sample})
        return _store_activations(call, boxes, activations, every_mode, learned) if store else call(boxes, *learned)
    # asked here: inside an autograd.Function every input still looks as if it needed a gradient under no_grad
    grads = every_mode or needs_gradient(*learned)
    chosen, which = (pairs, "list") if isinstance(pairs, Tensor) else (None, pairs)
    others = (boxes, chosen, valid, flipped, quarter_turns, picture_hw, units.mean, units.std, channel_weights)
    words = (which, units.position, units.scale, units.axes, activation, loss, float(beta), per_sample, grads, backend)
    if not grads:
        return PairLoss(*torch.ops.wherefrom.pair_loss(*learned, *others, *words)[:5])
    anchor = _anchor([value for value in learned if value is not None and (every_mode or value.requires_grad)])
    return PairLoss(*(_PairLossInEveryMode if every_mode else _PairLoss).apply(anchor, *learned, *others, *words)[:5])


def _by_definition(options: dict[str, Any], boxes: Tensor, *learned: Tensor | None) -> PairLoss:
    """Call the definition on boxes and what is learned; shapes as `pair_loss`."""
    a, b, weight, output_bias, hidden_bias = learned
    assert a is not None and b is not None and weight is not None and output_bias is not None
    return pair_loss_reference(a, b, boxes, weight=weight, output_bias=output_bias, hidden_bias=hidden_bias, **options)


def _store_activations(
    call: Callable[..., PairLoss], boxes: Tensor, activations: int, every_mode: bool, learned: Sequence[Tensor | None]
) -> PairLoss:
    """Serve a small problem on a processor by the definition in float32, all hidden activations stored; shapes as `pair_loss`."""
    with torch.autocast("cpu", enabled=False):
        floats = [None if value is None else value.float() for value in learned]
        call = partial(call, boxes.float())
        if activations > ONE_THREAD_BELOW or every_mode or torch.compiler.is_compiling():
            return call(*floats)
        with in_one_thread(boxes, activations):
            return PairLoss(*_InOneThread.apply(call, activations, *floats)) if needs_gradient(*floats) else call(*floats)


class _InOneThread(torch.autograd.Function):
    """A small problem whose graph is kept apart, so that its gradients stay in one thread as its loss did; shapes as `pair_loss`."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., PairLoss], activations: int, *learned: Tensor | None) -> tuple[Tensor, ...]:
        needs = ctx.needs_input_grad[2:]
        apart = [value if value is None else value.detach().requires_grad_(need) for value, need in zip(learned, needs, strict=True)]
        with torch.enable_grad():
            result = call(*apart)
        ctx.call, ctx.activations, ctx.needs = call, activations, needs
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
        inputs = [value for value, need in zip(learned, ctx.needs, strict=True) if need]
        with in_one_thread(upstream, ctx.activations):
            gradients = iter(torch.autograd.grad(loss, inputs, upstream, retain_graph=True, create_graph=again))
        return None, None, *(next(gradients) if need else None for need in ctx.needs)


def _anchor(learned: list[Tensor]) -> Tensor:
    """Return empty sums, (inputs, *): what a second derivative needs to find the inputs by, without keeping them in memory."""
    return torch.stack([value[:0].sum(dtype=torch.float32) for value in learned])


def _check_words(pairs: str | Tensor, activation: str, loss: str, beta: float) -> None:
    """Raise ValueError if an option of the loss is unknown; a list of pairs, (P, 2), is not looked at."""
    for name, word, words in (("activation", activation, Activation), ("loss", loss, Regression)):
        if word not in get_args(words):
            raise ValueError(f"{name}={word!r}: take one of {', '.join(get_args(words))}")
    if loss in ("smooth_l1", "huber") and not beta > 0:
        raise ValueError(f'beta={beta}: needs to be above 0; for |e| alone take loss="l1"')
    if not isinstance(pairs, Tensor) and pairs not in get_args(Pairs):
        raise ValueError(f"pairs={pairs!r}: take one of {', '.join(get_args(Pairs))}, or a tensor (P, 2)")


def _check_tensors(tensors: dict[str, Tensor], channels: int, loss: str, *, float64: bool) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit, and only what is learned requires a gradient.

    Shapes: as `pair_loss`.
    """
    check_shape("a", tensors["a"], ("B", "N", "H"))
    batch, boxes, hidden = tensors["a"].shape
    outputs = 2 * channels if loss == "gaussian_nll" else channels
    expected: dict[str, tuple[int | str, ...]] = {"b": (batch, boxes, hidden), "boxes": (batch, boxes, 4), "weight": (outputs, hidden)}
    expected |= {"output_bias": (outputs,), "hidden_bias": (hidden,), "pairs": ("P", 2), "picture_hw": (batch, 2)}
    expected |= dict.fromkeys(("valid", "flipped", "quarter_turns"), (batch, boxes))
    expected |= dict.fromkeys(("mean", "std", "channel_weights"), (channels,))
    dtypes: dict[str, tuple[torch.dtype, ...]] = dict.fromkeys(LEARNED, (*FLOATS, torch.float64) if float64 else FLOATS)
    dtypes |= {"boxes": (torch.float32, torch.float64), "pairs": (torch.int64, torch.int32), "valid": (torch.bool,)}
    dtypes |= {"flipped": (torch.bool,), "quarter_turns": INTEGERS}
    for name, tensor in tensors.items():
        check_shape(name, tensor, expected.get(name, tensor.shape))
        if name in dtypes:
            check_dtype(name, tensor, dtypes[name])
        check_device(name, tensor, "a", tensors["a"])
        if name not in LEARNED and torch.is_grad_enabled():
            check_no_derivative(name, tensor, "which pair_loss does not give")


def _check_boxes(boxes: Tensor, valid: Tensor | None, *, wait: bool) -> None:
    """Raise ValueError if one of boxes (B, N, 4), where valid (B, N), is empty or not finite; a GPU's are read only if `wait`."""
    if torch.compiler.is_compiling() or transforms_active() or not (wait or boxes.device.type == "cpu"):
        return
    wrong = ~((boxes[..., 2:] > boxes[..., :2]) & (boxes[..., 2:] - boxes[..., :2] < math.inf)).all(-1)
    wrong = wrong if valid is None else wrong & valid
    if wrong.any():
        sample, box = wrong.nonzero()[0].tolist()
        corners = ", ".join(f"{corner:g}" for corner in boxes[sample, box].tolist())
        raise ValueError(f"boxes[{sample}, {box}] is ({corners}), which has no finite size above 0; mark it as not valid")


LIBRARY.define(
    "pair_loss(Tensor a, Tensor b, Tensor weight, Tensor output_bias, Tensor? hidden_bias, Tensor boxes, Tensor? chosen, Tensor? valid, "
    "Tensor? flipped, Tensor? quarter_turns, Tensor? picture_hw, Tensor? mean, Tensor? std, Tensor? channel_weights, str pairs, "
    "str position, str scale, str axes, str activation, str loss, float beta, bool per_sample, bool grads, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _pair_loss_op(
    a: Tensor, b: Tensor, weight: Tensor, output_bias: Tensor, hidden_bias: Tensor | None, boxes: Tensor, chosen: Tensor | None,
    valid: Tensor | None, flipped: Tensor | None, quarter_turns: Tensor | None, picture_hw: Tensor | None, mean: Tensor | None,
    std: Tensor | None, channel_weights: Tensor | None, pairs: str, position: PositionUnit, scale: Scale, axes: Axes, activation: str,
    loss: str, beta: float, per_sample: bool, grads: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Serve the call by the path that there is -> the five parts of PairLoss, a factor, and what times that is the gradients of a, b,
    weight and output_bias: large as they are, they are to be scaled once, by the factor and what comes from above together.

    Shapes: as `pair_loss`, chosen (P, 2) with pairs="list" -> as `PairLoss`, then (..), (B, N, H), (B, N, H), (.., K, H) and (.., K), of
            which the leading axis is B with per_sample, else 1.
    """
    check_no_tangent(a, b, weight, output_bias, hidden_bias)
    path = choose_path(backend, a)
    with torch.no_grad(), torch.autocast(a.device.type, enabled=False), torch.cuda.device_of(a):
        problem = PairLossProblem(
            a=a,
            b=b,
            weight=weight.float(),
            output_bias=output_bias.float(),
            hidden_bias=hidden_bias,
            boxes=boxes.float(),
            chosen=chosen,
            valid=valid,
            units=PairUnits(position=position, scale=scale, axes=axes, mean=mean, std=std),
            flipped=flipped,
            quarter_turns=quarter_turns,
            picture_hw=picture_hw,
            channel_weights=channel_weights,
            pairs=pairs,
            activation=activation,
            loss=loss,
            beta=beta,
            per_sample=per_sample,
            grads=grads,
        )
        if path == "triton":
            from wherefrom.kernels.pair_loss_triton import pair_loss_triton

            return _means(problem, pair_loss_triton(problem), scale_gradients=False)
        return _means(problem, pair_loss_torch(problem), scale_gradients=True)


def _means(problem: PairLossProblem, sums: PairLossSums, *, scale_gradients: bool) -> tuple[Tensor, ...]:
    """Divide sums by the pairs that they are over -> as `_pair_loss_op`, shapes as there; gradients in place, or by their factor."""
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
        return *means, sums.counted, sums.a.new_empty(0), sums.a, sums.b, sums.weight, sums.output_bias.float()
    factor = (1 / (counted if problem.per_sample else total)).view(-1)
    gradients = (sums.a, sums.b, sums.weight, sums.output_bias)
    if scale_gradients:
        for each in gradients:
            each.mul_(factor.view(-1, *(1,) * (each.ndim - 1)))
        factor = torch.ones_like(factor)
    return *means, sums.counted, factor, *(each.float() for each in gradients)


@torch.library.register_fake("wherefrom::pair_loss", lib=LIBRARY)
def _pair_loss_fake(
    a: Tensor, b: Tensor, weight: Tensor, output_bias: Tensor, hidden_bias: Tensor | None, boxes: Tensor, chosen: Tensor | None,
    valid: Tensor | None, flipped: Tensor | None, quarter_turns: Tensor | None, picture_hw: Tensor | None, mean: Tensor | None,
    std: Tensor | None, channel_weights: Tensor | None, pairs: str, position: PositionUnit, scale: Scale, axes: Axes, activation: str,
    loss: str, beta: float, per_sample: bool, grads: bool, backend: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Return empty tensors of the shapes that `_pair_loss_op` returns; shapes as there."""
    batch, channels = a.shape[0], len(CHANNELS[scale])
    groups = (batch if per_sample else 1) if grads else 0
    shapes = [(batch,) if per_sample else (), (channels,), (channels,), (channels,)]
    gradients = [(groups,), *[a.shape if grads else (0,)] * 2, (groups, *weight.shape), (groups, *output_bias.shape)]
    floats = [a.new_empty(shape, dtype=torch.float32) for shape in [*shapes, *gradients]]
    return *floats[:4], a.new_empty(batch, dtype=torch.int64), *floats[4:]


LIBRARY.impl("pair_loss", _pair_loss_op, "CPU")
LIBRARY.impl("pair_loss", _pair_loss_op, "CUDA")


class _PairLoss(torch.autograd.Function):
    """The operator with its gradient: what it computed beside the loss, times what comes from above; shapes as `_pair_loss_op`."""

    @staticmethod
    def forward(anchor: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return torch.ops.wherefrom.pair_loss.default(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        anchor, *arguments = inputs
        ctx.mark_non_differentiable(*output[1:])
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # else zeros as large as the gradients are made for outputs that have none
        ctx.save_for_backward(anchor, *output[5:])
        ctx.dtypes = [None if value is None else value.dtype for value in arguments[:5]]
        ctx.others = len(arguments) - 5

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if upstream is None:
            return (None,) * (6 + ctx.others)
        if any(ctx.needs_input_grad[6:]):
            raise RuntimeError(ONLY_LEARNED)
        anchor, *saved = ctx.saved_tensors
        dtypes = [dtype if need else None for dtype, need in zip(ctx.dtypes, ctx.needs_input_grad[1:6], strict=True)]
        # a compiled graph refuses second derivatives by itself
        scaled = _scale_gradients if torch.compiler.is_compiling() else _ScaleGradients.apply
        return None, *scaled(anchor, upstream, *saved, *dtypes), *(None,) * ctx.others


class _PairLossInEveryMode(_PairLoss):
    """The same with forward mode and vmap; apart, for torch.compile takes no Function that has them. Shapes as `_pair_loss_op`."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _PairLoss.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0], *output[5:])
        ctx.per_sample = output[0].ndim == 1

    @staticmethod
    def jvp(ctx: Any, _anchor: Tensor | None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        anchor, *saved = ctx.saved_tensors
        # as above: without a transform there is one level of forward mode alone, and this is within it
        slope = _Slope.apply if transforms_active() or needs_gradient(anchor) else _slope
        return slope(anchor, ctx.per_sample, *saved, *tangents[:5]), *(None,) * 9

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return one_by_one(_in_every_mode, info.batch_size, in_dims[1:], inputs[1:])


def _in_every_mode(*arguments: Any) -> tuple[Tensor, ...]:
    """Call the operator with all its derivatives; shapes as `_pair_loss_op`."""
    return _PairLossInEveryMode.apply(_anchor([value for value in arguments[:5] if value is not None]), *arguments)


def _scale_gradients(
    _anchor: Tensor, upstream: Tensor, factor: Tensor, of_a: Tensor, of_b: Tensor, of_weight: Tensor, of_output_bias: Tensor,
    *dtypes: torch.dtype | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return the gradients of a, b, weight and both biases times what comes from above, () or (B,); None where no dtype is given.

    Shapes: the factor (1,) or (B,), gradients as `_pair_loss_op` returns them.
    """
    each = (upstream.float() * factor).reshape(-1, 1, 1)
    gradients = (
        lambda: of_a * each,
        lambda: of_b * each,
        lambda: (of_weight * each).sum(0),
        lambda: (of_output_bias * each[..., 0]).sum(0),
        lambda: (of_a.sum(1, keepdim=True) * each).sum((0, 1)),
    )
    return tuple(None if dtype is None else gradient().to(dtype) for gradient, dtype in zip(gradients, dtypes, strict=True))


def _slope(
    _anchor: Tensor, per_sample: bool, factor: Tensor, of_a: Tensor, of_b: Tensor, of_weight: Tensor, of_output_bias: Tensor,
    *tangents: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return how the loss, () or (B,), changes with tangents of a, b, weight, output_bias and hidden_bias; 0 for those that are None.

    Shapes: the factor (1,) or (B,), gradients as `_pair_loss_op` returns them.
    """
    slopes = []
    for gradient, tangent in zip((of_a, of_b, of_weight, of_output_bias, of_a.sum(1)), tangents, strict=True):
        if tangent is not None:
            product = gradient * tangent.float()
            slopes.append(product.sum(tuple(range(int(per_sample), product.ndim))))
    return torch.stack(slopes).sum(0) * (factor if per_sample else factor.squeeze(0))


class _HasNoDerivative(torch.autograd.Function):
    """A step, on tensors of any shape, that has no derivative: saying so is what keeps that from being silently 0."""

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


class _ScaleGradients(_HasNoDerivative):
    forward = staticmethod(_scale_gradients)


class _Slope(_HasNoDerivative):
    forward = staticmethod(_slope)
