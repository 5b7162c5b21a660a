"""What every run is judged by, fixed before the first one: class token, mean token and grid over all pictures, and named protocols.

Here: the table of metrics, and how they are measured of a network that has been trained.
Not here: the protocols (train/evaluation/), training (one_run.py), differences between runs (report.py).
"""

import fnmatch
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from wherefrom.pipeline.demo.shards import demo_shards
from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.view_recipe import ViewFamily
from wherefrom.pipeline.views import Batch
from wherefrom.tools.against_lightly.judge import FOLDS, RAW_PX, center, featured
from wherefrom.train.encoder import Encoder
from wherefrom.train.evaluation.dense_pictures import DemoPictures
from wherefrom.train.evaluation.features import ENCODER, RANDOM, RAW, Evaluation
from wherefrom.train.evaluation.labels import GRID
from wherefrom.train.evaluation.network import Network
from wherefrom.train.evaluation.pictures import ShardPictures, evaluation_mode
from wherefrom.train.evaluation.protocols import Measured, measure, protocols_named
from wherefrom.train.settings import TrainSettings

ALL_PICTURES = f"loo-knn20-cosine-t0.07 / ridge-{FOLDS}fold, center0.875, grid3x3w0.4 @1"
ON_PICTURES = ("pairs", "jigsaw", "occlusion", "positions")  # protocols, on the pictures of the run
ON_SCENES = ("hummingbird", "linear-segmentation")  # on the demo's scenes

MetricValues = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One row of the table: the mean of the scores whose names fit a pattern; a protocol's are called "PROTOCOL: ROW"."""

    title: str
    scores: str  # a pattern, as of file names
    better: str = "higher"

    def of(self, scores: Mapping[str, float]) -> float | None:
        """Return the metric's value; None where it was not measured."""
        values = [value for name, value in scores.items() if fnmatch.fnmatchcase(name, self.scores)]
        return statistics.fmean(values) if values else None


METRICS = (
    Metric(title="class token, 20-NN", scores="class token knn"),
    Metric(title="class token, ridge", scores="class token ridge"),
    Metric(title="mean token, 20-NN", scores="mean token knn"),
    Metric(title="mean token, ridge", scores="mean token ridge"),
    Metric(title="3 x 3 grid, 20-NN", scores="grid knn"),
    Metric(title="3 x 3 grid, ridge", scores="grid ridge"),
    Metric(title="pairs, paired law: R2 of position", scores="pairs: paired: R2 [xy]"),
    Metric(title="pairs, paired law: R2 of scale", scores="pairs: paired: R2 scale"),
    Metric(title="pairs, paired law: L2 of position", scores="pairs: paired: L2 of position", better="lower"),
    Metric(title="pairs, disjoint law: R2 of position", scores="pairs: disjoint: R2 [xy]"),
    Metric(title="pairs, disjoint law: L2 of position", scores="pairs: disjoint: L2 of position", better="lower"),
    Metric(title="jigsaw, gaps: permutation", scores="jigsaw: gaps: permutation"),
    Metric(title="jigsaw, gaps: cells", scores="jigsaw: gaps: cells"),
    Metric(title="occlusion, random: 20-NN", scores="occlusion: random, mean"),
    Metric(title="occlusion, salient first: 20-NN", scores="occlusion: salient first, mean"),
    Metric(title="absolute position of tokens: R2", scores="positions: R2 of [xy]"),
    Metric(title="demo, patch retrieval: mIoU", scores="hummingbird: mIoU, memory 10240"),
    Metric(title="demo, linear segmentation: mIoU", scores="linear-segmentation: mIoU"),
)
CHOICE = METRICS[0:6:2]  # whose mean SP's law and weight are chosen by


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """What was measured of a network."""

    metrics: MetricValues
    floors: Mapping[str, MetricValues]  # by the column: a random encoder, raw pixels, chance; nothing where they were not asked for
    not_measured: Mapping[str, str]  # why, by protocol


def judge_all(
    network: Network,
    random: Encoder | None,
    settings: TrainSettings,
    *,
    data: str,
    val: str,
    file: Path,
    protocols: bool = True,
    limit: int | None = None,
) -> Judged:
    """Measure everything; what `file` holds of the same network is not measured again.

    random: the encoder as the run started; None: no floors beside the network, which other runs of the host have.
    protocols: also what they measure; if not, only what is told of all pictures.
    limit: pictures of either side that protocols take; None: all.
    """
    columns: dict[str, MetricValues] = {ENCODER: {}, RAW: {}, RANDOM: {}}
    encoders = {ENCODER: network.encoder} if random is None else {ENCODER: network.encoder, RANDOM: random}
    with ShardPictures(ShardIndex.open((data, val)), threads=1) as pictures:
        for column, scores in over_all_pictures(encoders, pictures, settings).items():
            columns[column] |= scores
    not_measured: dict[str, str] = {}
    for names in filter(None, (ON_PICTURES, ON_SCENES) if protocols else ()):
        sides = (data, val) if names is ON_PICTURES else _scenes()
        for found in _by_protocols(names, network, sides, floors=random is not None, file=file, limit=limit):
            name = found.protocol.partition("@")[0]
            if found.not_measured:
                not_measured[name] = found.not_measured
            for score in found.scores:
                columns.setdefault(score.features, {})[f"{name}: {score.row}"] = score.value
    floors = {column: scores for column, scores in columns.items() if column != ENCODER} if random is not None else {}
    return Judged(metrics=columns[ENCODER], floors=floors, not_measured=not_measured)


def _scenes() -> tuple[str, str]:
    """Return the demo's pictures, which are drawn the first time."""
    demo = demo_shards()
    return str(demo.train), str(demo.val)


def over_all_pictures(encoders: Mapping[str, Encoder], pictures: ShardPictures, settings: TrainSettings) -> dict[str, MetricValues]:
    """Return accuracies of class token (where there is one), mean token and grid, by column; of raw pixels, 8 x 8, as "pixels".

    Every picture gets its label from all the others, by neighbors, and by ridge regression on four fifths of them.
    Raises: ValueError if less than two pictures have a label.
    """
    grid = ViewFamily(name="grid", views=GRID.rows * GRID.cols, size_px=(settings.label_view_px,) * 2, law=GRID)
    families = (center(settings.label_picture_px), grid, center(RAW_PX, name="raw"))

    def parts(batch: Batch) -> dict[str, Tensor]:
        found = {f"{RAW}/pixels": batch.family("raw").pixels.float().flatten(1)}
        for column, encoder in encoders.items():
            features = encoder.encode(batch.family("center"))
            if features.prefix is not None and encoder.has_class_token:
                found[f"{column}/class token"] = features.prefix[:, 0, 0].float()
            found[f"{column}/mean token"] = features.tokens[:, 0].float().flatten(1, -2).mean(1)
            found[f"{column}/grid"] = encoder.encode(batch.family("grid")).tokens.float().flatten(2, -2).mean(2).flatten(1)
        return found

    with evaluation_mode(*encoders.values()):
        features = featured(pictures, families, parts)
    columns: dict[str, MetricValues] = {}
    for name, value in features.scores().items():
        column, _, score = name.partition("/")
        columns.setdefault(column, {})[score] = value
    return columns


class _WithoutFloors(Evaluation):
    """An evaluation of the network alone: floors are measured once a host and seed."""

    @cached_property
    def networks(self) -> Mapping[str, Encoder]:
        return {ENCODER: self.network.encoder}


def _by_protocols(
    names: Sequence[str], network: Network, sides: tuple[str, str], *, floors: bool, file: Path, limit: int | None
) -> tuple[Measured, ...]:
    """Measure by named protocols, on pictures to learn from and held-out ones."""
    train = ShardIndex.open(sides[0])
    held_out = ShardIndex.open(sides[1], classes=train.classes)
    kind = DemoPictures if names is ON_SCENES else ShardPictures
    with kind(train, threads=1) as known, kind(held_out, threads=1) as asked:
        masked: dict[str, Any] = {"masked": (known, asked)} if names is ON_SCENES else {}
        evaluation = (Evaluation if floors else _WithoutFloors)(network, known, asked, limit=limit, **masked)
        about = {"train": train.fingerprint, "held_out": held_out.fingerprint, "limit": limit, "floors": floors}
        aside = file.with_name(f"{file.stem}-{names[0]}{file.suffix}")  # two sets of pictures, two reports
        return measure(evaluation, protocols_named(names), file=aside, about=about)
