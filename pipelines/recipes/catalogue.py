"""The recipes there are."""

from __future__ import annotations

from pipelines.recipes import contradictory
from pipelines.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {module.RECIPE.name: module.RECIPE for module in (contradictory,)}
