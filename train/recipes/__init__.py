"""Runs by name: complete settings, one file a method, or a few that belong together. `RECIPES` is the table of them."""

from wherefrom.train.recipes.table import DEFAULT, RECIPES, recipe, started

__all__ = ["DEFAULT", "RECIPES", "recipe", "started"]
