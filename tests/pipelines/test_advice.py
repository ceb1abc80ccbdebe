"""What a sentence about a bad value advises."""

from typing import Any

import pytest

from pipelines.convert.advice import Wanted, way_out


@pytest.mark.parametrize(
    ("value", "wanted", "advice"),
    [
        ("NULL", "number", "if it means a missing value, --csv_nulls=,NULL says so"),
        ("\\N", "id", "if it means a missing value, --csv_nulls=,\\N says so"),
        ("n/a", "label", "if it means a missing value, --csv_nulls=,n/a says so"),
        ("u18", "id", "dtype: string takes any text"),
        ("18.5", "id", "dtype: string takes any text"),
        ("1,234,567", "id", "write it without separators: 1234567"),
        ("9007199254740994.0", "id", "floats beyond 2^53 are rounded: write ids as whole numbers"),
        ("18446744073709551615", "id", "int64 ends at 2^63 - 1: when the log is written, cast such ids to text .dtype"),
        (2**63, "id", "int64 ends at 2^63 - 1"),
        ("1,5", "number", "write numbers as in 1234.5"),
        ("$5", "number", "write numbers as in 1234.5"),
        ("True", "number", "write 0 and 1"),
        ("cheap", "number", "kind: categorical with dtype: string takes any text"),
        ("yes", "label", 'say which value means 1, as in equals: "yes"'),
        (4, "label", "say which values mean 1, as in equals: 5 or at_least: 4"),
        ("soon", "time", "a time is a number, or text as 2024-01-31 10:00:00"),
        (b"\xff", "text", "convert it from the encoding it was written in, as with iconv -f WINDOWS-1252"),
    ],
)
def test_advice(value: Any, wanted: Wanted, advice: str) -> None:
    assert way_out(value, wanted, "a.csv", csv=True, served=False).startswith(f"; {advice.replace('.dtype', '(dtype')}")


def test_advice_follows_what_can_be_changed() -> None:
    assert way_out(b"\xff", "text", "a.parquet", csv=False, served=False) == ""
    assert "csv_nulls" not in way_out("NULL", "id", "a.parquet", csv=False, served=False)
    for value in ("u18", "18.5", 2**64 - 1):
        assert "dtype" not in way_out(value, "id", "a.csv", csv=True, served=True)
    assert way_out("cheap", "number", "a.csv", csv=True, served=True) == ""
