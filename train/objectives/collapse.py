"""Whether features still tell pictures apart: numbers to look at beside any loss, for a loss alone does not show it.

Here: how far features are spread. Not here: who rings the alarm (loop.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.train.over_ranks import gathered

FEATURE_STD = "feature_std"
COLLAPSED_STD = 0.01  # of the meter: all features within a hundredth of their common direction; random encoders lie above


@torch.no_grad()
def spread(features: Tensor) -> dict[str, Tensor]:
    """Return how features of length 1 are spread, as meters: (..., D), n in all ranks; means over micro-batches are not those of the whole.

    feature_std: 1 where they lie evenly around the sphere, 0 where they are all alike.
    feature_rank: in how many directions they differ, (sum of eigenvalues)^2 / sum of their squares, of the covariance: 1 to min(n - 1, D),
    0 where they are equal.
    """
    each = F.normalize(gathered(features.detach().flatten(0, -2).float()), dim=-1)  # (n, D)
    centered = each - each.mean(0)
    variance = centered.square().sum(1).mean()
    gram = centered.mT @ centered if each.shape[1] < len(each) else centered @ centered.mT
    rank = gram.diagonal().sum().square() / gram.square().sum().clamp(min=1e-24)
    return {FEATURE_STD: variance.sqrt(), "feature_rank": rank}
