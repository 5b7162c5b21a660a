"""How well a token tells where in the picture it lies: by a linear map, before and after the directions that tell it are taken out.

Here: the protocol; removal as RASA does it.
Not here: linear maps (linear_maps.py), where two views show the same (correspondence.py).
Source: RASA of Franca, arXiv 2507.14137 (valeoai/Franca, rasa/src): targets row / (rows - 1) and column / (columns - 1), two directions a
round, made orthonormal by Gram and Schmidt, up to 9 rounds. There a sigmoid stands behind the map, which AdamW fits in 5 epochs a round,
at 2e-4: never to the end. Here it is ridge regression, in closed form, with a constant and a penalty that does as early stopping does:
without one, least squares finds the directions in which all else cancels, and taking those out takes little of the position out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wherefrom.train.evaluation.features import RAW, Evaluation, Part, raw_tokens
from wherefrom.train.evaluation.knn import neighbors
from wherefrom.train.evaluation.labels import vote
from wherefrom.train.evaluation.linear_maps import r2_of_map, ridge, sums_of_products
from wherefrom.train.evaluation.protocols import Need, NotMeasuredError, Score

MEAN = Part(token="mean")


@dataclass(frozen=True, kw_only=True, slots=True)
class AbsolutePositions:
    """Tokens of whole pictures (Resize(256), CenterCrop(224)) behind the last block; R2 on held-out pictures, then k-NN by the mean token.

    The mean token of tokens without their position is the mean token without it: its k-NN says what the removal costs or gains.
    """

    version: int = 1
    needs: tuple[Need, ...] = ("training pictures",)
    parts: tuple[Part, ...] = (MEAN,)
    rounds: tuple[int, ...] = (0, 1, 3, 9)  # of removal, after which it is measured; RASA: 9
    penalty: float = 1e-4  # of the regression that R2 is of, times the mean variance of a feature
    removal_penalty: float = 1.0  # of those whose directions are taken out, likewise
    pictures: int = 1000  # of either side, at most, for the maps
    k: int = 20
    temperature: float = 0.07

    def measure(self, evaluation: Evaluation) -> Iterator[Score]:
        """Yield R2 of x and y after every round that is asked for, and accuracy of k-NN where there are labels."""
        rows, cols = evaluation.grid()
        if min(rows, cols) < 2:
            raise NotMeasuredError(f"the network makes {rows} x {cols} tokens of a picture: they have no positions")
        train, held_out = (self._sums(evaluation, side) for side in ("train", "held_out"))
        rounds = max(self.rounds)
        removals = {column: removed_positions(sums, rounds=rounds, penalty=self.removal_penalty) for column, sums in train.items()}
        for rounds in self.rounds:
            for column, sums in train.items():
                without = removals[column][rounds]
                weights = ridge(projected(sums, without), 2, self.penalty)
                for axis, r2 in zip("xy", r2_of_map(projected(held_out[column], without), weights).tolist(), strict=True):
                    yield Score(row=f"R2 of {axis}{_after(rounds)}", features=column, value=r2)
        yield from self._neighbors(evaluation, removals)

    def _sums(self, evaluation: Evaluation, side: str) -> dict[str, Tensor]:
        """Return the sums of products of tokens and their positions, of a side, by column."""
        recipe, ids = evaluation.recipe(evaluation.family()), evaluation.ids(side, self.pictures)
        columns, grid = (*evaluation.networks, RAW), evaluation.grid()
        where = cell_positions(grid).to(evaluation.device)
        of_blocks: dict[str, list[Tensor]] = {column: [] for column in columns}
        for number, batch in evaluation.batches(side, recipe, ids, own=True):
            views = batch.family("whole")
            with torch.no_grad():
                tokens = {column: encoder.encode(views).tokens for column, encoder in evaluation.networks.items()}
            tokens[RAW] = raw_tokens(views.pixels, grid)
            for column, values in tokens.items():
                of_blocks[column].append(sums_of_products(values.flatten(0, -2), where.repeat(len(values), 1)).unsqueeze(0))
            evaluation.progress(f"positions: {side.replace('_', ' ')}", min(len(ids), (number + 1) * 64), len(ids))
        return {column: evaluation.joined(blocks).sum(0) for column, blocks in of_blocks.items()}

    def _neighbors(self, evaluation: Evaluation, removals: dict[str, list[Tensor]]) -> Iterator[Score]:
        train, held_out = (evaluation.labeled(side, MEAN) for side in ("train", "held_out"))
        if not len(train.labels) or not len(held_out.labels):
            return
        for rounds in self.rounds:
            for column in evaluation.networks:
                without = removals[column][rounds].float()
                bank, queries = (labeled.features[column] @ without for labeled in (train, held_out))
                similarity, nearest = neighbors(bank, queries, k=self.k)
                told = vote(similarity, train.labels[nearest], temperature=self.temperature)
                accuracy = float((told == held_out.labels).double().mean())
                yield Score(row=f"k-NN, mean token, k {self.k}{_after(rounds)}", features=column, value=accuracy)


def _after(rounds: int) -> str:
    return f", {2 * rounds} directions out" if rounds else ""


def cell_positions(grid: tuple[int, int]) -> Tensor:
    """Return (x, y) of every cell, 0 in the first column and row and 1 in the last: (rows * cols, 2) float64."""
    rows, cols = grid
    y, x = torch.meshgrid(torch.linspace(0, 1, rows, dtype=torch.float64), torch.linspace(0, 1, cols, dtype=torch.float64), indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


def removed_positions(sums: Tensor, *, rounds: int, penalty: float) -> list[Tensor]:
    """Return what takes the directions that tell positions out of features, after 0, 1, ... rounds: (D, D) float64 each, x -> x @ it.

    sums: of features and both positions, as `sums_of_products`.
    """
    width = len(sums) - 3
    without = [torch.eye(width, dtype=torch.float64, device=sums.device)]
    for _ in range(rounds):
        weights = ridge(projected(sums, without[-1]), 2, penalty)[:-1]
        directions = orthonormal(weights)
        without.append(without[-1] - without[-1] @ directions @ directions.mT)
    return without


def orthonormal(vectors: Tensor) -> Tensor:
    """Return vectors (D, n) made orthonormal one after the other, as Gram and Schmidt do; those that nothing is left of are 0."""
    found: list[Tensor] = []
    for vector in vectors.mT:
        for other in found:
            vector = vector - (vector @ other) * other
        norm = vector.norm()
        found.append(vector / norm if norm > 0 else torch.zeros_like(vector))
    return torch.stack(found, 1)


def projected(sums: Tensor, without: Tensor) -> Tensor:
    """Return the sums of features that a matrix (D, D) was applied to, x -> x @ it."""
    rest = torch.eye(len(sums) - len(without), dtype=sums.dtype, device=sums.device)
    matrix = torch.block_diag(without, rest)
    return matrix.mT @ sums @ matrix
