"""STEM-Net on TikTok (ICME 2019, track 1): finish and like. The STEM paper's settings, Table 2.

    stem-recipe tiktok --raw=DIR --output=data/tiktok
    stem-train --config=tiktok --workdir=runs/tiktok

K1 = 1 and K2 = 8 as released; the baselines there have lr 1e-4 (--config.optimizer.learning_rate), MMoE and OMoE 8
experts, PLE K2 = 8, AITM and Shared-Bottom towers of 128-128, ESMM towers of 512-512-512. Ids seen fewer than 10 times
in train share one (min_count: 10 in the schema).
"""

import ml_collections

from stem_tf.configs import stem_released


def get_config() -> ml_collections.ConfigDict:
    config = stem_released.get_config()
    config.experiment = "tiktok"
    config.data.dir = "data/tiktok"
    config.model.shared_experts = 8
    return config
