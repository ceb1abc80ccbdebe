"""The data that a conversion extends: whether it may, and what it takes over."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from pipelines import integrity, manifest, yaml_reader
from pipelines.convert import times
from pipelines.convert.growth import UNKNOWN, Forget, Step
from pipelines.log.parts import Log
from pipelines.manifest import Ancestor, Manifest, Source, Times
from pipelines.schema import Schema
from stem_util import stores
from stem_util.errors import UserError

_LEARNED_KEPT = 10_000
"""How many files of earlier logs are remembered."""
_FREE_FIELDS = {"min_count", "missing", "allow_label_column", "weight"}
"""Fields of features and tasks that may differ: they change neither what ids and labels mean nor the model's shape."""


@contextlib.contextmanager
def extended(place: str, output: str, schema: Schema) -> Iterator[Manifest]:
    """Yields the data at a path or URI, which nobody can replace meanwhile.

    Raises:
      UserError: they are missing or damaged, were converted by an earlier version or with another schema, or lie where
        the output goes.
    """
    if _same(place, output):
        raise UserError(f"--extend and --output are both {place}: write the extended data to another directory")
    found = manifest.load(place)
    if found.loaded is None or set(found.history) != set(found.vocabularies):
        raise UserError(
            f"{place} was converted by an earlier version, which kept no counts of rare values: convert its log again"
        )
    inside = os.path.commonpath([os.path.realpath(found.data_dir), os.path.realpath(output)])
    if inside == os.path.realpath(found.data_dir) and not stores.is_uri(output):
        raise UserError(f"--output={output} lies in {place}, which it extends: choose another directory")
    found.check_history()
    if problem := difference(found.record_schema, schema):
        raise UserError(f"the schema does not extend that of {place}: {problem}")
    with manifest.in_use(found.data_dir):
        yield found


def _same(place: str, output: str) -> bool:
    if stores.is_uri(place) or stores.is_uri(output):
        return place.rstrip("/") == output.rstrip("/")
    return os.path.realpath(place) == os.path.realpath(output)


def difference(old: Schema, new: Schema) -> str:
    """The first difference of two schemas that keeps one from extending the other's data; "" if there is none.

    These may differ: ``name``, ``group``, ``item``, ``time``, ``task_tables``, ``ranking``; ``min_count``, ``missing``
    and ``allow_label_column`` of a feature; ``weight`` of a task. The order of features and tasks may not.
    """
    for what in ("features", "tasks"):
        before, now = ({each.name: each for each in getattr(schema, what)} for schema in (old, new))
        for name in [*before, *now]:
            if name not in now:
                return f"{what}.{name} is missing"
            if name not in before:
                return f"{what}.{name} is new"
            if text := _changed(before[name], now[name]):
                return f"{what}.{name}.{text}"
        if list(before) != list(now):
            return f"the {what} are in another order ({', '.join(before)} there)"
    return ""


def _changed(before: Any, now: Any) -> str:
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(now, field.name)
        if old != new and field.name not in _FREE_FIELDS:
            return f"{field.name} is {_shown(new)} and was {_shown(old)}"
    return ""


def _shown(value: Any) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {key: field for key, field in dataclasses.asdict(value).items() if field not in (None, (), False)}
    return "not set" if value in (None, ()) else yaml_reader.inline(value)


def check_new(found: Manifest, place: str, log: Log, given: Sequence[int]) -> None:
    """Makes sure that the data, and those that they extend, have not learned from a file of the log already.

    Args:
      found: the data.
      place: their path or URI, for the error.
      log: the new log.
      given: the split of each of its files, if splits are given.

    Raises:
      UserError: names the file.
    """
    known = learned(found)
    sizes = {identity.partition(":")[0] for identity in known}
    for number, path in enumerate(log.files):
        stamp = integrity.stamp(path)
        if str(stamp.bytes) not in sizes or (given and given[number]):
            continue
        checksum = "" if stores.is_uri(path) else integrity.crc32c(path)
        if Source(stores.absolute(path), 0, stamp.bytes, stamp.mtime_ns, checksum).identity in known:
            raise UserError(f"{path} is in {place} already, as train rows: each log can be added once")


def learned(found: Manifest) -> tuple[str, ...]:
    """`Source.identity` of the files that train rows came from, the oldest first."""
    before = found.ancestor.learned if found.ancestor else ()
    train = set(found.split["train"]) if found.split["by"] == "given files" else None
    own = [one.identity for one in found.sources if one.rows and (train is None or one.path in train)]
    return (*before, *own)[-_LEARNED_KEPT:]


def recorded(found: Manifest, place: str) -> Ancestor:
    """The manifest's entry of the data that a conversion extends."""
    where = place.rstrip("/") if stores.is_uri(place) else found.data_dir
    return Ancestor(where, manifest.checksum(found.data_dir), found.generation, learned(found))


def step(found: Manifest | None, now: Times | None, units: int, forget: Forget | None, *, late: bool) -> Step:
    """What a conversion does with the values that are known.

    Args:
      found: the data that it extends, if there are any.
      now: the times of its log.
      units: units per second of these.
      forget: which values lose their ids.
      late: the log may be older than the data.

    Raises:
      UserError: the log is older than the data and not late, or times that ``forget`` needs are missing.
    """
    before = found.times if found else None
    if found and before and now:
        if before.calendar != now.calendar:
            numbers, dates = (now, before) if before.calendar else (before, now)
            raise UserError(
                f"column '{numbers.column}' holds numbers that are no dates (up to {numbers.last:,}), and "
                f"column '{dates.column}' of {'the data to extend' if dates is before else 'the new log'} holds dates"
            )
        if now.last < before.last and not late:
            ends = [times.shown(each.last, each.calendar) for each in (now, before)]
            raise UserError(
                f"the log ends at {ends[0]} ('{now.column}'), and {found.data_dir} has rows until {ends[1]}: logs are "
                "added in the order of time; --late adds one that came late"
            )
    seen_since, generation = UNKNOWN, found.generation + 1 if found else 1
    if forget and forget.seconds:
        if now is None:
            raise UserError(
                "--forget: after how long a value is forgotten needs the time of rows: name their column in the "
                "schema (time: COLUMN), or give a number of conversions"
            )
        if not now.calendar:
            raise UserError(
                f"--forget: the numbers in column '{now.column}' (up to {now.last:,}) are no seconds, milli-, micro- "
                "or nanoseconds since 1970: give a number of conversions"
            )
        seen_since = now.last - forget.seconds * 10**6
    seen_until = generation - forget.conversions if forget and forget.conversions else 0
    return Step(
        ancestor=found.data_dir if found else None,
        generation=generation,
        first=now.first if now else UNKNOWN,
        units=units if now else None,
        seen_since=seen_since,
        seen_until=seen_until,
    )
