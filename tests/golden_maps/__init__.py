"""The maps: one file for each file of vectors, with its name, and in it a function with that name again.

A map says which public parts of ours mean the same as a case, from the case's kind and parameters alone; it builds them, calls them, runs backward
and hands back named tensors. It computes nothing itself, so what is compared is what a user gets. None says that no public part covers the case yet.
`LACKS` in a map's file names outputs that are an author's own form of what is compared elsewhere; every other output of a case must be answered.

There is no registry: what is listed is what lies in this folder.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable

from golden_cases import Answer, Case


def names() -> list[str]:
    """The files of vectors that have a map."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def map_of(file: str) -> Callable[[Case], Answer]:
    return getattr(importlib.import_module(f"{__name__}.{file}"), file)


def lacks(file: str) -> set[str]:
    return getattr(importlib.import_module(f"{__name__}.{file}"), "LACKS", set())
