"""ONNX: the whole computation in one file, for onnxruntime, OpenVINO, TensorRT and what else reads ONNX. Targets int8, int4, int2, each -matmulnbits
and each -weights.

    fitting.py             which Quants and QTensors an integer type holds exactly
    weights.py             a QTensor as integers and a DequantizeLinear
    nbits.py               a matrix as MatMulNBits
    signals.py             a quantizer of activations as QuantizeLinear and DequantizeLinear
    file.py                write, read
    asked.py               what an engine computes: runtime.py (onnxruntime), openvino.py

A tensor lies in the smallest type, of those that the target allows, that holds all values of its grid:

    int8, int8-weights     8 bits; opset 21
    int4, int4-weights     4 or 8 bits; opset 21. A head or an embedding of 8 bits stands beside a body of 4
    int2, int2-weights     2, 4 or 8 bits; opset 25, which few engines read (onnxruntime does, OpenVINO refuses it)
    int4-matmulnbits       the same numbers; products with a matrix as MatMulNBits, what does not become one as above in 4 or 8 bits. Also int8-,
                           int2-, and -matmulnbits-weights. Opset 21, also for 2 bits

Activations need one static step a tensor, learned or calibrated: a constant of the file. A step that each token has for itself is refused. The
targets that end in -weights leave the quantizers of activations out: the file then computes what the trained weights compute with inputs in full
precision, and its metadata lists what it lacks (`qatlas.left_out`).

The weights that a reader gets from DequantizeLinear are `QTensor.dequantize()`, bit for bit. What onnxruntime then computes is close, not equal: sums
run in another order, and where an activation lies within the last bit of a tie it falls on the other side. By default onnxruntime also fuses
DequantizeLinear and MatMul into kernels that round the activations to 8 bits, or that saturate on chips without VNNI; `answers` and our proofs
switch optimizations off. MatMulNBits says itself how exact it wants to be.

The same file is put to each of ENGINES, onnxruntime and (extra `openvino`) OpenVINO: both give the weights bit for bit, and their logits are compared
with ours. There is no format `openvino`: what it runs is this file, so a second writer would prove nothing more.
"""

from . import openvino, runtime
from .asked import answers
from .file import plan, read, types, unused, write
from .fitting import OPSETS, TARGETS, fit, why_not, why_not_signal

SUFFIX = "onnx"
ENGINES = (runtime, openvino)

__all__ = ["ENGINES", "OPSETS", "SUFFIX", "TARGETS", "answers", "fit", "plan", "read", "types", "unused", "why_not", "why_not_signal", "write"]
