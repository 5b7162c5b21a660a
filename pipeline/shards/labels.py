"""What labels samples: the rule that a user names, and what the files of ImageNet say of its validation pictures.

Here: `LabelRule`, the label in a text or a tar's name, ILSVRC2012's lists of validation labels.
Not here: reading tars (table.py), folders' names as labels (tree.py), names of classes to numbers (index.py).
A label is a whole number of the data's own, or the name of a class; Python's order of strings, which torchvision sorts by, numbers names.
"""

import json
import os
import re
from dataclasses import dataclass
from typing import Literal, Self

__all__ = ["LabelRule", "class_of_tar", "label_of_text"]

_WHOLE_NUMBER = re.compile(r"[+-]?[0-9]{1,18}")
_EXTENSION = re.compile(r"[a-z0-9_]{1,16}(\.[a-z0-9_]{1,16})*")
_WORDNET_ID = re.compile(r"n[0-9]{8}")
_MAX_NAME = 256  # letters of a class's name


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelRule:
    """Where the labels of samples lie; `of` reads what users write."""

    kind: Literal["auto", "none", "tar", "member"]
    extension: bytes = b""  # of the member to read
    field: tuple[str, ...] = ()  # of its JSON

    @classmethod
    def of(cls, labels: str | None) -> Self:
        """Return the rule that is written as None, "none", "tar", an extension such as "cls", or "json.FIELD".

        Raises: ValueError for anything else.
        """
        if labels is None:
            return cls(kind="auto", extension=b"cls")
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
