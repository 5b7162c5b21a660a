"""All protocols on a ResNet: no class token, no patches, and a coarse map of features; what does not fit is one line."""

from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_evaluation import SIZE, FormulaPictures, values_of

from wherefrom.pipeline.view_recipe import IMAGENET_MEAN, IMAGENET_STD
from wherefrom.train.encoder import Encoder, ModelSettings
from wherefrom.train.evaluation.features import ENCODER, RANDOM, RAW, Evaluation
from wherefrom.train.evaluation.network import Network
from wherefrom.train.evaluation.protocols import PROTOCOLS, measure
from wherefrom.train.objective import random_scope

SHORT: dict[str, dict[str, Any]] = {  # what takes less time than all of it
    "logistic": {"c": (1.0,), "iterations": 5},
    "few-shot": {"shares": (0.1,), "draws": 2, "iterations": 5},
    **{f"linear-{name}": {"epochs": 1, "least_updates": 2, "views": 1} for name in ("dino", "mocov3", "dinov2")},
    "linear-mae": {"epochs": 1, "least_updates": 0, "views": 1},
    "pairs": {"steps": 2},
    "jigsaw": {"permutations": 8, "steps": 2, "pictures": 12, "held_out_pictures": 8},
    "occlusion": {"percent": (50,)},
    "positions": {"rounds": (0, 1)},
    "hummingbird": {"memory": (64,), "k": 5},
    "linear-segmentation": {"epochs": 1, "drop_after": 1, "loss_px": 16, "mask_px": 16},
    "linear-depth": {"epochs": 1, "depth_px": 16, "bins": 8},
}
DO_NOT_FIT = {"linear-dinov2": "the network has no class token"}  # which it puts beside the mean token


class MappedPictures(FormulaPictures):
    """Pictures whose left half is of one class and near, and whose right half is of another and far."""

    classes, background, farthest = ("left", "right"), None, 10.0

    def masks(self, ids: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        return [np.repeat(np.arange(SIZE[1])[None] >= SIZE[1] // 2, SIZE[0], 0).astype(np.uint8) for _ in ids]

    def depths(self, ids: NDArray[np.int64]) -> list[NDArray[np.float32]]:
        return [1 + 4 * mask.astype(np.float32) for mask in self.masks(ids)]


@cache
def resnet() -> Network:
    """A random ResNet whose map is 32 times smaller than its picture."""
    with random_scope("resnet"):
        encoder = Encoder(ModelSettings(name="test_resnet")).requires_grad_(False).eval()
    return Network(encoder=encoder, name="resnet", picture_px=64, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def evaluation(px: int, train: int = 48, held_out: int = 20) -> Evaluation:
    sides = MappedPictures(train), MappedPictures(held_out)
    names = [f"imagenet-c/fog/{severity}" for severity in range(1, 6)] + ["imagenet-r"]
    others = {name: lambda: nullcontext(FormulaPictures(8)) for name in names}
    return Evaluation(replace(resnet(), picture_px=px), *sides, masked=sides, depth=sides, others=others)  # type: ignore[arg-type]


@pytest.mark.core
@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_every_protocol_measures_a_resnet_beside_its_floors_or_says_what_it_lacks(name: str) -> None:
    assert_measured_or_told(name, evaluation(64), grid=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_every_protocol_measures_a_resnet_at_the_usual_size(name: str) -> None:
    assert_measured_or_told(name, evaluation(224), grid=7)


def assert_measured_or_told(name: str, of: Evaluation, *, grid: int) -> None:
    assert of.grid() == (grid, grid)
    (found,) = measure(of, {name: PROTOCOLS[name](**SHORT.get(name, {}))})
    assert found.not_measured == DO_NOT_FIT.get(name, "")
    if name in DO_NOT_FIT:
        return
    values = values_of(found.scores)
    assert {column for _, column in values} >= {ENCODER, RANDOM, RAW}
    assert np.isfinite(list(values.values())).all()
    assert not any("class token" in row for row, _ in values)


@pytest.mark.core
def test_a_map_of_one_cell_has_no_positions() -> None:
    (found,) = measure(evaluation(32), {"positions": PROTOCOLS["positions"]()})
    assert found.not_measured == "the network makes 1 x 1 tokens of a picture: they have no positions"
