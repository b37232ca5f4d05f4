"""ONNX: the whole computation in one file, for onnxruntime, OpenVINO, TensorRT and what else reads ONNX. Targets int8, int4, int2, and each -weights.

    fitting.py             which Quants and QTensors an integer type holds exactly
    weights.py             a QTensor as integers and a DequantizeLinear
    signals.py             a quantizer of activations as QuantizeLinear and DequantizeLinear
    file.py                write, read
    runtime.py             ask onnxruntime

A tensor lies in the smallest type, of those that the target allows, that holds all values of its grid:

    int8, int8-weights     8 bits; opset 21
    int4, int4-weights     4 or 8 bits; opset 21. A head or an embedding of 8 bits stands beside a body of 4
    int2, int2-weights     2, 4 or 8 bits; opset 25, which few engines read (onnxruntime does, OpenVINO refuses it)

Activations need one static step a tensor, learned or calibrated: a constant of the file. A step that each token has for itself is refused. The
targets that end in -weights leave the quantizers of activations out: the file then computes what the trained weights compute with inputs in full
precision, and its metadata lists what it lacks (`qatlas.left_out`).

The weights that a reader gets from DequantizeLinear are `QTensor.dequantize()`, bit for bit. What onnxruntime then computes is close, not equal: sums
run in another order, and where an activation lies within the last bit of a tie it falls on the other side. By default onnxruntime also fuses
DequantizeLinear and MatMul into kernels that round the activations to 8 bits, or that saturate on chips without VNNI; `answers` and our proofs
switch optimizations off.
"""

from .file import plan, read, unused, write
from .fitting import OPSETS, TARGETS, fit, why_not, why_not_signal
from .runtime import answers

SUFFIX = "onnx"

__all__ = ["OPSETS", "SUFFIX", "TARGETS", "answers", "fit", "plan", "read", "unused", "why_not", "why_not_signal", "write"]
