"""Every part of the library, found by listing: a new part is tested by existing."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType
from typing import Any

import qatlas
from qatlas.core.codebook import IQ4_NL, NF4
from qatlas.core.floats import Float
from qatlas.core.grain import Block, Group, PerChannel, PerTensor
from qatlas.core.grid import Uniform
from qatlas.core.noun import Noun
from qatlas.core.quantizer import Quant
from qatlas.core.scale import AbsMax
from qatlas.core.transform import Hadamard, Permute

# What a field takes where it has no default. A part whose first field is of a new name adds one here, or gives the field a default.
FIRST = {"bits": 4, "levels": 4, "size": 8, "rows": 2, "cols": 4, "grid": Uniform(4), "weight": Quant(Uniform(4)), "start": AbsMax(), "where": "*",
         "table": (-1.0, -0.25, 0.0, 0.5)}
# More than one of a kind, where a field changes what the part is.
MORE: dict[str, list[dict[str, Any]]] = {
    "Uniform": [{"bits": b, "signed": s} for b in (1, 2, 3, 8) for s in (True, False)] + [{"bits": 4, "narrow": True}],
    "HalfStep": [{"bits": b} for b in (1, 2, 8)],
    "Stretched": [{"levels": n} for n in (2, 3, 16)],
    "Ternary": [{"threshold": 0.7}],
    "Float": [{"exponent": 4, "mantissa": 3}, {"exponent": 3, "mantissa": 2}],
    "Codebook": [{"table": IQ4_NL.table}, {"table": NF4.table}, {"table": (-1.0, 0.0)}],
    "PerChannel": [{"axis": -1}],
    "MinMax": [{"zero": "offset"}, {"zero": "offset", "offset_dtype": "float16"},
               {"zero": "offset", "nested": Quant(Uniform(6, False), PerTensor(), AbsMax()),
                "offset_nested": Quant(Uniform(6, False), PerTensor(), AbsMax())}],
    "AbsMax": [{"reach": 127.5}, {"dtype": "float16"}, {"dtype": "float8_e8m0fnu"}, {"nested": Quant(Uniform(6, False), PerTensor(), AbsMax())},
               {"nested": Quant(Float(4, 3), PerTensor(), AbsMax())}],
    "AbsMean": [{"times": 2.0, "per_root": True}, {"inverse": True}],
    "Clip": [{"margin": 0.5}, {"at": 0.99}],
    "Hadamard": [{"seed": 1}, {"block": 4}, {"most": 8}],
    "Chain": [{"parts": (Permute(), Hadamard())}],
    "Quant": [{"grid": Uniform(2), "grain": Group(32), "refit": True}, {"grid": Uniform(2), "grain": Block(2, 4)},
              {"grid": Uniform(2), "grain": PerChannel(1)}],
}


@lru_cache
def modules() -> list[ModuleType]:
    """All modules of qatlas that can be imported here (an extra may be missing), the command line left out. That none of
    ours is missing, tests/test_imports.py sees to."""
    found = []
    for info in pkgutil.walk_packages(qatlas.__path__, "qatlas."):
        if info.name.endswith(("__main__", ".cli")):
            continue
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(info.name))
    return found


def classes(kind: type) -> Iterator[type]:
    """The concrete classes below `kind`, each once, from the module that defines it."""
    for module in modules():
        for name, cls in sorted(inspect.getmembers(module, inspect.isclass)):
            if cls.__module__ == module.__name__ and issubclass(cls, kind) and cls is not kind and not name.startswith("_") and not abstract(cls):
                yield cls


def abstract(cls: type) -> bool:
    """Whether it is an interface: a method or property of its own raises NotImplementedError."""
    own = [getattr(member, "fget", member) for member in vars(cls).values()]
    return any("NotImplementedError" in member.__code__.co_names for member in own if inspect.isfunction(member))


def make(cls: type, **fields: Any) -> Any:
    """One of a class, fields without default from FIRST."""
    needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.init}
    unknown = needed - set(fields) - set(FIRST)
    assert not unknown, f"{cls.__module__}.{cls.__name__} has fields without default that tests/parts.py does not know: {sorted(unknown)}"
    return cls(**{name: FIRST[name] for name in needed - set(fields)}, **fields)


def every(kind: type) -> list[Any]:
    """One or more of each concrete class of a kind."""
    return [make(cls, **fields) for cls in classes(kind) for fields in ({}, *MORE.get(cls.__name__, []))]


def nouns() -> list[Any]:
    """One or more of every noun."""
    return [noun for noun in every(Noun) if dataclasses.is_dataclass(noun)]
