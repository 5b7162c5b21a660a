"""Protocols by name and version: what each measures of a network, one after the other, so that a stopped evaluation goes on.

Here: what a protocol is, the table of them, scores, the report and its file.
Not here: any protocol (one file a family beside this one), features (features.py), how reports look (tools/).
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from wherefrom.pipeline.entry_table import EntryTable
from wherefrom.pipeline.files import write_aside
from wherefrom.train.evaluation.features import CHANCE, CORRUPTED, ENCODER, RANDOM, RAW, VARIANTS, Evaluation, Labeled, Part
from wherefrom.train.evaluation.pictures import LabeledSource, Table
from wherefrom.train.plain_data import Plain, to_plain
from wherefrom.train.ranks import Ranks

Better = Literal["higher", "lower", "neither"]  # neither: of controls, and of how it was measured, such as what was left out
Need = Literal["labels", "training pictures", "masks", "depth", "corrupted pictures", "variants"]
NEED_OF: Mapping[str, Need] = {"masks": "masks", "depths": "depth", "unit": "depth", "farthest": "depth"}  # by what a report is about
OTHERS: Mapping[Need, Sequence[str]] = {"corrupted pictures": (CORRUPTED,), "variants": VARIANTS}  # by need: names in "others"


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One number: which of a protocol's, of which features, and which way it is good."""

    row: str  # what was measured, within the protocol: "k 20"
    features: str  # the column: ENCODER, RANDOM, RAW, CHANCE
    value: float  # not a number where there was nothing to measure
    better: Better = "higher"


Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairExample:
    """One pair of views of a held-out picture: where the target lies, and where it was told to lie. Boxes are xyxy, in source pixels."""

    law: str
    rank: Literal["best", "worst"]
    sample: int  # the picture, by its number among those held out
    reference: Box
    target: Box
    told: Box  # of the target's aspect where scale alone is told


class EvaluationProtocol(Protocol):
    """What is asked of a network, by fixed rules: a frozen dataclass whose fields are its choices, each with its default.

    Where a choice or the code changes its numbers, its version does.
    """

    @property
    def version(self) -> int:
        """Of its numbers."""

    @property
    def needs(self) -> tuple[Need, ...]:
        """What pictures must have."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts of whole pictures that it looks at, which all protocols share one pass for."""

    def measure(self, evaluation: Evaluation) -> Iterable["Score | PairExample | NotMeasuredError"]:
        """Return the scores, and of pairs some examples; every rank calls it, and gets the same.

        A NotMeasuredError among them says of a part of the protocol why it has no scores, while others have.
        Raises: NotMeasuredError in one line where these pictures or this network do not allow it.
        """


class NotMeasuredError(ValueError):
    """What a protocol, or a part of it, needs is not there; others are measured all the same."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


def lacking(evaluation: Evaluation, protocol: EvaluationProtocol) -> str:
    """Return in one line what a protocol needs and an evaluation has not, "" where there is all: no picture is looked at for it.

    Labels that a source does not tell beforehand are taken to be there.
    """
    return next((reason for need in protocol.needs if (reason := _lacks(evaluation, need))), "")


def _lacks(evaluation: Evaluation, need: Need) -> str:
    if need == "training pictures":
        return "" if evaluation.train is not None else "there are no training pictures (--data)"
    if need == "masks":
        return "" if evaluation.masked is not None else "the pictures have no masks (--masks)"
    if need == "depth":
        return "" if evaluation.depth is not None else "the pictures have no depths (--depths)"
    if need == "corrupted pictures":
        there = any(name.startswith(f"{CORRUPTED}/") for name in evaluation.others)
        return "" if there else f"there are no corrupted pictures (--others {CORRUPTED})"
    if need == "variants":
        there = any(name in VARIANTS for name in evaluation.others)
        return "" if there else "there are no drawn or odd pictures (--others)"
    return _lacks_labels(evaluation)


def _lacks_labels(evaluation: Evaluation) -> str:
    """Return what is missing of the labels of the pictures that are taken of both sides."""
    sources: dict[str, object] = {"train": evaluation.train, "held_out": evaluation.held_out}
    labels = {side: source.labels[evaluation.ids(side)] for side, source in sources.items() if isinstance(source, LabeledSource)}
    of_none = [side for side, of_side in labels.items() if not (of_side >= 0).any()]
    if of_none:
        which = "" if len(of_none) == len(sources) else {"train": "training ", "held_out": "held-out "}[of_none[0]]
        return f"the {which}pictures have no labels (--labels)"
    if "train" in labels and len(np.unique(labels["train"][labels["train"] >= 0])) < 2:
        return "the training pictures show one class alone"
    return ""


def labeled_sides(evaluation: Evaluation, part: Part) -> tuple[Labeled, Labeled]:
    """Return a part of the training and of the held-out pictures that have a label.

    Raises: NotMeasuredError if either side has none, or the training pictures are all of one class.
    """
    train, held_out = (evaluation.labeled(side, part) for side in ("train", "held_out"))
    if not len(train.labels) or not len(held_out.labels):
        raise NotMeasuredError("the pictures have no labels")
    if len(train.labels.unique()) < 2:
        raise NotMeasuredError("the training pictures show one class alone")
    return train, held_out


def check_part(evaluation: Evaluation, part: Part) -> None:
    """Raise NotMeasuredError if the network under evaluation has not such a part."""
    if part.token == "class" and not evaluation.network.encoder.has_class_token:
        raise NotMeasuredError("the network has no class token; take the summary, or the mean of its tokens")


PROTOCOLS = EntryTable(
    kind="protocol",
    group="wherefrom.protocols",
    own={
        "knn": "wherefrom.train.evaluation.knn:NearestNeighbors",
        "logistic": "wherefrom.train.evaluation.logistic:LogisticRegression",
        "few-shot": "wherefrom.train.evaluation.logistic:FewShot",
        "linear-dino": "wherefrom.train.evaluation.linear:LinearDINO",
        "linear-mocov3": "wherefrom.train.evaluation.linear:LinearMoCoV3",
        "linear-mae": "wherefrom.train.evaluation.linear:LinearMAE",
        "linear-dinov2": "wherefrom.train.evaluation.linear:LinearDINOv2",
        "pairs": "wherefrom.train.evaluation.pair_geometry:PairGeometry",
        "jigsaw": "wherefrom.train.evaluation.jigsaw:JigsawPuzzles",
        "positions": "wherefrom.train.evaluation.positions:AbsolutePositions",
        "correspondence": "wherefrom.train.evaluation.correspondence:TokenCorrespondence",
        "occlusion": "wherefrom.train.evaluation.occlusion:Occlusion",
        "corruptions": "wherefrom.train.evaluation.corruptions:Corruptions",
        "variants": "wherefrom.train.evaluation.variants:Variants",
        "hummingbird": "wherefrom.train.evaluation.hummingbird:Hummingbird",
        "linear-segmentation": "wherefrom.train.evaluation.dense_linear:LinearSegmentation",
        "linear-depth": "wherefrom.train.evaluation.dense_linear:LinearDepth",
    },
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a protocol found, or why it found nothing."""

    protocol: str  # by name and version: "knn@1"
    choices: Plain
    scores: tuple[Score, ...]
    seconds: float
    not_measured: str = ""
    examples: tuple[PairExample, ...] = ()  # to look at, of a protocol of pairs
    notes: tuple[str, ...] = ()  # why parts of it were not measured
    failed: bool = False  # nothing was lacking that is known beforehand: it met an error, or the memory was too small

    def table(self) -> Table:
        """Return the scores, a row for each thing measured and a column for each kind of features, within 80 columns."""
        if self.not_measured:
            return ((f"{self.protocol}: not measured, {self.not_measured}",),)
        columns = [column for column in (ENCODER, RANDOM, RAW, CHANCE) if any(score.features == column for score in self.scores)]
        values = {(score.row, score.features): score.value for score in self.scores}
        rows = [(row, *(written(values.get((row, column))) for column in columns)) for row in dict.fromkeys(s.row for s in self.scores)]
        return ((self.protocol, *columns), *rows)


def written(value: float | None) -> str:
    """Return a score's value as tables show it, "-" where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"


def protocols_named(names: Sequence[str]) -> dict[str, EvaluationProtocol]:
    """Return protocols by their names, `knn` or `knn@1`; by none, all of them.

    Raises: ValueError in one line if there is no such protocol, or it is of another version.
    """
    chosen: dict[str, EvaluationProtocol] = {}
    for word in names or list(PROTOCOLS):
        name, _, version = word.partition("@")
        protocol: EvaluationProtocol = PROTOCOLS[name]()
        if version and version != str(protocol.version):
            raise ValueError(f"protocol {word!r}: this is {name}@{protocol.version}; take that, or the wherefrom that has the other")
        chosen[name] = protocol
    return chosen


def measure(
    evaluation: Evaluation,
    protocols: Mapping[str, EvaluationProtocol],
    *,
    file: Path | None = None,
    about: Mapping[str, Plain] | None = None,
    again: bool = False,
    done: Callable[[Measured], None] = lambda _: None,
    aside: Callable[[Path], None] = lambda _: None,
) -> tuple[Measured, ...]:
    """Measure by protocols, one after the other; `done` is told of each, first of those that lack what they need, which are not tried.

    A protocol that meets a ValueError, or too little memory, is not measured, and says why.
    file: a report that is written anew after each, by the first rank; what it holds of the same network and pictures stays there and is not
    measured again, unless `again`. Before anything else in it is given up, it is put aside under another name, which `aside` is told.
    about: what the report is about, besides: "masks", "depths", "unit", "farthest" and "others" of the protocols that need such pictures,
    all else of every one.
    """
    ranks = evaluation.ranks
    own = {"network": evaluation.network.identity, "picture_px": evaluation.picture_px, "seed": evaluation.seed}
    same: dict[str, Plain] = json.loads(json.dumps(dict(about or {}) | own))
    head = {"name": evaluation.network.name} | {key: value for key, value in same.items() if not _is_of_needs(key)}
    lack = {name: lacking(evaluation, protocol) for name, protocol in protocols.items()}
    titles = {name: _title(name, protocol) for name, protocol in protocols.items()}
    asked = {titles[name]: (protocol, lack[name]) for name, protocol in protocols.items()}
    held, put_aside = _held(file, head, same, asked) if file is not None and ranks.first else ({}, False)
    held = json.loads(ranks.texts(json.dumps(held))[0])

    def write() -> None:
        if file is not None and ranks.first:
            with write_aside(file) as whole:
                whole.write_text(json.dumps(head | {"protocols": list(held.values())}, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    if put_aside and file is not None:
        aside(_put_aside(file))
        write()
    due = {name for name, title in titles.items() if again or not _counts(held.get(title), *asked[title], same)}
    evaluation.prepare([part for name in protocols if name in due and not lack[name] for part in protocols[name].parts])
    found: dict[str, Measured] = {}
    for name in sorted(protocols, key=lambda name: not (name in due and lack[name])):  # stable: those that lack something first
        protocol, title = protocols[name], titles[name]
        if name in due:
            found[name] = _measure(evaluation, title, protocol, lack[name])
            held[title] = _finite(asdict(found[name])) | {"of": _of_needs(same, protocol)}
            write()
        else:
            found[name] = _measured(held[title])
        done(found[name])
    return tuple(found[name] for name in protocols)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationReport:
    """What a report's file holds: of one network, on pictures to learn from and pictures held out, whoever measured it when."""

    name: str  # of the network
    about: Mapping[str, Plain]  # all that every number in it depends on: the network, "train", "held_out", "limit", "picture_px", "seed"
    measured: tuple[Measured, ...]
    of: Mapping[str, Mapping[str, Plain]]  # by protocol, what it depends on besides: "masks", "depths", "unit", "farthest", "others"


def read_report(file: Path) -> EvaluationReport:
    """Return all that a report's file holds.

    Raises: OSError if there is none; ValueError in one line if it is torn, or holds something else.
    """
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        # as reports said it once, for all protocols together
        of_all = {key: value for key, value in plain.items() if _is_of_needs(key)}
        return EvaluationReport(
            name=str(plain["name"]),
            about={key: value for key, value in plain.items() if key not in ("name", "protocols") and not _is_of_needs(key)},
            measured=tuple(map(_measured, plain["protocols"])),
            of={each["protocol"]: each.get("of", of_all) for each in plain["protocols"]},
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as problem:
        raise ValueError(f"{file}: is no report of `wherefrom evaluate`, or torn; evaluate again") from problem


def _title(name: str, protocol: EvaluationProtocol) -> str:
    return f"{name}@{protocol.version}"


def _is_of_needs(key: str) -> bool:
    return key in NEED_OF or key == "others"


def _of_needs(about: Mapping[str, Plain], protocol: EvaluationProtocol) -> dict[str, Plain]:
    """Return what, of all that a report is about, some protocols depend on and others do not, of this one."""
    found = {key: about[key] for key, need in NEED_OF.items() if key in about and need in protocol.needs}
    others = about.get("others")
    names = [name for need in protocol.needs for name in OTHERS.get(need, ()) if isinstance(others, dict) and name in others]
    return found | ({"others": {name: others[name] for name in names}} if names and isinstance(others, dict) else {})


def _counts(held: Mapping[str, Any] | None, protocol: EvaluationProtocol, lack: str, same: Mapping[str, Plain]) -> bool:
    """Return whether what a report holds need not be measured again; by other pictures than are here, where it needs some and none are."""
    if held is None or held["not_measured"] or held["choices"] != to_plain(protocol):
        return False
    return bool(lack) or _of_needs(held["of"], protocol) == _of_needs(same, protocol)


def _held(
    file: Path, head: Mapping[str, Plain], same: Mapping[str, Plain], asked: Mapping[str, tuple[EvaluationProtocol, str]]
) -> tuple[dict[str, Any], bool]:
    """Return what a report holds of the same network and pictures, by protocol, and whether it holds more, which would be lost."""
    try:
        report = read_report(file)
    except FileNotFoundError:
        return {}, False
    except (OSError, ValueError):  # torn, or no report
        return {}, True
    held = {each.protocol: _finite(asdict(each)) | {"of": report.of[each.protocol]} for each in report.measured}
    if report.about != {key: value for key, value in head.items() if key != "name"}:
        return {}, any(not each["not_measured"] for each in held.values())
    return held, any(title in asked and not each["not_measured"] and not _counts(each, *asked[title], same) for title, each in held.items())


def _put_aside(file: Path) -> Path:
    """Give a report another name, and return it."""
    number = 1
    while (other := file.with_name(f"{file.stem}-{number}{file.suffix}")).exists():
        number += 1
    return file.rename(other)


class _OtherRankError(ValueError):
    """What another rank failed by."""


class _AgreedRanks(Ranks):
    """Ranks that ask, before they exchange rows, whether one of them has failed and brings none: the others would wait for it."""

    def __init__(self, ranks: Ranks) -> None:
        self.__dict__.update(vars(ranks))

    def in_turn(self, own: Sequence[Tensor]) -> Tensor:
        """Return rows as all ranks have them.

        Raises: _OtherRankError if another one failed.
        """
        for failure in filter(None, self.texts("")):
            raise _OtherRankError(failure)
        return super().in_turn(own)


def _measure(evaluation: Evaluation, title: str, protocol: EvaluationProtocol, reason: str) -> Measured:
    """Return what a protocol finds, nothing where there is a reason for it already."""
    began = time.monotonic()
    found: list[Score | PairExample | NotMeasuredError] = []
    failure = "" if reason else _failure(evaluation, protocol, found)
    if failure:
        found.clear()
    scores = tuple(each for each in found if isinstance(each, Score))
    notes = tuple(str(each) for each in found if isinstance(each, NotMeasuredError))
    return Measured(
        protocol=title,
        choices=to_plain(protocol),
        scores=scores,
        seconds=round(time.monotonic() - began, 1),
        not_measured=reason or failure or ("" if scores else "; ".join(notes)),
        examples=tuple(each for each in found if isinstance(each, PairExample)),
        notes=notes if scores else (),
        failed=bool(failure),
    )


def _failure(evaluation: Evaluation, protocol: EvaluationProtocol, found: list[Score | PairExample | NotMeasuredError]) -> str:
    """Append what a protocol finds, and return by which error it failed, "" if by none; on all ranks alike, whichever of them failed."""
    ranks, failure = evaluation.ranks, ""
    evaluation.ranks = _AgreedRanks(ranks) if ranks.count > 1 else ranks
    try:
        found.extend(_until_not_measured(protocol.measure(evaluation)))
    except _OtherRankError as problem:
        return str(problem)
    except (ValueError, MemoryError, RuntimeError) as problem:
        if not isinstance(problem, ValueError) and not _is_of_memory(problem):
            raise
        failure = f"{' '.join(str(problem).split()) or 'the memory is too small':.300}"
    finally:
        evaluation.ranks = ranks
    return next(filter(None, ranks.texts(failure)), "")


def _until_not_measured(found: Iterable[Score | PairExample | NotMeasuredError]) -> Iterable[Score | PairExample | NotMeasuredError]:
    """Yield what is found, a NotMeasuredError that ends it last."""
    try:
        yield from found
    except NotMeasuredError as problem:
        yield problem


def _is_of_memory(problem: Exception) -> bool:
    return isinstance(problem, MemoryError | torch.cuda.OutOfMemoryError) or "DefaultCPUAllocator" in str(problem)


def _measured(plain: Mapping[str, Any]) -> Measured:
    known = {key: value for key, value in plain.items() if key != "of"}
    scores = (score | {"row": str(score["row"]), "value": _value(score["value"])} for score in known["scores"])
    examples = (example | {name: tuple(example[name]) for name in ("reference", "target", "told")} for example in known.get("examples", ()))
    tuples = {
        "scores": tuple(Score(**score) for score in scores),
        "examples": tuple(PairExample(**each) for each in examples),
        "notes": tuple(known.get("notes", ())),
    }
    return Measured(**known | tuples)


def _value(plain: object) -> float:
    """Return a score as JSON has it, null for what is no number. Raises: TypeError for anything else, OverflowError for a huge one."""
    if plain is None:
        return math.nan
    if not isinstance(plain, int | float):
        raise TypeError(f"{plain!r} is no number")
    return float(plain)


def _finite(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the same with null for numbers that JSON does not know."""
    scores = [score | {"value": score["value"] if math.isfinite(score["value"]) else None} for score in measured["scores"]]
    return measured | {"scores": scores}
