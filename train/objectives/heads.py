"""Projection heads: small networks between an encoder's summary and a loss, with BatchNorm over ranks and without.

Here: the one form of them that methods share.
Not here: heads that predict something of pairs (pair_heads.py); losses, which belong to their methods.
"""

import itertools
from collections.abc import Sequence
from typing import Literal

from torch import nn

from wherefrom.train.over_ranks import BatchNormOverRanks

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
