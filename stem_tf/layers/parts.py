"""The parts that layers and models with experts are built from, made alike: experts, gates and towers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Self

import tensorflow as tf

from stem_tf.layers.experts import DCN, FwFM, NFwFM, NormalisedExperts
from stem_tf.layers.gate import Gate
from stem_tf.layers.mlp import MLP

Counts = int | Sequence[int] | Mapping[str, "int | Sequence[int]"]
"""How many experts: a number, one per level, or either by task."""


@dataclass(frozen=True)
class Parts:
    """How a layer or model makes its experts, gates and towers.

    Attributes:
      expert: what an expert of the first level is; those above are MLPs. Shared-Bottom's bottom is one expert.
      expert_units: widths of an expert's layers, ReLU after every one; or a tuple of them per level.
      expert_norm: ``batch`` ends an expert in the swish of a batch norm (HoME) in place of its last ReLU.
      cross_layers: number of cross layers of a ``dcn`` expert, below its MLP.
      gate_units: hidden widths of a gate; () is the papers' linear gate, (128, 64) STEM's settings and release.
      gate_bias: the papers' equations have no bias in gates, the release has.
      tower_units: hidden widths of a tower.
      dropout: rate after every hidden layer of experts, gates and towers.
      batch_norm: in experts, gates and towers.
      fields: F, for experts that look at pairs of fields.
    """

    expert: Literal["mlp", "fwfm", "nfwfm", "dcn"] = "mlp"
    expert_units: tuple[int, ...] | tuple[tuple[int, ...], ...] = (512, 512, 512)
    expert_norm: Literal["none", "batch"] = "none"
    cross_layers: int = 2
    gate_units: tuple[int, ...] = (128, 64)
    gate_bias: bool = True
    tower_units: tuple[int, ...] = (128, 64)
    dropout: float = 0.0
    batch_norm: bool = False
    fields: int = 1

    def units(self, level: int = 0) -> tuple[int, ...]:
        """Widths of the layers of an expert of a level."""
        units = self.expert_units[level] if not isinstance(self.expert_units[0], int) else self.expert_units
        return units

    def experts(self, count: int, level: int = 0) -> tf.keras.layers.Layer:
        """``count`` = K experts: ``[B, D]`` or ``[K, B, D]`` -> ``[K, B, H]``."""
        if self.expert_norm == "batch":
            *hidden, out = self.units(level)
            return NormalisedExperts(self._experts(count, level, hidden, out), self.dropout)
        return self._experts(count, level, self.units(level))

    def _experts(self, count: int, level: int, units: Sequence[int], out: int | None = None) -> tf.keras.layers.Layer:
        """``out`` is the width of a last layer without an activation, after those of ``units``."""
        dropout, batch_norm = self.dropout, self.batch_norm
        if self.expert == "mlp" or level:
            return MLP(units, out, count, dropout=dropout, batch_norm=batch_norm)
        if self.expert == "fwfm":
            return FwFM(self.fields, out or units[-1], count)
        if self.expert == "nfwfm":
            return NFwFM(self.fields, units, count, out, dropout=dropout, batch_norm=batch_norm)
        return DCN(self.cross_layers, units, count, out, dropout=dropout, batch_norm=batch_norm)

    def gate(self, reader: str, experts: Sequence[str], level: int = 0) -> Gate:
        """The gate of ``reader``, a task or ``shared``, over experts of these names."""
        return Gate(
            reader, experts, self.gate_units, self.gate_bias, level, dropout=self.dropout, batch_norm=self.batch_norm
        )

    def towers(self, tasks: Sequence[str]) -> dict[str, MLP]:
        """``[B, H]`` -> ``[B, 1]`` float32, one per task."""
        return {
            task: MLP(self.tower_units, 1, dropout=self.dropout, batch_norm=self.batch_norm, out_dtype="float32")
            for task in tasks
        }


class LayerOfParts(tf.keras.layers.Layer):
    """Base of layers whose experts and gates :class:`Parts` makes: keeps their arguments, so that Keras can save them.

    Args:
      arguments: of the layer's constructor, by name, ``tasks`` and ``parts`` among them.
    """

    def __init__(self, arguments: Mapping[str, Any], **kwargs: object) -> None:
        super().__init__(**kwargs)
        plain = {"tasks": list(arguments["tasks"]), "parts": dataclasses.asdict(arguments["parts"])}
        self._arguments = MappingProxyType({**arguments, **plain})  # not a dict, which Keras would track

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), **self._arguments}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        return cls(**{**config, "parts": Parts(**config["parts"])})


def count_of(counts: Counts, level: int = 0, task: str | None = None) -> int:
    """The number of experts of ``task`` at ``level``."""
    if isinstance(counts, Mapping):
        counts = counts[task]  # type: ignore[index]
    return counts if isinstance(counts, int) else counts[level]


def numbered(name: str, count: int) -> list[str]:
    """Names of ``count`` experts: ``click``, or ``click 1``, ``click 2``, ..."""
    return [name] if count == 1 else [f"{name} {number}" for number in range(1, count + 1)]
