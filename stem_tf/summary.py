"""Text about a model: its tables, experts, gates and towers, their parameters and multiply-adds."""

from __future__ import annotations

import tensorflow as tf

from pipelines.schema import Feature
from stem_tf import report
from stem_tf.layers.embedding import SHARED
from stem_tf.layers.gate import Gate
from stem_tf.models.ranking_model import RankingModel


def summary(model: RankingModel) -> str:
    """Tables with rows, width and bytes; the network's parameters by part and owner; multiply-adds per row."""
    return "\n\n".join([_tables(model), _network(model)])


def _tables(model: RankingModel) -> str:
    cells, total, total_bytes = [], 0, 0
    kinds = {feature.name: _kind(feature) for feature in model.inputs.features}
    for group in model.embeddings.groups:
        for field in group.order:
            rows = field.rows or field.length or 1
            size = rows * group.width * 4
            total, total_bytes = total + rows, total_bytes + size
            tables = str(len(group.tables))
            cells.append([field.name, kinds[field.name], f"{rows:,}", tables, str(group.dim), report.size(size), ""])
    cells.append(["all", "", f"{total:,}", "", "", report.size(total_bytes), ""])
    names = ", ".join(model.embeddings.tables)
    return f"tables: {names}\n" + report.table(["feature", "kind", "rows", "tables", "width", "bytes", ""], cells)


def _kind(feature: Feature) -> str:
    hashed = "" if feature.hash is None else ", hashed" if feature.hash.hashes == 1 else ", hashed twice"
    return f"{feature.kind}{hashed}"


def _network(model: RankingModel) -> str:
    network = model.network
    owner = {
        weight.ref(): task.name
        for task in model.tasks
        for layer in network.own_layers(task.name)
        for weight in layer.weights
    }
    gates = {weight.ref() for layer in network.submodules if isinstance(layer, Gate) for weight in layer.weights}
    towers = {weight.ref() for tower in network.towers.values() for weight in tower.weights}
    counts: dict[str, list[int]] = {name: [0, 0, 0] for name in (*(task.name for task in model.tasks), SHARED)}
    for weight in network.weights:
        part = 1 if weight.ref() in gates else 2 if weight.ref() in towers else 0
        counts[owner.get(weight.ref(), SHARED)][part] += int(tf.size(weight))
    lines = [[name, *map("{:,}".format, parts), f"{sum(parts):,}", ""] for name, parts in counts.items()]
    sums = [sum(column) for column in zip(*counts.values(), strict=True)]
    lines.append(["all", *map("{:,}".format, sums), f"{sum(sums):,}", ""])
    head = ["parameters of", "experts", "gates", "towers", "all", ""]
    return f"{report.table(head, lines)}\n{multiply_adds(model):,} multiply-adds per row in matrix products"


def multiply_adds(model: RankingModel) -> int:
    """Multiply-adds of the network's matrix products for one row, as TensorFlow's profiler counts them."""
    profiler = tf.compat.v1.profiler
    h = {table: tf.TensorSpec([1, model.embeddings.flat_width]) for table in model.embeddings.tables}
    graph = tf.function(model.network.call, autograph=False).get_concrete_function(h).graph
    counting = profiler.ProfileOptionBuilder(profiler.ProfileOptionBuilder.float_operation())
    counting.with_empty_output().with_accounted_types(["MatMul", "BatchMatMulV2"])
    return int(profiler.profile(graph, options=counting.build()).total_float_ops) // 2


def on_level(name: str, level: int, levels: int) -> str:
    """The name of a gate or an expert, with its level if the model has several."""
    return name if levels == 1 else f"{name}, level {level + 1}"
