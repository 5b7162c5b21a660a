"""Projection heads: small networks between an encoder's summary and a loss, with BatchNorm over ranks and without.

Here: the one form of them that methods share; meters that see what they and their encoder learn collapse.
Not here: heads that predict something of pairs (pair_heads.py); losses, which belong to their methods.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
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


def spread(features: Tensor, name: str) -> dict[str, Tensor]:
    """Return meters that see features collapse, of the unit vectors in (n, D) features: "NAME_std" and "NAME_rank".

    std:  of a channel, times sqrt(D): 1 where they point everywhere, 0 where all are alike.
    rank: (sum of e)^2 / sum of e^2 of the covariance's eigenvalues e: how many directions they fill; without an eigendecomposition.
    Source: std as SimSiam has it, arXiv 2011.10566; rank: participation ratio, which falls as RankMe does, arXiv 2210.02885.
    """
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        unit = F.normalize(full_precision(features), dim=-1)
        centered = unit - unit.mean(0)
        samples, channels = centered.shape
        std = (centered.square().mean() * channels).sqrt()
        gram = centered @ centered.mT if samples < channels else centered.mT @ centered
        rank = gram.trace().square() / gram.square().sum().clamp(min=torch.finfo(gram.dtype).tiny)
    return {f"{name}_std": std, f"{name}_rank": rank}


def full_precision(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or as it is where it has more digits: what losses are computed in, whatever came before."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def refuse_one(batch: Batch, objective: str, why: str) -> None:
    """Raise ValueError if all ranks together have a single sample at a time."""
    if len(batch.sample) * rank_count() < 2:
        raise ValueError(f"objective {objective!r} with a single picture at a time: {why}; raise global_batch, or lower accumulation")
