"""Compares converted data with the statistics that a paper prints about the same data.

Statistics go by name: ``samples`` (rows of all splits), ``train samples`` and so on, ``fields`` (features), ``tasks``,
``users`` and ``items`` (distinct values of the schema's group and item), ``frequent users`` and ``frequent items``
(those that keep an id of their own under the feature's ``min_count``), ``<task> rate``. A published value is text, as
it is printed (``223.4M``, ``28.31%``), and equals what was found if that rounds to the same text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.convert.options import Options
from pipelines.log import source
from pipelines.log.find import find_files
from pipelines.manifest import SPLITS, Manifest

_PRINTED = re.compile(r"(?P<digits>\d[\d,]*(\.(?P<decimals>\d+))?)(?P<unit>[KM%]?)")
_MERGED = 1 << 20
"""Values of chunks that are kept, at least, before they are merged with those so far."""
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "%": 1e-2}


@dataclass(frozen=True)
class Compared:
    """One statistic: its name, the published text, the value that was found, and whether they are equal."""

    name: str
    published: str
    found: float

    @property
    def equal(self) -> bool:
        return self.as_printed == self.published.replace(",", "")

    @property
    def as_printed(self) -> str:
        """What was found, rounded as the published value is."""
        printed = _PRINTED.fullmatch(self.published)
        assert printed is not None, self.published
        return f"{self.found / _UNITS[printed['unit']]:.{len(printed['decimals'] or '')}f}{printed['unit']}"

    @property
    def shown(self) -> str:
        """What was found, in full; a share in percent, as the published value is."""
        return f"{100 * self.found:.6g}%" if self.published.endswith("%") else f"{self.found:,.10g}"

    @property
    def verdict(self) -> str:
        if math.isnan(self.found):
            return "no rows"
        if self.equal:
            return "equal"
        printed = _PRINTED.fullmatch(self.published)
        assert printed is not None
        published = float(printed["digits"].replace(",", "")) * _UNITS[printed["unit"]]
        return f"differs by {(self.found - published) / published:+.2%}" if published else "differs"


def compare(manifest: Manifest, published: Mapping[str, str], options: Options) -> list[Compared]:
    """Each published statistic beside what was found.

    Args:
      manifest: the converted data.
      published: statistics by name, as they are printed.
      options: the options of the conversion, whose log is counted if users or items are published.
    """
    schema = manifest.schema
    found = {f"{split} samples": float(manifest.rows(split)) for split in SPLITS}
    found["samples"] = sum(found.values())
    found |= {"fields": len(schema.features), "tasks": len(schema.tasks)}
    for task in schema.task_names:
        inside = {split: manifest.task_rows(split, task) for split in SPLITS if manifest.task_rows(split, task)}
        positive = sum(manifest.task_rate(split, task) * rows for split, rows in inside.items())
        found[f"{task} rate"] = positive / sum(inside.values()) if inside else math.nan
    sizes = {feature.column: manifest.vocabularies.get(feature.name) for feature in schema.features}
    for name, column in (("users", schema.group), ("items", schema.item)):
        if name in published and column:
            found[name] = _distinct(options, column)
        if column and (vocabulary := sizes.get(column)):
            found[f"frequent {name}"] = vocabulary.size
    return [Compared(name, text, found[name]) for name, text in published.items()]


def _distinct(options: Options, column: str) -> int:
    """The number of distinct values of a column in the whole log."""
    paths = [path for patterns in (options.log, *options.given.values()) if patterns for path in find_files(patterns)]
    log = source.open_log(paths, options.csv)
    known: list[pa.Array] = []  # the values so far, then those of chunks since they were last merged
    for unit in log.units:
        for chunk in source.read(log, unit, [column], skip_malformed=options.drop_bad_rows):
            known.append(pc.unique(chunk.columns[column]).drop_null())
            if sum(map(len, known[1:])) > max(len(known[0]), _MERGED):
                known = [pc.unique(pa.concat_arrays(known))]
    return len(pc.unique(pa.concat_arrays(known))) if known else 0
