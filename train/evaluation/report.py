"""What a run measures of itself: a short evaluation now and then and at its end, where the full one with every control follows.

Here: how many pictures are taken, both evaluations as one report, tables and curves, and that held-out shards are not learned from.
Not here: how anything is measured (pairs.py, answers.py, labels.py), when (loop.py).
"""

import filecmp
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.pipeline.shards.reader import ShardReader
from wherefrom.train.encoder import Encoder
from wherefrom.train.evaluation.answers import ANSWERS_PROTOCOL, answers_right, evaluate_answers
from wherefrom.train.evaluation.labels import PROTOCOLS, evaluate_labels
from wherefrom.train.evaluation.pair_controls import NoPairsError
from wherefrom.train.evaluation.pairs import PAIRS_PROTOCOL, PairRow, evaluate_pairs, pair_r2, r2_text
from wherefrom.train.evaluation.pictures import PictureSource, ReportProgress, Table
from wherefrom.train.objective import Objective, Progress, Step
from wherefrom.train.objectives.pairs import PairObjective, is_pair_objective
from wherefrom.train.plain_data import Plain
from wherefrom.train.ranks import Ranks
from wherefrom.train.reporting import EvaluationResults
from wherefrom.train.settings import EvaluationSettings

COMPARED_PICTURES = 16  # of two trees that may be copies


def check_held_out(train: ShardIndex, held_out: ShardIndex) -> None:
    """Refuse held-out shards that are learned from; pictures that two different shards share are not looked for.

    A tar is known by its bytes. Of trees of loose files no two may share a folder, by whatever path; a copy of a whole tree is known by the
    number and bytes of its pictures, and by the bytes of some of them.
    Raises: ValueError that names the first shard or folder that is learned from too, or has the very bytes of one.
    """
    learned_folders = dict(_picture_folders(train))
    for identity, folder in _picture_folders(held_out):
        if identity in learned_folders:
            raise ValueError(
                f"val: {folder} is a folder of training pictures too; hold out folders that are not learned from, or leave out --val"
            )
    by_numbers: dict[tuple[bool, int, int], list[int]] = {}
    for shard, numbers in enumerate(_numbers(train)):
        by_numbers.setdefault(numbers, []).append(shard)
    for shard, numbers in enumerate(_numbers(held_out)):
        is_tree, pictures, _ = numbers
        for training in by_numbers.get(numbers, ()) if pictures else ():
            path, learned = held_out.paths[shard], train.paths[training]
            if is_tree and _trees_look_alike(held_out, shard, train, training):
                same = f"holds copies of the training pictures in {learned}"
            elif not is_tree and (os.path.samefile(path, learned) or filecmp.cmp(path, learned, shallow=False)):
                same = "is a training shard too" if path == learned else f"holds the same bytes as the training shard {learned}"
            else:
                continue
            raise ValueError(f"val: {path} {same}; hold out shards that are not learned from, or leave out --val")


def _picture_folders(index: ShardIndex) -> Iterator[tuple[tuple[int, int], str]]:
    """Yield every folder of a tree that holds pictures itself: device and inode, and its path."""
    for shard in range(len(index.paths)):
        for folder, pictures in index.tree_folders(shard).items() if index.is_tree(shard) else ():
            if pictures:
                status = os.stat(folder)
                yield (status.st_dev, status.st_ino), folder


def _trees_look_alike(one: ShardIndex, one_shard: int, other: ShardIndex, other_shard: int) -> bool:
    """Compare the bytes of some pictures of two trees that have as many."""
    places = np.unique(np.linspace(0, one.shard_lengths[one_shard] - 1, COMPARED_PICTURES).astype(int)).tolist()
    first, first_of_other = (int(index.shard_lengths[:shard].sum()) for index, shard in ((one, one_shard), (other, other_shard)))
    paths = ((one.location(first + place)[0], other.location(first_of_other + place)[0]) for place in places)
    return all(filecmp.cmp(*pair, shallow=False) for pair in paths)


def pictures_in_both(train: ShardIndex, held_out: ShardIndex, *, rows: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None) -> int:
    """Return how many held-out pictures are, byte for byte, training pictures too, whatever they are called and wherever they lie.

    Those of equal length and size are read and compared; all others cannot be the same. rows: the pictures of either that count, by their
    numbers in the index; None: all.
    """
    train_rows, held_out_rows = rows or (np.arange(len(train)), np.arange(len(held_out)))
    sides = ((train, train_rows), (held_out, held_out_rows))
    kinds = [np.column_stack([index.length, index.source_size]).astype(np.int64)[of_side] for index, of_side in sides]
    _, kind = np.unique(np.concatenate(kinds), axis=0, return_inverse=True)
    of_train, of_held_out = np.split(kind.ravel(), [len(train_rows)])
    by_kind = np.argsort(of_train, kind="stable")
    in_order = of_train[by_kind]
    found = 0
    with ShardReader(train) as learned, ShardReader(held_out) as held:
        for sample in np.flatnonzero(np.isin(of_held_out, of_train)).tolist():
            first, last = np.searchsorted(in_order, of_held_out[sample], "left"), np.searchsorted(in_order, of_held_out[sample], "right")
            data = held.read(int(held_out_rows[sample]))
            found += any(np.array_equal(data, learned.read(int(other))) for other in train_rows[by_kind[first:last]])
    return found


def check_same_classes(train: ShardIndex, held_out: ShardIndex) -> None:
    """Refuse held-out pictures whose labels cannot be compared with those of the training pictures; unlabeled ones are no trouble.

    Raises: ValueError if one set names its classes and the other numbers them, or they have no class in common.
    """
    labels, held_out_labels = train.label[train.label >= 0], held_out.label[held_out.label >= 0]
    if not len(labels) or not len(held_out_labels):
        return
    if bool(train.classes) != bool(held_out.classes):
        named, numbered = (train, held_out) if train.classes else (held_out, train)
        raise ValueError(
            f"{numbered.paths[0]} numbers its classes, {named.paths[0]} names them: they cannot be compared; label both alike, or set "
            "labels to 'none'"
        )
    if not np.isin(held_out_labels, labels).any():
        theirs, ours = (_class_name(index, int(numbers[0])) for index, numbers in ((held_out, held_out_labels), (train, labels)))
        raise ValueError(
            f"val: {held_out.paths[0]} has no class of the training pictures: {theirs} there, {ours} here; hold out pictures of the same "
            "classes, or set labels to 'none'"
        )


def classes_not_learned(train: ShardIndex, held_out: ShardIndex) -> Iterator[str]:
    """Yield a line if some classes of held-out pictures have no training picture: nobody can be right about these."""
    labels, held_out_labels = train.label[train.label >= 0], held_out.label[held_out.label >= 0]
    unknown = held_out_labels[~np.isin(held_out_labels, labels)]
    if len(labels) and len(unknown):
        classes, most = len(np.unique(unknown)), 1 - len(unknown) / len(held_out_labels)
        first = _class_name(held_out, int(unknown[0]))
        yield f"{classes} held-out classes, such as {first}, have no training picture: at most {100 * most:.1f} % can be right"


def _class_name(index: ShardIndex, label: int) -> str:
    return repr(index.classes[label]) if index.classes else str(label)


def _numbers(index: ShardIndex) -> Iterator[tuple[bool, int, int]]:
    """Yield of every shard whether it is a tree, and the number of its pictures and bytes."""
    sizes = zip(index.shard_lengths.tolist(), index.shard_stamps[:, 1].tolist(), strict=True)
    yield from ((index.is_tree(shard), pictures, size) for shard, (pictures, size) in enumerate(sizes))


def evaluate_run(
    step: Step,
    train: PictureSource,
    held_out: PictureSource,
    settings: EvaluationSettings,
    *,
    view_px: int,
    picture_px: int | None = None,
    at: Progress,
    full: bool,
    progress: ReportProgress | None = None,
    ranks: Ranks | None = None,
) -> EvaluationResults:
    """Measure a run where it stands: its objectives on held-out pictures, and labels where there are any.

    Labels are told by local views of side `view_px`, and by whole pictures of side `picture_px` (None: not by these).

    Pairs: of every objective that `is_pair_objective`. Right answers: of every one that states a `chance`. Labels: by the network that the
    host exports. The short form takes fewer pictures and no control. It alone gives curves: k-NN from another number of pictures is
    another number. ranks: all of them call, share the pictures, and get the same.
    """
    taken = _Taken(step.encoder, train, held_out, settings, at, progress, ranks)
    sections: dict[str, _Section] = {}
    for name, objective in step.objectives.items():
        if is_pair_objective(objective):
            try:
                sections[name] = (_full_pairs if full else _short_pairs)(name, objective, taken)
            except NoPairsError as problem:  # held-out pictures may be smaller than those learned from; that is no reason to stop
                plain: Plain = {"protocol": PAIRS_PROTOCOL, "law": objective.settings.law_name, "not_measured": str(problem)}
                sections[name] = _Section(plain=plain, tables=(((f"{_heading(name, objective)}: not measured, {problem}",),),))
        elif isinstance(objective, Objective) and objective.chance is not None:
            sections[name] = (_full_answers if full else _short_answers)(objective, taken)
    sections["labels"] = _labels(step.exported(), taken, sides_px=(view_px, picture_px), full=full)
    where: dict[str, Plain] = {"update": at.update, "full": full}
    return EvaluationResults(
        update=at.update,
        full=full,
        report=where | {name: section.plain for name, section in sections.items() if section.plain is not None},
        curves={name: value for section in sections.values() for name, value in section.curves.items()},
        tables=tuple(table for section in sections.values() for table in section.tables),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Section:
    """What one objective, or the labels, add to a report."""

    plain: Plain = None  # None: nothing to write down
    curves: Mapping[str, float] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()


class _Taken(NamedTuple):
    """What all parts of an evaluation are taken of."""

    encoder: Encoder
    train: PictureSource
    held_out: PictureSource
    settings: EvaluationSettings
    at: Progress
    progress: ReportProgress | None
    ranks: Ranks | None


def _full_pairs(name: str, objective: PairObjective, taken: _Taken) -> _Section:
    settings = taken.settings
    pairs = evaluate_pairs(
        taken.encoder,
        objective,
        taken.train,
        taken.held_out,
        pictures=settings.pictures,
        train_pictures=settings.head_pictures,
        head_steps=settings.head_steps,
        progress=taken.progress,
        ranks=taken.ranks,
    )
    return _Section(plain=pairs.as_dict(), tables=(((_heading(name, objective),),), *pairs.tables()))


def _short_pairs(name: str, objective: PairObjective, taken: _Taken) -> _Section:
    row = pair_r2(taken.encoder, objective, taken.held_out, pictures=taken.settings.short_pictures, ranks=taken.ranks)
    r2 = dict(zip(objective.channels, row.r2, strict=True))
    return _Section(
        plain={"protocol": PAIRS_PROTOCOL, "law": objective.settings.law_name, "r2": r2},
        curves={f"{name}/r2_{channel}": value for channel, value in r2.items()},
        tables=(((_heading(name, objective),),), _short_table(objective.channels, row)),
    )


def _full_answers(objective: Objective, taken: _Taken) -> _Section:
    settings = taken.settings
    answers = evaluate_answers(
        taken.encoder,
        objective,
        taken.train,
        taken.held_out,
        at=taken.at,
        pictures=settings.pictures,
        train_pictures=settings.head_pictures,
        head_steps=settings.head_steps,
        progress=taken.progress,
        ranks=taken.ranks,
    )
    return _Section(plain=answers.as_dict(), tables=(((objective.name,),), *answers.tables()))


def _short_answers(objective: Objective, taken: _Taken) -> _Section:
    row = answers_right(taken.encoder, objective, taken.held_out, pictures=taken.settings.short_pictures, at=taken.at, ranks=taken.ranks)
    return _Section(
        plain={"protocol": ANSWERS_PROTOCOL, "accuracy": row.accuracy},
        curves={f"{objective.name}/accuracy": row.accuracy},
        tables=(((objective.name,),), (("right answers", "share"), (row.name, f"{row.accuracy:.3f}"))),
    )


def _labels(exported: Encoder, taken: _Taken, *, sides_px: tuple[int, int | None], full: bool) -> _Section:
    settings = taken.settings
    limit = settings.knn_pictures if full else settings.short_knn_pictures
    held_out_limit = settings.knn_held_out if full else settings.short_pictures
    if not limit:
        return _Section()
    view_px, picture_px = sides_px
    labels = evaluate_labels(
        exported,
        taken.train,
        taken.held_out,
        view_px=view_px,
        picture_px=picture_px,
        limit=limit,
        held_out_limit=held_out_limit,
        probe=full,
        progress=taken.progress,
        ranks=taken.ranks,
    )
    if labels is None:
        return _Section(tables=((("labels: the pictures have none, so there is neither k-NN nor linear probe",),),))
    curves = {f"{PROTOCOLS[score.protocol].name} {score.features}": score.accuracy for score in labels.scores}
    return _Section(plain=labels.as_dict(), curves={} if full else curves, tables=labels.tables())


def _heading(name: str, objective: PairObjective) -> str:
    return f"{name}, law {objective.settings.law_name}"


def _short_table(channels: Sequence[str], row: PairRow) -> Table:
    return (("R2", *channels), ("held-out pairs", *(r2_text(value) for value in row.r2)))
