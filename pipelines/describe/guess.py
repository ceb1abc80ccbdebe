"""Guesses what a column is, from its type, its values and its name."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import yaml_reader
from pipelines.log import casts

# Words in column names, in the singular if both forms occur. Users and items can be keys; earlier words are preferred.
_USERS = (
    "user usr uid member customer buyer viewer reader visitor listener client account subscriber player shopper "
    "consumer guest passenger student patient person reviewer"
).split()
_STAND_INS = "session cookie device household search srch".split()  # groups in place of users
_ITEMS = (
    "item iid video vid movie film photo product goods sku asin isbn article news post ad adgroup creative song track "
    "album book game recipe hotel listing property prop course restaurant business content story"
).split()
_USER_TRAITS = "age gender sex occupation profession education marital".split()
_ITEM_TRAITS = (
    "campaign author artist brand category cate genre genres tag tags price duration title upload publisher seller "
    "shop store merchant director music app"
).split()
_ENTITIES = {  # whole numbers with such a name are ids
    *_USERS,
    *_STAND_INS,
    *_ITEMS,
    *_USER_TRAITS[1:],
    *(
        "campaign author artist brand category cate genre publisher seller shop store merchant director music app "
        "advertiser city region country state province county district postcode device os browser carrier network site "
        "page domain host channel cluster segment topic tag language locale currency model version platform placement "
        "slot query keyword advert job"
    ).split(),
}
_IDS = {"id", "uid", "iid", "vid", "sku", "asin", "isbn", "code", "zip", "zipcode", "type", "uuid", "guid", "hash"}
_NO_IDS = set("paid bid valid invalid grid void solid fluid hybrid rapid said did kid covid mid humid avoid".split())
_QUANTITIES = set(
    "count cnt num number total sum avg mean median ratio rate pct percent share amount price cost seconds sec ms "
    "minutes min hours days length len size width height weight age duration rank position distance".split()
)
_DECORATIONS = set("id no key hash hashed uuid guid anonymous anon unique encrypted masked raw global".split())
_OUTCOMES = set(
    "click clicks clicked like likes liked dislike hate follow forward share shared comment commented buy bought "
    "purchase purchased cart conversion convert converted order ordered pay paid install installed download finish "
    "finished watch watched play played view viewed listen listened stay dwell favourite favorite collect subscribe "
    "skip rating ratings rated star stars grade enter label target outcome reply retweet save saved signup complete "
    "completed completion booking booked apply applied reserved revenue gmv response responded engaged".split()
)
_LAST_OUTCOMES = set(
    "income salary class churn churned default survived y".split()
)  # outcomes only if the log has no other
_EVENTS = set("event action behavior behaviour interaction feedback outcome label target response reaction".split())
_RATINGS = {"rating", "ratings", "rated", "star", "stars", "grade", "score", "overall"}
_TIMES = "time timestamp ts date datetime day dt created updated at unixtime".split()
_WEIGHT = re.compile(r"^(instance|sample|row|case|importance)_?weights?$", re.IGNORECASE)
_INDEX = re.compile(r"Unnamed: ?\d+|__index_level_\d+__")
_SPLIT_NAMES = {"train", "training", "valid", "validation", "val", "dev", "eval", "test", "testing"}
_SEPARATORS = ("|", ";", ", ", ",", " ")
_FEW, _FEW_AMOUNTS = 256, 100  # integers with no more distinct values are categories; the second for names of amounts
_EVENT_VALUES = 8  # the most values of a column that says what happened
_CODE = r"^[-+]?0[0-9]+$"
DATE = r"^\s*\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}"
"""The beginning of a text that is a date."""
# Plausible times from 1990 to 2100, as text or numbers.
_EPOCHS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_FROM, _TO = 631_152_000, 4_102_444_800
_RECENT, _SOON = 978_307_200, 2_051_222_400  # 2001 to 2035, for columns whose name does not mean a time


@dataclass(frozen=True)
class Column:
    """A column of the sample.

    Attributes:
      name: its name in the log.
      values: values of the sampled rows: int64, double, string, lists or times; missing ones are null.
      kind: what ``values`` holds; ``other`` cannot be a feature.
      stored: the type in the log, for comments.
    """

    name: str
    values: pa.Array
    kind: Literal["int", "float", "text", "list", "time", "other"]
    stored: str

    @functools.cached_property
    def present(self) -> pa.Array:
        return self.values.drop_null()

    @property
    def null_share(self) -> float:
        return self.values.null_count / max(len(self.values), 1)

    @functools.cached_property
    def tally(self) -> tuple[pa.Array, np.ndarray]:
        """The distinct values, without missing ones, and the number of rows of each; not for lists."""
        tally = pc.value_counts(self.present)
        return tally.field(0), casts.to_numpy(tally.field(1))

    @property
    def distinct(self) -> int:
        """The number of distinct values; lists are not compared."""
        return len(self.present) if pa.types.is_nested(self.values.type) else len(self.tally[0])

    @property
    def likely_distinct(self) -> float:
        """A lower bound of the number of distinct values in a log of which this is a sample, by Chao's estimator.

        ``d + f1 (f1 - 1) / (2 (f2 + 1))`` with d distinct values, of which f1 occur once and f2 twice (Chao 1984,
        bias-corrected): about right where all values are equally frequent.
        """
        counts = self.tally[1]
        once, twice = (int(np.count_nonzero(counts == times)) for times in (1, 2))
        return len(counts) + once * (once - 1) / (2 * (twice + 1))

    @functools.cached_property
    def words(self) -> list[str]:
        """The words of the name, in lower case: video and id for ``videoID_2`` and ``videoid``."""
        words: list[str] = []
        for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", self.name):
            word = word.lower()
            whole = word.endswith("id") and word[:-2] in _ENTITIES and word not in _IDS
            words += [word[:-2], "id"] if whole else [word]
        return words

    @functools.cached_property
    def separator(self) -> str | None:
        """The separator of lists written as text, or None.

        It must occur in a tenth of the rows, and the parts must repeat more than the whole texts. For a bar the latter
        is not needed, because only lists are written with bars.
        """
        values, counts = self.tally
        for separator in _SEPARATORS:
            holds = casts.to_numpy(pc.match_substring(values, separator))
            if holds @ counts < 0.1 * counts.sum():
                continue
            parts = pc.split_pattern(values, separator).flatten()
            if separator == " " and pc.mean(pc.match_substring_regex(parts, "[0-9]").cast(pa.int8())).as_py() < 0.9:
                continue  # sentences, not lists of ids
            if separator == "|" or pc.count_distinct(parts).as_py() < len(values):
                return separator
        return None

    def about(self) -> str:
        """Type, number of values and share of nulls, for a comment."""
        parts = [self.stored if len(self.stored) <= 60 else f"{self.stored[:57]}..."]
        if self.kind in ("int", "float", "text"):
            parts.append(f"{self.distinct:,} {'value' if self.distinct == 1 else 'values'}")
        if self.values.null_count:
            parts.append(f"{self.missing_share} missing")
        return ", ".join(parts)

    @property
    def missing_share(self) -> str:
        """The share of missing values as in ``2.50%``; their number if the share would be shown as 0."""
        return f"{self.null_share:.2%}" if self.null_share >= 0.00005 else f"{self.values.null_count:,} values"


def is_read(kind: pa.DataType) -> bool:
    """Whether a column of this type can be used at all, so that its values are worth reading."""
    if pa.types.is_dictionary(kind):
        return is_read(kind.value_type)
    if casts.is_list(kind):
        return not casts.is_list(kind.value_type) and is_read(kind.value_type)
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return number or casts.is_text(kind) or pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def read(name: str, values: pa.Array, stored: str) -> Column:
    """Makes a column of its values, which are null if the type is one that is not read (`is_read`)."""
    kind = values.type
    if pa.types.is_null(kind):
        return Column(name, values, "int" if stored == "null" else "other", stored)
    if pa.types.is_temporal(kind):
        return Column(name, values, "time", stored)
    cast: tuple[Any, pa.DataType, Literal["int", "float", "text"]] | None = None
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        cast = casts.to_int64, pa.int64(), "int"
    elif pa.types.is_floating(kind):
        cast = casts.to_float64, pa.float64(), "float"
    elif casts.is_text(kind):
        cast = casts.to_text, pa.string(), "text"
    if cast is not None:
        fits = can_cast(values, cast[1])
        return Column(name, cast[0](values)[0], cast[2], stored) if fits else Column(name, values, "other", stored)
    return Column(name, values, "list" if casts.is_list(kind) else "other", stored)


def can_cast(values: pa.Array, kind: pa.DataType) -> bool:
    """Whether all values can be cast; faster than `casts.try_cast`, which finds those that cannot."""
    try:
        # By way of bytes, so that UTF-8 is checked.
        (values.cast(pa.binary()) if kind == pa.string() else values).cast(kind)
    except pa.ArrowInvalid:
        return False
    return True


def has_codes(text: pa.Array) -> bool:
    """Whether a value has leading zeros, as 007: then it is a code rather than a number."""
    zeros = text.filter(pc.and_(pc.starts_with(text, "0"), pc.greater(pc.binary_length(text), 1)))
    return bool(len(zeros)) and bool(pc.any(pc.match_substring_regex(zeros, _CODE)).as_py())


def no_use(column: Column) -> str | None:
    """Why a column is neither feature nor task, or None."""
    present = column.present
    if not column.name:
        return "without a name, as pandas writes an index; give the column one to use it"
    if _INDEX.fullmatch(column.name):
        return "the index of a pandas table, by its name"
    if column.name == "row_id":
        return "its name is reserved for the place of a row in the log; rename it to use it"
    if column.kind == "other":
        return f"{column.stored} cannot be read as a feature; cast it when the log is written"
    if not len(present):
        return "every value is missing"
    if time := time_of(column):
        return f"{time}; split the log by it rather than learn it (or write hour or weekday as a column)"
    if column.kind == "list":
        return _no_list(column)
    if column.distinct == 1 and not column.values.null_count:
        return f"constant ({shown(present[0].as_py())})"
    if _WEIGHT.match(column.name) and column.kind in ("int", "float"):
        return f"the weight of a row, by its name: no feature; for rows to count so: weight: {column.name}"
    return _no_text(column) if column.kind == "text" else _no_number(column)


def _no_text(column: Column) -> str | None:
    present = column.present
    if _share(column, r"^\s*\[.*\]\s*$") > 0.9:
        return "lists written as text; write a list column, or the values with a separator, as in a|b"
    if _share(column, r"^\s*-?\d+,\d+\s*$") > 0.9:
        return "numbers with a decimal comma; write a point"
    if set(column.words) & set(_TIMES) and _share(column, DATE) > 0.9:
        return "a time that cannot be read; write it as in 2024-01-31 or 2024-01-31 23:59:00"
    if {text.lower() for text in column.tally[0][: len(_SPLIT_NAMES) + 1].to_pylist()} <= _SPLIT_NAMES:
        return "says which split a row is in"
    if column.separator:
        return None
    if column.distinct > 0.5 * len(present) and float(pc.mean(pc.utf8_length(present)).as_py()) > 30:
        return "free text"
    if column.distinct == len(present) >= 100 and not is_side_key(column):
        return "another value in every row: it names the row"
    return None


def _share(column: Column, pattern: str) -> float:
    """The share of rows with text that matches a pattern."""
    values, counts = column.tally
    return float(casts.to_numpy(pc.match_substring_regex(values, pattern)) @ counts / counts.sum())


def _no_number(column: Column) -> str | None:
    present = column.present
    if column.kind == "float" and _is_id(column) and _whole(present):
        return "whole numbers written as floats under the name of an id; cast them to int64 when the log is written"
    if column.kind == "float" and pc.max(pc.abs(present)).as_py() > np.finfo(np.float32).max:
        return "holds values that are not finite in float32; write them as missing, or cut them off"
    if column.distinct == len(present) >= 100 and not is_side_key(column):
        if _is_id(column):
            return "another value in every row: it names the row"
        if column.kind == "int" and pc.max(pc.pairwise_diff(present)).as_py() == 1 and _rises(present):
            return "counts the rows"
    return None


def _rises(values: pa.Array) -> bool:
    """Whether values never fall from row to row."""
    numbers = casts.to_numpy(values)
    return bool((numbers[1:] >= numbers[:-1]).all())


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
        return f"lists of {inner} cannot be a feature"
    return None


def time_of(column: Column) -> str | None:
    """The form in which a column holds times, or None if it does not."""
    present = column.present
    if not len(present):
        return None
    if column.kind == "time":
        return f"a time ({column.values.type})"
    if column.kind == "text":
        if _share(column, DATE) < 1:
            return None
        text = pc.utf8_trim_whitespace(column.tally[0])
        return "a time (text)" if any(can_cast(text, pa.timestamp("us", zone)) for zone in (None, "UTC")) else None
    if column.kind not in ("int", "float"):
        return None
    named = any(word in _TIMES or word.endswith(("time", "date", "timestamp")) for word in column.words)
    low, high = pc.min(present).as_py(), pc.max(present).as_py()
    first, last = (_FROM, _TO) if named else (_RECENT, _SOON)
    for unit, scale in _EPOCHS.items():
        if first * scale <= low and high <= last * scale and (named or (column.distinct > _FEW and not _is_id(column))):
            return f"a time ({unit} since 1970)"
    if named and 19_900_101 <= low and high <= 21_001_231:
        return "a time (yyyymmdd)"
    if named and not set(column.words) & set(_OUTCOMES) and column.distinct > _FEW and _rises(present):
        return "a time (numbers that never fall)"
    return None


def is_outcome(column: Column) -> bool:
    """Whether a column is an outcome: by its name, if it holds numbers, two texts or few values; 0 and 1 with is_*."""
    if column.kind not in ("int", "float", "text"):
        return False
    if is_event(column):
        return True
    if _says_id(column):
        return False
    words = _OUTCOMES | _EVENTS if column.kind == "text" else _OUTCOMES
    named = bool(set(column.words) & words) or is_rating(column)
    if named and (column.kind != "text" or column.distinct == 2):
        return True
    return is_binary(column) and column.words[:1] in (["is"], ["has"], ["did"])


def is_last_outcome(column: Column) -> bool:
    """Whether a column of two values is an outcome by its name, if the log has no other: income, class."""
    two = column.kind in ("int", "text") and column.distinct == 2
    return (two or is_binary(column)) and bool(set(column.words) & _LAST_OUTCOMES)


def is_event(column: Column) -> bool:
    """Whether a column says which of several events happened: event, behavior_type."""
    words = set(column.words)
    named = words & _EVENTS and not words & {"id", *_QUANTITIES, *_TIMES}
    return bool(named) and column.kind in ("int", "text") and 2 < column.distinct <= _EVENT_VALUES


def is_rating(column: Column) -> bool:
    """Whether a column holds marks, for instance from 1 to 5."""
    words = set(column.words)
    if column.kind not in ("int", "float") or not words & _RATINGS or words & _QUANTITIES or not len(column.present):
        return False
    return pc.min(column.present).as_py() >= 0 and 1 < pc.max(column.present).as_py() <= 10


def is_binary(column: Column) -> bool:
    """Whether a column holds 0 and 1, or False and True as text."""
    if column.kind not in ("int", "float", "text") or column.distinct != 2:
        return False
    values = column.tally[0].to_pylist()
    return {value.lower() for value in values} == {"false", "true"} if column.kind == "text" else set(values) == {0, 1}


def _says_id(column: Column) -> bool:
    return any(word in _IDS or (word.endswith("id") and word not in _NO_IDS) for word in column.words)


def _is_id(column: Column) -> bool:
    """Whether the name means an id, or ends with a thing that ids stand for: artist, home_city."""
    words = column.words
    return _says_id(column) or (bool(words) and words[-1] in _ENTITIES and not set(words) & _QUANTITIES)


def _whole(values: pa.Array) -> bool:
    return bool(pc.all(pc.equal(values, pc.round(values))).as_py())


def shown(value: Any) -> str:
    return yaml_reader.shown(value).replace(" (text)", "")


def side_of(column: Column) -> tuple[str, str] | None:
    """The side and the reason, by the words of the name; None if they do not decide it."""
    for word in column.words:
        for side, words in (("user", (*_USERS, *_USER_TRAITS)), ("item", (*_ITEMS, *_ITEM_TRAITS))):
            if word in words:
                return side, f"{side} by its name"
    return None


def is_side_key(column: Column, side: str = "") -> bool:
    """Whether the name means a user or an item: user_id, uid, video, itemId.

    Args:
      column: a column of the log.
      side: ask for ``user`` or ``item`` only, or for ``session``: what can stand in for a user.
    """
    nouns = {"user": _USERS, "item": _ITEMS, "session": _STAND_INS}.get(side, [*_USERS, *_ITEMS])
    words = [word for word in column.words if word not in _DECORATIONS]
    return column.kind in ("int", "text") and len(words) == 1 and words[0] in nouns


def feature(column: Column) -> tuple[dict[str, Any], str]:
    """The fields of a feature without its side, and the reason."""
    about = column.about()
    if column.kind == "list":
        return _list_feature(column, about)
    if column.kind == "text":
        if separator := column.separator:
            lists = pc.split_pattern(column.present, separator)
            parts = pc.utf8_trim_whitespace(pc.split_pattern(column.tally[0], separator).flatten())
            dtype = "int64" if can_cast(parts, pa.int64()) and not has_codes(parts) else "string"
            length = _length(lists)
            fields = {"kind": "multivalent", "dtype": dtype, "max_length": length, "separator": separator}
            return fields, f"{about}; values separated by {separator!r}, 99 % of rows have {length} or fewer"
        return {"kind": "categorical", "dtype": "string"}, about
    if column.kind == "int" and (category := _category(column)):
        hint = "; 0 and 1: if it is an outcome, make it a task" if is_binary(column) else ""
        return {"kind": "categorical", "dtype": "int64"}, f"{about}; {category}{hint}"
    skewed = pc.min(column.present).as_py() >= 0 and _skewness(column.present) > 2
    steps = ["log1p", "standardise"] if skewed else ["standardise"]
    why = "never negative, and skewed: log1p first" if skewed else "many values: a number"
    return {"kind": "numeric", "transform": steps}, f"{about}; {why}"


def _category(column: Column) -> str | None:
    """The reason why integers are categories rather than amounts, or None."""
    if column.distinct <= (_FEW_AMOUNTS if set(column.words) & _QUANTITIES else _FEW):
        return "few values: categories"
    if _is_id(column) or is_side_key(column):
        return "an id by its name"
    low, high = pc.min(column.present).as_py(), pc.max(column.present).as_py()
    if max(abs(low), abs(high)) > 2**53:
        return "too large to be amounts: ids"
    if high - low > 2**30 and abs(_skewness(column.present)) < 0.5:
        return "spread evenly over 32 bits: hashes"
    return None


def _list_feature(column: Column, about: str) -> tuple[dict[str, Any], str]:
    inner, length = column.values.type.value_type, _length(column.present)
    if pa.types.is_floating(inner):
        return {"kind": "dense", "length": length}, f"{about}; every list has {length} floats: a vector"
    dtype = "string" if casts.is_text(inner) else "int64"
    fields = {"kind": "multivalent", "dtype": dtype, "max_length": length}
    return fields, f"{about}; 99 % of rows have {length} values or fewer"


def _length(lists: pa.Array) -> int:
    """The length that 99 % of the lists do not exceed."""
    return max(1, int(np.quantile(pc.list_value_length(lists).to_numpy(zero_copy_only=False), 0.99, method="lower")))


def _skewness(values: pa.Array) -> float:
    numbers = casts.to_numpy(values).astype(np.float64)
    scale = numbers.std()
    return float((((numbers - numbers.mean()) / scale) ** 3).mean()) if scale > 0 else 0.0
