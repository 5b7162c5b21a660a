"""Runs by name: the table of recipes, and what a settings file starts from.

Here: where each recipe is defined; complete settings of one, of which files and the command line change what they are told.
Not here: the recipes (one file a method beside this one), what settings mean (settings.py, objectives/).
"""

from dataclasses import replace
from pathlib import Path

from wherefrom.pipeline.entry_table import EntryTable
from wherefrom.train.plain_data import unchecked
from wherefrom.train.settings import TrainSettings, overlaid, read_plain_settings

DEFAULT = "demo"

RECIPES = EntryTable(
    kind="recipe",
    group="wherefrom.recipes",
    own={
        "demo": "wherefrom.train.recipes.spatial:demo",
        "sp_dense": "wherefrom.train.recipes.spatial:sp_dense",
        "imagenette_sp": "wherefrom.train.recipes.spatial:imagenette_sp",
        "imagenet_sp_vits16": "wherefrom.train.recipes.spatial:imagenet_sp_vits16",
        "imagenet_sp_dense_vits16": "wherefrom.train.recipes.spatial:imagenet_sp_dense_vits16",
        "part": "wherefrom.train.recipes.part:part",
        "imagenette_part": "wherefrom.train.recipes.part:imagenette_part",
        "imagenet_part_vitb16": "wherefrom.train.recipes.part:imagenet_part_vitb16",
        "gtsa": "wherefrom.train.recipes.gtsa:gtsa",
        "imagenette_gtsa": "wherefrom.train.recipes.gtsa:imagenette_gtsa",
        "coco_gtsa_vits16": "wherefrom.train.recipes.gtsa:coco_gtsa_vits16",
        "imagenette_mocov3": "wherefrom.train.recipes.moco_v3:imagenette_mocov3",
        "imagenet_mocov3_vits16": "wherefrom.train.recipes.moco_v3:imagenet_mocov3_vits16",
        "imagenette_dino": "wherefrom.train.recipes.dino:imagenette_dino",
        "imagenet_dino_vits16": "wherefrom.train.recipes.dino:imagenet_dino_vits16",
        "imagenette_mae": "wherefrom.train.recipes.mae:imagenette_mae",
        "imagenet_mae_vitb16": "wherefrom.train.recipes.mae:imagenet_mae_vitb16",
        "imagenette_simclr": "wherefrom.train.recipes.simclr:imagenette_simclr",
        "imagenet_simclr_r50": "wherefrom.train.recipes.simclr:imagenet_simclr_r50",
        "imagenette_byol": "wherefrom.train.recipes.byol:imagenette_byol",
        "imagenet_byol_r50": "wherefrom.train.recipes.byol:imagenet_byol_r50",
        "imagenette_barlow": "wherefrom.train.recipes.barlow:imagenette_barlow",
        "imagenet_barlow_r50": "wherefrom.train.recipes.barlow:imagenet_barlow_r50",
        "imagenette_vicreg": "wherefrom.train.recipes.vicreg:imagenette_vicreg",
        "imagenet_vicreg_r50": "wherefrom.train.recipes.vicreg:imagenet_vicreg_r50",
        "rotation": "wherefrom.train.recipes.classics:rotation",
        "imagenette_rotation": "wherefrom.train.recipes.classics:imagenette_rotation",
        "imagenet_rotation_r50": "wherefrom.train.recipes.classics:imagenet_rotation_r50",
        "context": "wherefrom.train.recipes.classics:context",
        "imagenette_context": "wherefrom.train.recipes.classics:imagenette_context",
        "imagenet_context_r50": "wherefrom.train.recipes.classics:imagenet_context_r50",
        "jigsaw": "wherefrom.train.recipes.classics:jigsaw",
        "imagenette_jigsaw": "wherefrom.train.recipes.classics:imagenette_jigsaw",
        "imagenet_jigsaw_r50": "wherefrom.train.recipes.classics:imagenet_jigsaw_r50",
        "colorization": "wherefrom.train.recipes.classics:colorization",
        "imagenette_colorization": "wherefrom.train.recipes.classics:imagenette_colorization",
        "imagenet_colorization_r50": "wherefrom.train.recipes.classics:imagenet_colorization_r50",
    },
)


def recipe(name: str) -> TrainSettings:
    """Return the settings of the recipe called `name`.

    Raises: ValueError if there is none, with the nearest name; or if what another package calls so is none.
    """
    make = RECIPES[name]
    if not callable(make):
        raise ValueError(f"recipe {name!r} of {RECIPES.owner(name)} is {make!r:.60}, expected a function; mend or uninstall it")
    result = make()
    if not isinstance(result, TrainSettings):
        raise ValueError(f"recipe {name!r} of {RECIPES.owner(name)} returns {result!r:.60}, expected TrainSettings; mend or uninstall it")
    return replace(result, recipe=name)


def started(name: str, file: Path | None) -> TrainSettings:
    """Return the settings of a recipe (no name: the file's, else the default), with what a settings file says; unchecked, for `settled`.

    Raises: ValueError if the file is of another recipe than the named one, or of none that there is; as `overlaid`.
    """
    if file is None:
        return unchecked(recipe(name or DEFAULT))
    named = str(read_plain_settings(file).get("recipe", name or DEFAULT))
    if name and name != named:
        raise ValueError(f"recipe {name!r}: {file} is of recipe {named!r}; leave the name out, or take another file or --out")
    if named not in RECIPES:
        raise ValueError(f"{file}: recipe={named!r}: a file changes one of {', '.join(RECIPES)}; name that, or leave it out for {DEFAULT}")
    return overlaid(file, recipe(named))
