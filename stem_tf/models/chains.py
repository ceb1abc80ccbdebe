"""Tasks in a chain, as impression -> click -> cart -> buy: ESMM (SIGIR 2018) and AITM (KDD 2021)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import tensorflow as tf

from stem_tf.layers.embedding import SHARED, Embedded
from stem_tf.layers.gate import mixture
from stem_tf.layers.mlp import Linear
from stem_tf.layers.seeds import seeds
from stem_tf.models import hyperparameters
from stem_tf.models.hyperparameters import Experts, hyperparameter
from stem_tf.models.network import Network, Outputs
from stem_tf.models.registry import register
from stem_util.errors import UserError, did_you_mean


def chain_of(follows: Mapping[str, str], tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks in the chain's order, ``(click, cart, buy)`` of ``{buy: cart, cart: click}``.

    Raises:
      UserError: the mapping does not make one chain of all tasks.
    """

    def wrong(what: str) -> UserError:
        return UserError(
            "config.model.follows should name each task but the first with the one it follows, among whose positive "
            f"rows its own are, as in buy:cart,cart:click, but {what}"
        )

    if not follows:
        raise wrong("is empty")
    for name in itertools.chain.from_iterable(follows.items()):
        if name not in tasks:
            raise wrong(f"'{name}' is none of the tasks {', '.join(tasks)}{did_you_mean(name, tasks)}")
    for previous in follows.values():
        followers = [task for task, other in follows.items() if other == previous]
        if len(followers) > 1:
            raise wrong(f"{' and '.join(followers)} follow the same one, {previous}")
    first = [task for task in tasks if task not in follows]
    if len(first) > 1:
        raise wrong(f"{' and '.join(first)} follow none: only one task can be the first")
    chain, after = first, {previous: task for task, previous in follows.items()}
    while chain and chain[-1] in after:
        chain.append(after[chain[-1]])
    if circle := [task for task in tasks if task not in chain]:
        raise wrong(f"{' and '.join(circle)} make a circle")
    return tuple(chain)


@dataclass(frozen=True)
class Chain(hyperparameters.Hyperparameters):
    """Hyperparameters of models whose tasks follow each other: each task but the first ``follows`` another one."""

    follows: Mapping[str, str] = hyperparameter(
        "", "chain of tasks, each with the one it follows: buy:cart,cart:click", by="task"
    )


@register("esmm", "each task's probability is a product along its chain")
class ESMM(Network):
    """Entire Space Multi-Task Model (Ma et al., SIGIR 2018, Eq. 1) for a chain of tasks t_1, t_2, ...::

        p(t_k) = prod_{j <= k} sigmoid(o_j), o_j = tower_j(x)

        x --+--> tower click --> o_1 ----------+--> y_click
            |                                  v
            +--> tower cart ---> o_2 --> (product) --+--> y_cart
            |                                        v
            +--> tower buy ----> o_3 ---------> (product) --> y_buy

    Tower k estimates task k among the positive rows of task k - 1, but is trained on all rows, through the products.
    Task k's loss trains the table and the towers of t_1, ..., t_k: only the last tower is one task's.

    Shapes: ``{"shared": [B, D]}`` float32 -> ``{task: [B]}`` float32, the logits of p.

    All tasks are binary.

    Raises:
      UserError: see :func:`chain_of`.
    """

    @dataclass(frozen=True)
    class Hyperparameters(Chain):
        """The chain, whose tasks are factors of those that follow them."""

        @property
        def probabilities(self) -> str:
            return "name=esmm"

        @property
        def also_trains(self) -> Mapping[str, str]:
            return self.follows or {}

    def __init__(self, tasks: Sequence[str], hyper: Hyperparameters, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.chain = chain_of(hyper.follows, tasks)
        self.towers = hyper.parts.towers(tasks)

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of = seeds(seed)
        o = [self.towers[task](h[SHARED], training=training, seed=next(seed_of))[:, 0] for task in self.chain]
        return dict(zip(self.chain, itertools.accumulate(o, logit_of_product), strict=True))

    def own_layers(self, task: str) -> list[tf.keras.layers.Layer]:
        return [self.towers[task]] if task == self.chain[-1] else []


def logit_of_product(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """``logit(sigmoid(a) sigmoid(b)) = -log(e^-a + e^-b + e^-(a + b))``, elementwise.

    From (1 - p) / p = (1 + e^-a) (1 + e^-b) - 1. Terms of one sign: nothing cancels where both probabilities are near
    1, and gradients are finite everywhere.
    """
    return -tf.reduce_logsumexp(tf.stack([-a, -b, -a - b]), axis=0)


@register("aitm", "each task attends to what the one before it learned")
class AITM(Network):
    """Adaptive Information Transfer Multi-task (Xi et al., KDD 2021) along a chain of tasks t_1, t_2, ...::

        q_t = bottom_t(x)        z_1 = q_1        p_(t-1) = g_(t-1)(z_(t-1))
        z_t = w_p h1(p_(t-1)) + w_q h1(q_t), w = softmax over u in {p_(t-1), q_t} of <h2(u), h3(u)> / sqrt(H)
        y_t = sigmoid(tower_t(z_t))
        penalty: calibrator * sum_{t > 1} mean of max(y_t - y_(t-1), 0) over the rows in task t's space

        x --+--> [bottom click] --> z_1 --+--> tower click --> y_click
            |                             v g_1
            +--> [bottom cart] ---> (attention) --> z_2 --+--> tower cart --> y_cart
            |                                             v g_2
            +--> [bottom buy] --------------------> (attention) --> z_3 --> tower buy --> y_buy

    g and h are one linear layer each, the h's shared by all steps. Task t's loss trains the table, the bottoms and g's
    up to it, the h's (where t > 1) and its tower: towers are one task's, and the last task's bottom and g. The penalty
    trains what both of its tasks read. The STEM authors' release has no penalty.

    Shapes: ``{"shared": [B, D]}`` float32 -> ``{task: [B]}`` float32; bottoms ``[1, B, H]``, the pair (p, q)
    ``[2, B, H]``, its weights w ``[B, 2]`` float32 under any precision policy.

    Raises:
      UserError: see :func:`chain_of`.
    """

    @dataclass(frozen=True)
    class Hyperparameters(Chain, Experts):
        """The weight of the penalty, ``calibrator``, is 0.6 in the paper; with it, all tasks are binary."""

        calibrator: float = hyperparameter(
            0.0, "weight of the loss where a task's probability exceeds its predecessor's", low=0
        )

        @property
        def probabilities(self) -> str:
            return f"calibrator={self.calibrator}" if self.calibrator else ""

    def __init__(self, tasks: Sequence[str], hyper: Hyperparameters, **kwargs: object) -> None:
        super().__init__(**kwargs)
        parts = hyper.parts
        self.chain, self.calibrator = chain_of(hyper.follows, tasks), hyper.calibrator
        width = parts.units()[-1]
        self.bottoms = {task: parts.experts(1) for task in tasks}
        # By the task that reads it: g_(t-1) is at t.
        self.infos = {task: Linear(width) for task in self.chain[1:]}
        self.h1, self.h2, self.h3 = Linear(width), Linear(width), Linear(width)
        self.towers = parts.towers(tasks)

    def call(self, h: Embedded, training: bool = False, seed: tf.Tensor | None = None) -> Outputs:
        seed_of, outputs, z = seeds(seed), {}, None
        for task in self.chain:
            q = self.bottoms[task](h[SHARED], training=training, seed=next(seed_of))[0]
            z = q if z is None else self._attention(self.infos[task](z), q)
            outputs[task] = self.towers[task](z, training=training, seed=next(seed_of))[:, 0]
        return outputs

    def _attention(self, p: tf.Tensor, q: tf.Tensor) -> tf.Tensor:
        pair = tf.stack([p, q])
        scores = tf.reduce_sum(tf.cast(self.h2(pair) * self.h3(pair), tf.float32), axis=-1) / p.shape[-1] ** 0.5
        return mixture(tf.nn.softmax(tf.transpose(scores)), [self.h1(pair)])

    def own_layers(self, task: str) -> list[tf.keras.layers.Layer]:
        own = [self.bottoms[task], self.infos[task]] if task == self.chain[-1] else []
        return [*own, self.towers[task]]

    def penalty(
        self, outputs: Outputs, weights: Mapping[str, tf.Tensor], spaces: Mapping[str, tf.Tensor], share: float
    ) -> tf.Tensor:
        total = tf.constant(0.0)
        for previous, task in itertools.pairwise(self.chain):
            excess = tf.nn.relu(tf.sigmoid(outputs[task]) - tf.sigmoid(outputs[previous]))
            total += tf.math.divide_no_nan(tf.reduce_sum(weights[task] * excess), spaces[task])
        return self.calibrator * total
