"""`wherefrom recipes`: which runs have a name, ours and those of installed packages, one line each.

Here: the list. Not here: what is in a recipe (`wherefrom train RECIPE --help`), the table of them (train/recipes/table.py).
"""

import inspect

from wherefrom.train.recipes import RECIPES, recipe


def recipes_command() -> int:
    """List all recipes: what each learns, and which package it is of if it is not ours; `wherefrom train RECIPE --help` says more."""
    width = max(map(len, RECIPES))
    for name in RECIPES:
        print(f"{name:<{width}}  {_line(name)}")
    return 0


def _line(name: str) -> str:
    """Return what a recipe's own words say first, or why it cannot be had."""
    try:
        recipe(name)
        words = inspect.getdoc(RECIPES[name]) or "no words of its own"
    except ValueError as problem:
        return str(problem)
    owner = RECIPES.owner(name)
    return words.splitlines()[0] + ("" if owner == "wherefrom" else f" ({owner})")
