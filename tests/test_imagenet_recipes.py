"""The first 20 updates of every recipe for ImageNet or COCO on photographs, in batches of 2: finite, and of losses as formulas have them.

Networks, views, heads, precision and rates are the recipes'; but for Barlow Twins and VICReg, of whose heads the hidden layers are narrowed
from 8192 to 2048: whole, 20 updates take two minutes. The rates are those of the first updates of hundreds of epochs.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from host_runs import Rows, trainer_of

from wherefrom.train import RECIPES, TrainSettings, recipe
from wherefrom.train.meters import GRADIENT, LOSS, TERM

BATCH = 2
D, K = 8192, 65536
# Each term at first: what formulas say of features that tell nothing yet, and by which factor it may be off.
FIRST: dict[str, Mapping[str, tuple[float, float]]] = {
    "imagenet_sp_vits16": {"spatial/position": (2, 2), "spatial/scale": (1, 2)},  # variances of standardized targets
    "imagenet_sp_dense_vits16": {"dense/position": (2, 2), "dense/scale": (1, 2)},
    "imagenet_simclr_r50": {"simclr/contrast": (2 * math.log(2 * BATCH - 1), 3)},  # chance; cosines of 0.1 are logits of 1
    "imagenet_byol_r50": {"byol/distance": (4, 1.2)},  # of directions that have nothing to do with one another
    # BatchNorm of two pictures gives 1 and -1: a channel agrees or not, and any two of them are alike or opposite
    "imagenet_barlow_r50": {"barlow/invariance": (2 * D, 1.5), "barlow/redundancy": (D * (D - 1), 1.1)},
    "imagenet_vicreg_r50": {"vicreg/variance": (0.5, 2)},  # of what can be between 0 and 1
    "imagenet_dino_vits16": {"dino/dino": (math.log(K), 1.1)},
    "coco_gtsa_vits16": {"gtsa/rotation": (math.log(4), 1.3)},  # chance; what regions are alike by, formulas do not say
    "imagenet_mocov3_vits16": {"moco_v3/contrast": (4 * 0.2 * math.log(BATCH), 2)},  # chance, twice, by 2 T
    "imagenet_part_vitb16": {"part/position": (2, 1.5)},  # variances of standardized targets
    "imagenet_rotation_r50": {"rotation/turn": (math.log(4), 1.3)},  # chance, as the next
    "imagenet_context_r50": {"context/direction": (math.log(8), 1.3)},
    "imagenet_jigsaw_r50": {"jigsaw/permutation": (math.log(2000), 1.3)},
    "imagenet_colorization_r50": {"colorization/color": (math.log(313), 1.3)},
    "imagenet_mae_vitb16": {"mae/pixels": (1, 2.5)},  # the variance of normalized patches, and of what is told of them at random
}
NAMES = [name for name in RECIPES.own if name.startswith(("imagenet_", "coco_"))]


def on_photographs(name: str, photographs: Path) -> TrainSettings:
    settings = recipe(name)
    ((host, learned),) = settings.objectives.items()
    changes: Any = {"barlow": {"hidden": 2048}, "vicreg": {"hidden": 2048}, "part": {"snap": "pixel"}}  # which every renderer cuts
    settings = settings.with_objectives(**{host: replace(learned, **changes.get(host, {}))})  # type: ignore[type-var]
    runtime = replace(settings.runtime, device="cpu", renderer="torch", threads=1, log_with="none")
    return replace(settings, data=str(photographs / "imagenet-sample"), global_batch=BATCH, runtime=runtime)


def first_updates(settings: TrainSettings, count: int) -> Rows:
    """Return what each of the first updates of a run measures; broken ones raise."""
    with trainer_of(settings) as trainer:
        rows = []
        for _ in range(count):
            trainer.update()
            rows.append(trainer.window.take())
        return rows


def assert_plausible(rows: Rows, name: str) -> None:
    """Raise AssertionError unless all numbers are finite, and the first ones as formulas have them."""
    for row in rows:
        assert all(math.isfinite(value) for key, value in row.items() if key == LOSS or key.startswith((TERM, GRADIENT)))
    for term, (expected, factor) in FIRST[name].items():
        assert expected / factor < rows[0][f"{TERM}{term}"] < expected * factor, term
    assert rows[0][LOSS] != rows[-1][LOSS]


@pytest.mark.core
def test_every_recipe_has_a_row() -> None:
    assert set(FIRST) == set(NAMES)


@pytest.mark.core
def test_first_updates_of_a_recipe_are_plausible(photographs: Path) -> None:
    rows = first_updates(on_photographs("imagenet_mae_vitb16", photographs), 2)
    assert_plausible(rows, "imagenet_mae_vitb16")
    with pytest.raises(AssertionError):  # control
        assert_plausible([{key: 3 * value for key, value in row.items()} for row in rows], "imagenet_mae_vitb16")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_20_updates_of_every_recipe_are_plausible(name: str, photographs: Path) -> None:
    assert_plausible(first_updates(on_photographs(name, photographs), 20), name)
