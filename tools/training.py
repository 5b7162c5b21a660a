"""`wherefrom train`: a command line made from the settings, and where its default values come from.

Here: the recipe's, a settings file's, or an earlier run's values, then what the command line says beside.
Not here: what the settings are (train/settings.py), the run itself (train/loop.py).
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro

from wherefrom.tools.terminal import Terminal
from wherefrom.train.loop import run
from wherefrom.train.objectives import DenseSpatialSettings, SpatialSettings
from wherefrom.train.recipes import DEFAULT, recipe
from wherefrom.train.run_folder import RunFolder, refuse_if_absent
from wherefrom.train.settings import TrainSettings, read_plain_settings, read_settings


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainSettings):
    """Pretrain an encoder. Every setting can be changed here; what a run was told lies in its settings.yaml."""

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]  # demo, sp_dense, imagenet_sp_vits16, ...
    needs_data: tyro.conf.Suppress[bool] = False  # the recipe's to say
    out: Path | None = None  # the run's folder; None: the next free runs/RECIPE-NUMBER
    resume: bool = False  # go on with the run in `out`
    config: Path | None = None  # a settings.yaml to start from, instead of the recipe's own values


def train_command(arguments: Sequence[str]) -> int:
    """Train as the command line says; return 0, or 128 + n if signal n stopped the run after saving it."""
    # once to learn what to start from, whatever it may learn, then again from there
    anything = replace(recipe(DEFAULT), spatial=SpatialSettings(), dense=DenseSpatialSettings())
    asked = _parsed(anything, "", [word for word in arguments if word not in ("-h", "--help")])
    base = _start(asked)
    options = _parsed(base, asked.recipe or base.recipe, arguments)
    settings = TrainSettings(**{field.name: getattr(options, field.name) for field in fields(TrainSettings)})
    summary = run(settings, reporter=Terminal(), out=options.out, resume=options.resume)
    return 128 + signal.Signals[summary.stopped_by] if summary.stopped_by else 0


def _parsed(base: TrainSettings, named: str, words: Sequence[str]) -> TrainOptions:
    default = TrainOptions(**{field.name: getattr(base, field.name) for field in fields(base)} | {"recipe": named})
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(TrainOptions, prog="wherefrom train", args=words, default=default, config=markers)


def _start(asked: TrainOptions) -> TrainSettings:
    """Return the settings that the command line changes: a file's, those of the run to go on with, or the recipe's.

    Raises: ValueError if there is no run to go on with, or if the file or the run is of another recipe than the one that is named.
    """
    file = asked.config
    if asked.resume and asked.out is not None:
        refuse_if_absent(asked.out)
    if file is None and asked.resume and asked.out is not None and RunFolder(asked.out).settings.is_file():
        file = RunFolder(asked.out).settings
    if file is None:
        return recipe(asked.recipe or DEFAULT)
    named = str(read_plain_settings(file).get("recipe", asked.recipe or DEFAULT))
    if asked.recipe and asked.recipe != named:
        raise ValueError(f"recipe {asked.recipe!r}: {file} is of recipe {named!r}; leave the name out, or take another file or --out")
    return read_settings(file, recipe(named))
