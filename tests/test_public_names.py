"""What others may rely on, against two lists beside this file: public names with their parameters, and the command line's options.

A list changes when somebody means it to: `python tests/test_public_names.py --take` writes both anew.
"""

import contextlib
import difflib
import enum
import importlib
import inspect
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tyro

from wherefrom.tools.cli import COMMANDS, main
from wherefrom.train import OBJECTIVES, RECIPES, recipe

pytestmark = pytest.mark.core
HERE = Path(__file__).parent
FOLDERS = ("kernels", "pipeline", "train")


def public_names() -> list[str]:
    """Return a line for every name in `__all__` of the packages: what it is, and what it is called with."""
    modules = [importlib.import_module(f"wherefrom.{folder}") for folder in FOLDERS]
    return [f"{module.__name__}.{name} {described}" for module in modules for name, described in sorted(_descriptions(module))]


def _descriptions(module: Any) -> Iterator[tuple[str, str]]:
    for name in module.__all__:
        thing = getattr(module, name)
        if not (inspect.isclass(thing) or inspect.isroutine(thing)):
            yield name, "value"
        elif isinstance(thing, enum.EnumMeta):  # whose signature is Python's, another in each version
            yield name, "enum: " + ", ".join(thing.__members__)
        elif getattr(thing, "_is_protocol", False):
            members = sorted(member for member in vars(thing) if member == "__call__" or not member.startswith("_"))
            yield name, "protocol: " + ", ".join(_member(thing, member) for member in members)
        else:
            yield name, f"{'class' if inspect.isclass(thing) else 'function'}({', '.join(_parameters(thing))})"


def _member(protocol: Any, name: str) -> str:
    member = getattr(protocol, name)
    return f"{name}({', '.join(_parameters(member))})" if inspect.isroutine(member) else name


def _parameters(callable: Callable[..., Any]) -> Iterator[str]:
    """Yield names, in order, with = where there is a default, and the star after which they are named."""
    starred = False
    for parameter in inspect.signature(callable).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        starred |= parameter.kind is parameter.VAR_POSITIONAL
        yield f"{prefix}{parameter.name}" + ("=" if parameter.default is not parameter.empty else "")


def command_line() -> list[str]:
    """Return a line for every option of every command, as its own `--help` has them; of `train` with every objective's by default."""
    lines = set()
    command, parse = "", tyro.cli

    def record_and_parse(function: Any, *, args: Any, prog: str, **settings: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # TODO: another way when a tyro comes without get_parser
            parser = tyro.extras.get_parser(function, prog=prog, **settings)
        lines.update(f"{command} {option}" for action in parser._actions for option in action.option_strings or [action.dest])
        return parse(function, args=args, prog=prog, **settings)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(tyro, "cli", record_and_parse)
        for command in COMMANDS:
            for words in calls_with_every_objective() if command == "train" else [[]]:
                with contextlib.suppress(SystemExit):
                    main([*command.split(), *words, "--help"])
    return sorted(lines)


def calls_with_every_objective() -> Iterator[list[str]]:
    """Yield words for `train` that switch on each objective beside a recipe that lacks it."""
    for name in OBJECTIVES:
        lacking = next(each for each in RECIPES if name not in recipe(each).objectives)
        yield [lacking, f"--{name.replace('_', '-')}"]


LISTS: dict[str, Callable[[], list[str]]] = {"public_names.txt": public_names, "command_line.txt": command_line}


def difference(name: str, now: list[str]) -> str:
    """Return in one line what a list lacks (+) and has too much (-), nothing if it is right."""
    listed = (HERE / name).read_text(encoding="utf-8").splitlines()
    changes = [line for line in difflib.unified_diff(listed, now, lineterm="", n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")]
    return "; ".join(changes) and f"{name}: {'; '.join(changes)}. Meant so? python tests/test_public_names.py --take"


@pytest.mark.parametrize("name", LISTS)
def test_public_names_and_options_are_those_of_the_lists(name: str) -> None:
    changes = difference(name, LISTS[name]())
    assert not changes, changes


def test_a_parameter_that_is_renamed_and_an_option_that_goes_are_noticed() -> None:
    names = public_names()
    [line] = [line for line in names if line.startswith("wherefrom.kernels.pair_targets function(")]
    renamed = line.replace("backend=", "path=")
    assert renamed != line
    changes = difference("public_names.txt", [renamed if one == line else one for one in names])
    assert f"-{line}; +{renamed}. Meant so?" in changes and "\n" not in changes
    options = (HERE / "command_line.txt").read_text(encoding="utf-8").splitlines()
    assert "-views --samples. Meant" in difference("command_line.txt", [line for line in options if line != "views --samples"])
    assert {"train --optim.lr", "prove --quick", "index pattern", "bench loader --rounds", "bench kernels --quick"} <= set(options)


def test_how_a_callable_is_called_is_all_there() -> None:
    def example(first: int, second: int = 2, *rest: int, third: int, **others: int) -> None: ...

    def keyword_only(first: int, *, second: int = 2) -> None: ...

    assert list(_parameters(example)) == ["first", "second=", "*rest", "third", "**others"]
    assert list(_parameters(keyword_only)) == ["first", "*", "second="]


if __name__ == "__main__":
    if sys.argv[1:] != ["--take"]:
        sys.exit("usage: python tests/test_public_names.py --take")
    for name, list_now in LISTS.items():
        (HERE / name).write_text("".join(f"{line}\n" for line in list_now()), encoding="utf-8")
        print(f"tests/{name}: taken")
