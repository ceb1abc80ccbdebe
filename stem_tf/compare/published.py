"""What papers print for public data sets: AUC on test by model and task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One table of a paper.

    Attributes:
      source: paper and table.
      tasks: T tasks in the table's order; of each, the names that it may have in a schema.
      aucs: [T] by model, under the names of this package's models.
      note: what a reader of the table should know, or "".
    """

    source: str
    tasks: tuple[tuple[str, ...], ...]
    aucs: Mapping[str, tuple[float, ...]]
    note: str = ""

    def place(self, task: str) -> int | None:
        """The place of a schema's task in the table; None if it is not there."""
        return next((place for place, names in enumerate(self.tasks) if task in names), None)

    def auc(self, model: str, task: str) -> float | None:
        """The printed AUC; None if there is none."""
        place = self.place(task)
        return None if place is None or model not in self.aucs else self.aucs[model][place]

    def gain(self, model: str, task: str) -> float | None:
        """The AUC less that of Single-Task (PLE Eq. 11), from the printed AUCs."""
        auc, single = self.auc(model, task), self.auc("single_task", task)
        return None if auc is None or single is None else round(auc - single, 4)


def _tasks(*names: str) -> tuple[tuple[str, ...], ...]:
    """Tasks by name, or by the column of the published log, ``is_<name>``."""
    return tuple((name, f"is_{name}") for name in names)


_STEM = "Su et al., STEM: Unleashing the Power of Embeddings for Multi-task Recommendation, AAAI 2024"
_PLE = "Tang et al., Progressive Layered Extraction (PLE), RecSys 2020"

_TABLES: Mapping[str, Published] = {
    "tiktok": Published(
        f"{_STEM}, Table 2",
        _tasks("finish", "like"),
        {
            "single_task": (0.7505, 0.9058),
            "shared_bottom": (0.7504, 0.9022),
            "omoe": (0.7516, 0.9029),
            "mmoe": (0.7511, 0.9018),
            "ple": (0.7511, 0.9016),
            "esmm": (0.7503, 0.9012),
            "aitm": (0.7506, 0.9026),
            "me_mmoe": (0.7502, 0.9045),
            "me_ple": (0.7492, 0.9058),
            "stem_net": (0.7513, 0.9095),
        },
    ),
    "qk_video": Published(
        f"{_STEM}, Table 3",
        _tasks("click", "like"),
        {
            "single_task": (0.9234, 0.9400),
            "shared_bottom": (0.9235, 0.9389),
            "omoe": (0.9238, 0.9394),
            "mmoe": (0.9238, 0.9401),
            "ple": (0.9238, 0.9399),
            "esmm": (0.9208, 0.9368),
            "aitm": (0.9237, 0.9398),
            "me_mmoe": (0.9239, 0.9407),
            "me_ple": (0.9238, 0.9410),
            "stem_net": (0.9237, 0.9426),
        },
    ),
    "kuairand_1k": Published(
        f"{_STEM}, Table 4",
        _tasks("click", "like", "follow", "comment", "forward", "hate", "long_view", "profile_enter"),
        {
            "single_task": (0.7534, 0.9293, 0.8294, 0.8943, 0.8572, 0.8821, 0.7650, 0.8358),
            "shared_bottom": (0.7535, 0.9261, 0.8162, 0.8881, 0.8228, 0.7820, 0.7642, 0.8340),
            "omoe": (0.7549, 0.9273, 0.8404, 0.8923, 0.8352, 0.8750, 0.7655, 0.8349),
            "mmoe": (0.7541, 0.9278, 0.8268, 0.8901, 0.8591, 0.8908, 0.7647, 0.8360),
            "ple": (0.7537, 0.9290, 0.8362, 0.8885, 0.8449, 0.8940, 0.7643, 0.8374),
            "me_mmoe": (0.7555, 0.9288, 0.8310, 0.8912, 0.8500, 0.8668, 0.7658, 0.8385),
            "me_ple": (0.7536, 0.9294, 0.8353, 0.8970, 0.8521, 0.8871, 0.7637, 0.8381),
            "stem_net": (0.7523, 0.9282, 0.8420, 0.8910, 0.8635, 0.9070, 0.7637, 0.8359),
        },
        "The paper calls the tasks A to H; which is which is read from their rates of positives.",
    ),
    "census_income": Published(
        f"{_PLE}, Table 5",
        (("income",), ("never_married",)),
        {"single_task": (0.9445, 0.9923), "mmoe": (0.9393, 0.9928), "ple": (0.9522, 0.9945)},
        "The table prints MMoE's gain on income as +.0048, but its AUCs (.9393 against .9445) make it -.0052.",
    ),
    "ali_ccp": Published(
        f"{_PLE}, Table 5",
        (("click", "ctr"), ("conversion", "cvr", "purchase", "buy")),
        {"single_task": (0.6088, 0.6040), "mmoe": (0.6094, 0.5738), "ple": (0.6112, 0.6097)},
    ),
}


def of_data(name: str) -> Published | None:
    """The published table of a data set, by the name in its schema; None where there is none."""
    return _TABLES.get(name)
