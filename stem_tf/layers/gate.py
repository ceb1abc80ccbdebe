"""Gates: a distribution over experts, and the mixture it makes of them."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf

from stem_tf.layers.mlp import MLP
from stem_tf.layers.sides import Sides

_mixtures: contextvars.ContextVar[list[tuple[tf.Tensor, Sequence[tf.Tensor]]] | None] = contextvars.ContextVar(
    "mixtures", default=None
)


@tf.keras.utils.register_keras_serializable("stem_tf")
class Gate(tf.keras.layers.Layer):
    """``softmax(MLP(x))`` over E experts (STEM Eq. 5, PLE Eq. 3). Shapes: ``[B, D]`` -> ``[B, E]``, float32 under any
    precision policy.

    >>> gate = Gate("click", experts=["expert 1", "expert 2", "expert 3"])
    >>> x = tf.ones([5, 8])
    >>> mixture(gate(x), [MLP([16], count=3)(x)]).shape
    TensorShape([5, 16])

    Args:
      reader: who reads the mixture, a task or ``shared``.
      experts: E names, in the order of the mixture.
      units: hidden widths; the papers' equations have none, the STEM paper's settings and its release [128, 64].
      bias: in its linear layers; PLE Eq. 3 and STEM Eq. 5 have none, the release has.
      level: which of the model's levels it belongs to, from 0.
      dropout, batch_norm: as in :class:`MLP`.

    Raises:
      ValueError: no experts.

    Attributes:
      observer: is given (gate, weights) at every call; see :func:`observe`.
    """

    observer: Callable[[tuple[Gate, tf.Tensor]], None] | None = None

    def __init__(
        self,
        reader: str,
        experts: Sequence[str],
        units: Sequence[int] = (),
        bias: bool = True,
        level: int = 0,
        dropout: float = 0.0,
        batch_norm: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        if not experts:
            raise ValueError("a gate needs at least one expert; received experts=[]")
        self.reader, self.experts, self.level = reader, tuple(experts), level
        self.mlp = MLP(units, out=len(experts), dropout=dropout, batch_norm=batch_norm, bias=bias, out_dtype="float32")

    def call(self, x: tf.Tensor | Sides, training: bool = False, seed: tf.Tensor | None = None) -> tf.Tensor:
        weights = tf.nn.softmax(self.mlp(x, training=training, seed=seed))
        if self.observer is not None:
            self.observer((self, weights))
        return weights


@contextlib.contextmanager
def observe(network: tf.Module) -> Iterator[list[tuple[Gate, tf.Tensor]]]:
    """Collects (gate, its weights ``[B, E]``) of every gate of ``network`` that is called inside, in calling order.

    In a graph it collects the graph's tensors: call it inside the function that is traced.
    """
    seen: list[tuple[Gate, tf.Tensor]] = []
    gates = [layer for layer in network.submodules if isinstance(layer, Gate)]
    for gate in gates:
        gate.observer = seen.append
    try:
        yield seen
    finally:
        for gate in gates:
            gate.observer = None


@contextlib.contextmanager
def observe_mixtures() -> Iterator[list[tuple[tf.Tensor, Sequence[tf.Tensor]]]]:
    """Collects (weights ``[B, E]``, groups of experts ``[K_g, B, H]``) of every :func:`mixture` made inside.

    In a graph it collects the graph's tensors, as :func:`observe` does; the weights are those that a gate returned.
    """
    seen: list[tuple[tf.Tensor, Sequence[tf.Tensor]]] = []
    token = _mixtures.set(seen)
    try:
        yield seen
    finally:
        _mixtures.reset(token)


def mixture(weights: tf.Tensor, groups: Sequence[tf.Tensor]) -> tf.Tensor:
    """``sum_k weights[:, k] * expert_k`` over all experts of all groups, in the groups' order.

    Args:
      weights: ``[B, E]``, E the number of experts in all groups.
      groups: outputs of expert groups, each ``[K_g, B, H]``.

    Returns:
      ``[B, H]`` in the experts' dtype.

    Raises:
      ValueError: more or fewer weights than experts.
    """
    count = sum(group.shape[0] for group in groups)
    if weights.shape[-1] != count:
        raise ValueError(f"a mixture of {count} experts needs as many weights; received {weights.shape[-1]}")
    if (seen := _mixtures.get()) is not None:
        seen.append((weights, groups))
    weights = tf.cast(tf.transpose(weights)[:, :, tf.newaxis], groups[0].dtype)
    parts = tf.split(weights, [group.shape[0] for group in groups])
    return tf.add_n([_summed(part * group) for part, group in zip(parts, groups, strict=True)])


def _summed(terms: tf.Tensor) -> tf.Tensor:
    """``[K, B, H]`` -> ``[B, H]``; one expert needs no sum, which would copy it and its gradient."""
    return tf.squeeze(terms, axis=0) if terms.shape[0] == 1 else tf.reduce_sum(terms, axis=0)
