"""STEM-Net as in the paper's settings (experts 512-512-512, D = 16, batch 4096, lr 1e-3), for any converted data.

stem-train --config=stem_net --config.data.dir=DATA --workdir=RUN
"""

import ml_collections

from stem_tf.configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.experiment = "stem_net"
    return config
