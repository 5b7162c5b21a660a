"""What labels samples: the rule that a user names, and what the files of ImageNet say of its validation pictures.

Here: `LabelRule`, the label in a text or a tar's name, ILSVRC2012's lists of validation labels.
Not here: reading tars (table.py), folders' names as labels (tree.py), names of classes to numbers (index.py).
A label is a whole number of the data's own, or the name of a class; Python's order of strings, which torchvision sorts by, numbers names.
"""

import csv
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from wherefrom.pipeline.shards.storage import read_head, storage_of

__all__ = ["LabelRule", "class_of_tar", "imagenet_classes", "is_imagenet_validation", "label_of_text"]

_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
_EXTENSION = re.compile(r"[a-z0-9_]{1,16}(\.[a-z0-9_]{1,16})*")
_WORDNET_ID = re.compile(r"n[0-9]{8}")
_MAX_NAME = 256  # letters of a class's name
_VALIDATION_PICTURE = re.compile(r"(?:^|/)ILSVRC2012_val_([0-9]{8})(?:\.|$)")
_SOLUTION, _GROUND_TRUTH, _META = "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_PLACES = ("", "ILSVRC2012_devkit_t12/data", "data")  # in a folder that holds the pictures, or one of its parents
_PARENTS = 5  # Kaggle's archive has the pictures in ILSVRC/Data/CLS-LOC/val and the solution beside ILSVRC
_MAX_LIST_BYTES = 2**26


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelRule:
    """Where the labels of samples lie; `of` reads what users write."""

    kind: Literal["auto", "none", "tar", "member"]
    extension: bytes = b""  # of the member to read
    field: tuple[str, ...] = ()  # of its JSON

    @classmethod
    def of(cls, labels: str | None) -> Self:
        """Return the rule that is written as None, "none", "tar", an extension such as "cls", or "json.FIELD".

        Raises: ValueError for any other word; TypeError for what is none.
        """
        if labels is None:
            return cls(kind="auto", extension=b"cls")
        if not isinstance(labels, str):
            raise TypeError(f"labels={labels!r:.60}: needs a word such as 'cls', 'json.FIELD', 'tar' or 'none'")
        if labels in ("none", "tar"):
            return cls(kind="none" if labels == "none" else "tar")
        extension, _, field = labels.partition(".")
        is_json = extension == "json"
        if is_json != bool(field) or not (_EXTENSION.fullmatch(extension) and all(field.split(".") if is_json else [True])):
            forms = "a member's extension such as cls or txt, json.FIELD, tar (each tar's name) or none"
            raise ValueError(f"labels={labels!r}: names no label; give {forms}")
        return cls(kind="member", extension=extension.encode(), field=tuple(field.split(".")) if is_json else ())

    @property
    def complaint(self) -> str:
        """What is wrong with a member that has no label by this rule."""
        if self.kind == "auto":
            return "not a number"
        return f"no {'.'.join(self.field)}" if self.field else "no label"


def label_of_text(text: bytes, rule: LabelRule) -> int | str | None:
    """Return the label in the member that the rule names; None if there is none."""
    label: object = text.decode("utf-8", "surrogateescape").strip()
    if rule.field:
        try:
            label = json.loads(text)
            for name in rule.field:
                label = label[name] if isinstance(label, dict) else None
        except (ValueError, KeyError, RecursionError):
            return None
        if isinstance(label, int) and not isinstance(label, bool) and abs(label) < 10**18:
            return label
    elif isinstance(label, str) and _WHOLE_NUMBER.fullmatch(label):
        return int(label)
    if rule.kind == "auto" or not isinstance(label, str) or not 0 < len(label) <= _MAX_NAME:
        return None
    return label


def class_of_tar(tar: str, rule: LabelRule, *, nested: bool = False) -> str | None:
    """Return the class that a tar's name says, if the rule takes labels from there: by itself from tars in tars, and from WordNet's ids."""
    name = os.path.basename(tar)
    stem = name if nested else name.removesuffix(".tar")
    by_itself = rule.kind == "auto" and (nested or _WORDNET_ID.fullmatch(stem) is not None)
    return stem if rule.kind == "tar" or by_itself else None


def imagenet_classes(keys: Sequence[str], folder: str) -> list[str | None] | None:
    """Return the WordNet ids of ImageNet's validation pictures in a folder, from the lists in it or above it; None if there is no list.

    Lists: LOC_val_solution.csv as Kaggle has it, or the devkit's meta.mat with its ground truth, which counts classes in the devkit's way.
    Raises: ValueError if the ground truth is there without meta.mat, or a list is not what its name says.
    """
    ground_truth = ""
    for place in _places(folder):
        solution = _text_of(os.path.join(place, _SOLUTION))
        if solution is not None:
            classes = dict(_solution(solution, os.path.join(place, _SOLUTION)))
            return [classes.get(_picture_name(key)) for key in keys]
        numbers = _text_of(os.path.join(place, _GROUND_TRUTH))
        if numbers is None:
            continue
        meta = os.path.join(place, _META)
        if storage_of(meta).kind(meta) == "file":
            classes = dict(_devkit(numbers, os.path.join(place, _GROUND_TRUTH), meta))
            return [classes.get(_picture_name(key)) for key in keys]
        ground_truth = ground_truth or os.path.join(place, _GROUND_TRUTH)
    if ground_truth:
        raise ValueError(
            f"{ground_truth}: its numbers are the devkit's own, not those of sorted class names; put the devkit's {_META} beside it, "
            f"or {_SOLUTION}, or take --labels none"
        )
    return None


def is_imagenet_validation(key: str) -> bool:
    """Return whether a key is of a picture of ILSVRC2012's validation set."""
    return _VALIDATION_PICTURE.search(key) is not None


def _places(folder: str) -> Iterator[str]:
    """Yield where ImageNet's lists may lie, the nearest first."""
    for _ in range(_PARENTS):
        for place in _PLACES:
            yield os.path.join(folder, place)
        folder = os.path.join(folder, os.pardir)


def _text_of(path: str) -> bytes | None:
    try:
        return read_head(path, _MAX_LIST_BYTES)
    except OSError:
        return None


def _picture_name(key: str) -> str:
    found = _VALIDATION_PICTURE.search(key)
    return f"ILSVRC2012_val_{found[1]}" if found else ""


def _solution(text: bytes, path: str) -> Iterator[tuple[str, str]]:
    """Yield picture and class from lines such as `ILSVRC2012_val_00048981,n03995372 85 1 499 272`."""
    lines = csv.reader(io.StringIO(text.decode("utf-8", "replace")))
    try:
        if next(lines, None) != ["ImageId", "PredictionString"]:
            raise ValueError(f"{path}: does not begin with ImageId,PredictionString; fetch it again, or take --labels none")
        for line in lines:
            if len(line) == 2 and (words := line[1].split()):
                yield line[0], words[0]
    except csv.Error as error:  # a field without end, such as a quote that nothing closes
        raise ValueError(f"{path}: line {lines.line_num} is no line of CSV ({error}); fetch it again, or take --labels none") from error


def _devkit(text: bytes, path: str, meta: str) -> Iterator[tuple[str, str]]:
    """Yield picture and class from the ground truth, a number a line in the order of the pictures, and what meta.mat says of numbers."""
    wordnet_id = _wordnet_ids(meta)
    for number, word in enumerate(text.split(), 1):
        if not word.isdigit() or int(word) not in wordnet_id:
            raise ValueError(f"{path}: line {number} is {word[:20]!r}, no number of a class of {meta}; fetch it again")
        yield f"ILSVRC2012_val_{number:08d}", wordnet_id[int(word)]


def _wordnet_ids(meta: str) -> Mapping[int, str]:
    """Return the WordNet id of every number that the devkit gives a class."""
    try:
        from scipy.io import loadmat  # an extra: one file of one data set is all that needs it
        from scipy.io.matlab import MatReadError
    except ModuleNotFoundError as error:
        raise ValueError(f"{meta}: is read by scipy, which is not here; pip install scipy, or put {_SOLUTION} there") from error
    try:
        rows = loadmat(io.BytesIO(read_head(meta, _MAX_LIST_BYTES)), variable_names=["synsets"], squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if int(row["num_children"]) == 0}
    except (MatReadError, LookupError, TypeError, ValueError, OSError, NotImplementedError, ArithmeticError, zlib.error) as error:
        raise ValueError(f"{meta}: is not the devkit's ({type(error).__name__}); fetch it again, or put {_SOLUTION} there") from error
