"""Recipes as a config gives them: by name, in a YAML file, or written out."""

import dataclasses
from pathlib import Path
from typing import Any

from qswin.calib.reading import read_yaml
from qswin.qat.quant.recipe import Recipe, named_recipe


def read_recipe(written: Any, calibrator: str | None = None, budget: float | None = None) -> Recipe:
    """The recipe that is meant.

    Args:
        written: a name, the name of a YAML file (qswin search writes one), or a mapping as `Recipe.to_dict` gives it.
        calibrator: of activations, over the recipe's.
        budget: of mean KL, over the recipe's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the name is not known, or what is written is not a recipe.
    """
    where, written = written if isinstance(written, str) else "recipe", contents(written)
    if not isinstance(written, str | dict):
        raise ValueError(f"recipe={written!r}: give a name, a YAML file or a mapping")
    recipe = Recipe.from_dict(written, where) if isinstance(written, dict) else named_recipe(written)
    if calibrator is not None:
        recipe = dataclasses.replace(recipe, calibrator=calibrator)
    return recipe if budget is None else dataclasses.replace(recipe, budget=budget)


def contents(written: Any) -> Any:
    """What a recipe's file says; anything but the name of a file is returned as it is. Raises as `read_recipe` does."""
    if not (isinstance(written, str) and written.endswith((".yaml", ".yml"))):
        return written
    path = Path(written)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe file")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path}: not a recipe; `qswin search` writes one, and docs/recipes.md shows one")
    return values
