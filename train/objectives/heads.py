"""Projection heads: small networks between an encoder's summary and a loss, with BatchNorm over ranks and without.

Here: the one form of them that methods share.
Not here: heads that predict something of pairs (pair_heads.py); losses, which belong to their methods.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from wherefrom.pipeline.views import Batch
from wherefrom.train.over_ranks import BatchNormOverRanks, rank_count

Closing = Literal["none", "norm", "scale", "plain"]


def mlp(
    widths: Sequence[int],
    *,
    norm: bool = True,
    hidden_bias: bool = False,
    out_bias: bool = False,
    closing: Closing = "none",
    activation: type[nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Return linear layers of `widths`, input first, with BatchNorm, unless `norm` is false, and `activation` after all but the last.

    closing: BatchNorm after the last layer: none; "norm", with scale and shift; "scale", without shift; "plain", with neither.
    Shapes: (n, widths[0]) -> (n, widths[-1]). Weights start as torch's do.
    Raises: ValueError if there are less than two widths.
    """
    if len(widths) < 2:
        raise ValueError(f"widths={tuple(widths)}: needs at least an input and an output")
    layers: list[nn.Module] = []
    *hidden, last = itertools.pairwise(widths)
    for inputs, outputs in hidden:
        layers.append(nn.Linear(inputs, outputs, bias=hidden_bias))
        layers += [BatchNormOverRanks(outputs)] if norm else []
        layers.append(activation())
    layers.append(nn.Linear(*last, bias=out_bias))
    if closing != "none":
        layers.append(BatchNormOverRanks(widths[-1], affine=closing != "plain"))
    if closing == "scale":
        layers[-1].register_parameter("bias", None)
    return nn.Sequential(*layers)


def full_precision(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is where it has more digits: what losses are computed in, whatever came before."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def refuse_one(batch: Batch, objective: str, why: str) -> None:
    """Raise ValueError if all ranks together have a single sample at a time."""
    if len(batch.sample) * rank_count() < 2:
        raise ValueError(f"objective {objective!r} with a single picture at a time: {why}; raise global_batch, or lower accumulation")
