"""The pair loss in Triton: one kernel for the loss and its slopes by every output, one for the gradients, no atomics.

Here: the kernels, and the launchers, which go through a batch 64 samples at a time.
Not here: the definition (pair_loss_reference.py), checks and means (pair_loss.py).
Forward: a program has PAIRS pairs, some to a lane, and runs through the hidden units. Backward: a program has a block of hidden units
and runs through the pairs, so that every sum has one owner and one order.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from wherefrom.kernels.dispatch import Launch, interpreted
from wherefrom.kernels.pair_loss_torch import PairLossProblem, PairLossSums
from wherefrom.kernels.pair_targets_triton import load_boxes, pair_target_tile, wide

SAMPLES_AT_ONCE = 64  # bounds the slopes in memory ...
SLOPES_AT_ONCE = 2**25  # ... as this does, where N is large
PAIRS = 256  # of a program of forward, four a lane: more would spill on some architectures
UNITS = 64  # hidden units of a program of backward, which is one warp
BACKWARD_WARPS = 1024  # at the least: about eight on each processor of a large GPU

PTX = tl.constexpr(not interpreted() and torch.version.hip is None)
LOG2_E = tl.constexpr(math.log2(math.e))
NORMAL = tl.constexpr(1 / math.sqrt(2 * math.pi))
SQRT_2_PI = tl.constexpr(math.sqrt(2 / math.pi))


@triton.jit
def exp2(x):
    """2^x, of any shape, to 2 units in the last place, as the hardware has it."""
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x):
    """1 / x, of any shape, to 1 unit in the last place, as the hardware has it."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return act(x) and act'(x), x of any shape; what is not used costs nothing.

    gelu: x Phi(x), with Phi(-|x|) = exp(-x^2 / 2) P(t), t = 1 / (1 + q |x|), P of degree 5, |error| < 1.1e-8 before rounding; act' needs
          that exponential anyway. The form is Abramowitz and Stegun's 7.1.26; q and P are a minimax fit of ours, with a constant term,
          which makes it seven times as exact for no more instructions.
    """
    if ACTIVATION == "relu":
        return tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
        square = x * x
        power = tl.minimum(x * (-2 * LOG2_E * SQRT_2_PI) * (1.0 + 0.044715 * square), 126.0)  # so that rest is not infinity times 0
        rest = exp2(power)
        share = reciprocal(1.0 + rest)
        rest *= share  # 1 - share without cancellation
        active = x * share
        return active, share + active * rest * (2 * SQRT_2_PI) * (1.0 + 3 * 0.044715 * square)
    else:
        bell = exp2(x * x * (-0.5 * LOG2_E))
        t = reciprocal(1.0 + 0.31397466 * tl.abs(x))
        tail = -0.136911581 * t + 0.554209566
        tail = tail * t - 0.354168085
        tail = tail * t + 0.371653782
        tail = tail * t + 0.057533218
        tail = (tail * t + 0.007683090) * bell
        share = tl.where(x < 0, tail, 1.0 - tail)
        return x * share, share + x * bell * NORMAL


@triton.jit
def zeros_each(COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Return COUNT vectors of zeros, (SIZE,) each, as a tuple: each stays in registers."""
    each = ()
    for _ in tl.static_range(COUNT):
        each += (tl.zeros((SIZE,), tl.float32),)
    return each


@triton.jit
def load_each(base_ptr, step, index, mask, COUNT: tl.constexpr):
    """Return the tuple of COUNT loads at base + c * step + index, each of the shape of index, (units,) or (rows,); 0 where masked."""
    each = ()
    for c in tl.static_range(COUNT):
        each += (tl.load(base_ptr + c * step + index, mask=mask, other=0.0),)
    return each


@triton.jit
def add_four_units(output, inputs, weight_ptr, H, ACTIVATION: tl.constexpr, K: tl.constexpr, PAIRS: tl.constexpr):
    """Return the outputs of PAIRS pairs plus what four hidden units add, of inputs (PAIRS, 4)."""
    active, _ = activate(inputs, ACTIVATION)
    even, odd = tl.split(tl.reshape(active, (PAIRS, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    each = ()
    for c in tl.static_range(K):
        at = weight_ptr + c * H
        total = output[c] + tl.load(at) * first
        total += tl.load(at + 1) * second
        total += tl.load(at + 2) * third
        total += tl.load(at + 3) * fourth
        each += (total,)
    return each


@triton.jit
def loss_and_slope(residual, log_variance, beta, LOSS: tl.constexpr):
    """Return the loss of a residual, its slope by the output, and by the log-variance; all of one shape, (PAIRS,)."""
    if LOSS == "gaussian_nll":
        precision = tl.exp(-log_variance)
        slope = residual * precision
        share = residual * slope
        return 0.5 * (log_variance + share), slope, 0.5 * (1.0 - share)
    elif LOSS == "squared":
        return residual * residual, 2 * residual, residual
    elif LOSS == "l1":
        slope = tl.where(residual > 0, 1.0, tl.where(residual < 0, -1.0, residual))
        return tl.abs(residual), slope, slope
    else:  # linear beyond beta; written so that NaN stays NaN
        gain = 1.0 / beta if LOSS == "smooth_l1" else 1.0
        half = 0.5 * beta if LOSS == "smooth_l1" else 0.5
        slope = residual * gain
        limit = gain * beta
        slope = tl.where(slope > limit, limit, tl.where(slope < -limit, -limit, slope))
        return slope * (residual - half * slope), slope, slope


@triton.jit
def pair_loss_forward_kernel(
    slopes_ptr,
    sums_ptr,
    a_ptr,
    b_ptr,
    weight_ptr,
    output_bias_ptr,
    boxes_ptr,
    facts_ptr,
    picture_ptr,
    mean_ptr,
    std_ptr,
    channel_weights_ptr,
    chosen_ptr,
    N,
    P,
    H,
    beta,
    WHICH: tl.constexpr,
    POSITION: tl.constexpr,
    SCALE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LOSS: tl.constexpr,
    GRADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """One program: PAIRS pairs of one sample; grid (ceil(P / PAIRS), B).

    Shapes: slopes (B, K, P); sums (B, programs, 1 + 4 C + K): count, then losses, squared errors, targets and squared deviations of the
            targets from the program's mean, by channel, then slopes, by output; a and b (B, H / 4, N, 4); weight (K, H);
            facts (B, N) int32: turns + 4 * flipped + 8 * valid; picture (B, 2) height, width; chosen (P, 2).
    """
    C: tl.constexpr = 3 if SCALE == "log_area" else 2 if SCALE == "none" else 4
    K: tl.constexpr = 2 * C if LOSS == "gaussian_nll" else C
    sample = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < P
    if WHICH == "list":
        r = tl.load(chosen_ptr + pair * 2, mask=inside, other=0).to(tl.int64)
        t = tl.load(chosen_ptr + pair * 2 + 1, mask=inside, other=0).to(tl.int64)
    else:
        r, t = pair // N, pair % N
    exists = inside & (r >= 0) & (r < N) & (t >= 0) & (t < N)

    r, t = tl.where(exists, r, 0).to(tl.int32), tl.where(exists, t, 0).to(tl.int32)

    # outputs: the four inputs of a box that lie side by side come with one load
    four = tl.arange(0, 4)[None, :]
    at_r, at_t = r[:, None] * 4 + four, t[:, None] * 4 + four
    rows_a, rows_b = a_ptr + at_r, b_ptr + at_t
    output = zeros_each(K, PAIRS)
    for k in range(0, H, 4):
        at = (sample * H + k) * N
        inputs = tl.load(rows_a + at) + tl.load(rows_b + at)
        output = add_four_units(output, inputs, weight_ptr + k, H, ACTIVATION, K, PAIRS)

    # targets, and which pairs count
    rx0, ry0, rx1, ry1 = load_boxes(boxes_ptr, sample * N + r, exists)
    tx0, ty0, tx1, ty1 = load_boxes(boxes_ptr, sample * N + t, exists)
    of_r = tl.load(facts_ptr + sample * N + r, mask=exists, other=8)
    of_t = tl.load(facts_ptr + sample * N + t, mask=exists, other=8)
    counts = inside & ((of_r & of_t & 8) != 0)
    if WHICH == "others":
        counts = counts & (r != t)
    if WHICH == "disjoint":
        counts = counts & ((rx1 <= tx0) | (tx1 <= rx0) | (ry1 <= ty0) | (ty1 <= ry0))
    picture_h, picture_w = tl.load(picture_ptr + sample * 2), tl.load(picture_ptr + sample * 2 + 1)
    targets = pair_target_tile(
        rx0, ry0, rx1, ry1, tx0, ty0, tx1, ty1, of_r & 4, of_r & 3, picture_h, picture_w, POSITION, SCALE, VIEW_AXES=True
    )

    # losses and slopes
    count = tl.sum(counts.to(tl.float32), 0)
    sums_ptr += (sample * tl.num_programs(0) + tl.program_id(0)) * (1 + 4 * C + K)
    tl.store(sums_ptr, count)
    for c in tl.static_range(C):
        target = (targets[c] - tl.load(mean_ptr + c)) / tl.load(std_ptr + c)
        target = tl.where(counts, tl.where(exists, target, float("nan")), 0.0)
        residual = tl.where(counts, output[c] + tl.load(output_bias_ptr + c) - target, 0.0)
        log_variance = output[K - C + c] + tl.load(output_bias_ptr + K - C + c)  # for another loss than this, not used
        loss, slope, slope_log_variance = loss_and_slope(residual, log_variance, beta, LOSS)
        total = tl.sum(target, 0)
        deviation = tl.where(counts, target - total / tl.maximum(count, 1.0), 0.0)
        tl.store(sums_ptr + 1 + c, tl.sum(tl.where(counts, loss, 0.0), 0))
        tl.store(sums_ptr + 1 + C + c, tl.sum(residual * residual, 0))
        tl.store(sums_ptr + 1 + 2 * C + c, total)
        tl.store(sums_ptr + 1 + 3 * C + c, tl.sum(deviation * deviation, 0))
        if GRADS:
            weight = tl.load(channel_weights_ptr + c)
            slope = tl.where(counts, slope * weight, 0.0)
            tl.store(slopes_ptr + (sample * K + c) * P + pair, slope, mask=inside)
            tl.store(sums_ptr + 1 + 4 * C + c, tl.sum(slope, 0))
            if LOSS == "gaussian_nll":
                slope = tl.where(counts, slope_log_variance * weight, 0.0)
                tl.store(slopes_ptr + (sample * K + C + c) * P + pair, slope, mask=inside)
                tl.store(sums_ptr + 1 + 5 * C + c, tl.sum(slope, 0))
        else:
            tl.store(sums_ptr + 1 + 4 * C + c, 0.0)
            if LOSS == "gaussian_nll":
                tl.store(sums_ptr + 1 + 5 * C + c, 0.0)


@triton.jit
def pair_loss_backward_kernel(
    of_a_ptr,
    of_b_ptr,
    of_weight_ptr,
    slopes_ptr,
    a_ptr,
    b_ptr,
    weight_ptr,
    N,
    H,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """One program: UNITS hidden units and a segment of the references of one sample, against all targets; grid (H / UNITS, segments, B).

    Shapes: of_a (B, N, H); of_b (B, segments, N, H) and of_weight (B, segments, K, H), to be summed; slopes (B, K, N, N);
            a and b (B, N, H); weight (K, H). Only this program touches its part of of_b, so it may add to it in memory.
    """
    sample, segment = tl.program_id(2).to(tl.int64), tl.program_id(1)
    part = sample * tl.num_programs(1) + segment
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    there = unit < H
    weights = load_each(weight_ptr, H, unit, there, K)
    of_weight = zeros_each(K, UNITS)
    blocks = tl.cdiv(tl.cdiv(N, ROWS), tl.num_programs(1))
    for block in range(blocks):
        row = (segment * blocks + block) * ROWS + tl.arange(0, ROWS)
        inside = row < N
        mask = inside[:, None] & there[None, :]
        at = (sample * N + row)[:, None] * H + unit[None, :]
        a = tl.load(a_ptr + at, mask=mask, other=0.0)
        of_a = tl.zeros((ROWS, UNITS), tl.float32)
        tl.debug_barrier()  # what other threads added to of_b for the block before is there
        for t in range(N):
            slopes = load_each(slopes_ptr + sample * K * N * N + t, wide(N) * N, wide(N) * row, inside, K)
            x = a + tl.load(b_ptr + (sample * N + t) * H + unit, mask=there, other=0.0)[None, :]
            active, steep = activate(x, ACTIVATION)
            gradient = tl.zeros((ROWS, UNITS), tl.float32)
            added = ()
            for c in tl.static_range(K):
                gradient += slopes[c][:, None] * weights[c][None, :]
                added += (of_weight[c] + tl.sum(slopes[c][:, None] * active, 0),)
            of_weight = added
            gradient *= steep
            of_a += gradient
            at_b = of_b_ptr + (part * N + t) * H + unit
            before = tl.load(at_b, mask=there & (block > 0), other=0.0)
            tl.store(at_b, before + tl.sum(gradient, 0), mask=there)
        tl.store(of_a_ptr + at, of_a, mask=mask)
    for c in tl.static_range(K):
        tl.store(of_weight_ptr + (part * K + c) * H + unit, of_weight[c], mask=there)


@triton.jit
def pair_list_backward_kernel(
    of_own_ptr,
    of_weight_ptr,
    slopes_ptr,
    own_ptr,
    other_ptr,
    weight_ptr,
    starts_ptr,
    order_ptr,
    partner_ptr,
    N,
    P,
    H,
    K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    UNITS: tl.constexpr,
):
    """One program: UNITS hidden units and a segment of the members of one sample, each with its pairs of the list; grid as above.

    Shapes: of_own (B, N, H); of_weight (B, segments, K, H), to be summed; slopes (B, K, P); own and other (B, N, H); pairs sorted
            by own: own n has places starts[n] to starts[n + 1], where order (P,) names the pair, partner (P,) its other member.
    """
    sample, segment = tl.program_id(2).to(tl.int64), tl.program_id(1)
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    there = unit < H
    weights = load_each(weight_ptr, H, unit, there, K)
    of_weight = zeros_each(K, UNITS)
    length = tl.cdiv(N, tl.num_programs(1))
    for n in range(segment * length, tl.minimum((segment + 1) * length, N)):
        at = (sample * N + n) * H + unit
        own = tl.load(own_ptr + at, mask=there, other=0.0)
        of_own = tl.zeros((UNITS,), tl.float32)
        for place in range(tl.load(starts_ptr + n), tl.load(starts_ptr + n + 1)):
            slope_at = slopes_ptr + sample * K * P + tl.load(order_ptr + place)
            partner = tl.load(partner_ptr + place)
            active, steep = activate(own + tl.load(other_ptr + (sample * N + partner) * H + unit, mask=there, other=0.0), ACTIVATION)
            gradient = tl.zeros((UNITS,), tl.float32)
            added = ()
            for c in tl.static_range(K):
                slope = tl.load(slope_at + wide(c) * P)
                gradient += slope * weights[c]
                added += (of_weight[c] + slope * active,)
            of_weight = added
            of_own += gradient * steep
        tl.store(of_own_ptr + at, of_own, mask=there)
    if OF_WEIGHT:
        part = sample * tl.num_programs(1) + segment
        for c in tl.static_range(K):
            tl.store(of_weight_ptr + (part * K + c) * H + unit, of_weight[c], mask=there)


def pair_loss_triton(problem: PairLossProblem) -> PairLossSums:
    """Launch for a checked problem, at most SAMPLES_AT_ONCE of its samples at a time."""
    batch, boxes, _ = problem.a.shape
    outputs = len(problem.weight)
    pairs = boxes**2 if problem.chosen is None else len(problem.chosen)
    sums = PairLossSums.zeros(problem, unwritten=pairs > 0)
    at_once = max(1, min(SAMPLES_AT_ONCE, SLOPES_AT_ONCE // max(1, outputs * pairs), batch))
    slopes = problem.weight.new_empty(at_once, outputs, pairs if problem.grads else 0)
    lists = _sorted_lists(problem) if problem.grads and problem.chosen is not None else ()
    for start in range(0, batch if pairs else 0, at_once):
        part = slice(start, min(start + at_once, batch))
        a, b = problem.inputs(part)
        _forward(problem, part, slopes, a, b, sums)
        if problem.grads:
            a, b = a.contiguous(), b.contiguous()
            _list_backward(problem, part, slopes, a, b, lists, sums) if lists else _backward(problem, part, slopes, a, b, sums)
    return sums


def _forward(problem: PairLossProblem, part: slice, slopes: Tensor, a: Tensor, b: Tensor, sums: PairLossSums) -> None:
    """Fill slopes (b, K, P) from a and b (b, N, H) of some samples, and add up everything that has no hidden axis."""
    a, b = _fours(a), _fours(b)
    weight = _padded(problem.weight).contiguous()
    samples, _, boxes, _ = a.shape
    channels, outputs = problem.channels, len(problem.weight)
    pairs = boxes**2 if problem.chosen is None else len(problem.chosen)
    block = min(PAIRS, max(64, triton.next_power_of_2(pairs)))
    programs = triton.cdiv(pairs, block)
    parts = a.new_empty(samples, programs, 1 + 4 * channels + outputs)

    def one_each(value: Tensor | None, otherwise: float) -> Tensor:  # (C,)
        return a.new_full((channels,), otherwise) if value is None else value.to(a).contiguous()

    picture = a.new_ones(samples, 2) if problem.picture_hw is None else problem.picture_hw[part].to(a).contiguous()
    facts = _facts(problem, part)
    pair_loss_forward_kernel[(programs, samples)](
        slopes,
        parts,
        a,
        b,
        weight,
        problem.output_bias.contiguous(),
        problem.boxes[part].contiguous(),
        facts,
        picture,
        one_each(problem.units.mean, 0.0),
        one_each(problem.units.std, 1.0),
        one_each(problem.channel_weights, 1.0),
        facts if problem.chosen is None else problem.chosen.contiguous(),
        boxes,
        pairs,
        weight.shape[1],
        problem.beta,
        WHICH=problem.pairs,
        POSITION=problem.units.position,
        SCALE=problem.units.scale,
        ACTIVATION=problem.activation,
        LOSS=problem.loss,
        GRADS=problem.grads,
        PAIRS=block,
        num_warps=max(1, block // 128),
        enable_fp_fusion=True,
    )
    parts = parts.double()
    count = parts[..., :1]
    loss, squared, target, deviation = parts[..., 1 : 1 + 4 * channels].split(channels, -1)
    sums.counted[part] = count.sum((1, 2)).long()
    sums.loss[part], sums.squared[part], sums.target[part] = loss.sum(1), squared.sum(1), target.sum(1)
    sums.target_squared[part] = (deviation + target.square() / count.clamp(min=1)).sum(1)
    if problem.grads:
        _add(sums.output_bias, parts[..., 1 + 4 * channels :].sum(1), part, problem.per_sample)


def _padded(value: Tensor) -> Tensor:
    """Add hidden units that are 0, and stay so through every activation: (..., H) -> (..., H up to a multiple of 16)."""
    return F.pad(value, (0, -value.shape[-1] % 16)) if value.shape[-1] % 16 else value  # pad would copy it


def _fours(value: Tensor) -> Tensor:
    """Return (B, N, H) as (B, H / 4, N, 4): a load takes four units, and neighboring boxes, which a warp has, lie side by side."""
    return _padded(value).unflatten(-1, (-1, 4)).transpose(1, 2).contiguous()


def _facts(problem: PairLossProblem, part: slice) -> Tensor:
    """Return turns + 4 * flipped + 8 * valid of each box, (B, N) int32; without turns and mirrors axes are those of the source."""
    facts = torch.full(problem.boxes[part].shape[:2], 8, dtype=torch.int32, device=problem.boxes.device)
    if problem.valid is not None:
        facts = facts * problem.valid[part]
    if problem.units.axes == "view" and problem.flipped is not None:
        facts = facts + 4 * (problem.flipped[part] != 0)
    if problem.units.axes == "view" and problem.quarter_turns is not None:
        facts = facts + problem.quarter_turns[part].to(torch.int32) % 4
    return facts


def _add(total: Tensor, each: Tensor, part: slice, per_sample: bool) -> None:
    """Add what each of some samples gives, (B, ...), to its own place of a total, or to the one that all share."""
    if per_sample:
        total[part] = each
    else:
        total += each.sum(0)


def _segments(samples: int, units: int, most: int) -> int:
    """Return into how many parts to cut a sample, so that the whole machine has work and no more memory is taken than that needs."""
    return max(1, min(most, triton.cdiv(BACKWARD_WARPS, samples * units)))


def rows_at_once(outputs: int) -> int:
    """Return how many references a warp of backward holds: as many as its registers do."""
    return 8 if outputs <= 4 else 4


def _backward(problem: PairLossProblem, part: slice, slopes: Tensor, a: Tensor, b: Tensor, sums: PairLossSums) -> None:
    """Compute the gradients of some samples of a and b (b, N, H) from their slopes (b, K, N * N), for all pairs."""
    samples, boxes, hidden = a.shape
    rows = rows_at_once(len(problem.weight))
    blocks = triton.cdiv(hidden, UNITS)
    segments = _segments(samples, blocks, triton.cdiv(boxes, rows))
    of_b = sums.b[part].unsqueeze(1) if segments == 1 else a.new_empty(samples, segments, boxes, hidden)
    of_weight = a.new_empty(samples, segments, *problem.weight.shape)
    pair_loss_backward_kernel[(blocks, segments, samples)](
        sums.a[part],
        of_b,
        of_weight,
        slopes,
        a,
        b,
        problem.weight.contiguous(),
        boxes,
        hidden,
        K=len(problem.weight),
        ACTIVATION=problem.activation,
        ROWS=rows,
        UNITS=UNITS,
        num_warps=1,
        enable_fp_fusion=True,
    )
    if segments > 1:
        torch.sum(of_b, 1, out=sums.b[part])
    _add(sums.weight, of_weight.sum(1), part, problem.per_sample)


SortedList = tuple[Tensor, Tensor, Tensor]  # starts (N + 1,), order (P,), partner (P,)


def _sorted_lists(problem: PairLossProblem) -> tuple[SortedList, ...]:
    """Return (starts, order, partner) of the chosen pairs by reference, then by target: as `pair_list_backward_kernel` reads them."""
    assert problem.chosen is not None
    boxes = problem.a.shape[1]
    chosen = problem.chosen.long().clamp(0, boxes - 1)
    lists = []
    for own, other in ((chosen[:, 0], chosen[:, 1]), (chosen[:, 1], chosen[:, 0])):
        sorted_own, order = torch.sort(own, stable=True)
        starts = torch.searchsorted(sorted_own, torch.arange(boxes + 1, device=own.device))
        lists.append((starts, order, other[order]))
    return tuple(lists)


def _list_backward(
    problem: PairLossProblem,
    part: slice,
    slopes: Tensor,
    a: Tensor,
    b: Tensor,
    lists: tuple[tuple[Tensor, Tensor, Tensor], ...],
    sums: PairLossSums,
) -> None:
    """Compute the gradients of some samples of a and b (b, N, H) from slopes (b, K, P), for a list: by reference, then by target."""
    samples, boxes, hidden = a.shape
    blocks = triton.cdiv(hidden, UNITS)
    segments = _segments(samples, blocks, boxes)
    of_weight = a.new_empty(samples, segments, *problem.weight.shape)
    for own, other, of_own, (starts, order, partner) in zip((a, b), (b, a), (sums.a, sums.b), lists, strict=True):
        pair_list_backward_kernel[(blocks, segments, samples)](
            of_own[part],
            of_weight,
            slopes,
            own,
            other,
            problem.weight.contiguous(),
            starts,
            order,
            partner,
            boxes,
            len(order),
            hidden,
            K=len(problem.weight),
            ACTIVATION=problem.activation,
            OF_WEIGHT=own is a,
            UNITS=UNITS,
            num_warps=1,
            enable_fp_fusion=True,
        )
    _add(sums.weight, of_weight.sum(1), part, problem.per_sample)


def launches() -> list[Launch]:
    """Return launches as they are really made: every activation both ways, 3, 4 and 8 outputs."""
    f32 = dict.fromkeys(("slopes_ptr", "sums_ptr", "a_ptr", "b_ptr", "weight_ptr", "output_bias_ptr", "boxes_ptr"), "*fp32")
    f32 |= dict.fromkeys(("picture_ptr", "mean_ptr", "std_ptr", "channel_weights_ptr"), "*fp32")
    forward = f32 | {"facts_ptr": "*i32", "chosen_ptr": "*i64", "N": "i32", "P": "i32", "H": "i32", "beta": "fp32"}
    backward = dict.fromkeys(("of_a_ptr", "of_b_ptr", "of_weight_ptr", "slopes_ptr", "a_ptr", "b_ptr", "weight_ptr"), "*fp32")
    backward |= {"N": "i32", "H": "i32"}
    by_list = dict.fromkeys(("of_own_ptr", "of_weight_ptr", "slopes_ptr", "own_ptr", "other_ptr", "weight_ptr"), "*fp32")
    by_list |= dict.fromkeys(("starts_ptr", "order_ptr", "partner_ptr"), "*i64") | {"N": "i32", "P": "i32", "H": "i32"}
    entries: list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = []
    for activation, loss, which, scale, outputs in (
        ("gelu", "squared", "all", "log_area", 3),
        ("gelu_tanh", "huber", "disjoint", "log_area", 3),
        ("relu", "smooth_l1", "list", "log_sides", 4),
        ("gelu", "gaussian_nll", "others", "ratio", 8),
    ):
        rows, chosen = rows_at_once(outputs), {"ACTIVATION": activation}
        options = {"WHICH": which, "POSITION": "reference", "SCALE": scale, "LOSS": loss, "GRADS": True, "PAIRS": PAIRS}
        backward_options = {"K": outputs, "ROWS": rows, "UNITS": UNITS}
        list_options = {"K": outputs, "OF_WEIGHT": True, "UNITS": UNITS}
        entries += [
            ("forward", pair_loss_forward_kernel, forward, options | chosen, PAIRS // 128, PAIRS * 4),
            ("backward", pair_loss_backward_kernel, backward, backward_options | chosen, 1, rows * UNITS),
            ("list backward", pair_list_backward_kernel, by_list, list_options | chosen, 1, UNITS),
        ]
    return [
        Launch(
            name=f"pair_loss {direction}, {constants['ACTIVATION']}, {constants.get('LOSS') or constants['K']}",
            kernel=kernel,
            types=types,
            constants=constants,
            aligned=(*(name for name in types if name.endswith("_ptr")), "H"),
            warps=warps,
            per_step=per_step,
            options={"enable_fp_fusion": True},
        )
        for direction, kernel, types, constants, warps, per_step in entries
    ]
