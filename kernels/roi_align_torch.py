"""The fast path of roi_align on CPUs, and wherever Triton does not serve: per-axis weight tables and sparse sums.

Here: the tables, pooling and scattering by them, in plain PyTorch operations.
Not here: checks, choice of path and derivatives (roi_align.py), the definition (roi_align_reference.py).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.kernels.dispatch import in_one_thread

ADAPTIVE, AREA = 0, -1  # "adaptive" and "area" among numbers of samples

READERS = 4  # samples of a bin that may read one token: in adaptive mode they lie at least 1/2 apart, 2/3 if they are three or more
CHUNK = 2**19  # numbers that the torch path keeps between its two sums: more would leave the cache
FEATURES = 16  # those taken at once come in multiples of these: whole vectors, whose sums do not depend on how they are cut
SMALL = 2**18  # numbers of all products of a problem that are written out, 0 and all, rather than summed sparsely
DIRECT_WIDTH = 128  # features from which on listing every (output, token) pays
DIRECT_SPAN = 4  # tokens an axis that a bin may read for both axes to be summed at once; more are summed one axis after the other


def table_bins(out_hw: Sequence[int], quarter_turns: Tensor | None) -> tuple[int, int]:
    """Return how many bins the tables of rows and columns hold: of out_hw either way round where boxes have turns, (B, R)."""
    return (out_hw[0], out_hw[1]) if quarter_turns is None else (max(out_hw), max(out_hw))


def weights_torch(
    boxes: Tensor,
    quarter_turns: Tensor | None,
    flipped: Tensor | None,
    valid: Tensor | None,
    map_hw: Sequence[int],
    frame_hw: Sequence[float],
    out_hw: Sequence[int],
    samples: int,
) -> tuple[Tensor, Tensor]:
    """Compute what `roi_weights` returns, shapes as there, without waiting for a GPU; both axes at once, the shorter one padded."""
    (B, R), bins, size = boxes.shape[:2], table_bins(out_hw, quarter_turns), max(map_hw)
    sizes, counts = (boxes.new_tensor(hw).view(2, 1, 1, 1) for hw in (map_hw, out_hw))  # leading axis: rows, columns
    scale = boxes.new_tensor([side / frame for side, frame in zip(map_hw, frame_hw, strict=True)]).view(2, 1, 1, 1)
    low, high = boxes.view(B, R, 2, 2).permute(2, 3, 0, 1).flip(1).unsqueeze(-1) * scale - 0.5  # (2, B, R, 1) each
    bin = torch.arange(max(bins), device=boxes.device)
    backwards = None if flipped is None else torch.stack([torch.zeros_like(flipped), flipped])
    if quarter_turns is not None:
        turns = quarter_turns.unsqueeze(-1) % 4
        counts = torch.where(turns % 2 == 1, counts.flip(0), counts)
        turned = torch.stack([turns >= 2, (turns == 1) | (turns == 2)]).squeeze(-1)
        backwards = turned if backwards is None else turned ^ backwards
    if backwards is not None:
        bin = torch.where(backwards.unsqueeze(-1), counts - 1 - bin, bin)
    tables = _axis_weights(low, high, bin, counts, sizes, size, samples)
    if quarter_turns is not None:
        tables = tables * ((bin >= 0) & (bin < counts)).unsqueeze(-1)
    if valid is not None:
        tables = tables * valid.view(B, R, 1, 1)
    rows, columns = (tables[axis, :, :, : bins[axis], : map_hw[axis]] for axis in (0, 1))
    return rows.clone(memory_format=torch.contiguous_format), columns.clone(memory_format=torch.contiguous_format)


def _axis_weights(low: Tensor, high: Tensor, bin: Tensor, bins: Tensor, sizes: Tensor, size: int, samples: int) -> Tensor:
    """Return the weights (2, B, R, n, size) of tokens in bins `bin` of `bins` from low to high (2, B, R, 1), of sizes (2, 1, 1, 1) tokens.

    The order of operations is torchvision's: other rounding would change the number of samples.
    """
    width = (high - low) / bins
    start = (low + bin * width).unsqueeze(-1)  # (2, B, R, n, 1)
    token = torch.arange(size, device=low.device, dtype=torch.float32)
    sizes, width = sizes.unsqueeze(-1), width.unsqueeze(-1)
    if samples == AREA:
        start, end = (edge.clamp(min=-0.5).minimum(sizes - 0.5) for edge in (start, (low + (bin + 1) * width.squeeze(-1)).unsqueeze(-1)))
        overlap = (torch.minimum(end, token + 0.5) - torch.maximum(start, token - 0.5)).clamp_(min=0)
        return torch.where(end > start, overlap / (end - start), 0)

    count, readers = low.new_tensor(samples), samples
    if samples == ADAPTIVE:
        # a box that is inverted, infinite or NaN holds no sample
        count = torch.where((width > 0) & (width < 2**31), width.ceil(), 0)
        readers = min(READERS, int(count.max()) if count.numel() else 0) if low.device.type == "cpu" else READERS
    number = torch.arange(readers, device=low.device)
    if samples == ADAPTIVE and readers == READERS:
        # from the first sample that may read a token on: those between are too many to list in a huge box
        first = ((token - 1 - start) * (count / width) - 0.5).floor().clamp(min=0).minimum((count - readers).clamp(min=0))
        number = first.unsqueeze(-1) + number  # (2, B, R, n, size, readers)
    start, width, count, sizes = (value.unsqueeze(-1) for value in (start, width, count, sizes))
    position = start + (number + 0.5) * width / count
    inside = (position >= -1) & (position <= sizes) & (number < count)
    # the outermost tokens reach a whole token further out; what is not inside is moved where no token reaches
    position = torch.where(inside, position.clamp(min=0).minimum(sizes - 1), -2)
    reach = (1 - (position - token.unsqueeze(-1)).abs()).clamp_(min=0)
    return reach.sum(-1) / count.squeeze(-1).clamp(min=1)


def contract_torch(
    source: Tensor,
    rows: Tensor,
    columns: Tensor,
    quarter_turns: Tensor | None,
    map_hw: Sequence[int],
    out_hw: Sequence[int],
    transposed: bool,
) -> Tensor:
    """Compute what `roi_contract` returns, shapes as there, in float32, rounded at the end; on a GPU this waits for it."""
    odd = None  # where a turn swaps the axes
    if quarter_turns is not None and bool((quarter_turns % 2 == 1).any()):
        odd = (quarter_turns % 2 == 1)[..., None, None, None]
    product = _scatter_turned if transposed else _pool_turned
    lines = math.prod(map_hw) * len(rows) if transposed else math.prod(out_hw) * rows[..., 0, 0].numel()
    with in_one_thread(source, source.numel() + lines * source.shape[-1]):
        # detached: embedding_bag notes what its gradient would need, though none is taken here
        return product(source.detach().float(), rows, columns, odd, out_hw).to(source.dtype)


def _pool_turned(tokens: Tensor, rows: Tensor, columns: Tensor, odd: Tensor | None, out_hw: Sequence[int]) -> Tensor:
    """Pool float32 tokens (B, H, W, D) -> (B, R, *out_hw, D)."""
    h, w = out_hw
    pooled = _pool(tokens, rows[:, :, :h], columns[:, :, :w])
    if odd is None:
        return pooled
    swapped = pooled if h == w else _pool(tokens, rows[:, :, :w], columns[:, :, :h])
    return torch.where(~odd, pooled, swapped.transpose(2, 3))  # in this order contiguous


def _scatter_turned(gradient: Tensor, rows: Tensor, columns: Tensor, odd: Tensor | None, out_hw: Sequence[int]) -> Tensor:
    """Apply the transpose of `_pool_turned` to float32 (B, R, *out_hw, D) -> (B, H, W, D)."""
    h, w = out_hw
    if odd is None or h == w:
        upright = gradient if odd is None else torch.where(odd, gradient.transpose(2, 3), gradient)
        return _scatter(upright, rows[:, :, :h], columns[:, :, :w])
    swapped = gradient.masked_fill(~odd, 0).transpose(2, 3)
    upright = gradient.masked_fill(odd, 0)
    return _scatter(upright, rows[:, :, :h], columns[:, :, :w]) + _scatter(swapped, rows[:, :, :w], columns[:, :, :h])


def _pool(tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Sum tokens (B, H, W, D) by rows (B, R, n, H) and columns (B, R, m, W) -> (B, R, n, m, D)."""
    return _dense_or_sparse(_pool_dense, _pool_sparse, tokens, rows, columns)


def _scatter(gradient: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply the transpose of `_pool` to (B, R, n, m, D) -> (B, H, W, D)."""
    return _dense_or_sparse(_scatter_dense, _scatter_sparse, gradient, rows, columns)


Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def _dense_or_sparse(dense: Product, sparse: Product, source: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Write out all products of a small problem; but what reads something that is not finite is summed sparsely.

    Shapes: as `_pool`, or `_scatter`, whose two ways are `dense` and `sparse`.
    """
    (B, R, n, H), (m, W) = rows.shape, columns.shape[2:]
    if source.device.type != "cpu" or not 0 < B * R * n * W * source.shape[-1] * max(H, m) <= SMALL:
        return sparse(source, rows, columns)
    if source.sum().isfinite():
        return dense(source, rows, columns)
    exact = sparse(source, rows, columns)  # 0 * NaN would be NaN everywhere
    return torch.where(exact.isfinite(), dense(source.where(source.isfinite(), 0), rows, columns), exact)


def _pool_dense(tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    between = (rows[..., None, None] * tokens[:, None, None]).sum(3)  # (B, R, n, H, W, D) by H
    return (columns[:, :, None, :, :, None] * between[:, :, :, None]).sum(4)  # (B, R, n, m, W, D) by W


def _scatter_dense(gradient: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    between = (columns[:, :, None, :, :, None] * gradient[..., None, :]).sum(3)  # (B, R, n, m, W, D) by m
    return (rows[..., None, None] * between[:, :, :, None]).sum((1, 2))  # (B, R, n, H, W, D) by R and n


def _pool_sparse(tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pool by the weights that are not 0; shapes as `_pool`."""
    (B, H, W, D), (R, n), m = tokens.shape, rows.shape[1:3], columns.shape[2]
    terms = _terms(rows, columns) if D >= DIRECT_WIDTH else None
    if terms is not None:
        output, token, weight = terms
        return _sums(token, tokens.reshape(-1, D), weight, output, B * R * n * m).view(B, R, n, m, D)
    pooled = tokens.new_empty(B, R, n, m, D)  # by rows, then by columns, of a few pictures and features at a time
    for few, b in _few_pictures(B, R * n * W * D):
        down, across = _sparse_sums(rows[few].reshape(b, R * n, H), 1), _sparse_sums(columns[few].reshape(b * R, m, W), n)
        for part, d in _few_features(D, b * R * n * W):
            between = down.sums(tokens[few, :, :, part].reshape(b * H, W * d))
            pooled[few, ..., part] = across.sums(between.view(b * R * n * W, d)).view(b, R, n, m, d)
    return pooled


def _scatter_sparse(gradient: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Scatter by the weights that are not 0; shapes as `_scatter`."""
    (B, R, n, H), (m, W), D = rows.shape, columns.shape[2:], gradient.shape[-1]
    terms = _terms(rows, columns) if D >= DIRECT_WIDTH else None
    if terms is not None:
        output, token, weight = terms
        token, order = token.sort(stable=True)
        return _sums(output[order], gradient.reshape(-1, D), weight[order], token, B * H * W).view(B, H, W, D)
    tokens = gradient.new_empty(B, H, W, D)
    for few, b in _few_pictures(B, R * n * W * D):
        down, across = _sparse_sums(columns[few].reshape(b * R, m, W).mT, n), _sparse_sums(rows[few].reshape(b, R * n, H).mT, 1)
        for part, d in _few_features(D, b * R * n * W):
            between = down.sums(gradient[few, ..., part].reshape(b * R * n * m, d))
            tokens[few, ..., part] = across.sums(between.view(b * R * n, W * d)).view(b, H, W, d)
    return tokens


def _terms(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return every (output, token, weight) of rows (B, R, n, H) by columns (B, R, m, W), in the outputs' order.

    None where bins read so many tokens that two sums, one an axis, are less work.
    """
    B, H, W = len(rows), rows.shape[-1], columns.shape[-1]
    spans = []  # of each axis: the first token of a bin, and the weights from there on
    for table in (rows, columns):
        used = table != 0
        length = used.shape[-1]
        place = torch.arange(length, device=table.device)
        first = torch.where(used, place, length).amin(-1).clamp(max=length - 1)
        longest = int((torch.where(used, place, -1).amax(-1) - first).amax()) + 1 if used.numel() else 0
        if longest > DIRECT_SPAN:
            return None
        at = first.unsqueeze(-1) + place[: max(longest, 1)]
        spans.append((at, table.gather(-1, at.clamp(max=length - 1)) * (at < length)))
    (y, down), (x, across) = spans
    weight = (down[:, :, :, None, :, None] * across[:, :, None, :, None, :]).flatten()
    picture = torch.arange(B, device=rows.device).view(B, 1, 1, 1, 1, 1) * (H * W)
    token = (picture + y[:, :, :, None, :, None] * W + x[:, :, None, :, None, :]).flatten()
    nonzero = weight.nonzero().squeeze(-1)
    return nonzero // (down.shape[-1] * across.shape[-1]), token[nonzero], weight[nonzero]


def _sums(term: Tensor, source: Tensor, weight: Tensor, line: Tensor, lines: int) -> Tensor:
    """Sum weight (T,) times row term (T,) of source (S, C) into each line (T,), ascending, of `lines` -> (lines, C)."""
    return _SparseSums(term, weight, torch.searchsorted(line, torch.arange(lines + 1, device=line.device))).sums(source)


class _SparseSums(NamedTuple):
    """What has a weight, in order: a bin reads few tokens, 0 * NaN would be NaN, and no number of threads changes a bit."""

    term: Tensor  # (T,) rows of a source
    weight: Tensor  # (T,)
    ends: Tensor  # (lines + 1,) where each line's terms begin, the first 0

    def sums(self, source: Tensor) -> Tensor:
        """Sum the rows of source (S, C) into lines -> (lines, C)."""
        return F.embedding_bag(self.term, source, self.ends, mode="sum", per_sample_weights=self.weight, include_last_offset=True)


def _sparse_sums(weights: Tensor, copies: int) -> _SparseSums:
    """List products of weights (G, n, m) with each of k copies of matrices: rows of a source (G k m, C), lines (G k n, C)."""
    (G, n, m), k = weights.shape, copies
    used = weights != 0
    group, copy, line, term = used[:, None].expand(G, k, n, m).nonzero(as_tuple=True)
    ends = used.sum(-1)[:, None].expand(G, k, n).reshape(-1).cumsum(0)
    return _SparseSums((group * k + copy) * m + term, weights[group, line, term], F.pad(ends, (1, 0)))


def _few_pictures(pictures: int, numbers_each: int) -> list[tuple[slice, int]]:
    """Return slices of pictures, and their lengths, of which at most CHUNK numbers lie between the two sums, or one picture."""
    few = max(1, CHUNK // max(1, numbers_each))
    return [(slice(first, first + few), min(few, pictures - first)) for first in range(0, pictures, few)]


def _few_features(features: int, numbers_each: int) -> list[tuple[slice, int]]:
    """Return slices of the features, and their lengths, of which at most CHUNK numbers lie between the two sums, or FEATURES of them."""
    few = max(1, CHUNK // max(1, numbers_each * FEATURES)) * FEATURES
    return [(slice(first, first + few), min(few, features - first)) for first in range(0, features, few)]
