"""Heads that predict something of every pair of a picture's views.

Here: modules from `Features` and pairs to C channels a pair, all pairs in a few products.
Not here: what the channels mean (spatial.py), heads that serve as controls (wherefrom.train.evaluation.pair_controls).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.kernels.pair_loss import PairLoss, pair_loss
from wherefrom.train.encoder import Features
from wherefrom.train.objectives.heads import full_precision


class AttendHead(nn.Module):
    """The reference's summary looks at the tokens of both views; what it reads in each goes through a two-layer MLP.

    h_v = softmax(z_r Z_v' / t) Z_v for v = r and t, with logits in float32; output = MLP([h_r; h_t]).
    """

    def __init__(self, width: int, hidden: int, channels: int, *, temperature: float | None, projections: bool) -> None:
        super().__init__()
        self.temperature = math.sqrt(width) if temperature is None else temperature
        self.query, self.key, self.value = (nn.Linear(width, width) if projections else nn.Identity() for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(2 * width, hidden), nn.GELU(), nn.Linear(hidden, channels))

    def forward(self, features: Features, pairs: Tensor, *, stop_reference: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Predict every pair, and say how the attention went.

        Shapes: features of V views, pairs (P, 2) of (reference, target) -> (B, P, C); all P in one product, whatever P is.
        """
        tokens = features.tokens.flatten(2, -2)  # (B, V, N, D)
        query = self.query(features.summary.detach() if stop_reference else features.summary)
        key, value = self.key(tokens), self.value(tokens)
        with torch.autocast(query.device.type, enabled=False):
            query, key, value = (full_precision(each) for each in (query, key, value))
            logits = query.unsqueeze(1) @ key.mT / self.temperature  # (B, V looked at, V that look, N)
            attention = logits.softmax(-1)
            looked_up = attention @ value
        reference, target = pairs.unbind(-1)
        own = looked_up[:, reference, reference]
        output = self.mlp(torch.cat([own.detach() if stop_reference else own, looked_up[:, target, reference]], -1))
        with torch.no_grad():
            uniform = math.log(max(2, tokens.shape[2]))
            meters = {"logit_max": logits.abs().max(), "attention_entropy": torch.special.entr(attention).sum(-1).mean() / uniform}
        return output, meters


class AdditiveHead(nn.Module):
    """act(a_r + b_t + bias) W + c over all pairs, with a and b linear in the summaries.

    This is the two-layer MLP on [z_r; z_t]: a linear map of a concatenation is the sum of two, each computed once a view, not once a pair.
    """

    def __init__(self, width: int, hidden: int, channels: int) -> None:
        super().__init__()
        self.of_reference = nn.Linear(width, hidden)
        self.of_target = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, channels)

    def forward(self, features: Features, pairs: Tensor, *, stop_reference: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Predict every pair; shapes as `AttendHead`, and no meters."""
        summary = features.summary
        of_reference = self.of_reference(summary.detach() if stop_reference else summary)
        hidden = of_reference[:, pairs[:, 0]] + self.of_target(summary)[:, pairs[:, 1]]
        return self.out(F.gelu(hidden)), {}

    def loss(self, features: Features, boxes: Tensor, *, stop_reference: bool = False, **options: Any) -> PairLoss:
        """Return the loss of what `forward` predicts, without storing the pairs; boxes (B, V, 4) and options as `pair_loss` takes them."""
        summary = features.summary
        of_reference = self.of_reference(summary.detach() if stop_reference else summary)
        return pair_loss(of_reference, self.of_target(summary), boxes, weight=self.out.weight, output_bias=self.out.bias, **options)
