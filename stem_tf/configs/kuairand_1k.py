"""STEM-Net on KuaiRand-1K: the eight tasks A to H. The STEM paper's settings, Table 4.

    stem-recipe kuairand_1k --raw=DIR --output=data/kuairand_1k
    stem-train --config=kuairand_1k --workdir=runs/kuairand_1k

The paper chooses K1 and K2 from 1, 2, 4 and 8 and the learning rate from 1e-3, 5e-4 and 1e-4 without saying which it
took here: these are the smallest numbers of experts and the largest rate. Ids seen fewer than 10 times in train share
one (min_count: 10 in the schema). For the other sizes: stem-recipe kuairand_pure or kuairand_27k, and
--config.data.dir.
"""

import ml_collections

from stem_tf.configs import stem_released


def get_config() -> ml_collections.ConfigDict:
    config = stem_released.get_config()
    config.experiment = "kuairand_1k"
    config.data.dir = "data/kuairand_1k"
    return config
