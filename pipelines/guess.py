"""What a column seems to be, judged by its type, its values and its name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import casts, yaml_reader

_USER = "user uid usr member customer buyer viewer reader visitor age gender sex occupation".split()
_ITEM = (
    "item iid video vid movie film photo product goods sku article news ad adgroup campaign creative author artist "
    "song music album track book post game app brand category cate genre genres tag tags price duration title upload "
    "publisher"
).split()
_ID = "id uid iid vid sku code zip category cate channel type brand device".split()
_OUTCOMES = (
    "click clicks clicked like likes liked dislike hate follow forward share shared comment commented buy bought "
    "purchase purchased cart conversion convert converted order ordered pay paid install installed download finish "
    "finished watch watched play played view viewed listen listened stay dwell favourite favorite collect subscribe "
    "skip rating enter label target outcome"
).split()
_TIMES = "time timestamp ts date datetime day dt created at".split()
_SEPARATORS = ("|", ";", ", ", ",")
_FEW = 256  # integers with fewer distinct values are categories
# Plausible times from 2000 to 2100, as text or numbers.
_EPOCHS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_FROM, _TO = 946_684_800, 4_102_444_800


@dataclass(frozen=True)
class Column:
    """A column of the sample.

    Attributes:
      name: in the log.
      values: of the sampled rows: int64, double, string or lists; missing ones null.
      kind: what ``values`` holds; ``other`` is nothing a feature can be made of.
      stored: the type in the log, for people.
    """

    name: str
    values: pa.Array
    kind: Literal["int", "float", "text", "list", "other"]
    stored: str

    @property
    def present(self) -> pa.Array:
        return self.values.drop_null()

    @property
    def null_share(self) -> float:
        return self.values.null_count / max(len(self.values), 1)

    @property
    def distinct(self) -> int:
        """Number of distinct values; lists are not compared."""
        return len(self.values) if pa.types.is_nested(self.values.type) else pc.count_distinct(self.values).as_py()

    @property
    def words(self) -> list[str]:
        """The parts of the name, in lower case: ``videoID_2`` is video, id."""
        return [word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", self.name)]

    def about(self) -> str:
        """Type, number of values and nulls, for a comment."""
        parts = [self.stored]
        if self.kind in ("int", "float", "text"):
            parts.append(f"{self.distinct:,} {'value' if self.distinct == 1 else 'values'}")
        if self.values.null_count:
            parts.append(f"{self.null_share:.2%} missing")
        return ", ".join(parts)


def read(name: str, values: pa.Array, stored: str) -> Column:
    kind = values.type
    cast: tuple[Any, Literal["int", "float", "text"]] | None = None
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        cast = casts.to_int64, "int"
    elif pa.types.is_floating(kind):
        cast = casts.to_float64, "float"
    elif casts.is_text(kind):
        cast = casts.to_text, "text"
    if cast is not None:
        known, bad = cast[0](values)
        return Column(name, values, "other", stored) if bad.any() else Column(name, known, cast[1], stored)
    return Column(name, values, "list" if casts.is_list(kind) else "other", stored)


def no_use(column: Column) -> str | None:
    """Why a column is neither feature nor task, or None."""
    present = column.present
    if not len(present):
        return "every value is missing"
    if time := time_of(column):
        return f"{time}; split the log by it rather than learn it (or write hour or weekday as a column)"
    if column.kind == "other":
        return f"{column.stored} cannot be read as a feature; cast it when the log is written"
    if column.kind == "list":
        return _no_list(column)
    if column.distinct == 1 and not column.values.null_count:
        return f"constant ({shown(present[0].as_py())})"
    if column.kind == "float" and _is_id(column) and _whole(present):
        return "whole numbers written as floats under the name of an id; cast them to int64 when the log is written"
    if (
        column.kind == "text"
        and column.distinct > 0.5 * len(present)
        and _mean_length(present) > 30
        and not _split(column)
    ):
        return "free text"
    if column.distinct == len(present) >= 100 and not is_side_key(column) and (column.kind == "text" or _is_id(column)):
        return "another value in every row: it names the row"
    return None


def _no_list(column: Column) -> str | None:
    inner = column.values.type.value_type
    lengths = pc.list_value_length(column.present)
    if not pc.max(lengths).as_py():
        return "every list is empty"
    if pa.types.is_floating(inner) and pc.count_distinct(lengths).as_py() > 1:
        return "lists of floats of several lengths: neither a vector nor ids"
    if not (
        pa.types.is_integer(inner) or pa.types.is_boolean(inner) or pa.types.is_floating(inner) or casts.is_text(inner)
    ):
        return f"lists of {inner} are no type of a feature"
    return None


def time_of(column: Column) -> str | None:
    """How a column tells the time, or None."""
    kind, present = column.values.type, column.present
    if not len(present):
        return None
    if pa.types.is_temporal(kind):
        return f"a time ({kind})"
    if not set(column.words) & set(_TIMES):
        return None
    if column.kind == "text":
        try:
            present.cast(pa.timestamp("us"))
        except pa.ArrowInvalid:
            return None
        return "a time (text)"
    if column.kind in ("int", "float"):
        low, high = pc.min(present).as_py(), pc.max(present).as_py()
        for unit, scale in _EPOCHS.items():
            if _FROM * scale <= low and high <= _TO * scale:
                return f"a time ({unit} since 1970)"
        if 20_000_101 <= low and high <= 21_001_231:
            return "a time (yyyymmdd)"
    return None


def is_outcome(column: Column) -> bool:
    """Numbers or one of two texts under the name of an outcome; 0 and 1 under is_*."""
    if column.kind not in ("int", "float", "text") or _is_id(column):
        return False
    named = bool(set(column.words) & set(_OUTCOMES)) and (column.kind != "text" or column.distinct == 2)
    return named or (is_binary(column) and column.words[:1] in (["is"], ["has"], ["did"]))


def is_binary(column: Column) -> bool:
    return column.kind in ("int", "float") and set(pc.unique(column.present).to_pylist()) == {0, 1}


def _is_id(column: Column) -> bool:
    return bool(set(column.words) & set(_ID))


def _whole(values: pa.Array) -> bool:
    return bool(pc.all(pc.equal(values, pc.round(values))).as_py())


def _mean_length(values: pa.Array) -> float:
    return float(pc.mean(pc.utf8_length(values)).as_py())


def shown(value: Any) -> str:
    return yaml_reader.shown(value).replace(" (text)", "")


def side_of(column: Column) -> tuple[str, str]:
    """Side and the word of the name that gave it away; context when none does."""
    for word in column.words:
        for side, words in (("user", _USER), ("item", _ITEM)):
            if word in words:
                return side, f"{side} by its name"
    return "context", "context, as its name says neither user nor item"


def is_side_key(column: Column) -> bool:
    """Whether the name is that of a user or an item: user_id, uid, video, itemId."""
    words = [word for word in column.words if word not in ("id", "no", "key")]
    nouns = (*_USER[: _USER.index("age")], *_ITEM[: _ITEM.index("author")])
    return column.kind in ("int", "text") and len(words) == 1 and words[0] in nouns


def feature(column: Column) -> tuple[dict[str, Any], str]:
    """The fields of a feature, and why."""
    side, why = side_of(column)
    about = f"{column.about()}; {why}"
    if column.kind == "list":
        return _list_feature(column, side, about)
    if column.kind == "text":
        if separator := _split(column):
            lists = pc.split_pattern(column.present, separator)
            dtype = "string" if casts.to_int64(lists.flatten())[1].any() else "int64"
            length = _length(lists)
            fields = {"kind": "multivalent", "side": side, "dtype": dtype, "max_length": length, "separator": separator}
            return fields, f"{about}; {separator!r} parts its values, {length} hold 99 % of rows"
        return {"kind": "categorical", "side": side, "dtype": "string"}, about
    if column.kind == "int" and (category := _category(column)):
        hint = "; 0 and 1: if it is an outcome, make it a task" if is_binary(column) else ""
        return {"kind": "categorical", "side": side, "dtype": "int64"}, f"{about}; {category}{hint}"
    skewed = pc.min(column.present).as_py() >= 0 and _skewness(column.present) > 2
    steps = ["log1p", "standardise"] if skewed else ["standardise"]
    why = "never negative, and skewed: log1p first" if skewed else "many values: a number"
    return {"kind": "numeric", "side": side, "transform": steps}, f"{about}; {why}"


def _category(column: Column) -> str | None:
    """Why integers are categories rather than amounts, or None."""
    if column.distinct <= _FEW:
        return "few values: categories"
    if _is_id(column) or is_side_key(column):
        return "an id by its name"
    if max(abs(pc.min(column.present).as_py()), abs(pc.max(column.present).as_py())) > 2**53:
        return "too large to be amounts: ids"
    return None


def _list_feature(column: Column, side: str, about: str) -> tuple[dict[str, Any], str]:
    inner, length = column.values.type.value_type, _length(column.present)
    if pa.types.is_floating(inner):
        return {"kind": "dense", "side": side, "length": length}, f"{about}; every list has {length} floats: a vector"
    dtype = "string" if casts.is_text(inner) else "int64"
    fields = {"kind": "multivalent", "side": side, "dtype": dtype, "max_length": length}
    return fields, f"{about}; {length} values hold 99 % of rows"


def _length(lists: pa.Array) -> int:
    """The length that 99 % of the lists do not pass."""
    return max(1, int(np.quantile(pc.list_value_length(lists).to_numpy(zero_copy_only=False), 0.99, method="lower")))


def _split(column: Column) -> str | None:
    """The separator of a text column's values: in a tenth of the rows, and the parts repeat more than the wholes."""
    for separator in _SEPARATORS:
        holds = pc.match_substring(column.present, separator)
        if pc.mean(holds.cast(pa.int8())).as_py() < 0.1:
            continue
        if pc.count_distinct(pc.split_pattern(column.present, separator).flatten()).as_py() < column.distinct:
            return separator
    return None


def _skewness(values: pa.Array) -> float:
    numbers = values.to_numpy(zero_copy_only=False).astype(np.float64)
    scale = numbers.std()
    return float((((numbers - numbers.mean()) / scale) ** 3).mean()) if scale > 0 else 0.0
