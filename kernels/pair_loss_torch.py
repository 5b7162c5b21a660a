"""The pair loss in plain torch: tile by tile, in buffers that fit a cache and are used again and again.

Here: what every path takes and returns (`PairLossProblem`, `PairLossSums`), and the path for processors and machines without Triton.
Not here: the definition (pair_loss_reference.py), checks, means and the operator (pair_loss.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from wherefrom.kernels.pair_loss_reference import counted_pairs
from wherefrom.kernels.pair_targets_reference import PairUnits, pair_targets_reference

TILE = 784 * 512  # elements of one tile's hidden activations: with their gradients they stay in the cache
TARGETS_AT_ONCE = 4096  # pairs whose targets are made in one go, for several tiles
APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}  # as PyTorch calls them


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLossProblem:
    """What a path is given, checked."""

    a: Tensor  # (B, N, H) as given: read through `inputs`
    b: Tensor  # (B, N, H)
    weight: Tensor  # (K, H) float32, K = C or 2 C
    output_bias: Tensor  # (K,) float32
    hidden_bias: Tensor | None  # (H,)
    boxes: Tensor  # (B, N, 4) float32
    chosen: Tensor | None  # (P, 2), with pairs="list"
    valid: Tensor | None  # (B, N), as the next two
    units: PairUnits
    flipped: Tensor | None
    quarter_turns: Tensor | None
    picture_hw: Tensor | None  # (B, 2)
    channel_weights: Tensor | None  # (C,)
    pairs: str
    activation: str
    loss: str
    beta: float
    per_sample: bool
    grads: bool

    @property
    def channels(self) -> int:
        """C: the targets of a pair."""
        return len(self.units.channels)

    def inputs(self, samples: slice) -> tuple[Tensor, Tensor]:
        """Return a, with the hidden bias, and b of some samples, (b, N, H) float32, 0 where they are not valid."""
        a, b = self.a[samples], self.b[samples]
        if self.hidden_bias is not None:
            a = a + self.hidden_bias.float()  # float32, in one pass
        if self.valid is not None:  # in the given dtype: fewer bytes
            a, b = (torch.where(self.valid[samples].unsqueeze(-1), value, 0) for value in (a, b))
        return a.float(), b.float()


@dataclass(frozen=True, kw_only=True, slots=True)
class PairLossSums:
    """What a path returns: sums over the counted pairs, not divided by anything; gradients are those of the weighted loss."""

    loss: Tensor  # (B, C) float64, each channel's loss, not weighted
    squared: Tensor  # (B, C) float64, squared errors
    target: Tensor  # (B, C) float64
    target_squared: Tensor  # (B, C) float64
    counted: Tensor  # (B,) int64
    a: Tensor  # (B, N, H), as the next three empty without gradients
    b: Tensor  # (B, N, H)
    weight: Tensor  # (B or 1, K, H): per sample, else of all
    output_bias: Tensor  # (B or 1, K) float64

    @classmethod
    def zeros(cls, problem: PairLossProblem, *, unwritten: bool = False) -> "PairLossSums":
        """Return sums over nothing; `unwritten` leaves a and b, the large ones, to a path that writes every element."""
        batch, channels = len(problem.a), problem.channels
        groups = (batch if problem.per_sample else 1) if problem.grads else 0
        shape = problem.a.shape if problem.grads else (0,)
        floats = problem.weight
        exact = floats.new_zeros(4, batch, channels, dtype=torch.float64)
        return cls(
            loss=exact[0],
            squared=exact[1],
            target=exact[2],
            target_squared=exact[3],
            counted=floats.new_zeros(batch, dtype=torch.int64),
            a=floats.new_empty(shape) if unwritten else floats.new_zeros(shape),
            b=floats.new_empty(shape) if unwritten else floats.new_zeros(shape),
            weight=floats.new_zeros(groups, *problem.weight.shape),
            output_bias=floats.new_zeros(groups, *problem.output_bias.shape, dtype=torch.float64),
        )


Tile = tuple[slice, slice, slice]  # samples, references (or pairs of the list), targets


def pair_loss_torch(problem: PairLossProblem) -> PairLossSums:
    """Go through the pairs in tiles that fit a cache, in buffers used again and again."""
    sums = PairLossSums.zeros(problem)
    batch, boxes, hidden = problem.a.shape
    rows, columns = (boxes, boxes) if problem.chosen is None else (len(problem.chosen), 1)
    at_once = max(1, (TILE if problem.a.device.type == "cpu" else 64 * TILE) // max(1, hidden))
    buffers = problem.weight.new_empty(2, min(at_once, batch * rows * columns) * hidden)
    samples = None
    for block in _tiles((0, 0, 0), (batch, rows, columns), max(1, TARGETS_AT_ONCE // at_once) * at_once):
        if block[0] != samples:
            samples, inputs = block[0], problem.inputs(block[0])
        targets, counts = _targets(problem, block, _pairs_of(problem, block), sums)
        starts, lengths = tuple(part.start for part in block), tuple(part.stop - part.start for part in block)
        targets = targets.view(*lengths, -1)
        for tile in _tiles(starts, lengths, at_once):
            inner = tuple(slice(part.start - start, part.stop - start) for part, start in zip(tile, starts, strict=True))
            a, b = (value[inner[0]] for value in inputs)
            _add_tile(problem, sums, buffers, tile, a, b, targets[inner], None if counts is None else counts.view(lengths)[inner])
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


def _pairs_of(problem: PairLossProblem, block: Tile) -> Tensor:
    """Return the pairs of a block, (P, 2) of (reference, target), targets fastest."""
    _, rows, columns = block
    if problem.chosen is not None:
        return problem.chosen[rows]
    device = problem.a.device
    return torch.cartesian_prod(
        torch.arange(rows.start, rows.stop, device=device), torch.arange(columns.start, columns.stop, device=device)
    )


def _targets(problem: PairLossProblem, block: Tile, chosen: Tensor, sums: PairLossSums) -> tuple[Tensor, Tensor | None]:
    """Return targets (B, P, C) and which pairs count (B, P), None for all, of a block's samples and pairs; add them to the sums."""
    samples = block[0]

    def own(value: Tensor | None) -> Tensor | None:  # (B, ...) -> (b, ...)
        return None if value is None else value[samples]

    targets = pair_targets_reference(
        problem.boxes[samples],
        chosen,
        units=problem.units,
        flipped=own(problem.flipped),
        quarter_turns=own(problem.quarter_turns),
        picture_hw=own(problem.picture_hw),
    )
    if problem.valid is None and problem.pairs in ("all", "list"):
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


def _add_tile(
    problem: PairLossProblem, sums: PairLossSums, buffers: Tensor, tile: Tile, a: Tensor, b: Tensor, targets: Tensor, counts: Tensor | None
) -> None:
    """Add the loss of one tile of pairs, and its gradients, to the sums.

    Shapes: buffers (2, at least b r t H) for b samples, r references and t targets; a and b (b, N, H), targets (b, r, t, C),
            counts (b, r, t).
    """
    samples, rows, columns = tile
    *lengths, channels = targets.shape
    hidden, outputs = problem.a.shape[-1], len(problem.weight)
    count = lengths[0] * lengths[1] * lengths[2]
    inputs, active = (buffer[: count * hidden].view(count, hidden) for buffer in buffers)

    if problem.chosen is None:
        torch.add(a[:, rows].unsqueeze(2), b[:, columns].unsqueeze(1), out=inputs.view(*lengths, hidden))
    else:
        reference, target = problem.chosen[rows].long().unbind(-1)
        by_pair = lengths[0], lengths[1], hidden
        torch.index_select(a, 1, reference, out=inputs.view(by_pair))
        torch.index_select(b, 1, target, out=active.view(by_pair))
        inputs += active
    _activate(problem.activation, inputs, active)
    output = torch.addmm(problem.output_bias, active, problem.weight.t())
    residual = output[:, :channels] - targets.reshape(count, channels)
    uncounted = None if counts is None else ~counts.reshape(count, 1)
    if uncounted is not None:
        residual.masked_fill_(uncounted, 0)
    values, slope = _loss_and_slope(problem.loss, problem.beta, residual, output[:, channels:])
    if uncounted is not None and problem.loss == "gaussian_nll":  # the others are 0 where the residual is
        values.masked_fill_(uncounted, 0)
        slope.masked_fill_(uncounted, 0)
    sums.loss[samples] += values.view(lengths[0], -1, channels).sum(1)
    sums.squared[samples] += residual.square_().view(lengths[0], -1, channels).sum(1)
    if not problem.grads:
        return

    if problem.channel_weights is not None:
        slope.view(count, -1, channels).mul_(problem.channel_weights)
    own, groups = (samples, lengths[0]) if problem.per_sample else (slice(None), 1)
    by_group = slope.view(groups, -1, outputs)
    sums.output_bias[own] += by_group.sum(1, dtype=torch.float64)
    sums.weight[own].baddbmm_(by_group.mT, active.view(groups, -1, hidden))
    torch.mm(slope, problem.weight, out=active)
    _through_activation(problem.activation, inputs, active)
    if problem.chosen is None:
        gradient = active.view(*lengths, hidden)
        sums.a[samples, rows] += gradient.sum(2)
        sums.b[samples, columns] += gradient.sum(1)
    else:
        sums.a[samples].index_add_(1, reference, active.view(by_pair))
        sums.b[samples].index_add_(1, target, active.view(by_pair))


def _activate(activation: str, inputs: Tensor, out: Tensor) -> None:
    """Write act(inputs) into `out`, of the same shape, (pairs, H)."""
    if activation == "relu":
        torch.clamp_min(inputs, 0, out=out)
    else:
        torch.ops.aten.gelu.out(inputs, approximate=APPROXIMATE[activation], out=out)


def _through_activation(activation: str, inputs: Tensor, gradient: Tensor) -> None:
    """Multiply a gradient by act'(inputs), in place; both (pairs, H)."""
    if activation == "relu":
        torch.ops.aten.threshold_backward.grad_input(gradient, inputs, 0, grad_input=gradient)
    else:
        torch.ops.aten.gelu_backward.grad_input(gradient, inputs, approximate=APPROXIMATE[activation], grad_input=gradient)


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
