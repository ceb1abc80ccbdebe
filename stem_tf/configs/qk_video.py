"""STEM-Net on QK-Video (Tenrec): click and like. The STEM paper's settings, Table 3.

    stem-recipe qk_video --raw=DIR --output=data/qk_video
    stem-train --config=qk_video --workdir=runs/qk_video

The paper chooses K1 and K2 from 1, 2, 4 and 8 and the learning rate from 1e-3, 5e-4 and 1e-4 without saying which it
took here: these are the smallest numbers of experts and the largest rate. Ids seen fewer than 10 times in train share
one (min_count: 10 in the schema).
"""

import ml_collections

from stem_tf.configs import stem_released


def get_config() -> ml_collections.ConfigDict:
    config = stem_released.get_config()
    config.experiment = "qk_video"
    config.data.dir = "data/qk_video"
    return config
