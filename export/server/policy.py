"""Which versions of a model serve, as in models.config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Policy:
    """The newest ``latest`` versions that load (None: all), among the ``specific`` ones if any are given."""

    latest: int | None = 1
    specific: frozenset[int] | None = None

    def candidates(self, found: Iterable[int]) -> list[int]:
        """Returns the versions in ``found`` that may serve, newest first."""
        return sorted((x for x in found if self.specific is None or x in self.specific), reverse=True)


LATEST = Policy()
