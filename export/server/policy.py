"""Which of a model's versions serve, as models.config says it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Policy:
    """The newest ``latest`` that load (None: all of them), of ``specific`` ones where there are any."""

    latest: int | None = 1
    specific: frozenset[int] | None = None

    def candidates(self, found: Iterable[int]) -> list[int]:
        """Those of ``found`` that may serve, newest first."""
        return sorted((x for x in found if self.specific is None or x in self.specific), reverse=True)


LATEST = Policy()
