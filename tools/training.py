"""`wherefrom train`: a command line made from the settings, and where its default values come from.

Here: the recipe's, a settings file's, or an earlier run's values, then what the command line says beside; checked once, all together.
Not here: what the settings are (train/settings.py), the run itself (train/loop.py).
"""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from wherefrom.tools.terminal import Terminal
from wherefrom.train.loop import run
from wherefrom.train.objectives import DenseSpatialSettings, SpatialSettings
from wherefrom.train.plain_data import unchecked, unchecked_type
from wherefrom.train.recipes import DEFAULT, recipe, started
from wherefrom.train.run_folder import RunFolder, refuse_if_absent
from wherefrom.train.settings import TrainSettings, settled, with_its_own_model

HELP = ("-h", "--help")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainSettings):
    """Pretrain an encoder. Every setting can be changed here; what a run was told lies in its settings.yaml."""

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]  # demo, sp_dense, imagenet_sp_vits16, ...
    needs_data: tyro.conf.Suppress[bool] = False  # the recipe's to say
    out: Path | None = None  # the run's folder; None: the next free runs/RECIPE-NUMBER
    resume: bool = False  # go on with the run in `out`
    config: Path | None = None  # a settings.yaml, whole or in part, whose values go over the recipe's


def train_command(arguments: Sequence[str]) -> int:
    """Train as the command line says; return 0, or 128 + n if signal n stopped the run after saving it."""
    # once to learn what to start from, whatever it may learn, then again from there
    anything = replace(recipe(DEFAULT), spatial=SpatialSettings(), dense=DenseSpatialSettings())
    words = [word for word in arguments if word not in HELP]
    asked = _parsed(unchecked(anything), "", words, tyro.conf.AvoidSubcommands)
    file = _file(asked)
    base = started(asked.recipe, file)
    given = {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}
    _refuse_absent(base, given)
    options = _parsed(base, asked.recipe or base.recipe, arguments, tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    stage = with_its_own_model(options, base, given={name.removeprefix("model.") for name in given})
    settings = settled(stage, source=f"{file} and the command line" if file is not None else None)
    summary = run(settings, reporter=Terminal(), out=options.out, resume=options.resume)
    return 128 + signal.Signals[summary.stopped_by] if summary.stopped_by else 0


def _parsed(base: TrainSettings, named: str, words: Sequence[str], *markers: Any) -> TrainOptions:
    """Return what the words make of `base`; nothing is checked but their form."""
    kind = unchecked_type(TrainOptions)
    default = kind(**{field.name: getattr(base, field.name) for field in fields(TrainSettings)} | {"recipe": named})
    return tyro.cli(kind, prog="wherefrom train", args=words, default=default, config=markers)


def _file(asked: TrainOptions) -> Path | None:
    """Return the file whose settings the command line changes: the one that is named, or that of the run to go on with.

    Raises: ValueError if there is no run to go on with.
    """
    if asked.resume and asked.out is not None:
        refuse_if_absent(asked.out)
        saved = RunFolder(asked.out).settings
        return asked.config or (saved if saved.is_file() else None)
    return asked.config


def _refuse_absent(base: TrainSettings, given: set[str]) -> None:
    """Raise ValueError if a setting is given of a part that `base` has not, such as another objective, and say where it can be had."""
    for name in sorted(given):
        *parents, last = name.split(".")
        held: Any = base
        for depth, parent in enumerate(parents):
            held = getattr(held, parent)
            if held is None:
                part = ".".join(parents[: depth + 1])
                inner = f"{last.removeprefix('no_')}: ..."
                for outer in reversed(parents):
                    inner = f"{outer}: {{{inner}}}"
                raise ValueError(f"--{name.replace('_', '-')}: {base.recipe} has no {part}; a file for --config can add it, e.g. {inner}")
