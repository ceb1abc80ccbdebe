"""PLE on synthetic data (Ma et al., KDD 2018): two regressions of known correlation. The PLE paper's settings, Fig. 7.

    stem-train --config=synthetic --config.data.dir=DATA --workdir=runs/synthetic

Two levels of single-layer experts below the towers, 256-128-64, and linear gates without bias (Eq. 3). The paper gives
no numbers of experts, batch or learning rate: one expert a task and a shared one, and this project's defaults.
Inputs are one dense vector of 512 numbers, which each model multiplies by a learned matrix first (model.dim columns).
"""

import ml_collections

from stem_tf.configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.experiment = "synthetic"
    config.data.dir = "data/synthetic"
    config.model.name = "ple"
    config.model.layers = 2
    config.model.expert_units = ((256,), (128,))
    config.model.gate_units = ()
    config.model.gate_bias = False
    config.model.tower_units = (64,)
    config.model.dim = 256
    config.train.monitor = "loss"
    return config
