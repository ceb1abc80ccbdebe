"""docs/schema.md: every key of a schema is there, with its default, and its example is one."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import schema_yaml
from pipelines.schema import Feature, Label, Ranking, Schema, Task
from stem_util.errors import UserError

PAGE = (Path(__file__).resolve().parents[2] / "docs/schema.md").read_text(encoding="utf-8")
EXAMPLE = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[0]
SECTIONS = {"At the top": Schema, "A feature": Feature, "A task": Task, "A label": Label, "A ranking": Ranking}
# Fields that are no key of their own name: the names of the records, and what YAML writes otherwise.
RENAMED = {"one_of": "in", "boundaries": "bucketise", "quantiles": "bucketise"}


def lines(section: str) -> dict[str, dict[str, str]]:
    """The section's table: by key, its cells by the names of their columns."""
    rows = re.findall(r"^\|(.+)\|$", PAGE.split(f"## {section}\n")[1].split("\n## ")[0], re.MULTILINE)
    head, _, *body = [[cell.strip() for cell in row.split(" | ")] for row in rows]
    table = [dict(zip(head, cells, strict=True)) for cells in body]
    return {row.pop("key").strip("`"): row for row in table}


@pytest.mark.parametrize(("section", "record"), SECTIONS.items())
def test_every_field_has_its_line_with_its_default(section: str, record: Any) -> None:
    table = lines(section)
    for field in dataclasses.fields(record):
        if field.name == "name" and record is not Schema:
            continue
        row = table[RENAMED.get(field.name, field.name)]
        written, default = row["default"].strip("`"), field.default
        if field.name == "column" and record is Feature:
            assert written == "the feature's name"
        elif field.name in ("dtype", "max_length", "length"):
            assert written.startswith("required")
        elif default is dataclasses.MISSING:
            assert written == "required"
        else:
            assert (
                written == "none"
                if default in (None, (), 0) and default is not False
                else yaml.safe_load(written) == default
            )


def allowed(place: str, changed: str = "") -> set[str]:
    """The keys that an error lists for an unknown one at ``place``, a line of the example."""
    with pytest.raises(UserError) as caught:
        changed = changed or (f"{place}, zzz: 1" if "{" in place else f"zzz: 1\n{place}")
        schema_yaml.loads(EXAMPLE.replace(place, changed, 1))
    return set(str(caught.value).rpartition("llowed: ")[2].split(", "))


def test_every_key_that_is_read_is_there() -> None:
    assert allowed("name: shop") == set(lines("At the top"))
    features = [allowed(f"{{kind: {kind}") for kind in ("categorical", "multivalent", "numeric", "dense")]
    assert set.union(*features) == set(lines("A feature"))
    for kind, keys in zip(("categorical", "multivalent", "numeric", "dense"), features, strict=True):
        assert keys == {
            key for key, row in lines("A feature").items() if row["for"] == "all" or f"`{kind}`" in row["for"]
        }
    assert allowed("bought:     {label: {column: outcome, equals: bought}") == set(lines("A task"))
    assert allowed("click:      {label: {column: is_click") == set(lines("A label"))
    assert allowed("ranking:\n", "ranking:\n  zzz: 1\n") == set(lines("A ranking"))


def test_the_example_has_every_key() -> None:
    read = schema_yaml.loads(EXAMPLE)
    assert schema_yaml.loads(schema_yaml.dumps(read)) == read
    for section in SECTIONS:
        assert [key for key in lines(section) if f"{key}:" not in EXAMPLE] == []
