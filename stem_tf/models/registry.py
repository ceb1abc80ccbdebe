"""The models by name: each is registered where its class is defined, in this package or in a module of your own."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from stem_tf.configs.base import Key
from stem_tf.models.hyperparameters import Hyperparameters
from stem_tf.models.network import Network
from stem_util.errors import UserError

_N = TypeVar("_N", bound=type[Network])


@dataclass(frozen=True)
class Model:
    """A registered model.

    Attributes:
      name: the value of ``config.model.name``.
      what: the model in a few words.
      network: its class.
    """

    name: str
    what: str
    network: type[Network]

    @functools.cached_property
    def keys(self) -> dict[str, Key]:
        """Its config keys by name, without ``model.``: the fields that :func:`hyperparameter` made."""
        fields = dataclasses.fields(self.network.Hyperparameters)
        return {field.name: field.metadata["key"] for field in fields if "key" in field.metadata}

    def hyperparameters(self, values: Mapping[str, Any], fields: int = 1) -> Hyperparameters:
        """Those of a flat config ``{"model.tower_units": (64,), ...}``, for data with so many features."""
        return self.network.Hyperparameters(**{name: values[f"model.{name}"] for name in self.keys}, fields=fields)


_REGISTERED: dict[str, Model] = {}


def register(name: str, what: str) -> Callable[[_N], _N]:
    """Makes a :class:`Network` the model ``config.model.name=<name>``, which --help describes by ``what``.

    The class has an attribute ``Hyperparameters``, a frozen dataclass whose fields are the model's config keys. A name
    may be registered again by the same class only, as when a notebook runs a cell twice.

    Raises:
      UserError: the name is another model's.
    """

    def add(network: _N) -> _N:
        known = _REGISTERED.get(name)
        if known is not None and _place(known.network) != _place(network):
            raise UserError(f"a model '{name}' is registered by {_place(known.network)} and by {_place(network)}")
        _REGISTERED[name] = Model(name, what, network)
        return network

    return add


def models(module: str = "") -> dict[str, Model]:
    """The models of this package, and those that ``module`` has.

    Raises:
      UserError: the module cannot be imported, or has no model of its own.
    """
    shipped = _shipped()
    if not module:
        return shipped
    inside = vars(_imported(module)).values()
    own = {
        name: model
        for name, model in _REGISTERED.items()
        if name not in shipped and any(model.network is value for value in inside)
    }
    if not own:
        raise UserError(
            f"config.model.module={module} registers no model: put @register(name, what it is) of "
            f"{__name__} above a Network there"
        )
    return shipped | own


def _shipped() -> dict[str, Model]:
    import stem_tf.models as package

    names = [found.name for found in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    for module in names:
        importlib.import_module(module)
    # By file: the order in which they were first imported is arbitrary.
    return {
        name: model for module in names for name, model in _REGISTERED.items() if model.network.__module__ == module
    }


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:  # whatever the user's own module raises
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"config.model.module={module}: there is no module '{error.name}'; it should be a name that Python can "
                "import, as in my_team.my_model: install it, or put the directory that it lies in on PYTHONPATH"
            ) from error
        raise UserError(
            f"config.model.module={module} cannot be imported: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error


def _place(network: type[Network]) -> str:
    return f"{network.__module__}.{network.__qualname__}"
