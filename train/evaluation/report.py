"""What a run measures of itself: a short evaluation now and then and at its end, where the full one with every control follows.

Here: how many pictures are looked at, both evaluations as one report, tables and curves, and that held-out shards are not learned from.
Not here: how anything is measured (pairs.py, labels.py), when (loop.py).
"""

import filecmp
import os
from collections.abc import Iterator, Sequence

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.train.evaluation.labels import PROTOCOL_NAMES, evaluate_labels
from wherefrom.train.evaluation.pair_controls import NoPairsError, PairObjective
from wherefrom.train.evaluation.pairs import PAIRS_PROTOCOL, PairRow, evaluate_pairs, pair_r2, r2_text
from wherefrom.train.evaluation.pictures import PictureSource, ReportProgress, Table
from wherefrom.train.objective import Step
from wherefrom.train.plain_data import Plain
from wherefrom.train.reporting import Evaluated
from wherefrom.train.settings import EvaluationSettings


def check_held_out(learned: ShardIndex, held_out: ShardIndex) -> None:
    """Refuse held-out shards that are learned from; pictures that two different shards share are not looked for.

    Raises: ValueError that names the first shard that is a training shard too, or has the very bytes of one.
    """
    alike: dict[tuple[int, int], list[str]] = {}
    for path, contents in zip(learned.paths, _contents(learned), strict=True):
        alike.setdefault(contents, []).append(path)
    for path, contents in zip(held_out.paths, _contents(held_out), strict=True):
        pictures, _ = contents
        for training in alike.get(contents, ()) if pictures else ():
            if os.path.samefile(path, training) or filecmp.cmp(path, training, shallow=False):
                same = "is a training shard too" if path == training else f"holds the same bytes as the training shard {training}"
                raise ValueError(f"val: {path} {same}; hold out shards that are not learned from, or leave out --val")


def _contents(index: ShardIndex) -> Iterator[tuple[int, int]]:
    """Yield the number of pictures and of bytes of every shard."""
    yield from zip(index.shard_lengths.tolist(), index.shard_stamps[:, 1].tolist(), strict=True)


def evaluate_run(
    step: Step,
    train: PictureSource,
    held_out: PictureSource,
    settings: EvaluationSettings,
    *,
    view_px: int,
    update: int,
    full: bool,
    progress: ReportProgress | None = None,
) -> Evaluated:
    """Measure a run after `update` updates: pairs of held-out pictures, and labels, by views of side `view_px`, where there are any.

    The short form looks at fewer pictures and at no control. It alone gives curves: k-NN from another number of pictures is another number.
    """
    report: dict[str, Plain] = {"update": update, "full": full}
    curves: dict[str, float] = {}
    tables: list[Table] = []
    for name, objective in step.objectives.items():
        if not isinstance(objective, PairObjective):
            continue
        law = objective.settings.law
        heading = f"{name}, law {law}"
        try:
            if full:
                pairs = evaluate_pairs(
                    step.encoder,
                    objective,
                    train,
                    held_out,
                    pictures=settings.pictures,
                    train_pictures=settings.head_pictures,
                    head_steps=settings.head_steps,
                    progress=progress,
                )
                report[name] = pairs.as_dict()
                tables += [((heading,),), *pairs.tables()]
            else:
                row = pair_r2(step.encoder, objective, held_out, pictures=settings.short_pictures)
                report[name] = {"protocol": PAIRS_PROTOCOL, "law": law, "r2": dict(zip(objective.channels, row.r2, strict=True))}
                tables += [((heading,),), _short_table(objective.channels, row)]
                curves |= {f"{name}/r2_{channel}": value for channel, value in zip(objective.channels, row.r2, strict=True)}
        except NoPairsError as problem:  # held-out pictures may be smaller than those learned from; that is no reason to stop
            report[name] = {"protocol": PAIRS_PROTOCOL, "law": law, "not_measured": str(problem)}
            tables.append(((f"{heading}: not measured, {problem}",),))
    bank, asked = (settings.knn_pictures, settings.knn_held_out) if full else (settings.short_knn_pictures, settings.short_pictures)
    if bank:
        labels = evaluate_labels(
            step.encoder, train, held_out, view_px=view_px, limit=bank, held_out_limit=asked, probe=full, progress=progress
        )
        if labels is None:
            tables.append((("labels: the pictures have none, so there is neither k-NN nor linear probe",),))
        else:
            report["labels"] = labels.as_dict()
            tables += labels.tables()
            if not full:
                curves |= {f"{PROTOCOL_NAMES[score.protocol]} {score.features}": score.accuracy for score in labels.scores}
    return Evaluated(update=update, full=full, report=report, curves=curves, tables=tuple(tables))


def _short_table(channels: Sequence[str], row: PairRow) -> Table:
    return (("R2", *channels), ("held-out pairs", *(r2_text(value) for value in row.r2)))
