"""One signature of a loaded version: ``{input: TensorProto}`` in, ``{output: array}`` out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, types_pb2
from tensorflow.core.protobuf import config_pb2, meta_graph_pb2

from export.server import tensors
from export.server.callables import Callables
from export.server.status import StatusError, invalid_argument

_METHODS = tuple(f"tensorflow/serving/{method}" for method in ("predict", "classify", "regress"))


class Signature:
    """``{input: TensorProto}`` in, ``{output: array}`` out."""

    def __init__(self, session: tf.compat.v1.Session, signature: meta_graph_pb2.SignatureDef) -> None:
        self._session = session
        self._method = signature.method_name
        self._feeds = {alias: info.name for alias, info in signature.inputs.items()}
        self._types = {alias: info.dtype for alias, info in signature.inputs.items()}
        # Numbers in "Expects arg[0] to be ..." are places among the sorted feed names.
        self._order = sorted(self._feeds, key=lambda alias: self._feeds[alias])
        self._fetches = {alias: info.name for alias, info in signature.outputs.items()}
        self._all = tuple(sorted(self._fetches))
        self._callable = Callables(self._make_callable, self._all)
        if self._method in _METHODS:
            self._callable(self._all)

    def __call__(
        self, inputs: Mapping[str, tensor_pb2.TensorProto], output_filter: Iterable[str]
    ) -> dict[str, np.ndarray]:
        if self._method not in _METHODS:
            raise StatusError(
                grpc.StatusCode.INTERNAL,
                "Expected prediction signature method_name to be one of "
                f"{{{', '.join(_METHODS)}}}. Was: {self._method}",
            )
        if len(inputs) != len(self._feeds):
            raise invalid_argument(_wrong_number(set(inputs), set(self._feeds)))
        arrays = []
        for alias in self._order:
            if alias not in inputs:
                raise invalid_argument(
                    f"Signature input alias: {alias}(feed name: {self._feeds[alias]}) not found in request and no "
                    f"default value provided. Inputs expected to be in the request {{{_names(inputs)}}}, "
                    "or default input alias set: "
                )
            try:
                arrays.append(tensors.decode(inputs[alias]))
            except ValueError as error:
                raise invalid_argument(f"tensor parsing error: {alias}") from error
        wanted = self._wanted(output_filter)
        for place, alias in enumerate(self._order):
            if inputs[alias].dtype != self._types[alias]:
                expected, sent = _type_name(self._types[alias]), _type_name(inputs[alias].dtype)
                raise invalid_argument(f"Expects arg[{place}] to be {expected} but {sent} is provided")
        try:
            return self._callable(wanted)(arrays)
        except tf.errors.OpError as error:
            raise StatusError(error.error_code, error.message) from error

    def prepare(self, before: Signature) -> None:
        """Builds what answers the sets of outputs that requests asked of ``before`` lately: none has to wait here."""
        if self._method in _METHODS:
            self._callable.prepare(before._callable.recent())

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
        """Feeds in ``self._order`` to ``outputs``, pruned to what these need."""
        fetches = list(dict.fromkeys(self._fetches[alias] for alias in outputs))
        options = config_pb2.CallableOptions(feed=[self._feeds[alias] for alias in self._order], fetch=fetches)
        # Session.make_callable with feeds is Session.run in disguise; this is the C++ callable.
        run = self._session._make_callable_from_options(options)
        places = {alias: fetches.index(self._fetches[alias]) for alias in outputs}

        def call(arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
            fetched = run(*arrays)
            return {alias: fetched[place] for alias, place in places.items()}

        return call


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
