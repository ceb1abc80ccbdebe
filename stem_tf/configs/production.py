"""The production model of the STEM paper's A/B test: an MMoE whose experts are NFwFMs, for any converted data.

    stem-train --config=production --config.data.dir=DATA --workdir=RUN
    stem-train --config=production --config.model.name=stem_net --config.data.dir=DATA --workdir=RUN

The second is the model with shared and task-specific embeddings: a group of NFwFM experts for each table, a gate over
all, and STEM-Net's stop-gradient (our reading of the paper, which gives neither equations nor sizes).
"""

import ml_collections

from stem_tf.configs import base


def get_config() -> ml_collections.ConfigDict:
    config = base.get_config()
    config.experiment = "production"
    config.model.name = "mmoe"
    config.model.expert = "nfwfm"
    config.model.expert_units = (256, 128)
    return config
