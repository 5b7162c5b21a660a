"""Prototypes: a linear layer whose rows are directions.

Here: the layer.
Not here: what stands before it, and what its output is compared with (dino.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """Logits of features by weight-normalized prototypes, without bias: (..., width) -> (..., count).

    Row k of the weight is `weight_g[k] * weight_v[k] / |weight_v[k]|`; of fixed norms there is no `weight_g`, and they are 1.
    Source: weight normalization, arXiv 1602.07868; the last layer of DINO's head, arXiv 2104.14294.
    """

    def __init__(self, width: int, count: int, *, free_norms: bool = False) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(count, width).uniform_(-(width**-0.5), width**-0.5))  # as nn.Linear starts
        self.weight_g = nn.Parameter(torch.ones(count, 1)) if free_norms else None

    def forward(self, features: Tensor) -> Tensor:
        weight = F.normalize(self.weight_v, dim=1)
        return F.linear(features, weight if self.weight_g is None else self.weight_g * weight)
