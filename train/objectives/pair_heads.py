"""Heads that predict something of every pair of a picture's views.

Here: modules from `Features` and pairs to C channels a pair, all pairs in a few products.
Not here: what the channels mean (spatial.py), heads that serve as controls (wherefrom.train.evaluation.pair_controls).
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.kernels.pair_loss import PairLoss, pair_loss
from wherefrom.train.encoder import Features, sincos_positions
from wherefrom.train.objectives.heads import full_precision

Query = Literal["patches", "positions"]


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
        if of_reference.dtype == torch.float64:  # in which it alone computes
            options["backend"] = "reference"
        return pair_loss(of_reference, self.of_target(summary), boxes, weight=self.out.weight, output_bias=self.out.bias, **options)


class LinearHead(nn.Module):
    """A linear map of [z_r; z_t]: the sum of two, each computed once a view."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.of_reference = nn.Linear(width, channels)
        self.of_target = nn.Linear(width, channels, bias=False)

    def forward(self, features: Features, pairs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Predict every pair, (P, 2) of (reference, target) -> (B, P, C), and no meters."""
        summary = features.summary
        return self.of_reference(summary)[:, pairs[:, 0]] + self.of_target(summary)[:, pairs[:, 1]], {}


class CrossAttentionHead(nn.Module):
    """A query for every pair reads all patches of the picture, by one head; a linear map of what it reads is the prediction.

    The query is a linear map of [z_r; z_t], or, with query="positions", fixed sines and cosines of the numbers r and t, which tell
    nothing of a picture. Logits in float32, over sqrt(width); `projections` are linear maps of query, keys, values and result.
    Source: PART, arXiv 2506.03682: without projections as the paper writes it, with them as in its code.
    """

    def __init__(self, width: int, channels: int, *, query: Query, patches: int, projections: bool) -> None:
        super().__init__()
        self.patches = patches
        self.of_reference = self.of_target = None
        if query == "patches":
            self.of_reference, self.of_target = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        else:
            self.register_buffer("of_numbers", sincos_positions(patches, patches, width).flatten(0, 1), persistent=False)
        self.query, self.key, self.value, self.read = (nn.Linear(width, width) if projections else nn.Identity() for _ in range(4))
        self.out = nn.Linear(width, channels)

    def forward(self, features: Features, pairs: Tensor, keys: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Predict every pair, and say how the attention went.

        Shapes: features of N patches, pairs (P, 2) of (reference, target), keys (B, n) int64, the patches that are read, by default
                all -> (B, P, C).
        """
        patches = features.summary
        query = self._queries(patches, pairs)
        read = patches if keys is None else patches.gather(1, keys.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
        query, key, value = self.query(query), self.key(read), self.value(read)
        with torch.autocast(query.device.type, enabled=False):
            query, key, value = (full_precision(each) for each in (query, key, value))
            logits = query @ key.mT / math.sqrt(query.shape[-1])  # (B, P, n)
            attention = logits.softmax(-1)
            looked_up = attention @ value
        with torch.no_grad():
            uniform = math.log(max(2, read.shape[1]))
            meters = {"logit_max": logits.abs().max(), "attention_entropy": torch.special.entr(attention).sum(-1).mean() / uniform}
        return self.out(self.read(looked_up)), meters

    def _queries(self, patches: Tensor, pairs: Tensor) -> Tensor:
        """Return the query of every pair, (B, P, D), or (1, P, D) where it is the same in all pictures."""
        reference, target = pairs.unbind(-1)
        if self.of_reference is not None and self.of_target is not None:
            return self.of_reference(patches)[:, reference] + self.of_target(patches)[:, target]
        assert isinstance(self.of_numbers, Tensor)
        return self.of_numbers[reference % self.patches * self.patches + target % self.patches].to(patches.dtype).unsqueeze(0)
