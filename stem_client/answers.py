"""Reads the scores in an answer, in either encoding of a server."""

from __future__ import annotations

import itertools
from collections.abc import Set
from typing import Any

import grpc
import numpy as np

from stem_client import protocol
from stem_client.errors import RankingError


def parse(message: Any, payload: bytes) -> Any:
    """Parses a message of class ``message``; raises RankingError if the bytes are not one."""
    try:
        return message.FromString(payload)
    except Exception as error:  # protobuf's DecodeError has moved between its versions
        raise wrong(f"the answer is not readable: {error}") from None


def version(response: Any) -> int | None:
    """The version of the model that answered, if the answer names it."""
    return response.model_spec.version.value if response.model_spec.HasField("version") else None


def check_tasks(given: Set[str], expected: Set[str]) -> None:
    """Raises RankingError if an answer does not have exactly one output per task of the model."""
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
      shape: [B], or [1, N]; a server that batches requests pads N to the longest of them, and the padding is dropped.

    Raises:
      RankingError: there are no outputs, one is not a float32 tensor of that shape, or a score is NaN or infinite.
    """
    if not response.outputs:
        raise wrong("the answer has no scores")
    return {task: _scores(response.outputs[task], task, shape) for task in sorted(response.outputs)}


def wrong(details: str) -> RankingError:
    """The error for an answer that cannot be used."""
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
    # Fewer values than elements: the last value is repeated.
    scores = np.full(count, tensor.float_val[-1], np.float32)
    filled = min(count, given)
    scores[:filled] = np.fromiter(itertools.islice(tensor.float_val, filled), np.float32, filled)
    return scores
