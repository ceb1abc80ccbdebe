"""Building blocks of the models, usable alone in any Keras model of tf_keras. docs/layers.md shows how.

Shapes: B batch, F fields, D embedding width, T tasks, K experts, H hidden width.
"""

from stem_tf.layers.embedding import SHARED, Embeddings, Field, PackedTable, task_table
from stem_tf.layers.experts import DCN, FwFM, NFwFM
from stem_tf.layers.extraction import ExtractionNetwork
from stem_tf.layers.gate import Gate, mixture, observe
from stem_tf.layers.mlp import MLP, Linear
from stem_tf.layers.parts import Parts
from stem_tf.layers.stem import STEMLayer

__all__ = [
    "DCN",
    "Embeddings",
    "ExtractionNetwork",
    "Field",
    "FwFM",
    "Gate",
    "Linear",
    "MLP",
    "NFwFM",
    "PackedTable",
    "Parts",
    "SHARED",
    "STEMLayer",
    "mixture",
    "observe",
    "task_table",
]
