"""PLE on Ali-CCP: click and conversion. The PLE paper's settings, Table 5.

    stem-recipe ali_ccp --raw=DIR --output=data/ali_ccp
    stem-train --config=ali_ccp --workdir=runs/ali_ccp

Two levels of single-layer experts below the towers, 256-128-64, and linear gates without bias (Eq. 3). The paper gives
no number of experts, batch size or learning rate: here one expert per task, a shared one, and this project's defaults.
"""

import ml_collections

from stem_tf.configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.experiment = "ali_ccp"
    config.data.dir = "data/ali_ccp"
    config.model.name = "ple"
    config.model.layers = 2
    config.model.expert_units = ((256,), (128,))
    config.model.gate_units = ()
    config.model.gate_bias = False
    config.model.tower_units = (64,)
    return config
