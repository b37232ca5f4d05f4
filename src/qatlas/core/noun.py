"""Noun: a frozen dataclass that goes to JSON and back.

Grid, Grain, Scale, Estimator, Quant, Rule and the transforms are values: equal when their fields are equal, never changed in place, and written into
every checkpoint and record. The JSON names the class as `module:Class` without the leading `qatlas.`; reading imports only from qatlas itself, or
finds a class in a module that the user has already imported. A checkpoint can therefore never cause foreign code to be imported.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from typing import Any, TypeVar

from .error import CheckpointError

N = TypeVar("N", bound="Noun")
MOVED = {"core.grid:Float": "core.floats:Float", "papers.bitnet:Centred": "core.centred:Centred",
         "papers.pb_llm:Partial": "core.partial:Partial"}         # where files of before look for what moved


class Noun:
    """Mixin for frozen dataclasses: `to_json`, `from_json`, `but`."""

    def to_json(self) -> dict[str, Any]:
        """A dict of plain values. Fields at their default are left out."""
        module = type(self).__module__.removeprefix("qatlas.")
        out: dict[str, Any] = {"is": f"{module}:{type(self).__name__}"}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not _is_default(field, value):
                out[field.name] = _plain(value)
        return out

    def but(self: N, **changes: Any) -> N:
        """The same noun with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def from_json(data: Any) -> Any:
    """The inverse of `Noun.to_json`; lists and plain values pass through.

    Raises:
        CheckpointError: a class that is not a Noun, or a module that is neither ours nor imported already.
    """
    if isinstance(data, list):
        return tuple(from_json(item) for item in data)
    if not isinstance(data, dict) or "is" not in data:
        return data
    cls = _find(data["is"])
    fields = {field.name for field in dataclasses.fields(cls)}
    extra = set(data) - fields - {"is"}
    if extra:
        raise CheckpointError(f"{data['is']} has no field {', '.join(sorted(extra))}; it has {', '.join(sorted(fields))}. Written by a newer qatlas?")
    lacking = [f.name for f in dataclasses.fields(cls) if f.name not in data and f.default is f.default_factory is dataclasses.MISSING]
    if lacking:
        raise CheckpointError(f"{data['is']} lacks {', '.join(lacking)}")
    return cls(**{key: from_json(value) for key, value in data.items() if key != "is"})


def _find(address: str) -> Any:
    name, _, cls_name = MOVED.get(str(address), str(address)).partition(":")
    ours = f"qatlas.{name}"
    try:
        module: Any = sys.modules.get(ours) or importlib.import_module(ours)
    except ImportError:
        module = sys.modules.get(name)
    cls = getattr(module, cls_name, None)
    if not (isinstance(cls, type) and issubclass(cls, Noun) and dataclasses.is_dataclass(cls)):
        raise CheckpointError(f"the file names {address!r}, no part of qatlas nor of a module imported so far; import the paper's file first")
    return cls


def _is_default(field: dataclasses.Field, value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return bool(value == field.default_factory())
    return field.default is not dataclasses.MISSING and type(value) is type(field.default) and bool(value == field.default)


def _plain(value: Any) -> Any:
    if isinstance(value, Noun):
        return value.to_json()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
