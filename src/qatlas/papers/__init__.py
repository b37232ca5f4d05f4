"""The shelf: one file a paper. Each has an essay, its atom if it has one, and one function with the file's name, whose arguments are its
configuration.

There is no registry: what is listed is what lies in this folder.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..core.error import RunError, unknown


def names() -> list[str]:
    """The papers there are.

    >>> "lsq" in names()
    True
    """
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def module(name: str) -> ModuleType:
    """A paper's file.

    Raises:
        RunError: no such paper, with the nearest names.
    """
    if name not in names():
        raise RunError(unknown("paper", name, names()))
    return importlib.import_module(f"{__name__}.{name}")


def paper(name: str) -> Callable[..., Any]:
    """A paper's function."""
    return getattr(module(name), name)
