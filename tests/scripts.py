"""A file of runs/ as a module."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


def script(name: str) -> ModuleType:
    """runs/<name>.py, executed anew."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "runs" / f"{name}.py")
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))      # dataclasses and transformers look there
    spec.loader.exec_module(module)
    return module
