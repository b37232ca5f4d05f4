"""The shelf: one file a paper. Each has an essay, its atom if it has one, and one function with the file's name, whose arguments are its
configuration.

There is no registry: what is listed is what lies in this folder.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

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


def check(name: str, arguments: dict[str, Any], target: str | None = None) -> None:
    """Refuse what can be refused before a model is loaded: the paper begins, and is stopped where it first touches model or task.

    Raises:
        RunError: an argument that the paper does not have. QatlasError: whatever the paper says of a value.
    """
    function = paper(name)
    takes = inspect.signature(function).parameters
    for key in arguments:
        if key not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            raise RunError(f"{name}: " + unknown("argument", key, [p.name for p in takes.values() if p.kind is p.KEYWORD_ONLY]))
    absent = _Absent()
    absent.target = target
    try:
        function(absent, absent, **arguments)
    except _Touched:
        return


class _Touched(BaseException):
    """The paper has begun its work."""


class _Absent:
    """Stands for a model and a task that are not loaded yet; of the task only the target is known."""

    target: str | None

    def __getattr__(self, name: str) -> NoReturn:
        raise _Touched(name)
