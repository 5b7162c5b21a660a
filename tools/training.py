"""`wherefrom train`: a command line made from the settings, and where its default values come from.

Here: the recipe's, a settings file's, or an earlier run's values, then what the command line says beside; objectives that it adds;
all of it checked once, together.
Not here: what the settings are (train/settings.py), the run itself (train/loop.py).
"""

import itertools
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import tyro

from wherefrom.pipeline.entry_table import EntryTable
from wherefrom.tools.terminal import Terminal
from wherefrom.train.loop import run
from wherefrom.train.objective import OBJECTIVES, ObjectiveSettings
from wherefrom.train.plain_data import checked_type, entry_class, named_fields, unchecked, unchecked_default, with_fields
from wherefrom.train.recipes import DEFAULT, RECIPES, recipe, started
from wherefrom.train.run_folder import RunFolder, refuse_if_absent
from wherefrom.train.settings import TrainSettings, settled, with_its_own_length, with_its_own_model

HELP = ("-h", "--help")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(TrainSettings):
    """Pretrain an encoder. Every setting can be changed here; what a run was told lies in its settings.yaml.

    --NAME, or --NAME.SETTING VALUE, of an objective that the recipe lacks learns it beside: --spatial, --spatial.weight 1.
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]  # one that `wherefrom recipes` lists
    needs_data: tyro.conf.Suppress[bool] = False  # the recipe's to say
    objectives: tyro.conf.Suppress[Mapping[str, ObjectiveSettings]] = field(default_factory=dict)  # options of their own
    out: Path | None = None  # the run's folder; None: the next free runs/RECIPE-NUMBER
    resume: bool = False  # go on with the run in `out`
    config: Path | None = None  # a settings.yaml, whole or in part, whose values go over the recipe's


def train_command(arguments: Sequence[str]) -> int:
    """Train as the command line says; return 0, or 128 + n if signal n stopped the run after saving it."""
    # once to learn what to start from, whatever is learned from there, then again from there
    words = [word for word in arguments if word not in HELP]
    first_pass = _parsed(recipe(DEFAULT), {}, "", _without_objectives(words), tyro.conf.AvoidSubcommands)
    file = _file(first_pass)
    base = _with_named_objectives(started(first_pass.recipe, file), words)
    for path, table in list(named_fields(base)):
        base = _with_entry(base, path, table, words)
    given = {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")} - set(OBJECTIVES)
    _refuse_absent(base, given)
    others = [word for word in arguments if _objective_of(word) is None or "." in word or "=" in word]
    markers = (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
    options = _parsed(base, base.objectives, first_pass.recipe or base.recipe, others, *markers)
    if options.recipe != (first_pass.recipe or base.recipe):
        raise ValueError(f"recipe {recipe(options.recipe).recipe!r}: name it before the options")
    stage = replace(options, objectives={name: getattr(options, name) for name in base.objectives})
    if "epochs" in given and "updates" in given and stage.updates is not None:
        raise ValueError(f"--epochs {stage.epochs} --updates {stage.updates}: a run has one length; leave one of them out")
    stage = with_its_own_length(stage, given=given)
    stage = with_its_own_model(stage, base, given={name.removeprefix("model.") for name in given})
    settings = settled(stage, source=f"{file} and the command line" if file is not None else None)
    summary = run(settings, reporter=Terminal(), out=options.out, resume=options.resume)
    return 128 + signal.Signals[summary.stopped_by] if summary.stopped_by else 0


def _parsed(base: TrainSettings, objectives: Mapping[str, Any], named: str, words: Sequence[str], *markers: Any) -> Any:
    """Return what the words make of `base` and of stages of objectives; nothing is checked but their form."""
    stage = replace(unchecked(base, TrainOptions, naming=_naming), objectives={})
    parts = {name: unchecked(part, naming=_naming) for name, part in objectives.items()}
    default = replace(with_fields(stage, parts), recipe=named)
    return tyro.cli(type(default), prog="wherefrom train", args=words, default=default, config=markers)


def _naming(table: EntryTable) -> Any:
    """Return the annotation of the option that names one of a table."""
    return Annotated[
        str, tyro.conf.arg(name="", metavar="NAME", help=f"one of {', '.join(table)}; another has its own options and defaults")
    ]


def _objective_of(word: str) -> str | None:
    """Return the name of the objective that an option is of, `--spatial` or `--spatial.views`; None if it is of none."""
    name = word[2:].partition("=")[0].partition(".")[0].replace("-", "_")
    return name if word.startswith("--") and name in OBJECTIVES and name not in TrainOptions.__dataclass_fields__ else None


def _without_objectives(words: Sequence[str]) -> list[str]:
    """Return the words but for what is said of objectives, whose options are known once it is known which are learned.

    The values of such an option end where another option begins, or a recipe is named.
    """
    others, skipping = [], False
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("--"):
            skipping = _objective_of(word) is not None
        elif _objective_of(before) is not None and "=" not in before and not _is_flag(before):
            pass  # the option's first value
        elif word in RECIPES or (_objective_of(before) is not None and _is_flag(before)):
            skipping = False
        if not skipping:
            others.append(word)
    return others


def _is_flag(option: str) -> bool:
    """Return whether an option of an objective takes no value: its bare name, or a field that is true or false."""
    name, *path = option[2:].replace("-", "_").split(".")
    kind: Any = OBJECTIVES[name] if path else bool
    for part in path:
        hints = get_type_hints(kind) if is_dataclass(kind) else {}
        kind = hints.get(part, hints.get(part.removeprefix("no_")))
        kind = next((each for each in get_args(kind) if is_dataclass(each)), kind)  # of one that may be none
    return kind is bool


def _with_named_objectives(base: TrainSettings, words: Sequence[str]) -> TrainSettings:
    """Return `base`, a stage, with the objectives of which the command line says something, those that it lacks behind its own."""
    named = dict.fromkeys(name for word in words if (name := _objective_of(word)) is not None)
    new = [name for name in named if name not in base.objectives]
    added = {name: unchecked_default(entry_class(OBJECTIVES, name, f"--{name}"), missing=tyro.MISSING) for name in new}
    return replace(base, objectives={**base.objectives, **added})


def _with_entry(base: TrainSettings, path: str, table: EntryTable, words: Sequence[str]) -> TrainSettings:
    """Return `base`, a stage, with the entry of a table that is named for a field; what has no default is the command line's to say."""
    option = f"--{path}".replace("_", "-")
    named = [word for flag, word in itertools.pairwise(words) if flag == option]
    named += [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    objective, *parents, last = path.split(".")
    chain: list[Any] = [base.objectives[objective]]  # what holds it, from the outside in
    for parent in parents:
        chain.append(getattr(chain[-1], parent))
    if not named or named[-1] == table.name_of(checked_type(getattr(chain[-1], last))):
        return base
    changed = unchecked_default(entry_class(table, named[-1], option), missing=tyro.MISSING)
    for held, name in zip(reversed(chain), [last, *reversed(parents)], strict=True):
        changed = replace(held, **{name: changed})
    return replace(base, objectives={**base.objectives, objective: changed})


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
            held = base.objectives.get(parent) if depth == 0 and parent in OBJECTIVES else getattr(held, parent, None)
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
