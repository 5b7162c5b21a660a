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

from wherefrom.pipeline.entry_table import EntryTable
from wherefrom.pipeline.files import write_aside
from wherefrom.train.evaluation.features import CHANCE, CORRUPTED, ENCODER, RANDOM, RAW, VARIANTS, Evaluation, Labeled, Part
from wherefrom.train.evaluation.pictures import LabeledSource, Table
from wherefrom.train.plain_data import Plain, to_plain

Need = Literal["labels", "training pictures", "masks", "depth", "corrupted pictures", "variants"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One number: which of a protocol's, of which features, and which way it is good."""

    row: str  # what was measured, within the protocol: "k 20"
    features: str  # the column: ENCODER, RANDOM, RAW, CHANCE
    value: float  # not a number where there was nothing to measure
    better: Literal["higher", "lower"] = "higher"


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

    def measure(self, evaluation: Evaluation) -> Iterable[Score | PairExample]:
        """Return the scores, and of pairs some examples; every rank calls it, and gets the same.

        Raises: NotMeasuredError in one line where these pictures or this network do not allow it.
        """


class NotMeasuredError(ValueError):
    """What a protocol needs is not there; others are measured all the same."""

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

    def table(self) -> Table:
        """Return the scores, a row for each thing measured and a column for each kind of features, within 80 columns."""
        if self.not_measured:
            return ((f"{self.protocol}: not measured, {self.not_measured}",),)
        columns = [column for column in (ENCODER, RANDOM, RAW, CHANCE) if any(score.features == column for score in self.scores)]
        values = {(score.row, score.features): score.value for score in self.scores}
        rows = [(row, *(_number(values.get((row, column))) for column in columns)) for row in dict.fromkeys(s.row for s in self.scores)]
        return ((self.protocol, *columns), *rows)


def _number(value: float | None) -> str:
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
    done: Callable[[Measured], None] = lambda _: None,
) -> tuple[Measured, ...]:
    """Measure by protocols, one after the other; `done` is told of each, first of those that lack what they need, which are not tried.

    file: a report that is written anew after each, by the first rank; what it holds of the same network and pictures is not measured again.
    about: what the report is about, besides; where it differs, everything is measured.
    """
    same = dict(about or {}) | {"network": evaluation.network.identity, "picture_px": evaluation.picture_px, "seed": evaluation.seed}
    known = _known(file, same) if evaluation.ranks.first else {}
    known = {name: _measured(plain) for name, plain in json.loads(evaluation.ranks.texts(json.dumps(known))[0]).items()}
    due = {name: protocol for name, protocol in protocols.items() if _is_due(known.get(_title(name, protocol)), protocol)}
    lack = {name: lacking(evaluation, protocol) for name, protocol in due.items()}
    evaluation.prepare([part for name, protocol in due.items() if not lack[name] for part in protocol.parts])
    for name in sorted(protocols, key=lambda name: not lack.get(name)):  # stable: those that lack something first
        protocol, title = protocols[name], _title(name, protocols[name])
        if name in due:
            known[title] = _measure(evaluation, title, protocol, lack[name])
        if file is not None and evaluation.ranks.first:
            with write_aside(file) as aside:
                plain = {"name": evaluation.network.name} | same | {"protocols": [_finite(asdict(each)) for each in known.values()]}
                aside.write_text(json.dumps(plain, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        done(known[title])
    return tuple(known[_title(name, protocol)] for name, protocol in protocols.items())


def _is_due(known: "Measured | None", protocol: EvaluationProtocol) -> bool:
    return known is None or known.choices != to_plain(protocol)


def _title(name: str, protocol: EvaluationProtocol) -> str:
    return f"{name}@{protocol.version}"


def _measure(evaluation: Evaluation, title: str, protocol: EvaluationProtocol, reason: str) -> Measured:
    """Return what a protocol finds, nothing where there is a reason for it already."""
    began = time.monotonic()
    found: tuple[Score | PairExample, ...] = ()
    try:
        found = () if reason else tuple(protocol.measure(evaluation))
    except NotMeasuredError as problem:
        reason = str(problem)
    return Measured(
        protocol=title,
        choices=to_plain(protocol),
        scores=tuple(each for each in found if isinstance(each, Score)),
        seconds=round(time.monotonic() - began, 1),
        not_measured=reason,
        examples=tuple(each for each in found if isinstance(each, PairExample)),
    )


def _known(file: Path | None, same: Mapping[str, Plain]) -> dict[str, Plain]:
    """Return what a report holds of the same network and pictures, by protocol; nothing where there is none, or it is damaged."""
    try:
        plain = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
        if {name: value for name, value in plain.items() if name not in ("name", "protocols")} != json.loads(json.dumps(dict(same))):
            return {}
        return {each["protocol"]: each for each in plain["protocols"] if not each["not_measured"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _measured(plain: Mapping[str, Any]) -> Measured:
    scores = (score | {"value": math.nan if score["value"] is None else score["value"]} for score in plain["scores"])
    examples = (example | {name: tuple(example[name]) for name in ("reference", "target", "told")} for example in plain.get("examples", ()))
    return Measured(
        **{**plain, "scores": tuple(Score(**score) for score in scores), "examples": tuple(PairExample(**each) for each in examples)}
    )


def _finite(measured: dict[str, Any]) -> dict[str, Any]:
    """Return the same with null for numbers that JSON does not know."""
    scores = [score | {"value": score["value"] if math.isfinite(score["value"]) else None} for score in measured["scores"]]
    return measured | {"scores": scores}
