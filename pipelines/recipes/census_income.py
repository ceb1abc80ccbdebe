"""Census-Income (KDD): from UCI's two text files, or the bundled Parquet files, to PLE's task group 1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import schema_yaml
from pipelines.convert.options import Options
from pipelines.recipes import text
from pipelines.recipes.recipe import Prepare, RawFile, Recipe
from stem_util.errors import UserError

COLUMNS = (
    "age", "class_worker", "det_ind_code", "det_occ_code", "education", "wage_per_hour", "hs_college", "marital_stat",
    "major_ind_code", "major_occ_code", "race", "hisp_origin", "sex", "union_member", "unemp_reason",
    "full_or_part_emp", "capital_gains", "capital_losses", "stock_dividends", "tax_filer_stat", "region_prev_res",
    "state_prev_res", "det_hh_fam_stat", "det_hh_summ", "instance_weight", "mig_chg_msa", "mig_chg_reg",
    "mig_move_reg", "mig_same", "mig_prev_sunbelt", "num_emp", "fam_under_18", "country_father", "country_mother",
    "country_self", "citizenship", "own_or_self", "vet_question", "vet_benefits", "weeks_worked", "year", "income_50k",
)  # fmt: skip
"""The columns of UCI's files, in order."""
_GET = (
    "unpack census-income+kdd.zip of https://archive.ics.uci.edu/dataset/117 and what is packed in it, or give "
    "--raw=datasets/census_income"
)
_HALVES_SEED = 1


def _prepare(given: Prepare) -> Options:
    schema = schema_yaml.load("census_income")
    kinds: dict[str, text.Kind] = dict.fromkeys(COLUMNS, "text")
    kinds |= {feature.column: "optional integer" for feature in schema.features if feature.dtype == "int64"}
    train, test = (_read(given.files[file.name], kinds) for file in RECIPE.files)
    order, half = np.random.RandomState(_HALVES_SEED).permutation(len(test)), len(test) // 2
    parts = {"train": train, "validation": test.take(order[:half]), "test": test.take(order[half:])}
    paths = {split: str(given.scratch / f"{split}.parquet") for split in parts}
    for split, table in parts.items():
        pq.write_table(table, paths[split])
    return Options(schema=schema, output="", given=paths)


def _read(path: Path, kinds: Mapping[str, text.Kind]) -> pa.Table:
    if path.suffix != ".parquet":
        return pa.concat_tables(text.tables(path, kinds, _GET))
    try:
        return pq.read_table(path, columns=list(COLUMNS))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is no Parquet file of Census-Income ({str(error).splitlines()[0]}): {_GET}") from None


RECIPE = Recipe(
    name="census_income",
    title="Census-Income (KDD): income over 50,000 dollars, and never married",
    about="""\
One row is a person of the US census of 1994 and 1995. PLE's task group 1: income over 50,000 dollars, and marital
status never married. Features are the 39 other columns without the sampling weight (UCI and PLE count 40, with the
marital status). All are categorical, ages and amounts too; values seen fewer than 5 times in train share one id. Split
as in the MMoE paper (Ma et al., KDD 2018): train is the train file, and the test file is divided at random into two
halves, validation and test. The halves are the same whatever --seed is, because AUCs on the two differ by .0016.""",
    source="UCI Machine Learning Repository, https://doi.org/10.24432/C5N30T",
    licence="CC BY 4.0",
    get=_GET,
    files=(
        RawFile(
            "census-income.data", f"42 values with ', ' between them, no header: {', '.join(COLUMNS)}", "train.parquet"
        ),
        RawFile("census-income.test", "the same", "test.parquet"),
    ),
    prepare=_prepare,
    published={"samples": "299,285", "train samples": "199,523", "fields": "40", "tasks": "2"},
    published_in="UCI and the PLE paper, section 5.2.1",
    config="census_income",
)
