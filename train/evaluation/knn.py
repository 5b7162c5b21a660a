"""k nearest neighbors by cosine: how often those most like a held-out picture show its class.

Here: the protocol, and the search, exact and in bounded memory.
Not here: votes, and the short form of a run (labels.py).
Source: DINO's eval_knn.py, arXiv 2104.14294: k of 10, 20, 100, 200, votes weighted by exp(cosine / 0.07), k 20 quoted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wherefrom.train.evaluation.features import Evaluation, Part
from wherefrom.train.evaluation.labels import vote
from wherefrom.train.evaluation.protocols import Need, Score, labeled_sides

QUERIES, BANK = 1024, 65_536  # a block of similarities: 256 MiB in float32


@dataclass(frozen=True, kw_only=True, slots=True)
class NearestNeighbors:
    """Whole pictures as Resize(256) and CenterCrop(224) show them (bilinear with antialias); features of unit length, not centered."""

    version: int = 1
    needs: tuple[Need, ...] = ("labels", "training pictures")
    parts: tuple[Part, ...] = (Part(token="class"), Part(token="mean"))
    k: tuple[int, ...] = (10, 20, 100, 200)
    temperature: float = 0.07

    def measure(self, evaluation: Evaluation) -> Iterator[Score]:
        """Yield top-1 of every part and k; where there are fewer training pictures than k, of them all."""
        for part in (part for part in self.parts if part.fits(evaluation.network.encoder)):
            train, held_out = labeled_sides(evaluation, part)
            for column, bank in train.features.items():
                similarity, nearest = neighbors(bank, held_out.features[column], k=max(self.k))
                for k in self.k:
                    told = vote(similarity[:, :k], train.labels[nearest[:, :k]], temperature=self.temperature)
                    accuracy = float((told == held_out.labels).double().mean())
                    yield Score(row=f"{part.name}, k {k}", features=column, value=accuracy)


def neighbors(bank: Tensor, queries: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """Return the cosine to the k most similar rows of a bank, the most similar first, and which these are.

    Shapes: bank (N, D), queries (M, D) -> (M, min(k, N)) each, the second int64. Beside both it takes one block of similarities, 256 MiB,
    and 65,536 rows of the bank, whatever N and M.
    """
    values, rows = [], []
    for block in queries.split(QUERIES):
        some = F.normalize(block, dim=-1)
        best = torch.empty(len(some), 0, device=bank.device)
        which = torch.empty(len(some), 0, dtype=torch.int64, device=bank.device)
        for first in range(0, len(bank), BANK):
            similarity = some @ F.normalize(bank[first : first + BANK], dim=-1).mT
            value, row = similarity.topk(min(k, similarity.shape[1]), dim=-1)
            del similarity  # before the next block comes, which would lie beside it
            best, order = torch.cat([best, value], 1).sort(dim=1, descending=True, stable=True)
            which = torch.cat([which, row + first], 1).gather(1, order)[:, :k]
            best = best[:, :k]
        values.append(best)
        rows.append(which)
    return torch.cat(values), torch.cat(rows)
