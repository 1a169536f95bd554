"""Names of a package that are imported when they are used, so that importing the package costs nothing."""

import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazily(package: str, **homes: tuple[str, ...]) -> Callable[[str], Any]:
    """A package's `__getattr__` (PEP 562).

    Args:
        homes: names by the module under the package that has them; "__" stands for a dot.
    """
    where = {name: f"{package}.{module.replace('__', '.')}" for module, names in homes.items() for name in names}

    def __getattr__(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(where[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return __getattr__
