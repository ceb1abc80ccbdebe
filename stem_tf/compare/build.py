"""Makes the report of a comparison: its sections, in the order in which a manager reads them."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

from stem_tf.compare import page
from stem_tf.compare.comparison import Comparison
from stem_tf.compare.document import Section
from stem_util.progress import Progress

ORDER = ("verdict", "gain", "seesaw", "zones", "calibration", "why", "cost", "provenance", "words")


def write(comparison: Comparison, sections: Sequence[Section], output: Path) -> Path:
    """Writes the report into ``output``; returns the path of the page. See `stem_tf.compare.page.write`."""
    return page.write(
        comparison.name,
        sections,
        output,
        subject=subject(comparison),
        settings=dataclasses.asdict(comparison.settings),
    )


def sections_of(comparison: Comparison) -> list[Section]:
    """All sections of the report."""
    makers = [_maker(name) for name in ORDER if importlib.util.find_spec(f"stem_tf.compare.sections.{name}")]
    sections = []
    with Progress(len(makers), unit="sections", desc="report") as progress:
        for make in makers:
            sections.append(make(comparison))
            progress.update(1)
    return sections


def _maker(name: str) -> Callable[[Comparison], Section]:
    make: Callable[[Comparison], Section] = importlib.import_module(f"stem_tf.compare.sections.{name}").section
    return make


def subject(comparison: Comparison) -> str:
    """What was compared, in one line: the data, its rows and tasks, the arms and their seeds."""
    manifest, seeds = comparison.manifest, [len(arm.runs) for arm in comparison.arms.values()]
    fewest = "" if min(seeds) == max(seeds) else f"{min(seeds)} to "
    return (
        f"Data {manifest.schema.name}: trained on {manifest.rows('train'):,} rows, judged on {manifest.rows('test'):,} "
        f"test rows. {_count(len(comparison.tasks), 'task')}, {_count(len(seeds), 'arm')}, "
        f"{fewest}{_count(max(seeds), 'seed')} per arm."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
