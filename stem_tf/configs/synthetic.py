"""PLE on synthetic data (Ma et al., KDD 2018): two regressions of known correlation. The PLE paper's settings, Fig. 7.

    stem-recipe mmoe_synthetic --correlation=0.5 --output=data/synthetic
    stem-train --config=synthetic --workdir=runs/synthetic

Two levels of single-layer experts below the towers, 256-128-64, and linear gates without bias (Eq. 3). The paper gives
no number of experts, batch size or learning rate: here one expert per task, a shared one, and this project's defaults.
Inputs are one dense vector of 512 numbers, which each model multiplies by a learned matrix first (model.dim columns).
"""

import ml_collections

from stem_tf.configs import ali_ccp


def get_config() -> ml_collections.ConfigDict:
    config = ali_ccp.get_config()
    config.experiment = "synthetic"
    config.data.dir = "data/synthetic"
    config.model.dim = 256
    config.train.monitor = "loss"
    return config
