"""STEM-Net for a log of your own, up to a few million rows: modest widths, and patience to stop by itself.

stem-train --config=small --config.data.dir=DATA --workdir=RUN

A place to start from, for any converted data. Larger logs: --config=stem_net, the paper's widths and batch.
"""

import ml_collections

from stem_tf.configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.experiment = "small"
    config.data.batch_size = 512
    config.model.expert_units = (64, 32)
    config.model.gate_units = (32,)
    config.model.tower_units = (32,)
    config.model.init_std = 1e-3
    config.optimizer.learning_rate = 2e-3
    config.train.epochs = 20
    config.train.patience = 3
    return config
