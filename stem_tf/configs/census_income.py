"""STEM-Net on Census-Income (KDD): income over 50,000 dollars, and never married. PLE's task group 1.

stem-recipe census_income --raw=datasets/census_income --output=data/census_income
stem-train --config=census_income --workdir=runs/census_income
"""

import ml_collections

from stem_tf.configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.experiment = "census_income"
    config.data.dir = "data/census_income"
    config.model.expert_units = (256, 128)
    config.model.gate_units = (64,)
    config.model.tower_units = (64,)
    config.optimizer.tables = "dense"
    config.train.epochs = 8
    config.train.patience = 1
    config.train.log_every = 10
    return config
