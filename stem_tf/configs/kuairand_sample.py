"""STEM-Net on the bundled KuaiRand sample: six tasks of a short-video feed.

    stem-convert datasets/kuairand_sample/log.parquet --schema=kuairand_sample --split=time --split_column=time_ms \
        --output=data/kuairand_sample
    stem-train --config=kuairand_sample --workdir=runs/kuairand_sample

Tables are trained with `lazy` here: most ids of this small log are rare, and the L2 of `deferred` and `dense` also
pulls rows that no batch reads to 0. Mean AUC of seeds 0 and 1: lazy .7857 and .7882 on validation, .7666 and .7659 on
test; deferred .7840 and .7866, .7629 and .7629. For a log of your own start from --config=small.
"""

import ml_collections

from stem_tf.configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.experiment = "kuairand_sample"
    config.data.dir = "data/kuairand_sample"
    # A small log: narrow experts, and small batches, reached the best mean validation AUC (over three seeds).
    config.data.batch_size = 512
    config.model.expert_units = (32,)
    config.model.gate_units = (32,)
    config.model.tower_units = (32,)
    config.model.init_std = 1e-3
    config.optimizer.learning_rate = 5e-4
    config.optimizer.tables = "lazy"
    config.train.epochs = 20
    config.train.patience = 3
    config.train.log_every = 10
    return config
