"""The methods by name, and how a config becomes one.

Every module of this package that defines a `Method` takes part, and so does every entry point of the group
`frepa.methods` of an installed package: a new method is one file, and nothing else is touched.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Union

import torch
from pydantic import Field

import frepa_dist.methods
from frepa_dist.methods.base import Method, MethodSettings

ENTRY_POINTS = "frepa.methods"


def _find_methods() -> dict[str, type[Method]]:
    package = frepa_dist.methods
    modules = [
        importlib.import_module(f"{package.__name__}.{found.name}")
        for found in pkgutil.iter_modules(package.__path__)
        if found.name != "registry"
    ]
    classes = [
        member
        for module in modules
        for member in vars(module).values()
        if inspect.isclass(member) and issubclass(member, Method) and not inspect.isabstract(member)
    ]
    classes += [point.load() for point in entry_points(group=ENTRY_POINTS)]
    methods: dict[str, type[Method]] = {}
    for method in dict.fromkeys(classes):
        other = methods.setdefault(method.name, method)
        assert other is method, f"two methods have the name {method.name}: {other}, {method}"
    return methods


METHODS = _find_methods()

if TYPE_CHECKING:
    MethodConfig = MethodSettings
else:
    MethodConfig = Annotated[
        Union[tuple(method.config_class for _, method in sorted(METHODS.items()))],  # noqa: UP007
        Field(discriminator="name"),
    ]


def create_method(config: MethodSettings, compute_dtype: torch.dtype = torch.float32) -> Method:
    """Create the method that a config names; see `Method` for the arguments.

    Raises:
        ConfigError: the settings contradict each other.
    """
    return METHODS[config.name](config, compute_dtype)
