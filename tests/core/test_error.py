"""Errors: one family, and sentences that name what is near."""

from __future__ import annotations

import inspect

from qatlas.core import error
from qatlas.core.error import QatlasError, nearest, unknown


def test_one_family() -> None:
    kinds = [cls for _, cls in inspect.getmembers(error, inspect.isclass) if issubclass(cls, Exception)]
    assert len(kinds) >= 7
    for cls in kinds:
        assert issubclass(cls, QatlasError) and cls.__doc__ and cls.__module__ == "qatlas.core.error"


def test_nearest_and_unknown() -> None:
    known = ["gguf:q4_0", "gguf:q8_0", "onnx", "gptq"]
    assert nearest("gguf:q4_1", known)[0] == "gguf:q4_0"
    assert nearest("zzz", known) == []
    said = unknown("target", "gguf:q4", known)
    assert said.startswith("there is no target 'gguf:q4'; nearest: gguf:q4_0") and "all: gguf:q4_0, gguf:q8_0, gptq, onnx" in said
    assert "none is close" in unknown("target", "zzz", iter(known))
