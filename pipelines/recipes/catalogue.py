"""The recipes there are."""

from __future__ import annotations

from pipelines.recipes import census_income, contradictory, mmoe_synthetic, movielens_1m, tiktok
from pipelines.recipes.recipe import Recipe

_MODULES = (census_income, movielens_1m, tiktok, mmoe_synthetic, contradictory)
RECIPES: dict[str, Recipe] = {module.RECIPE.name: module.RECIPE for module in _MODULES}
"""By name: public logs, then generated ones."""
