"""Makes converted data, ready to train on, of a public log as its authors release it, or of a generated one.

    stem-recipe NAME --raw=DIR --output=DIR
    stem-recipe contradictory --rows=1000000 --contradiction=0.7 --output=DIR
    stem-recipe NAME --help

Nothing is downloaded: a recipe's help says where its files come from and under which licence. What a paper prints about
the data is compared with what was found.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from pipelines.jobs import convert
from pipelines.log.parts import CsvOptions
from pipelines.manifest import Manifest
from pipelines.recipes import truth
from pipelines.recipes.catalogue import RECIPES
from pipelines.recipes.recipe import Made, Recipe, Setting, make
from stem_util import cli, copies, owned, stores
from stem_util.errors import UserError, did_you_mean


class _Flags:
    """The flags of the job, with those of one recipe.

    Attributes:
      all: what `cli.run` needs.
      settings: the recipe's own flags by name.
    """

    def __init__(self, recipe: Recipe | None) -> None:
        self.all = flags = cli.Flags()
        self.raw = flags.DEFINE(
            cli.PATH, "raw", None, "Directory of the raw files on this machine, for recipes that read some."
        )
        self.output = flags.DEFINE(cli.PLACE, "output", None, "Directory to create, or its URI.")
        self.seed = flags.DEFINE_integer("seed", 0, "Seed of generated rows, of the split and the shuffle.", 0)
        self.processes = flags.DEFINE_integer(
            "processes", None, "Worker processes (default: the number of cores).", lower_bound=1
        )
        self.overwrite = flags.DEFINE_boolean("overwrite", False, "Replace the converted data at --output.")
        self.settings = {setting.name: self._define(setting) for setting in recipe.settings} if recipe else {}

    def _define(self, setting: Setting) -> Any:
        limits = {"lower_bound": setting.low, "upper_bound": setting.high}
        name, default = setting.name, setting.default
        if isinstance(default, tuple):
            return self.all.DEFINE_list(name, [f"{number:g}" for number in default], _with_default(setting))
        if isinstance(default, int):
            return self.all.DEFINE_integer(name, default, setting.help, **limits)
        if isinstance(default, float):
            return self.all.DEFINE_float(name, default, setting.help, **limits)
        return self.all.DEFINE_enum(name, default, setting.choices, setting.help)

    def values(self, recipe: Recipe) -> dict[str, Any]:
        """The recipe's settings as given.

        Raises:
          UserError: a number is none, or is not finite.
        """
        found = {}
        for setting in recipe.settings:
            value = self.settings[setting.name].value
            found[setting.name] = _numbers(setting.name, value) if isinstance(setting.default, tuple) else value
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{setting.name}={value}: should be a finite number")
        return found


def _with_default(setting: Setting) -> str:
    assert isinstance(setting.default, tuple)
    return f"{setting.help} (default: {','.join(f'{number:g}' for number in setting.default)})"


def _numbers(flag: str, texts: Sequence[str]) -> tuple[float, ...]:
    try:
        return tuple(map(float, texts))
    except ValueError:
        raise UserError(f"--{flag}={','.join(texts)}: should be numbers with commas between them") from None


def main(recipe: Recipe | None, flags: _Flags, argv: Sequence[str]) -> None:
    started = time.monotonic()
    if len(argv) < 2:
        raise UserError(f"name a recipe, as in stem-recipe contradictory --output=DIR. Recipes: {', '.join(RECIPES)}")
    if recipe is None or argv[1] != recipe.name:
        hint = did_you_mean(argv[1], RECIPES) or "."
        raise UserError(f"there is no recipe '{argv[1]}'{hint} Recipes: {', '.join(RECIPES)}")
    if len(argv) > 2:
        raise UserError(f"unexpected argument '{argv[2]}'; flags are written --name=value")
    if not flags.output.value:
        raise UserError("--output is required")
    with copies.output(flags.output.value, owned.DATA, overwrite=flags.overwrite.value) as directory:
        made = make(
            recipe,
            flags.raw.value,
            directory,
            flags.values(recipe),
            seed=flags.seed.value,
            processes=flags.processes.value or len(os.sched_getaffinity(0)),
            overwrite=flags.overwrite.value,
        )
    _print_statistics(recipe, made)
    _print_best(made.manifest)
    where = flags.output.value if stores.is_uri(flags.output.value) else made.manifest.data_dir
    convert.report(made.manifest, where, time.monotonic() - started, CsvOptions(), recipe.config)


def _print_statistics(recipe: Recipe, made: Made) -> None:
    if not made.statistics:
        return
    rows = [("", "published", "found", "")]
    rows += [(s.name, s.published, s.shown, s.verdict) for s in made.statistics]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"{recipe.title}, beside {recipe.published_in}:")
    for name, published, found, verdict in rows:
        print(f"{name:{widths[0]}}  {published:>{widths[1]}}  {found:>{widths[2]}}  {verdict}".rstrip())
    print()


def _print_best(manifest: Manifest) -> None:
    """Prints what the truth itself reaches on test, where it is known."""
    found = truth.best(manifest, "test")
    if found:
        print(f"the best that any model can reach on test, up to chance: {', '.join(found)}\n")


def _described(recipe: Recipe | None) -> str:
    if recipe is None:
        width = max(map(len, RECIPES))
        return "\n".join(["\nrecipes:", *(f"  {name:{width}}  {of.title}" for name, of in RECIPES.items())])
    lines = [f"\n{recipe.name}: {recipe.title}", "", recipe.about, "", f"source: {recipe.source}"]
    lines += [f"licence: {recipe.licence}"]
    lines += [f"files: {recipe.get}"] if recipe.files else []
    lines += [f"  {file.name}{f' (or {file.instead})' if file.instead else ''}: {file.layout}" for file in recipe.files]
    if recipe.published:
        printed = ", ".join(f"{name} {value}" for name, value in recipe.published.items())
        lines += [f"published ({recipe.published_in}): {printed}"]
    return "\n".join([*lines, f"train with: stem-train --config={recipe.config} --config.data.dir=DIR"])


def run() -> None:
    """Console script stem-recipe."""
    recipe = next((RECIPES[argument] for argument in sys.argv[1:] if argument in RECIPES), None)
    flags = _Flags(recipe)

    def job(argv: Sequence[str]) -> None:
        main(recipe, flags, argv)

    cli.run(
        job,
        flags.all,
        recipe.name if recipe else "NAME",
        memory="a conversion with fewer --processes",
        described=functools.partial(_described, recipe),
    )


if __name__ == "__main__":
    run()
