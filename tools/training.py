"""`wherefrom train`: a command line made from the settings, and where its default values come from.

Here: the recipe's, a settings file's, or an earlier run's values, then what the command line says beside; checked once, all together.
Not here: what the settings are (train/settings.py), the run itself (train/loop.py).
"""

import itertools
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from wherefrom.pipeline.entry_table import EntryTable
from wherefrom.tools.terminal import Terminal
from wherefrom.train.loop import run
from wherefrom.train.objective import ObjectiveSettings
from wherefrom.train.objectives import DenseSpatialSettings, SpatialSettings
from wherefrom.train.plain_data import checked_type, entry_class, named_fields, unchecked, unchecked_default
from wherefrom.train.recipes import DEFAULT, RECIPES, recipe, started
from wherefrom.train.run_folder import RunFolder, refuse_if_absent
from wherefrom.train.settings import TrainSettings, settled, with_its_own_model

HELP = ("-h", "--help")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainSettings):
    """Pretrain an encoder. Every setting can be changed here; what a run was told lies in its settings.yaml."""

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]  # demo, sp_dense, imagenet_sp_vits16, ...
    needs_data: tyro.conf.Suppress[bool] = False  # the recipe's to say
    foreign_objectives: tyro.conf.Suppress[Mapping[str, ObjectiveSettings]] = field(default_factory=dict)  # a file's to say
    out: Path | None = None  # the run's folder; None: the next free runs/RECIPE-NUMBER
    resume: bool = False  # go on with the run in `out`
    config: Path | None = None  # a settings.yaml, whole or in part, whose values go over the recipe's


def train_command(arguments: Sequence[str]) -> int:
    """Train as the command line says; return 0, or 128 + n if signal n stopped the run after saving it."""
    # once to learn what to start from, whatever it may learn, then again from there
    anything = replace(recipe(DEFAULT), spatial=SpatialSettings(), dense=DenseSpatialSettings())
    words = [word for word in arguments if word not in HELP]
    first_pass = _parsed(anything, "", _without_entries(words, anything), tyro.conf.AvoidSubcommands)
    file = _file(first_pass)
    base = started(first_pass.recipe, file)
    for path, table in list(named_fields(base)):
        base = _with_entry(base, path, table, words)
    given = {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}
    _refuse_absent(base, given)
    options = _parsed(base, first_pass.recipe or base.recipe, arguments, tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    if options.recipe != (first_pass.recipe or base.recipe):
        raise ValueError(f"recipe {recipe(options.recipe).recipe!r}: name it before the options")
    stage = with_its_own_model(options, base, given={name.removeprefix("model.") for name in given})
    settings = settled(stage, source=f"{file} and the command line" if file is not None else None)
    summary = run(settings, reporter=Terminal(), out=options.out, resume=options.resume)
    return 128 + signal.Signals[summary.stopped_by] if summary.stopped_by else 0


def _parsed(base: TrainSettings, named: str, words: Sequence[str], *markers: Any) -> TrainOptions:
    """Return what the words make of `base`; nothing is checked but their form."""
    default = replace(unchecked(base, TrainOptions, naming=_naming), recipe=named)
    return tyro.cli(type(default), prog="wherefrom train", args=words, default=default, config=markers)


def _naming(table: EntryTable) -> Any:
    """Return the annotation of the option that names one of a table."""
    return Annotated[
        str, tyro.conf.arg(name="", metavar="NAME", help=f"one of {', '.join(table)}; another has its own options and defaults")
    ]


def _without_entries(words: Sequence[str], base: TrainSettings) -> list[str]:
    """Return the words but for what is said of a field that holds one of a table, whose options are known once it is known which.

    The values of such an option end where another option begins, or a recipe is named.
    """
    paths = [f"--{path}".replace("_", "-") for path, _ in named_fields(base)]
    others, skipping = [], False
    for before, word in zip(["", *words], words, strict=False):
        option = word.partition("=")[0].replace("_", "-")
        if word.startswith("--"):
            skipping = any(option == path or option.startswith(f"{path}.") for path in paths)
        elif before.startswith("--") and "=" not in before:
            pass  # the option's first value
        elif word in RECIPES:
            skipping = False
        if not skipping:
            others.append(word)
    return others


def _with_entry(base: TrainSettings, path: str, table: EntryTable, words: Sequence[str]) -> TrainSettings:
    """Return `base`, a stage, with the entry of a table that is named for a field; what has no default is the command line's to say."""
    option = f"--{path}".replace("_", "-")
    named = [word for flag, word in itertools.pairwise(words) if flag == option]
    named += [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    *parents, last = path.split(".")
    chain: list[Any] = [base]  # what holds it, from the outside in
    for parent in parents:
        chain.append(getattr(chain[-1], parent))
    if not named or named[-1] == table.name_of(checked_type(getattr(chain[-1], last))):
        return base
    changed = unchecked_default(entry_class(table, named[-1], option), missing=tyro.MISSING)
    for held, name in zip(reversed(chain), [last, *reversed(parents)], strict=True):
        changed = replace(held, **{name: changed})
    return changed


def _file(first_pass: TrainOptions) -> Path | None:
    """Return the file whose settings the command line changes: the one that is named, or that of the run to go on with.

    Raises: ValueError if there is no run to go on with.
    """
    if first_pass.resume and first_pass.out is not None:
        refuse_if_absent(first_pass.out)
        saved = RunFolder(first_pass.out).settings
        return first_pass.config or (saved if saved.is_file() else None)
    return first_pass.config


def _refuse_absent(base: TrainSettings, given: set[str]) -> None:
    """Raise ValueError if a setting is given of a part that `base` has not, such as another objective, and say where it can be had."""
    tables = dict(named_fields(base))
    for name in sorted(given):
        *parents, last = name.split(".")
        option = f"--{name.replace('_', '-')}"
        held: Any = base
        for depth, parent in enumerate(parents):
            held = getattr(held, parent, None)
            if held is None:
                part = ".".join(parents[: depth + 1])
                inner = f"{last.removeprefix('no_')}: ..."
                for outer in reversed(parents):
                    inner = f"{outer}: {{{inner}}}"
                raise ValueError(f"{option}: {base.recipe} has no {part}; a file for --config can add it, e.g. {inner}")
        table = tables.get(".".join(parents))
        if table is not None and last.removeprefix("no_") not in (names := [field.name for field in fields(checked_type(held))]):
            which = f"the {table.name_of(checked_type(held))} {table.kind}"
            mend = f"it has {', '.join(names)}; --{'.'.join(parents)} names another {table.kind}"
            raise ValueError(f"{option}: {which} has no {last}; {mend}")
