"""Hyperparameters that families of models share. A model inherits the families it belongs to and adds its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from stem_tf.configs.base import Key, numbers
from stem_tf.layers.parts import Counts, Parts
from stem_util.errors import UserError


def hyperparameter(default: Any, help: str, **limits: Any) -> Any:
    """A field of a dataclass that is the config key ``model.<name of the field>``.

    Args:
      default, help: default and help of the key.
      limits: which values the key takes, as in :class:`stem_tf.configs.base.Key`.
    """
    return dataclasses.field(default=default, metadata={"key": Key(default, help, **limits)})


@dataclass(frozen=True)
class Hyperparameters:
    """Hyperparameters that every model has: those of towers.

    Attributes:
      fields: F, the number of features in the data; no config key.
    """

    tower_units: tuple[int, ...] = hyperparameter(Parts.tower_units, "hidden widths of a task's tower", low=1)
    dropout: float = hyperparameter(Parts.dropout, "rate after every hidden layer", low=0, below=1)
    batch_norm: bool = hyperparameter(Parts.batch_norm, "batch normalisation in experts, gates and towers")
    fields: int = 1

    @property
    def parts(self) -> Parts:
        """Makes the experts, gates and towers that these hyperparameters describe."""
        of_parts = {field.name for field in dataclasses.fields(Parts)}
        return Parts(**{name: value for name, value in vars(self).items() if name in of_parts})

    @property
    def depth(self) -> int:
        """How many levels of experts the model has."""
        return 1

    def check(self) -> None:
        """Refuses values that do not fit each other.

        Raises:
          UserError: such values.
        """

    @property
    def probabilities(self) -> str:
        """The setting that takes each task's output for a probability, as in ``name=esmm``; "" where none does."""
        return ""

    @property
    def also_trains(self) -> Mapping[str, str]:
        """Tasks, each with another one whose tower its loss trains too."""
        return {}


@dataclass(frozen=True)
class HiddenLayers(Hyperparameters):
    """Hyperparameters of models that have layers below the towers."""

    expert_units: tuple[int, ...] | tuple[tuple[int, ...], ...] = hyperparameter(
        Parts.expert_units, "widths of an expert's layers (of each level)", by_level=True, low=1
    )

    def check(self) -> None:
        super().check()
        if not self.expert_units or any(isinstance(u, tuple) and not u for u in self.expert_units):
            raise UserError("config.model.expert_units should name at least one layer, but is ()")


@dataclass(frozen=True)
class Experts(HiddenLayers):
    """Hyperparameters of models made of experts, or of bottoms, which are one expert each."""

    expert: Literal["mlp", "fwfm", "nfwfm", "dcn"] = hyperparameter(
        Parts.expert,
        "what an expert of the first level is; the bottom, for models without experts",
        choices=("mlp", "fwfm", "nfwfm", "dcn"),
    )
    expert_norm: Literal["none", "batch"] = hyperparameter(
        Parts.expert_norm,
        "what an expert (of each level) ends in: none, as the papers' do; batch, swish of a batch norm in place of the"
        " last ReLU (HoME), so that no expert dies or drowns the others",
        choices=("none", "batch"),
    )
    cross_layers: int = hyperparameter(
        Parts.cross_layers, "cross layers of an expert", low=1, only_if=("model.expert", ("dcn",))
    )

    def check(self) -> None:
        super().check()
        if self.expert == "fwfm" and len(self.parts.units()) > 1:
            raise UserError(
                f"config.model.expert_units should be one width for experts of kind fwfm, but is {self.expert_units}"
            )


@dataclass(frozen=True)
class Gates(Experts):
    """Hyperparameters of models whose gates mix experts."""

    gate_units: tuple[int, ...] = hyperparameter(
        Parts.gate_units, "hidden widths of a gate; () is the papers' linear gate", low=1
    )
    gate_bias: bool = hyperparameter(Parts.gate_bias, "bias in gates; the papers' equations have none")


@dataclass(frozen=True)
class CommonExperts(Gates):
    """Hyperparameters of mixtures of experts that belong to no task."""

    experts: Counts = hyperparameter(8, "E, experts (of each level)", by_level=True, low=1)


@dataclass(frozen=True)
class TaskExperts(Gates):
    """Hyperparameters of models with experts of each task and shared ones."""

    task_experts: Counts = hyperparameter(1, "K1, experts of each task (and level)", by="task", by_level=True, low=0)
    shared_experts: Counts = hyperparameter(1, "K2, shared experts (of each level)", by_level=True, low=0)

    def check(self) -> None:
        super().check()
        if not sum(numbers((self.task_experts, self.shared_experts))):
            raise UserError(
                "config.model.task_experts and config.model.shared_experts are both 0: there are no experts"
            )


@dataclass(frozen=True)
class Levels(Hyperparameters):
    """Hyperparameters of models whose experts may be stacked in levels."""

    own_depth: ClassVar[int] = 1
    layers: int = hyperparameter(0, "levels of experts; 0 is the model's own number", low=0)

    @property
    def depth(self) -> int:
        return self.layers or self.own_depth


@dataclass(frozen=True)
class ReleasedStacking(Levels):
    """Hyperparameters of models that the STEM authors' release stacks in another way than the papers."""

    released_stacking: bool = hyperparameter(
        False,
        "levels as in the authors' release: STEM-Net's shared gate leaks gradients, PLE's sees shared experts only",
        stacked=True,
    )


@dataclass(frozen=True)
class TaskTables(Hyperparameters):
    """Hyperparameters of models with a table for each task beside the shared one."""

    task_features: str = hyperparameter(
        "schema",
        "features with tables of their own for each task: all, none, user, item, ids (the schema's group and item), "
        "names a,b, or as the schema says",
    )
