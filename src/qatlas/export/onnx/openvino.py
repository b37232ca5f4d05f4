"""OpenVINO, as a second reader and engine of the same file: it reads ONNX itself, keeps 4-bit and 8-bit constants as they are, and knows MatMulNBits.

It is asked to compute in fp32, exactly, and on one thread: INT8 and INT4 weights stay what they are, a QuantizeLinear stays one, the order of sums is
its own. It finds the code of an input by a product in place of a division: of 6.4 million normal numbers 32 get another code than ours. As it
comes it multiplies in 8 bits where it can, and computes in bf16 where the chip has it; logits then move by percents of the largest
(docs/results.md#onnx-in-two-engines), as onnxruntime's do with its optimizations.

INT2 it refuses ("Unsupported type"), so a file of `onnx:int2` is not asked about; the 2-bit MatMulNBits of `onnx:int2-matmulnbits` it reads, bit for
bit.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ...core.error import FormatError
from .runtime import Ask

NAME = "OpenVINO"
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
UNREAD = ("INT2", "UINT2")


def why_not(path: str | Path) -> str | None:
    """The sentence for a file that OpenVINO cannot be asked about, or None."""
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed: pip install 'qatlas[openvino]'"
    import onnx

    proto = onnx.load(str(path))
    small = {onnx.TensorProto.DataType.Name(t.data_type) for t in proto.graph.initializer} & set(UNREAD)
    if small:
        return f"OpenVINO reads no {' and no '.join(sorted(small))}; the targets int2-matmulnbits and int4 hold these weights in types that it reads"
    return None


def start(model: str | bytes, settings: dict[str, Any] | None = None) -> Ask:
    """What runs a model: inputs by name -> outputs in order; also `.inputs`, their names. settings: of the CPU plug-in, in place of SETTINGS.

    Raises:
        FormatError: what OpenVINO cannot load, or the extra is missing.
    """
    try:
        import openvino
    except ImportError:
        raise FormatError("OpenVINO is not installed: pip install 'qatlas[openvino]'") from None
    core = openvino.Core()
    try:
        compiled = core.compile_model(core.read_model(model), "CPU", SETTINGS if settings is None else settings)
    except Exception as error:
        raise FormatError(f"OpenVINO cannot load this file: {_said(error)}") from None

    def ask(feed: dict[str, Any]) -> list[Any]:
        try:
            found = compiled(feed)
        except Exception as error:
            raise FormatError(f"OpenVINO cannot run this file: {_said(error)}") from None
        return [found[i].copy() for i in range(len(compiled.outputs))]

    ask.inputs = [given.get_any_name() for given in compiled.inputs]  # type: ignore[attr-defined]
    return ask


def _said(error: Exception) -> str:
    """The last line is the reason, the others the places in OpenVINO's source."""
    return next(reversed([line.strip() for line in str(error).splitlines() if line.strip()]), type(error).__name__)
