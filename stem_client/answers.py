"""Scores out of an answer, whichever way the server encoded them."""

from __future__ import annotations

import itertools
from typing import Any

import grpc
import numpy as np

from stem_client import protocol
from stem_client.errors import RankingError


def read(response: Any, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Scores float32 [last of ``shape``] by task, in the order of their names.

    Args:
      response: PredictResponse.
      shape: [B], or [1, N]; a server that batches requests pads N to the longest among them, and the rest is dropped.

    Raises:
      RankingError: an output is no float32 tensor of that shape.
    """
    return {task: _scores(response.outputs[task], task, shape) for task in sorted(response.outputs)}


def _scores(tensor: Any, task: str, shape: tuple[int, ...]) -> np.ndarray:
    count = shape[-1]
    sizes = tuple(dim.size for dim in tensor.tensor_shape.dim)
    fits = sizes == shape if len(shape) == 1 else len(sizes) == 2 and sizes[0] == shape[0] and sizes[1] >= count
    if tensor.dtype != protocol.DT_FLOAT or not fits:
        what = f"data type {tensor.dtype}, shape {list(sizes)}"
        raise RankingError(grpc.StatusCode.INTERNAL, f"output '{task}' has {what}; float {list(shape)} was expected")
    size = sizes[-1]
    if tensor.tensor_content:
        if len(tensor.tensor_content) != 4 * size:
            raise _malformed(task, f"{len(tensor.tensor_content)} bytes", size)
        return np.frombuffer(tensor.tensor_content, "<f4", count).astype(np.float32)
    given = len(tensor.float_val)
    if given > size:
        raise _malformed(task, f"{given} values", size)
    # Fewer values than elements: the last one stands for the rest, and none at all for zeros.
    scores = np.full(count, tensor.float_val[-1] if given else 0.0, np.float32)
    filled = min(count, given)
    scores[:filled] = np.fromiter(itertools.islice(tensor.float_val, filled), np.float32, filled)
    return scores


def _malformed(task: str, found: str, size: int) -> RankingError:
    return RankingError(grpc.StatusCode.INTERNAL, f"output '{task}' has {found} for {size} elements")
