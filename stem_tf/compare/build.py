"""Makes the report of a comparison: its sections, in the order in which a manager reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from stem_tf.compare import page
from stem_tf.compare.comparison import Comparison
from stem_tf.compare.document import Section
from stem_tf.compare.sections import calibration, cost, gain, provenance, seesaw, verdict, why, words, zones
from stem_util.progress import Progress

SECTIONS = (verdict, gain, seesaw, zones, calibration, why, cost, provenance, words)


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
    sections = []
    with Progress(len(SECTIONS), unit="sections", desc="report") as progress:
        for module in SECTIONS:
            sections.append(module.section(comparison))
            progress.update(1)
    return sections


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
