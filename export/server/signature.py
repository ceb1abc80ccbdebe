"""One signature of a loaded version: ``{input: TensorProto}`` in, ``{output: array}`` out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2

from export.server import tensors
from export.server.callables import Callables
from export.server.limits import Limits
from export.server.status import StatusError, invalid_argument

_METHODS = tuple(f"tensorflow/serving/{method}" for method in ("predict", "classify", "regress"))


class Feeds(NamedTuple):
    """A request that was read.

    Attributes:
      arrays: the inputs, in the order of :attr:`Signature.order`.
      wanted: the sorted outputs that it asks for.
      axes: the sizes of the axes of scores: ``(B,)``, or ``(B, N)`` for ``rank``; None if the inputs disagree or the
        signature does not tell.
    """

    arrays: list[np.ndarray]
    wanted: tuple[str, ...]
    axes: tuple[int, ...] | None


class Signature:
    """One signature in a session.

    Args:
      session: holds the loaded graph.
      definition: of the signature.
      axes: how many axes each input shares with the scores, by alias: 1 for ``[B, ...]``, 2 for ``[B, N, ...]``. Rows
        then do not depend on each other, so calls can be joined and cut along these axes. None for a model of
        which this is not known.

    Attributes:
      order: aliases of the inputs; "Expects arg[0] to be ..." counts in this order.
      axes: as above.
    """

    def __init__(
        self,
        session: tf.compat.v1.Session,
        definition: meta_graph_pb2.SignatureDef,
        axes: Mapping[str, int] | None = None,
    ) -> None:
        self._session = session
        self._method = definition.method_name
        self._feeds = {alias: info.name for alias, info in definition.inputs.items()}
        self._types = {alias: info.dtype for alias, info in definition.inputs.items()}
        self.order = tuple(sorted(self._feeds, key=lambda alias: self._feeds[alias]))
        self.axes = None if axes is None else tuple(axes[alias] for alias in self.order)
        self._fetches = {alias: info.name for alias, info in definition.outputs.items()}
        self._all = tuple(sorted(self._fetches))
        self._callable = Callables(self._make_callable, self._all)
        if self._method in _METHODS:
            self._callable(self._all)

    def read(self, inputs: Mapping[str, tensor_pb2.TensorProto], output_filter: Iterable[str], limits: Limits) -> Feeds:
        """Reads the arrays of a request.

        Raises:
          StatusError: as TensorFlow Serving answers; INVALID_ARGUMENT if the request is beyond ``limits``.
        """
        if self._method not in _METHODS:
            raise StatusError(
                grpc.StatusCode.INTERNAL,
                "Expected prediction signature method_name to be one of "
                f"{{{', '.join(_METHODS)}}}. Was: {self._method}",
            )
        if len(inputs) != len(self._feeds):
            raise invalid_argument(_wrong_number(set(inputs), set(self._feeds)))
        shapes = {}
        for alias in self.order:
            if alias not in inputs:
                raise invalid_argument(
                    f"Signature input alias: {alias}(feed name: {self._feeds[alias]}) not found in request and no "
                    f"default value provided. Inputs expected to be in the request {{{_names(inputs)}}}, "
                    "or default input alias set: "
                )
            try:
                shapes[alias] = tensors.shape_of(inputs[alias])
            except ValueError as error:
                raise invalid_argument(f"tensor parsing error: {alias}") from error
        axes = self._shared_axes(shapes)
        _check(shapes, axes, limits)
        arrays = []
        for alias in self.order:
            try:
                arrays.append(tensors.decode(inputs[alias], limits.elements))
            except ValueError as error:
                raise invalid_argument(f"tensor parsing error: {alias}") from error
        wanted = self._wanted(output_filter)
        for place, alias in enumerate(self.order):
            if inputs[alias].dtype != self._types[alias]:
                expected, sent = _type_name(self._types[alias]), _type_name(inputs[alias].dtype)
                raise invalid_argument(f"Expects arg[{place}] to be {expected} but {sent} is provided")
        return Feeds(arrays, wanted, axes)

    def run(self, arrays: list[np.ndarray], wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Computes the outputs ``wanted`` from the inputs ``arrays``.

        Raises:
          StatusError: TensorFlow's error.
        """
        try:
            return self._callable(wanted)(arrays)
        except tf.errors.OpError as error:
            raise StatusError(error.error_code, error.message) from error
        except UnicodeDecodeError as error:
            # The error quotes bytes of the request that are not UTF-8: Python cannot make an exception from its text.
            raise invalid_argument(error.object.decode("utf-8", "backslashreplace")) from None

    def prepare(self, before: Signature) -> None:
        """Builds the sets of outputs that requests used in ``before`` lately, so that no request waits for it."""
        if self._method in _METHODS:
            self._callable.prepare(before._callable.recent())

    def _shared_axes(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
        """The sizes of the scores' axes, if all inputs agree."""
        if self.axes is None:
            return None
        longest: tuple[int, ...] = ()
        for shape, axes in zip(shapes.values(), self.axes, strict=True):
            if len(shape) < axes:
                return None
            longest = max(longest, shape[:axes], key=len)
        same = all(shape[:axes] == longest[:axes] for shape, axes in zip(shapes.values(), self.axes, strict=True))
        return longest if same else None

    def _wanted(self, output_filter: Iterable[str]) -> tuple[str, ...]:
        seen: set[str] = set()
        for alias in output_filter:
            if alias not in self._fetches:
                raise invalid_argument(
                    f"output tensor alias not found in signature: {alias} Outputs expected to be in the set "
                    f"{{{_names(self._fetches)}}}."
                )
            if alias in seen:
                raise invalid_argument(f"duplicate output tensor alias: {alias}")
            seen.add(alias)
        return tuple(sorted(seen)) or self._all

    def _make_callable(self, outputs: tuple[str, ...]) -> Callable[[list[np.ndarray]], dict[str, np.ndarray]]:
        """A callable from feeds in ``self.order`` to ``outputs``, which runs only what these need."""
        fetches = list(dict.fromkeys(self._fetches[alias] for alias in outputs))
        options = config_pb2.CallableOptions(feed=[self._feeds[alias] for alias in self.order], fetch=fetches)
        # Session.make_callable with feeds only wraps Session.run; this is the C++ callable.
        run = self._session._make_callable_from_options(options)
        places = {alias: fetches.index(self._fetches[alias]) for alias in outputs}

        def call(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
            fetched = run(*arrays)
            return {alias: fetched[place] for alias, place in places.items()}

        return call


def _check(shapes: Mapping[str, tuple[int, ...]], axes: tuple[int, ...] | None, limits: Limits) -> None:
    """Raises StatusError for a request beyond its limits."""
    for alias, shape in shapes.items():
        rows = math.prod(axes) if axes is not None else shape[0] if shape else 0
        if rows > limits.rows:
            raise invalid_argument(
                f"{alias} has shape {list(shape)}: the request has {rows} rows, and this server takes {limits.rows} "
                "(--max_rows); send several requests"
            )
    elements = sum(math.prod(shape) for shape in shapes.values())
    if elements > limits.elements:
        largest = max(shapes, key=lambda alias: math.prod(shapes[alias]))
        raise invalid_argument(
            f"the request has {elements} elements, the most in {largest} {list(shapes[largest])}, and this server "
            f"takes {limits.elements} (--max_elements); send several requests"
        )


def _names(names: Iterable[str]) -> str:
    return ",".join(sorted(names))


def _type_name(number: int) -> str:
    """TensorFlow's C++ name of a type: ``float``, not ``float32``."""
    return types_pb2.DataType.Name(number).removeprefix("DT_").lower()


def _wrong_number(sent: set[str], expected: set[str]) -> str:
    return (
        f"input size does not match signature: {len(sent)}!={len(expected)} "
        f"len({{{_names(sent)}}}) != len({{{_names(expected)}}}). "
        f"Sent extra: {{{_names(sent - expected)}}}. Missing but required: {{{_names(expected - sent)}}}."
    )
