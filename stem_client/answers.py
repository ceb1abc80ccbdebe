"""Scores out of an answer, whichever way the server encoded them."""

from __future__ import annotations

import itertools
from collections.abc import Set
from typing import Any

import grpc
import numpy as np

from stem_client import protocol
from stem_client.errors import RankingError


def parse(message: Any, payload: bytes) -> Any:
    """A message of class ``message``; raises RankingError where the bytes are none."""
    try:
        return message.FromString(payload)
    except Exception as error:  # protobuf's DecodeError has moved between its versions
        raise wrong(f"the answer is not readable: {error}") from None


def version(response: Any) -> int | None:
    """The version of the model that an answer is of, where it says so."""
    return response.model_spec.version.value if response.model_spec.HasField("version") else None


def check_tasks(given: Set[str], expected: Set[str]) -> None:
    """Raises RankingError where an answer has not one output for each task of the model."""
    if given == expected:
        return
    missing, extra = sorted(expected - given), sorted(given - expected)
    if missing or extra:
        said = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(extra)} beside them"] * bool(extra)
        raise wrong(f"the model's tasks are {', '.join(sorted(expected))}; the answer {' and '.join(said)}")


def read(response: Any, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Scores float32 [last of ``shape``] by task, in the order of their names.

    Args:
      response: PredictResponse.
      shape: [B], or [1, N]; a server that batches requests pads N to the longest among them, and the rest is dropped.

    Raises:
      RankingError: there are no outputs, one is no float32 tensor of that shape, a score is NaN or infinite.
    """
    if not response.outputs:
        raise wrong("the answer has no scores")
    return {task: _scores(response.outputs[task], task, shape) for task in sorted(response.outputs)}


def wrong(details: str) -> RankingError:
    """An answer that is none."""
    return RankingError(grpc.StatusCode.INTERNAL, details)


def _scores(tensor: Any, task: str, shape: tuple[int, ...]) -> np.ndarray:
    scores = _values(tensor, task, shape)
    bad = ~np.isfinite(scores)
    if bad.any():
        raise wrong(f"output '{task}' holds {scores[bad][0]} at {int(bad.argmax())}; scores are finite")
    return scores


def _values(tensor: Any, task: str, shape: tuple[int, ...]) -> np.ndarray:
    count = shape[-1]
    sizes = tuple(dim.size for dim in tensor.tensor_shape.dim)
    fits = sizes == shape if len(shape) == 1 else len(sizes) == 2 and sizes[0] == shape[0] and sizes[1] >= count
    if tensor.dtype != protocol.DT_FLOAT or not fits:
        what = f"data type {tensor.dtype}, shape {list(sizes)}"
        raise wrong(f"output '{task}' has {what}; float {list(shape)} was expected")
    size = sizes[-1]
    if tensor.tensor_content:
        if len(tensor.tensor_content) != 4 * size:
            raise wrong(f"output '{task}' has {len(tensor.tensor_content)} bytes for {size} elements")
        return np.frombuffer(tensor.tensor_content, "<f4", count).astype(np.float32)
    given = len(tensor.float_val)
    if not 0 < given <= size:
        raise wrong(f"output '{task}' has {given} values for {size} elements")
    # Fewer values than elements: the last one stands for the rest.
    scores = np.full(count, tensor.float_val[-1], np.float32)
    filled = min(count, given)
    scores[:filled] = np.fromiter(itertools.islice(tensor.float_val, filled), np.float32, filled)
    return scores
