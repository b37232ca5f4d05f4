"""ExecuTorch: placeholder."""

from . import runtime
from .file import answers, plan, read, types, unused, write
from .fitting import TARGETS, fit, fit_input, why_not
from .runtime import lacks

SUFFIX = "pte"
ENGINES = (runtime,)
TRACED = True

__all__ = ["ENGINES", "SUFFIX", "TARGETS", "TRACED", "answers", "fit", "fit_input", "lacks", "plan", "read", "types", "unused", "why_not", "write"]
