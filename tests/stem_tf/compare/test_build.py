"""What a report says of itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from stem_tf.compare import build


@pytest.mark.parametrize(
    ("seeds", "said"),
    [((1,), "2 tasks, 1 arm, 1 seed per arm."), ((5, 5), "2 arms, 5 seeds"), ((3, 1, 5), "3 arms, 1 to 5 seeds per")],
)
def test_subject_counts(seeds: tuple[int, ...], said: str) -> None:
    comparison: Any = SimpleNamespace(
        manifest=SimpleNamespace(schema=SimpleNamespace(name="music"), rows={"train": 12_000, "test": 4_183}.get),
        arms={str(place): SimpleNamespace(runs=range(count)) for place, count in enumerate(seeds)},
        tasks=("click", "like"),
    )
    found = build.subject(comparison)
    assert found.startswith("Data music: trained on 12,000 rows, judged on 4,183 test rows. 2 tasks, ")
    assert said in found
