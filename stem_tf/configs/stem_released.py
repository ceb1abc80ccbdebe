"""The training recipe of the STEM paper's released code, for any converted data: exact dense Adam, L2 on whole tables.

    stem-train --config=stem_released --config.data.dir=DATA --workdir=RUN

Batch 4096, lr 1e-3, clip 10, L2 1e-6, tables from N(0, 1e-4), a stop after the first epoch whose mean AUC is not
better. Every step moves every row: with tables of many millions of rows --config.optimizer.tables=deferred is faster.
"""

import ml_collections

from stem_tf.configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.experiment = "stem_released"
    config.model.init_std = 1e-4
    config.optimizer.tables = "dense"
    config.train.epochs = 100
    config.train.patience = 1
    return config
