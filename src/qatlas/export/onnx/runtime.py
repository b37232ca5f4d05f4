"""onnxruntime, as a reader of our files. Optimizations are off: by default it fuses DequantizeLinear with the product behind it into kernels that
round activations to 8 bits, or that saturate where a chip lacks VNNI, and then it does not compute what the file says.

`answers` asks any engine. An engine is a module with a NAME, `why_not` (a sentence on why it cannot be asked about a file, or None) and `start`
(a model -> a function from inputs by name to outputs in order): this one, and openvino.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...core.error import FormatError

NAME = "onnxruntime"
Ask = Callable[[dict[str, Any]], list[Any]]


def why_not(path: str | Path) -> str | None:
    """It reads all that we write; without it `read` has failed before."""
    return None


def start(model: str | bytes, optimized: bool = False) -> Ask:
    """What runs a model: inputs by name -> outputs in order; also `.inputs`, their names."""
    runs = session(model, optimized)

    def ask(feed: dict[str, Any]) -> list[Any]:
        try:
            return list(runs.run(None, feed))
        except Exception as error:
            raise FormatError(f"onnxruntime cannot run {_called(model)}: {str(error).strip().splitlines()[0]}") from None

    ask.inputs = [given.name for given in runs.get_inputs()]  # type: ignore[attr-defined]
    return ask


def session(model: str | bytes, optimized: bool = False) -> Any:
    """An onnxruntime session on the CPU, one thread.

    Raises:
        FormatError: what onnxruntime cannot load, or the extra is missing.
    """
    try:
        import onnxruntime
    except ImportError:
        raise FormatError("reading ONNX needs onnxruntime, which is not installed: pip install 'qatlas[onnx]'") from None
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise FormatError(f"onnxruntime cannot load this file: {str(error).strip().splitlines()[0]}") from None


def _called(model: str | bytes) -> str:
    return model if isinstance(model, str) else "these weights"
