"""The definition of the pair loss: a two-layer head on all pairs of N boxes and its regression loss, everything materialized.

Here: the formula in plain PyTorch with autograd's own gradients, in the dtype of what is given (float64 for tests); what the call returns.
Not here: checks and choice of path (pair_loss.py), the kernels (pair_loss_triton.py).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.kernels.pair_targets_reference import DEFAULT_UNITS, PairUnits, pair_targets_reference


class PairLoss(NamedTuple):
    """A loss over pairs of boxes, and numbers to log, which carry no gradient. A tuple, so that torch.func and compile know its parts.

    Shapes: C channels, B samples. Means are over all counted pairs of the batch, 0 where there are none.
    """

    loss: Tensor  # () or (B,), float32: the only part that has a gradient
    channel_loss: Tensor  # (C,) mean loss of each channel, not weighted
    squared_error: Tensor  # (C,) mean squared error of each channel
    target_variance: Tensor  # (C,) of the targets
    counted: Tensor  # (B,) int64: pairs of each sample that count

    @property
    def r2(self) -> Tensor:
        """1 - squared error / variance of the targets, (C,): not finite where the targets do not vary."""
        return 1 - self.squared_error / self.target_variance


def pair_loss_reference(
    a: Tensor,
    b: Tensor,
    boxes: Tensor,
    *,
    weight: Tensor,
    output_bias: Tensor,
    hidden_bias: Tensor | None = None,
    pairs: str | Tensor = "all",
    valid: Tensor | None = None,
    units: PairUnits = DEFAULT_UNITS,
    flipped: Tensor | None = None,
    quarter_turns: Tensor | None = None,
    picture_hw: Tensor | None = None,
    activation: str = "gelu",
    loss: str = "squared",
    beta: float = 1.0,
    channel_weights: Tensor | None = None,
    per_sample: bool = False,
) -> PairLoss:
    """Return the loss of W act(a_r + b_t + hidden_bias) + output_bias against the targets of boxes r and t; words as `pair_loss`.

    Shapes: a and b (B, N, H), boxes (B, N, 4), weight (C, H), output_bias (C,), hidden_bias (H,), pairs (P, 2) or a word, valid,
            flipped and quarter_turns (B, N), picture_hw (B, 2), channel_weights (C,) -> PairLoss.
    Raises: nothing; arguments are trusted.
    """
    if valid is not None:  # what is hidden there, NaN even, reaches nothing
        a, b = (torch.where(valid.unsqueeze(-1), value, 0) for value in (a, b))
    if hidden_bias is not None:  # before there are pairs of them
        a = a + hidden_bias
    if isinstance(pairs, Tensor):
        chosen = pairs
        hidden = a.index_select(1, pairs[:, 0]) + b.index_select(1, pairs[:, 1])
    else:
        each = torch.arange(a.shape[1], device=a.device)
        chosen = torch.cartesian_prod(each, each)
        hidden = (a.unsqueeze(2) + b.unsqueeze(1)).flatten(1, 2)
    hidden = F.relu(hidden) if activation == "relu" else F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none")
    output = F.linear(hidden, weight.to(hidden.dtype), output_bias.to(hidden.dtype))  # (B, P, C or 2 C)
    exact = torch.float64 if output.dtype == torch.float64 else torch.float32
    output = output.to(exact)
    targets = pair_targets_reference(
        boxes.to(exact),
        chosen,
        units=units,
        flipped=flipped,
        quarter_turns=quarter_turns,
        picture_hw=picture_hw,
    )
    counts = counted_pairs(boxes, chosen, pairs, valid)
    return _means(output, targets, counts, loss, beta, channel_weights, per_sample)


def _means(
    output: Tensor, targets: Tensor, counts: Tensor, loss: str, beta: float, channel_weights: Tensor | None, per_sample: bool
) -> PairLoss:
    """Return means over the pairs that count: output (B, P, C or 2 C), targets (B, P, C), counts (B, P) bool, channel_weights (C,)."""
    counted, weighed = counts.sum(1), counts.unsqueeze(-1)
    total = counted.sum().clamp(min=1)
    channels = targets.shape[-1]
    residual = torch.where(weighed, output[..., :channels] - targets, 0)
    each_loss = regression_loss(residual, output[..., channels:], loss, beta) * weighed
    targets = torch.where(weighed, targets.detach(), 0)
    variance = (torch.where(weighed, targets - targets.sum((0, 1)) / total, 0)).square().sum((0, 1)) / total
    squared_error = residual.detach().square().sum((0, 1)) / total
    of_channel = each_loss.sum((0, 1)) / total
    losses = each_loss.sum(1) / counted.clamp(min=1).unsqueeze(-1) if per_sample else of_channel
    weights = losses.new_ones(channels) if channel_weights is None else channel_weights.to(losses)
    return PairLoss((losses * weights).sum(-1), of_channel.detach(), squared_error, variance, counted)


def counted_pairs(boxes: Tensor, chosen: Tensor, pairs: str | Tensor, valid: Tensor | None) -> Tensor:
    """Return which of the `chosen` pairs (P, 2) of boxes (B, N, 4) count, (B, P) bool: both `valid` (B, N), and as `pairs` asks of them."""
    reference, target = chosen.unbind(-1)
    counts = torch.ones(boxes.shape[0], len(chosen), dtype=torch.bool, device=boxes.device)
    if valid is not None:
        counts &= valid.index_select(1, reference) & valid.index_select(1, target)
    if isinstance(pairs, str) and pairs == "others":
        counts &= reference != target
    if isinstance(pairs, str) and pairs == "disjoint":
        r, t = boxes.index_select(1, reference), boxes.index_select(1, target)
        counts &= ((r[..., 2:] <= t[..., :2]) | (t[..., 2:] <= r[..., :2])).any(-1)
    return counts


def regression_loss(residual: Tensor, log_variance: Tensor, loss: str, beta: float) -> Tensor:
    """Return the loss of each residual, (..., C), with PyTorch's formulas; `log_variance` is read by "gaussian_nll" alone."""
    zero = torch.zeros_like(residual)
    if loss == "gaussian_nll":
        return 0.5 * (log_variance + residual.square() * (-log_variance).exp())
    if loss == "l1":
        return residual.abs()
    if loss == "smooth_l1":
        return F.smooth_l1_loss(residual, zero, reduction="none", beta=beta)
    if loss == "huber":
        return F.huber_loss(residual, zero, reduction="none", delta=beta)
    return residual.square()
