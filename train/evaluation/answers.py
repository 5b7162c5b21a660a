"""How often an objective that has right answers is right about held-out pictures, beside fresh heads on frozen networks, and chance.

Here: `evaluate_answers`, which serves every objective that states a `chance`: rotation, context prediction, jigsaw, colorization.
Not here: where pictures come from (pictures.py), pair geometry (pairs.py), labels (labels.py), when to evaluate (loop.py).
"""

import copy
import itertools
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wherefrom.pipeline.view_recipe import ViewRecipe
from wherefrom.pipeline.views import Batch, Views
from wherefrom.train.encoder import Encoder, Features
from wherefrom.train.evaluation.labels import draw_ids
from wherefrom.train.evaluation.network import random_network
from wherefrom.train.evaluation.pictures import PictureSource, ReportProgress, Table, blocks, encoded, evaluation_mode
from wherefrom.train.objective import Encode, Objective, Progress, Terms, random_scope
from wherefrom.train.over_ranks import this_rank_alone
from wherefrom.train.ranks import Ranks

ANSWERS_PROTOCOL = "held-out-answers@1"
ACCURACY, COMMONEST, LEFT_OUT = "accuracy", "commonest", "pictures_left_out"  # meters


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerRow:
    """How often one way to answer is right, and its loss; None: it has none."""

    name: str
    accuracy: float
    loss: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerReport:
    """How often answers about held-out pictures are right, with what the number must be read beside."""

    protocol: str
    pictures: int
    left_out: float  # the share of them that does not count
    rows: tuple[AnswerRow, ...]  # the objective's own head first

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def tables(self) -> tuple[Table, ...]:
        """Return how many pictures there were, and the rows: text within 80 columns."""
        numbers = f"{self.pictures} held-out pictures, {self.left_out:.1%} of them left out"
        rows = [(row.name, f"{row.accuracy:.3f}", "-" if row.loss is None else f"{row.loss:.4f}") for row in self.rows]
        return ((numbers,),), (("right answers", "share", "loss"), *rows)

    def row(self, name: str) -> AnswerRow:
        """Return one row by its name."""
        return next(row for row in self.rows if row.name == name)


def answers_right(
    encoder: Encoder, objective: Objective, held_out: PictureSource, *, pictures: int, at: Progress, ranks: Ranks | None = None
) -> AnswerRow:
    """Return how often the objective's own head is right, and its loss; the short form, for during a run."""
    with this_rank_alone():
        return _Sums.of(encoder, objective, held_out, pictures, at, ranks).row("held-out pictures")


def evaluate_answers(
    encoder: Encoder,
    objective: Objective,
    train: PictureSource,
    held_out: PictureSource,
    *,
    at: Progress,
    pictures: int = 500,
    train_pictures: int = 3000,
    head_steps: int = 400,
    seed: int = 0,
    progress: ReportProgress | None = None,
    ranks: Ranks | None = None,
) -> AnswerReport:
    """Evaluate an objective that states a `chance`, by views drawn as those that it learns from.

    Two fresh heads learn the same task of `train_pictures` training pictures, on the encoder and on a random one of its architecture,
    both frozen: `head_steps` batches of 64 by AdamW at 1e-3, cosine to 0. What lies between the two the encoder has learned. ranks: all of
    them call, and share the held-out pictures.
    """
    assert objective.chance is not None, f"{objective.name} states no chance"
    what = f"answers of {objective.name}"
    random = random_network(encoder, seed)
    with this_rank_alone():
        own = _Sums.of(encoder, objective, held_out, pictures, at, ranks)
        rows = [own.row("held-out pictures")]
        recipe = ViewRecipe(families=objective.families)
        learned_from = [train.views(recipe, ids) for ids in blocks(draw_ids(train, train_pictures))]
        for done, (name, network) in enumerate((("fresh head", encoder), ("fresh head, random encoder", random))):
            if progress is not None:
                progress(what, done, 2)
            frozen = network.slow_copy()
            head = _fresh_head(frozen, objective, learned_from, at, steps=head_steps, seed=seed)
            rows.append(_Sums.of(frozen, head, held_out, pictures, at, ranks).row(name))
        if progress is not None:
            progress(what, 2, 2)
    if own.counted and own.commonest:
        rows.append(AnswerRow(name="the commonest of 64 pictures", accuracy=own.commonest / own.counted, loss=None))
    rows.append(AnswerRow(name="chance", accuracy=objective.chance, loss=None))
    return AnswerReport(protocol=ANSWERS_PROTOCOL, pictures=own.pictures, left_out=1 - own.counted / own.pictures, rows=tuple(rows))


@dataclass(kw_only=True, slots=True)
class _Sums:
    """Sums over pictures that count."""

    pictures: int = 0
    counted: float = 0.0
    right: float = 0.0
    loss: float = 0.0
    commonest: float = 0.0

    @staticmethod
    def of(encoder: Encoder, objective: Objective, held_out: PictureSource, pictures: int, at: Progress, ranks: Ranks | None) -> "_Sums":
        """Answer with a network and a head as they are."""
        recipe = ViewRecipe(families=objective.families)

        def answer(ids: NDArray[np.int64]) -> dict[str, Tensor]:
            terms = _answered(objective, held_out.views(recipe, ids), encoder.encode, at)
            meters = terms.meters
            counted = len(ids) * (1 - float(meters.get(LEFT_OUT, 0.0)))  # of a batch, whose numbers are means over those that count
            means = (1.0, float(meters[ACCURACY]), float(_loss(objective, terms)), float(meters.get(COMMONEST, 0.0)))
            return {"sums": torch.tensor([[float(len(ids)), *(counted * mean for mean in means)]], dtype=torch.float64)}

        with evaluation_mode(encoder, objective):
            sums = encoded(draw_ids(held_out, pictures), answer, ranks)["sums"].sum(0).tolist()
        return _Sums(pictures=round(sums[0]), counted=sums[1], right=sums[2], loss=sums[3], commonest=sums[4])

    def row(self, name: str) -> AnswerRow:
        """Return the means; not a number where no picture counts."""
        accuracy, loss = (total / self.counted if self.counted else math.nan for total in (self.right, self.loss))
        return AnswerRow(name=name, accuracy=accuracy, loss=loss)


def _fresh_head(frozen: Encoder, objective: Objective, batches: list[Batch], at: Progress, *, steps: int, seed: int) -> Objective:
    """Return the objective with a head that is built anew, and learns on what a frozen network says of the batches."""
    with random_scope(seed, "fresh head"):
        fresh = copy.deepcopy(objective)
        fresh.setup(frozen)
    fresh.to(next(frozen.parameters()).device).train()
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-3, weight_decay=0.05)
    remembered = _Remembered(frozen)
    with random_scope(seed, "batches of heads"):
        passes = 1 + steps // len(batches)
        order = torch.cat([torch.randperm(len(batches)) for _ in range(passes)])[:steps].tolist()
    for step, number in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad(set_to_none=True)
        _loss(fresh, _answered(fresh, batches[number], remembered.encode_of(number), at)).backward()
        optimizer.step()
    return fresh


class _Remembered:
    """A frozen network that encodes what is asked of a batch once: it is asked for the same in the same order every time."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.known: dict[int, list[Features]] = {}

    def encode_of(self, number: int) -> Encode:
        """Return how the batch of this number is encoded, one more time from its first question on."""
        known, place = self.known.setdefault(number, []), itertools.count()

        def encode(views: Views | Tensor, *, keep: Tensor | None = None, positions: bool = True) -> Features:
            question = next(place)
            if question == len(known):
                with evaluation_mode(self.encoder):
                    known.append(self.encoder.encode(views, keep=keep, positions=positions))
            return known[question]

        return encode


def _answered(objective: Objective, batch: Batch, encode: Encode, at: Progress) -> Terms:
    """Return what an objective says of a batch, whose draws follow from its first picture."""
    with random_scope("answers", objective.name, int(batch.sample[0]), device=batch.sample.device):
        terms: Terms = objective(batch, encode, at)
    return terms


def _loss(objective: Objective, terms: Terms) -> Tensor:
    return torch.stack([objective.weights.get(term, 1.0) * value for term, value in terms.losses.items()]).sum()
