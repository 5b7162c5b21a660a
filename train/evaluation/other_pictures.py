"""Pictures from elsewhere, in the layouts of ImageNet-C, -R, -A and -Sketch, and a classifier that only training pictures shaped.

Here: where such pictures lie, labels as those of the training pictures, the frozen classifier.
Not here: what is measured of them (corruptions.py, variants.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from wherefrom.pipeline.shards.index import ShardIndex
from wherefrom.train.evaluation.features import CORRUPTED, VARIANTS, Evaluation, Labeled, OpenPictures, Part
from wherefrom.train.evaluation.knn import neighbors
from wherefrom.train.evaluation.labels import vote
from wherefrom.train.evaluation.linear_maps import linear_classifier, scores
from wherefrom.train.evaluation.pictures import ShardPictures
from wherefrom.train.evaluation.protocols import NotMeasuredError

SEVERITIES = (1, 2, 3, 4, 5)
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
ClassifierName = Literal["k-NN", "linear"]


def other_pictures(folders: Mapping[str, Path], train: ShardIndex, **options: Any) -> dict[str, OpenPictures]:
    """Return how to open the pictures in folders, by the names that `Evaluation.others` takes: "imagenet-r", "imagenet-c/snow/3".

    folders: by "imagenet-c", of which a folder has CORRUPTION/SEVERITY/CLASS/*.JPEG, itself or the folders in it (noise, blur, weather,
    digital, as it is handed out), and by the names of VARIANTS, CLASS/*. A class is known by the name of its folder: that of a class of
    the training pictures, or, where they number a thousand from 0 on, ImageNet's. options: as ShardPictures takes them.
    Raises: ValueError in one line if a name or a folder is none, or classes cannot be told.
    """
    opened: dict[str, OpenPictures] = {}
    for name, folder in folders.items():
        if name != CORRUPTED and name not in VARIANTS:
            raise ValueError(f"pictures named {name!r}: there are {', '.join((CORRUPTED, *VARIANTS))}")
        if not folder.is_dir():
            raise ValueError(f"{name}: {folder} is no folder; name the one that its classes or corruptions lie in")
        found = {name: folder} if name in VARIANTS else _corrupted(folder)
        classes = class_names(train)
        opened |= {each: _opener(path, classes, options) for each, path in found.items()}
    return opened


def class_names(train: ShardIndex) -> Sequence[str]:
    """Return the names of the training pictures' classes, by number.

    Raises: ValueError if they are numbers that are not those of ImageNet.
    """
    if train.classes:
        return train.classes
    numbers = set(train.label[train.label >= 0].tolist())
    if numbers == set(range(1000)):
        return ImageNetInfo("imagenet-1k").label_names()
    raise ValueError(
        f"{train.paths[0]} numbers its {len(numbers)} classes, and folders name theirs: they cannot be compared; label training pictures "
        "by names, or take all of ImageNet's numbers, 0 to 999"
    )


def _corrupted(folder: Path) -> dict[str, Path]:
    """Return the folders of ImageNet-C by corruption and severity."""
    parents = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = {}
    for corruption in CORRUPTIONS:
        places = [parent / corruption for parent in parents if (parent / corruption).is_dir()]
        for severity in SEVERITIES if places else ():
            if (places[0] / str(severity)).is_dir():
                found[f"{CORRUPTED}/{corruption}/{severity}"] = places[0] / str(severity)
    if not found:
        raise ValueError(f"{CORRUPTED}: {folder} has no folder such as {CORRUPTIONS[0]}/1; name the one that corruptions lie in")
    return found


def _opener(folder: Path, classes: Sequence[str], options: Mapping[str, Any]) -> OpenPictures:
    return lambda: ShardPictures(ShardIndex.open(folder, classes=classes), **options)


class FrozenClassifier:
    """What tells a picture's class by its features: its neighbors among training pictures, or a linear map; made once of these."""

    def __init__(self, train: Labeled, column: str, *, head: ClassifierName, k: int, temperature: float) -> None:
        self.features, self.labels = train.features[column], train.labels
        self.k, self.temperature = k, temperature
        classes = int(self.labels.max()) + 1
        self.weights = linear_classifier(self.features, self.labels, classes=classes) if head == "linear" else None

    def tell(self, features: Tensor, among: Tensor | None = None) -> Tensor:
        """Return the class of every row of features (M, D), of those alone that are `among` (C,), by default of all: (M,) int64."""
        if self.weights is not None:
            of_classes = scores(features, self.weights)
            return of_classes.argmax(-1) if among is None else among[of_classes[:, among].argmax(-1)]
        rows = slice(None) if among is None else torch.isin(self.labels, among)
        similarity, nearest = neighbors(self.features[rows], features, k=self.k)
        return vote(similarity, self.labels[rows][nearest], temperature=self.temperature)


def frozen_classifiers(
    evaluation: Evaluation, part: Part, *, head: ClassifierName, k: int, temperature: float
) -> dict[str, FrozenClassifier]:
    """Return what tells classes by a part of the training pictures, by column.

    Raises: NotMeasuredError if they have no labels.
    """
    train = evaluation.labeled("train", part)
    if not len(train.labels):
        raise NotMeasuredError("the training pictures have no labels")
    return {column: FrozenClassifier(train, column, head=head, k=k, temperature=temperature) for column in train.features}
