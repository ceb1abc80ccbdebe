"""The recipes there are."""

from __future__ import annotations

from pipelines.recipes import (
    ali_ccp,
    census_income,
    contradictory,
    kuairand,
    mmoe_synthetic,
    movielens_1m,
    qk_video,
    tiktok,
)
from pipelines.recipes.recipe import Recipe

_PUBLIC = (
    census_income.RECIPE,
    movielens_1m.RECIPE,
    tiktok.RECIPE,
    qk_video.RECIPE,
    *kuairand.RECIPES,
    ali_ccp.RECIPE,
)
_GENERATED = (mmoe_synthetic.RECIPE, contradictory.RECIPE)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (*_PUBLIC, *_GENERATED)}
"""By name: public logs, then generated ones."""
